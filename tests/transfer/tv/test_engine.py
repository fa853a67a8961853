"""The embedded engine against Detectron2's own model, and its promises: refusals, exact resume, category
ids."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from pycocotools import mask as rle
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet50

from rsa_detectron2.common.config import CONFIGS
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import train_net
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES, tensor_shapes
from rsa_detectron2.transfer.convert.writers import convert, detectron2_name
from rsa_detectron2.transfer.data.annotations import dataset_name, load_dataset
from rsa_detectron2.transfer.data.average_precision import coco_ap
from rsa_detectron2.transfer.data.coco import CocoInstances
from rsa_detectron2.transfer.report import run_folder
from rsa_detectron2.transfer.tv import engine, trainer, weights
from tests.transfer.report.test_run_folder import full_after
from tests.transfer.tv.conftest import CATEGORIES

BASE = str(CONFIGS / "transfer" / "base_mask_rcnn_R50_FPN.yaml")
RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]


def config(coco="", folder="", *overrides):
    """The recipe, cut down to seconds: narrow heads, few proposals, sides of 64 to 80 pixels."""
    cfg = torchvision_defaults()
    cfg.merge_from_file(BASE)
    cfg.merge_from_list(
        [
            "MODEL.DEVICE",
            "cpu",
            "MODEL.WEIGHTS",
            "",
            "MODEL.FPN.OUT_CHANNELS",
            32,
            "MODEL.ROI_HEADS.NUM_CLASSES",
            3,
            "MODEL.ROI_BOX_HEAD.CONV_DIM",
            32,
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            64,
            "MODEL.ROI_MASK_HEAD.CONV_DIM",
            32,
            "MODEL.ANCHOR_GENERATOR.SIZES",
            [[8], [16], [32], [48], [64]],
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            16,
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
            50,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            30,
            "MODEL.RPN.POST_NMS_TOPK_TEST",
            20,
            "INPUT.MIN_SIZE_TRAIN",
            (64, 80),
            "INPUT.MIN_SIZE_TEST",
            64,
            "DATASETS.TRAIN",
            (coco,),
            "DATASETS.TEST",
            (coco,),
            "OUTPUT_DIR",
            str(folder),
            "DATALOADER.NUM_WORKERS",
            0,
            "SOLVER.IMS_PER_BATCH",
            2,
            "SOLVER.BASE_LR",
            0.01,
            "SOLVER.WARMUP_ITERS",
            2,
            "TEST.PRECISE_BN.ENABLED",
            False,
            *overrides,
        ]
    )
    return cfg


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.RESNETS.DEPTH", 77),
        ("MODEL.BACKBONE.FREEZE_AT", 6),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.FPN.NORM", "GN"),
        ("MODEL.RPN.IN_FEATURES", ["res4"]),
        ("DATASETS.TEST", ()),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128, 256, 512]]),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", 0),
    ],
)
def test_refuses_what_it_cannot_honor(key, value):
    with pytest.raises(InputError, match=key) as error:
        engine.train(config("", "", key, value))
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_refuses_a_wrong_number_of_classes(coco, tmp_path):
    with pytest.raises(InputError, match="3 categories.*NUM_CLASSES is 80"):
        engine.train(config(coco, tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", 80))


def test_refuses_an_image_of_another_size(coco):
    data = CocoInstances(load_dataset(coco), training=True)
    data.images[10] = {**data.images[10], "width": 81}
    with pytest.raises(InputError, match="0.png"):
        data[0, False]


def test_targets(coco):
    data = CocoInstances(load_dataset(coco), training=True)
    assert data.ids == [10, 11, 12, 13] and data.categories == CATEGORIES
    image, target = data[1, False]
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 80)
    assert target["labels"].tolist() == [1, 2, 3] and target["boxes"][0].tolist() == [4, 9, 24, 39]
    for label, box, mask in zip(target["labels"], target["boxes"].int(), target["masks"]):
        inside = torch.zeros(64, 80, dtype=torch.bool)
        inside[box[1] : box[3], box[0] : box[2]] = True
        assert torch.equal(mask.bool(), inside)
        assert torch.equal(image[label - 1] == 250, inside)

    mirrored, flipped = data[1, True]
    assert torch.equal(mirrored, image.flip(-1)) and torch.equal(flipped["masks"], target["masks"].flip(-1))
    assert flipped["boxes"][0].tolist() == [56, 9, 76, 39]


def test_batches_are_a_function_of_seed_and_iteration(coco):
    cfg = config(coco)
    data = CocoInstances(load_dataset(coco), training=True)

    def draw(start, stop):
        batches = trainer.training_batches(cfg, data, start, stop, "cpu")
        return [(torch.stack(images), torch.rand(3)) for images, _ in batches]

    whole = draw(0, 4)
    for (images, noise), (images_again, noise_again) in zip(whole[2:], draw(2, 4)):
        assert torch.equal(images, images_again) and torch.equal(noise, noise_again)
    epoch = torch.cat([images for images, _ in whole[:2]])  # each of the four images once, flipped or not
    assert len({image.sum().item() for image in epoch}) == 4
    cfg.SEED = 5
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(whole, draw(0, 4)))


def detectron2_model(cfg):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    theirs = get_cfg()
    theirs.merge_from_file(BASE)
    theirs.MODEL.DEVICE, theirs.MODEL.ROI_HEADS.NUM_CLASSES = "cpu", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return build_model(theirs)


def test_equals_detectron2_part_by_part():
    cfg = torchvision_defaults()
    cfg.merge_from_file(BASE)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    theirs, ours = detectron2_model(cfg).eval(), engine.build_model(cfg).eval()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    fpn = count(theirs.backbone) - count(theirs.backbone.bottom_up)
    assert count(ours.backbone.body) == count(theirs.backbone.bottom_up)
    assert count(ours.backbone.fpn) == fpn
    assert count(ours.rpn.head) == count(theirs.proposal_generator.rpn_head)
    assert count(ours.roi_heads.box_head) == count(theirs.roi_heads.box_head)
    # The outputs of the background: one box of 4 numbers from 1024 features, one mask from 256
    # channels, and biases.
    assert count(ours.roi_heads.box_predictor) == count(theirs.roi_heads.box_predictor) + 4 * (1024 + 1)
    masks = count(ours.roi_heads.mask_head) + count(ours.roi_heads.mask_predictor)
    assert masks == count(theirs.roi_heads.mask_head) + 256 + 1

    # Every layer that Detectron2 also has starts with the same spread.
    pairs = [
        (ours.roi_heads.box_predictor.cls_score, theirs.roi_heads.box_predictor.cls_score),
        (ours.roi_heads.box_predictor.bbox_pred, theirs.roi_heads.box_predictor.bbox_pred),
        (ours.roi_heads.mask_predictor.conv5_mask, theirs.roi_heads.mask_head.deconv),
        (ours.roi_heads.mask_predictor.mask_fcn_logits, theirs.roi_heads.mask_head.predictor),
        (ours.roi_heads.box_head[5], theirs.roi_heads.box_head.fc1),
        (ours.roi_heads.box_head[0][0], theirs.roi_heads.box_head.conv1),
        (ours.roi_heads.mask_head[0][0], theirs.roi_heads.mask_head.mask_fcn1),
        (ours.backbone.fpn.inner_blocks[0][0], theirs.backbone.fpn_lateral2),
        (ours.rpn.head.conv[0][0], theirs.proposal_generator.rpn_head.conv),
        (ours.backbone.body.conv1, theirs.backbone.bottom_up.stem.conv1),
    ]
    for ours_layer, theirs_layer in pairs:
        assert ours_layer.weight.std().item() == pytest.approx(theirs_layer.weight.std().item(), rel=0.15)
        assert (ours_layer.bias is None) == (theirs_layer.bias is None)
        assert ours_layer.bias is None or not ours_layer.bias.any()

    # With the same weights, the features of every level are the same.
    body = {
        detectron2_name(k): v for k, v in ours.backbone.body.state_dict().items() if "num_batches" not in k
    }
    state = {f"bottom_up.{name}": tensor for name, tensor in body.items()}
    for kind, name in (("inner_blocks", "fpn_lateral"), ("layer_blocks", "fpn_output")):
        for i, (conv, norm) in enumerate(getattr(ours.backbone.fpn, kind)):
            state[f"{name}{i + 2}.weight"] = conv.weight
            state.update({f"{name}{i + 2}.norm.{key}": value for key, value in norm.state_dict().items()})
    missing, unexpected = theirs.backbone.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        got, wanted = ours.backbone(image), theirs.backbone(image)
    assert len(got) == len(wanted) == 5
    for ours_map, theirs_map in zip(got.values(), wanted.values()):
        assert (ours_map - theirs_map).norm() <= 1e-4 * theirs_map.norm()


@pytest.mark.parametrize("protocol", ["infomin", "moco"])
def test_a_detector_of_detectron2_arrives(tmp_path, protocol):
    """Part by part, the outputs are those of Detectron2's own model."""
    model = pytest.importorskip("detectron2.modeling")
    cfg, theirs = torchvision_defaults(), pytest.importorskip("detectron2.config").get_cfg()
    for each in (cfg, theirs):
        each.merge_from_file(BASE)
        if protocol == "moco":
            each.merge_from_file(str(CONFIGS / "transfer" / "protocol_moco.yaml"))
        each.merge_from_list([*RESNET18, "MODEL.ROI_HEADS.NUM_CLASSES", 5, "MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    theirs = model.build_model(theirs).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save({"model": theirs.state_dict(), "iteration": 9}, tmp_path / "model_final.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_2017_val",)
    ours = engine.build_model(cfg).eval()
    assert weights.load_start(cfg, ours)["method"] == "detector"
    regions, masks = torch.rand(3, 256, 7, 7), torch.rand(3, 256, 14, 14)
    heads, their_heads = ours.roi_heads, theirs.roi_heads
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 96)
        features, wanted = list(ours.backbone(image).values()), list(theirs.backbone(image).values())
        pairs = [*zip(features, wanted)]
        pairs += zip(sum(ours.rpn.head(features), []), sum(theirs.proposal_generator.rpn_head(features), []))
        scores, boxes = heads.box_predictor(heads.box_head(regions))
        their_scores, their_boxes = their_heads.box_predictor(their_heads.box_head(regions))
        pairs += [(scores[:, 0], their_scores[:, -1]), (scores[:, 1:], their_scores[:, :-1])]
        pairs += [(boxes[:, 4:], their_boxes)]
        found = heads.mask_predictor(heads.mask_head(masks))[:, 1:]
        pairs.append((found, their_heads.mask_head.layers(masks)))
    assert len(pairs) == 5 + 10 + 3 + 1
    for found, wanted in pairs:
        assert wanted.std() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezes_what_detectron2_freezes(freeze_at):
    resnet = pytest.importorskip("detectron2.modeling.backbone.resnet")
    cfg = config("coco_2017_val", "", "MODEL.BACKBONE.FREEZE_AT", freeze_at, *RESNET18)
    theirs = pytest.importorskip("detectron2.config").get_cfg()
    theirs.merge_from_file(BASE)
    theirs.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", freeze_at, *RESNET18])
    body = engine.build_model(cfg).backbone.body
    bottom_up = resnet.build_resnet_backbone(theirs, resnet.ShapeSpec(channels=3))

    def learned(module, name=str):
        return {name(key) for key, p in module.named_parameters() if p.requires_grad}

    def batch_norms(module):
        return sum(isinstance(layer, _BatchNorm) for layer in module.modules())

    assert learned(body, detectron2_name) == learned(bottom_up)
    assert bool(learned(body)) == (freeze_at < 5)
    assert batch_norms(body) == batch_norms(bottom_up)


def test_a_frozen_backbone_stays_as_it_was(coco, tmp_path):
    """Bit for bit, precise BatchNorm included, while the rest learns."""
    cfg = config(coco, tmp_path, "MODEL.BACKBONE.FREEZE_AT", 5, "SOLVER.MAX_ITER", 3, "SEED", 0, *RESNET18)
    cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, 2
    torch.manual_seed(0)
    before = {name: tensor.clone() for name, tensor in engine.build_model(cfg).state_dict().items()}
    engine.train(cfg)
    after = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("backbone.body.")}


@pytest.mark.parametrize("max_iter, warmup", [(90, 10), (8, 1000)])
def test_learning_rate_is_detectron2s(max_iter, warmup):
    build = pytest.importorskip("detectron2.solver.build")
    cfg = pytest.importorskip("detectron2.config").get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = max_iter, warmup, (60, 80)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build.build_lr_scheduler(cfg, optimizer)
    for i in range(max_iter):
        assert trainer.learning_rate(cfg.SOLVER, i) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6
        )
        optimizer.step()
        scheduler.step()


def test_coco_ap(coco):
    dataset = load_dataset(coco)
    truth = [a for a in dataset.annotations if not a["iscrowd"]]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    found = [{key: a[key] for key in keys} | {"score": 0.9} for a in truth]
    for d in found:
        if isinstance(d["segmentation"], list):
            d["segmentation"] = rle.merge(rle.frPyObjects(d["segmentation"], 64, 80))
    before = json.dumps(found, default=str)
    perfect, nothing = coco_ap(dataset, found), coco_ap(dataset, [])
    assert json.dumps(found, default=str) == before
    for task in ("bbox", "segm"):
        assert list(perfect[task]) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
        assert perfect[task]["APs"] == pytest.approx(100)
        assert perfect[task]["APl"] is None and nothing[task]["APl"] is None  # no object is that large
        assert nothing[task]["AP"] == nothing[task]["APs"] == 0


def forget(folder, checkpoint):
    """Turn a finished run into one that was killed after ``checkpoint``, before it wrote a row of metrics."""
    for path in folder.glob("*.pth"):
        if path.name > checkpoint:
            path.unlink()
    (folder / "last_checkpoint").write_text(checkpoint)
    (folder / "metrics.json").unlink()


def test_resume_is_exact_and_category_ids_survive(coco, tmp_path, caplog):
    caplog.set_level("INFO")

    def run(name, max_iter, **how):
        cfg = config(
            coco,
            tmp_path / name,
            "SOLVER.MAX_ITER",
            max_iter,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            0.0,
            "SOLVER.CHECKPOINT_PERIOD",
            3 if name == "parts" else 99,
            "TEST.PRECISE_BN.ENABLED",
            name == "precise",
            "TEST.PRECISE_BN.NUM_ITER",
            2,
            *RESNET18,
        )
        return cfg, engine.train(cfg, **how)

    def state(name, file="model_final.pth"):
        return torch.load(tmp_path / name / file, weights_only=True)

    run("whole", 6)
    run("parts", 6)
    forget(tmp_path / "parts", "model_0000002.pth")
    with pytest.raises(InputError, match="holds a run .model_0000002.pth.: give --resume"):
        run("parts", 6)
    caplog.clear()
    run("parts", 6, resume=True)
    assert "resuming at iteration 3 of 6" in caplog.text and "random weights" not in caplog.text
    whole, parts = state("whole"), state("parts")
    assert whole["iteration"] == parts["iteration"] == 5
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())
    momenta = [
        {n: s["momentum_buffer"] for n, s in saved["optimizer"]["state"].items()} for saved in (whole, parts)
    ]
    assert all(torch.equal(buffer, momenta[1][n]) for n, buffer in momenta[0].items())

    folder = tmp_path / "parts"
    # the record of a run, also in its checkpoints
    about = json.loads((folder / "training.json").read_text())
    assert parts["run"] == about and about["kind"] == "finetune" and about["engine"] == "torchvision"
    assert about["settings"]["SOLVER.MAX_ITER"] == about["steps"] == 6 and about["data"]["images"] > 0
    assert len(about["data"]["sha256"][0]) == 64
    assert about["categories"] == [{"id": i, "name": str(i)} for i in CATEGORIES]
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert {p.name for p in folder.glob("*.pth")} == {
        "model_0000002.pth",
        "model_0000005.pth",
        "model_final.pth",
    }
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [5, 5] and "total_loss" in rows[0]
    assert {"bbox/AP", "segm/APl"} <= set(
        rows[1]
    )  # the figures of results.json, after the training's own rows
    assert set(rows[0]) == {
        "iteration",
        "total_loss",
        "loss_cls",
        "loss_box_reg",
        "loss_mask",
        "loss_rpn_cls",
        "loss_rpn_loc",
        "lr",
    }

    # A finished run is not trained again, and its model gives the same numbers from either place.
    detections = (folder / "inference" / "coco_instances_results.json").read_text()
    stamp = (folder / "model_final.pth").stat().st_mtime_ns
    cfg, again = run("parts", 6, resume=True)
    assert again["categories"] == about["categories"] and set(again["errors"]) == {"bbox", "segm"}
    for task, ap in again["ap"].items():
        of_classes = [again["per_class"][str(i)][task]["AP"] for i in CATEGORIES]
        assert np.mean(of_classes) == pytest.approx(ap["AP"], abs=1e-9)
    assert (folder / "model_final.pth").stat().st_mtime_ns == stamp
    assert (folder / "inference" / "coco_instances_results.json").read_text() == detections
    cfg.merge_from_list(
        ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "evaluated")]
    )
    assert engine.train(cfg, eval_only=True)["ap"] == again["ap"]
    cfg.MODEL.WEIGHTS = __file__
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        engine.train(cfg, eval_only=True)

    found = json.loads(detections)
    assert {d["category_id"] for d in found} == set(CATEGORIES) and {d["image_id"] for d in found} == set(
        range(10, 15)
    )
    for d in found:
        assert rle.decode(d["segmentation"]).shape == (64, 80) and d["bbox"][2] > 0 and 0 <= d["score"] <= 1

    # Precise BN changes the statistics and nothing else.
    run("precise", 6)
    precise = state("precise")["model"]
    changed = {name for name, tensor in precise.items() if not torch.equal(tensor, whole["model"][name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)
    shutil.rmtree(tmp_path)


def test_evaluations_during_training_leave_it_as_it_was(coco, tmp_path):
    def run(name, period):
        settings = {
            "SOLVER.MAX_ITER": 6,
            "TEST.EVAL_PERIOD": period,
            "TEST.PRECISE_BN.ENABLED": True,
            "TEST.PRECISE_BN.NUM_ITER": 2,
        }
        words = [word for pair in settings.items() for word in pair]
        cfg = config(coco, tmp_path / name, *RESNET18, *words)
        engine.train(cfg)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        saved = torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        return saved["model"], [row["iteration"] for row in rows if "bbox/AP" in row]

    plain, at_the_end = run("plain", 0)
    watched, evaluated = run("watched", 2)
    assert at_the_end == [5] and evaluated == [1, 3, 5]
    assert all(torch.equal(tensor, watched[name]) for name, tensor in plain.items())
    shutil.rmtree(tmp_path)


def test_a_full_disk_keeps_the_checkpoint_before(coco, tmp_path, monkeypatch, caplog, capsys):
    """Training goes on and ends with an error of one line; --resume then trains what is missing."""
    cfg = config(coco, tmp_path, *RESNET18, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_tensors", full_after("model_0000001.pth"))
        with pytest.raises(InputError, match=r"model_final.pth \(No space left on device\): make room"):
            engine.train(cfg)
    assert "model_0000003.pth (No space left on device); training goes on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]
    caplog.set_level("INFO")
    engine.train(cfg, resume=True)
    assert "resuming at iteration 2 of 4" in caplog.text
    shutil.rmtree(tmp_path)


def test_divergence_is_one_line(coco, tmp_path):
    cfg = config(coco, tmp_path, "SOLVER.BASE_LR", 1e9, "SOLVER.MAX_ITER", 10, "SOLVER.WARMUP_ITERS", 0)
    with pytest.raises(InputError, match="iteration.*BASE_LR"):
        engine.train(cfg)


def test_whole_backbone_arrives_or_nothing(coco, tmp_path, monkeypatch):
    state = {
        name: torch.full_like(tensor, 0.5)
        for name, tensor in resnet50().state_dict().items()
        if not name.startswith("fc") and not name.endswith("num_batches_tracked")
    }
    assert len(state) == 265
    cfg = config(coco, tmp_path, "MODEL.WEIGHTS", "r50.pkl", "SOLVER.MAX_ITER", 0)
    data = CocoInstances(load_dataset(coco), training=True)
    model = engine.build_model(cfg)
    monkeypatch.setattr(weights, "load_weights", lambda path: (state, {"method": "rsa"}))
    monkeypatch.setattr(weights.detectors, "is_detector", lambda path: False)
    trainer.fit(trainer.Trainer(cfg, model, data))
    assert all(torch.equal(model.backbone.body.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["weights"] == {"method": "rsa"}

    del state["layer4.2.bn3.running_var"]
    with pytest.raises(InputError, match="layer4.2.bn3.running_var"):
        trainer.fit(trainer.Trainer(cfg, model, data))
    (tmp_path / "model_final.pth").unlink()


def test_weights_of_another_input_and_bad_annotations_are_refused(coco, tmp_path, monkeypatch):
    cfg = config(coco, tmp_path, "MODEL.WEIGHTS", "r50.pkl", "MODEL.PIXEL_STD", [1.0, 1.0, 1.0])
    monkeypatch.setattr(weights, "load_weights", lambda path: ({}, {"method": "rsa"}))
    monkeypatch.setattr(weights.detectors, "is_detector", lambda path: False)
    with pytest.raises(InputError, match="r50.pkl was trained with MODEL.PIXEL_STD"):
        engine.train(cfg)
    path, images = coco.split("::")
    with open(path) as file:
        broken = json.load(file)
    broken["annotations"][3]["segmentation"] = [[1, 2, 3, 4]]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match="broken.json: 1 of 12 objects have two points .*annotation 4"):
        engine.train(config(dataset_name(tmp_path / "broken.json", images), tmp_path))


def test_learns_two_images(coco, tmp_path):
    cfg = config(
        coco, tmp_path, "SOLVER.MAX_ITER", 40, "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.RANDOM_FLIP", "none"
    )
    data = CocoInstances(load_dataset(coco), training=True)
    data.ids = data.ids[:2]
    torch.manual_seed(0)
    trainer.fit(trainer.Trainer(cfg, engine.build_model(cfg), data))
    first, last = [
        json.loads(line)["total_loss"] for line in (tmp_path / "metrics.json").read_text().splitlines()
    ]
    assert last < 0.75 * first
    shutil.rmtree(tmp_path)


def write_subset(coco, folder, change):
    """Name of a copy of ``coco`` whose list of annotations is replaced by ``change(list)``."""
    path, images = coco.split("::")
    with open(path) as file:
        content = json.load(file)
    content["annotations"] = change(content["annotations"])
    (folder / "changed.json").write_text(json.dumps(content))
    return dataset_name(folder / "changed.json", images)


@pytest.mark.parametrize("masks", [True, False])
def test_iterations_without_any_object_train(coco, tmp_path, masks):
    """One image of five has objects, so most iterations see none, and neither does precise BatchNorm."""
    one = write_subset(coco, tmp_path, lambda annotations: annotations[:3])
    cfg = config(
        one,
        tmp_path / "run",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        False,
        "SOLVER.MAX_ITER",
        5,
        "MODEL.MASK_ON",
        masks,
        "TEST.PRECISE_BN.ENABLED",
        True,
        "TEST.PRECISE_BN.NUM_ITER",
        1,
        "SOLVER.IMS_PER_BATCH",
        1,
        *RESNET18,
    )
    data = CocoInstances(load_dataset(one), training=True, masks=masks, filter_empty=False)
    image, target = data[3, True]
    assert len(data.ids) == 5 and target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64
    assert not masks or target["masks"].shape == (0, 64, 80)
    engine.train(cfg)
    row = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[0])
    assert all(np.isfinite(value) for value in row.values())
    state = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_an_empty_batch_leaves_a_norm_and_its_gradient_at_zero():
    """Without any region, the mask head's BatchNorm keeps its statistics and has a gradient of zeros, for
    which DDP waits."""
    layer = torch.nn.BatchNorm2d(4)
    before = [buffer.clone() for buffer in (layer.running_mean, layer.running_var)]
    layer(torch.zeros(0, 4, 3, 3)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.running_mean, layer.running_var)))
    assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_boxes_alone_train_a_faster_rcnn(coco, tmp_path):
    """There is no mask head, and no masks in the file, the detections or the results, which reports still
    read."""

    def without_masks(annotations):
        return [{**annotation, "segmentation": []} for annotation in annotations[:12]]

    boxes = write_subset(coco, tmp_path, without_masks)
    cfg = config(
        boxes,
        tmp_path / "run",
        "MODEL.MASK_ON",
        False,
        "SOLVER.MAX_ITER",
        2,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        0.0,
    )
    model = engine.build_model(cfg)
    assert model.roi_heads.mask_head is None and not any("mask" in name for name in model.state_dict())
    results = engine.train(cfg)
    assert set(results["ap"]["segm"].values()) == {None} and results["ap"]["bbox"]["AP"] is not None
    found = json.loads((tmp_path / "run" / "inference" / "coco_instances_results.json").read_text())
    assert found and all("segmentation" not in d for d in found)
    row = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[0])
    assert "loss_box_reg" in row and "loss_mask" not in row


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named(coco, tmp_path, workers):
    path, images = coco.split("::")
    shutil.copytree(images, tmp_path / "images")
    for image in (tmp_path / "images").glob("*.png"):
        image.write_bytes(image.read_bytes()[:-2000])
    damaged = dataset_name(path, tmp_path / "images")
    with pytest.raises(InputError, match=r"images/\d\.png"):
        engine.train(
            config(damaged, tmp_path / "run", "DATASETS.TEST", (coco,), "DATALOADER.NUM_WORKERS", workers)
        )


def test_a_key_of_another_architecture_names_the_other_engine(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("MODEL:\n  RETINANET:\n    NUM_CLASSES: 3\n")
    monkeypatch.setattr(
        "sys.argv", ["train_net", "--engine", "torchvision", "--config-file", str(tmp_path / "c.yaml")]
    )
    with pytest.raises(
        InputError,
        match="no key MODEL.RETINANET; the embedded engine trains Mask and .*--engine detectron2",
    ):
        train_net.main()


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
def test_other_depths_train_from_converted_weights(coco, tmp_path, name):
    """After one iteration at learning rate 0 the model has the backbone of the file, and its depth."""
    torch.manual_seed(0)
    state = {
        n: torch.rand_like(t) if "running_var" in n else 0.1 * torch.randn_like(t)
        for n, t in getattr(torchvision.models, name)().state_dict().items()
        if t.is_floating_point()
    }
    torch.save(state, tmp_path / "bare.pth")
    path, provenance = convert(tmp_path / "bare.pth", tmp_path / "w.pkl")
    keys = [
        item
        for key, value in ARCHITECTURES[name].resnets().items()
        for item in (f"MODEL.RESNETS.{key}", value)
    ]
    more = [
        "SOLVER.MAX_ITER",
        1,
        "SOLVER.BASE_LR",
        0.0,
        "SOLVER.IMS_PER_BATCH",
        1,
        "MODEL.WEIGHTS",
        str(path),
    ]
    with pytest.raises(
        InputError, match=f"was trained with MODEL.RESNETS.DEPTH {ARCHITECTURES[name].depth} .it is 50"
    ):
        engine.train(config(coco, tmp_path / "wrong", *more))
    results = engine.train(config(coco, tmp_path / "run", *more, *keys))
    assert results["iterations"] == 1 and results["weights"] == provenance
    found = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert len(tensor_shapes(name)) == {"resnet18": 100, "resnet101": 520}[name]
    for tensor in tensor_shapes(name):
        if "running" not in tensor:
            assert torch.equal(found[f"backbone.body.{tensor}"], state[tensor])


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            ["MODEL.RESNETS.DEPTH", 18],
            "DEPTH 18 with NUM_GROUPS 1, WIDTH_PER_GROUP 64, RES2_OUT_CHANNELS 256 .*RES2_OUT_CHANNELS 64$",
        ),
        (
            ["MODEL.RESNETS.NUM_GROUPS", 3],
            "NUM_GROUPS 3.*: give NUM_GROUPS 1, WIDTH_PER_GROUP 64.* or NUM_GROUPS 32, WIDTH_PER_GROUP 4",
        ),
    ],
)
def test_a_resnet_that_torchvision_has_not_is_refused(coco, tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        engine.build_model(config(coco, tmp_path, *keys))
