"""What only Detectron2 itself can confirm: that weights arrive, accumulation, several processes, precise
BN."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from tests.conftest import ROOT

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import yaml
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats

from rsa_detectron2.common.config import merge_config
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.launch import Processes
from rsa_detectron2.common.record import Origin, flatten
from rsa_detectron2.common.sync_batch_norm import SyncBatchNorm
from rsa_detectron2.tools import train_net
from rsa_detectron2.transfer.config import (
    RGB_IMAGENET,
    protocol_of,
    torchvision_defaults,
    value_of,
)
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES
from rsa_detectron2.transfer.convert.needs import check_weights
from rsa_detectron2.transfer.convert.writers import convert
from rsa_detectron2.transfer.d2 import data as d2_data
from rsa_detectron2.transfer.d2 import engine as d2_engine
from rsa_detectron2.transfer.d2 import evaluation as d2_evaluation
from rsa_detectron2.transfer.d2 import hooks as d2_hooks
from rsa_detectron2.transfer.d2 import model as d2_model
from rsa_detectron2.transfer.d2 import trainer as d2_trainer
from rsa_detectron2.transfer.d2 import weights as d2_weights
from rsa_detectron2.transfer.d2.config import add_rsa_config, get_cfg
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.data.drawn import write_coco
from rsa_detectron2.transfer.precise_bn import norm_layers
from rsa_detectron2.transfer.report import paper, run_folder
from rsa_detectron2.transfer.report.runs import Setup, describe
from tests.transfer.report.test_run_folder import full_after

CONFIGS = ROOT / "configs" / "transfer"


def flat(cfg, prefix=""):
    for key, value in cfg.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def load(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def test_embedded_defaults_are_detectron2s():
    detectron2 = dict(flat(get_cfg()))
    assert {k: v for k, v in flat(torchvision_defaults()) if detectron2[k] != v} == {}


def test_every_key_of_detectron2_counts():
    """Keys that no recipe sets count, too: a run is a row of the paper only with their defaults."""
    cfg = load("mask_rcnn_R50_FPN_1x_random.yaml")
    cell = next(cell for cell in paper.cells("table5") if cell.row == "random")
    origin = Origin("transfer/mask_rcnn_R50_FPN_1x_random.yaml", (), flatten(get_cfg()))

    def words():
        run = describe(cfg, Setup("detectron2", processes=8, origin=origin)) | {
            "iterations": cfg.SOLVER.MAX_ITER
        }
        return paper.differences(cell.training, json.loads(json.dumps(run)))

    assert words() == []
    cfg.SOLVER.NESTEROV, cfg.SEED, cfg.SOLVER.AMP.ENABLED = True, 5, True
    assert words() == ["SOLVER.NESTEROV True instead of False"]


@pytest.fixture(scope="module")
def weights(resnet50_checkpoint, tmp_path_factory):
    return convert(resnet50_checkpoint, tmp_path_factory.mktemp("weights") / "w.pkl")[0]


@pytest.fixture(scope="module")
def model(weights):
    cfg = load("mask_rcnn_R50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(weights))
    return model.eval()


def photograph():
    """A real photograph if the sample of images lies beside the project, otherwise noise."""
    found = sorted((ROOT.parent / "shared" / "data" / "imagenet_sample" / "train").glob("*/*"))
    if found:
        return Image.open(found[0]).convert("RGB").resize((224, 224))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))


def test_a_stock_model_with_our_config_has_the_features_of_the_transfer_recipe(weights, model):
    cfg = get_cfg()
    add_rsa_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    ours = build_model(cfg).eval()
    DetectionCheckpointer(ours).load(str(weights))
    image = [{"image": torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))}]
    with torch.no_grad():
        features, expected = (m.backbone.bottom_up(m.preprocess_image(image).tensor) for m in (ours, model))
    assert cfg.INPUT.FORMAT == "RGB" and list(features) == ["res2", "res3", "res4", "res5"]
    assert all(torch.equal(features[name], expected[name]) for name in features)
    assert all(parameter.requires_grad for parameter in ours.backbone.parameters())


def test_features_are_those_of_the_pretraining_backbone(model, resnet50_checkpoint):
    """Detectron2's own pre-processing and backbone are compared with the timm network that was trained, stage
    by stage."""
    from rsa_detectron2.pretrain.method.networks import build_backbone

    backbone = build_backbone("resnet50")
    prefix = "online.backbone."
    state = torch.load(resnet50_checkpoint, weights_only=True)["model"]
    backbone.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    pixels = torch.from_numpy(np.array(photograph())).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        x = backbone.eval().maxpool(
            backbone.act1(backbone.bn1(backbone.conv1(((pixels / 255 - mean) / std)[None])))
        )
        features = model.backbone.bottom_up(model.preprocess_image([{"image": pixels}]).tensor)
        for stage in (1, 2, 3, 4):
            x = getattr(backbone, f"layer{stage}")(x)
            difference = (features[f"res{stage + 1}"] - x).abs().max() / x.abs().max()
            assert difference < 1e-4, (stage, difference)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101", "resnext101_32x8d", "wide_resnet50_2"])
def test_features_of_other_networks(tmp_path, name):
    """Stock Detectron2's checkpointer and backbone are compared with torchvision's network, to 1e-5 of the
    largest feature."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)().eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_var, 0.5, 1)
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.weight, 0.3, 0.6)
            torch.nn.init.normal_(layer.bias, std=0.1)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    path, provenance = convert(tmp_path / "w.pth", tmp_path / "w.pkl")
    cfg = load(
        {"resnet18": "mask_rcnn_R18_FPN_1x.yaml", "resnet101": "mask_rcnn_R101_FPN_1x.yaml"}.get(
            name, "mask_rcnn_R50_FPN_1x.yaml"
        )
    )
    if name not in ("resnet18", "resnet101"):
        with pytest.raises(InputError, match="was trained with MODEL.RESNETS."):
            check_weights(cfg, provenance)
        cfg.merge_from_list(
            [
                item
                for key, value in ARCHITECTURES[name].resnets().items()
                for item in (f"MODEL.RESNETS.{key}", value)
            ]
        )
    check_weights(cfg, provenance)
    cfg.MODEL.DEVICE = "cpu"
    backbone = build_model(cfg).eval()
    checkpointer = d2_trainer.Checkpointer(backbone)
    checkpointer.load(str(path))
    assert checkpointer.absent == []
    images = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        found, x = (
            backbone.backbone.bottom_up(images),
            network.maxpool(network.relu(network.bn1(network.conv1(images)))),
        )
        for stage in (1, 2, 3, 4):
            x = getattr(network, f"layer{stage}")(x)
            assert x.std() > 0.01
            assert (found[f"res{stage + 1}"] - x).abs().max() <= 1e-5 * x.abs().max(), stage


def test_a_tensor_that_did_not_arrive_is_named(model, weights):
    d2_weights.assert_backbone_arrived(model, weights)
    tensor = model.backbone.bottom_up.res3[1].conv2.norm.running_var
    kept = tensor.clone()
    tensor.add_(1e-3)
    with pytest.raises(InputError, match=r"1 of 265 .*res3.1.conv2.norm.running_var"):
        d2_weights.assert_backbone_arrived(model, weights)
    tensor.copy_(kept)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w?x=1.pkl"])
def test_what_a_file_of_weights_would_run_is_not_run(weights, shapes, tmp_path, name):
    """The name does not decide how it is read: Detectron2 unpickles a .pkl, and reads others as files of
    torch."""
    contents = pickle.loads(weights.read_bytes())
    path = tmp_path / name
    path.write_bytes(pickle.dumps({**contents, "more": Bomb(tmp_path / "it ran")}))
    cfg = tiny(
        shapes,
        tmp_path / "run",
        "MODEL.WEIGHTS",
        str(path),
        "MODEL.RESNETS.DEPTH",
        50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        256,
    )
    d2_data.register_datasets(cfg)
    trainer = d2_trainer.Trainer(cfg)
    trainer.resume_or_load(False)
    d2_weights.assert_backbone_arrived(trainer.model, weights)
    assert not (tmp_path / "it ran").exists()


def test_a_deeper_backbone_is_refused(weights, shapes, tmp_path):
    cfg = tiny(
        shapes,
        tmp_path,
        "MODEL.WEIGHTS",
        str(weights),
        "MODEL.RESNETS.DEPTH",
        101,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        256,
    )
    d2_data.register_datasets(cfg)
    with pytest.raises(InputError, match="255 backbone tensors did not arrive .*res4.6.conv1.weight"):
        d2_trainer.Trainer(cfg).resume_or_load(False)


def test_resuming_from_a_damaged_or_another_model_is_one_line(shapes, tmp_path):
    cfg = tiny(shapes, tmp_path)
    d2_data.register_datasets(cfg)
    trainer = d2_trainer.Trainer(cfg)
    trainer.checkpointer.save("model_0000000", iteration=0)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 1
    wider = tiny(shapes, tmp_path, "MODEL.ROI_BOX_HEAD.FC_DIM", 48)
    with pytest.raises(
        InputError, match="lacks 4 tensors of this config's model, or has them in another shape"
    ):
        d2_trainer.Trainer(wider).resume_or_load(True)
    path = tmp_path / "model_0000000.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="model_0000000.pth cannot be read as a checkpoint"):
        trainer.resume_or_load(True)


def tiny(shapes, folder, *overrides):
    """A configuration that trains for seconds on a CPU: ResNet-18, narrow heads, 64 px. Only the order of the
    images is random.

    Every anchor and every proposal counts, and only the objects' own boxes are foreground. So nothing is
    sampled, and images with the same number of objects have the same number of terms in the loss.
    """
    cfg = load("base_mask_rcnn_R50_FPN.yaml")
    cfg.merge_from_list(
        [
            "MODEL.WEIGHTS",
            "",
            "MODEL.DEVICE",
            "cpu",
            "MODEL.RESNETS.DEPTH",
            18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            64,
            "MODEL.FPN.OUT_CHANNELS",
            16,
            "MODEL.ROI_HEADS.NUM_CLASSES",
            18,
            "MODEL.ROI_BOX_HEAD.CONV_DIM",
            16,
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            32,
            "MODEL.ROI_BOX_HEAD.NUM_CONV",
            1,
            "MODEL.ROI_MASK_HEAD.CONV_DIM",
            16,
            "MODEL.ROI_MASK_HEAD.NUM_CONV",
            1,
            "MODEL.ANCHOR_GENERATOR.SIZES",
            [[8], [16], [32], [48], [64]],
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
            10000,
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
            50,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            10,
            "MODEL.RPN.POST_NMS_TOPK_TEST",
            5,
            "MODEL.RPN.NMS_THRESH",
            1.0,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            100,
            "MODEL.ROI_HEADS.POSITIVE_FRACTION",
            1.0,
            "MODEL.ROI_HEADS.IOU_THRESHOLDS",
            [0.999],
            "INPUT.MIN_SIZE_TRAIN",
            (64,),
            "INPUT.MIN_SIZE_TEST",
            64,
            "INPUT.RANDOM_FLIP",
            "none",
            "DATASETS.TRAIN",
            (shapes,),
            "DATASETS.TEST",
            (shapes,),
            "OUTPUT_DIR",
            str(folder),
            "DATALOADER.NUM_WORKERS",
            0,
            "SOLVER.IMS_PER_BATCH",
            2,
            "SOLVER.MAX_ITER",
            4,
            "SOLVER.STEPS",
            (3,),
            "SOLVER.WARMUP_ITERS",
            0,
            "SOLVER.BASE_LR",
            0.01,
            "TEST.PRECISE_BN.NUM_ITER",
            3,
            "SEED",
            1,
            *overrides,
        ]
    )
    return cfg


FROZEN = [
    "MODEL.RESNETS.NORM",
    "FrozenBN",
    "MODEL.FPN.NORM",
    "",
    "MODEL.ROI_BOX_HEAD.NORM",
    "",
    "MODEL.ROI_MASK_HEAD.NORM",
    "",
    "TEST.PRECISE_BN.ENABLED",
    False,
]


def same_number_of_objects(shapes, folder):
    """Name of a copy of the data set with two objects in every image."""
    path, images = shapes.split("::")
    coco = json.load(open(path))
    kept = []
    for image in coco["images"]:
        of_image = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        kept += of_image[:2] if len(of_image) >= 2 else []
    coco["annotations"] = kept
    (folder / "two.json").write_text(json.dumps(coco))
    return dataset_name(folder / "two.json", images)


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_close(a, b, rel):
    """Compare relative to each tensor's largest value, or to 1e-3 for a bias that has hardly left zero."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= rel * b[name].abs().max().clamp(min=1e-3), name


def test_accumulation_equals_one_pass_and_two_processes(shapes, tmp_path):
    """With frozen norm layers, 1 process x 1 pass x 2 images, 1 x 2 x 1 and 2 x 1 x 1 reach the same weights,
    to 1e-5."""
    two = same_number_of_objects(shapes, tmp_path)
    runs = {"whole": (1, 1), "passes": (1, 2), "processes": (2, 1)}
    for name, (processes, accumulate) in runs.items():
        cfg = tiny(two, tmp_path / name, *FROZEN)
        results = d2_engine.train(cfg, d2_engine.Passes(Processes(processes), accumulate))
        assert (results["processes"], results["accumulate"], results["weights"]) == (
            processes,
            accumulate,
            None,
        )
    whole = final(tmp_path / "whole")
    torch.manual_seed(1)  # as SEED does
    start = d2_model.build_model(tiny(two, tmp_path, *FROZEN)).state_dict()
    assert any(torch.equal(whole[name], start[name]) for name in whole if "norm" in name)
    moved = [name for name in whole if not torch.equal(whole[name], start[name]) and "norm" not in name]
    assert len(moved) > 30
    for name in ("passes", "processes"):
        assert_close(final(tmp_path / name), whole, 1e-5)


def record_statistics(cfg, folder):
    """Save what each of two processes has: its own precise statistics by fvcore, and those of all images by
    the hook."""
    import detectron2.utils.comm as comm

    d2_data.register_datasets(cfg)
    torch.manual_seed(1)
    trainer = d2_trainer.Trainer(cfg)
    layers = norm_layers(trainer.model)

    def statistics():
        return [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]

    batches = list(trainer.following_batches(trainer.max_iter))
    counts = dict.fromkeys(layers, 0)

    def count(layer, inputs):
        counts[layer] += inputs[0][:, 0].numel()

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    with EventStorage():
        update_bn_stats(trainer.model, batches, len(batches))
    own = [(*moments, counts[layer]) for moments, layer in zip(statistics(), layers)]
    for handle in handles:
        handle.remove()
    next(hook for hook in trainer._hooks if isinstance(hook, d2_hooks.PreciseBN)).work(trainer.max_iter)
    torch.save([own, statistics()], f"{folder}/{comm.get_rank()}.pth")


def test_precise_bn_is_equal_on_all_ranks_and_that_of_all_images(shapes, tmp_path):
    cfg = tiny(
        shapes,
        tmp_path,
        "MODEL.RESNETS.NORM",
        "BN",
        "MODEL.FPN.NORM",
        "BN",
        "MODEL.ROI_BOX_HEAD.NORM",
        "BN",
        "MODEL.ROI_MASK_HEAD.NORM",
        "BN",
        "INPUT.MASK_FORMAT",
        "bitmask",
    )
    launch(record_statistics, 2, dist_url="auto", args=(cfg, str(tmp_path)))
    (own0, after0), (own1, after1) = (
        torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)
    )
    differ = 0
    for (m0, v0, n0), (m1, v1, n1), (mean, var), (mean1, var1) in zip(own0, own1, after0, after1):
        differ += not torch.equal(m0, m1)
        assert torch.equal(mean, mean1) and torch.equal(var, var1)
        # Of a mixture of two samples, where one may have more regions: within plus between variance.
        share0, share1 = n0 / (n0 + n1), n1 / (n0 + n1)
        torch.testing.assert_close(mean, share0 * m0 + share1 * m1, rtol=1e-4, atol=1e-6)
        wanted = share0 * v0 + share1 * v1 + share0 * share1 * (m0 - m1).square()
        torch.testing.assert_close(var, wanted, rtol=1e-4, atol=1e-6)
    assert differ == len(own0) > 10


@pytest.mark.slow
def test_two_processes_train_resume_and_evaluate_what_they_saved(shapes, tmp_path, tool):
    """The tool itself is stopped at half of the schedule and resumed, with evaluations during training."""
    cfg = tiny(shapes, tmp_path / "run", "TEST.EVAL_PERIOD", 1)
    (tmp_path / "c.yaml").write_text(cfg.dump())
    arguments = ["--config-file", tmp_path / "c.yaml", "--num-processes", 2, "SOLVER.CHECKPOINT_PERIOD", 2]
    for resumed in (False, True):
        if resumed:  # as if it had been killed before
            for name in ("last_checkpoint", "model_0000003.pth", "model_final.pth"):
                (tmp_path / "run" / name).unlink()
            forgotten = tool("train_net", *arguments)
            assert forgotten.returncode == 2 and forgotten.stderr.count("\n") == 1
            assert "holds a run (model_0000001.pth): give --resume to go on with it" in forgotten.stderr
            arguments += ["--resume", "MODEL.WEIGHTS", tmp_path / "gone.pkl"]  # they are no longer needed
        done = tool("train_net", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 images = 2 cpu x 1 accumulated x 1; BatchNorm sees 1 at once" in done.stdout
        assert done.stdout.count("SyncBN needs GPUs") == 1
        assert ("starts from random weights" in done.stdout) != resumed
        assert ("training goes on from model_0000001.pth" in done.stdout) == resumed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["processes"] == 2 and results["seed"] == 1 and "NORM: BN" in results["config"]
    assert results["iterations"] == 4 and not results["eval_only"]
    # its record
    about = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["run"]
    assert (
        about == json.loads((tmp_path / "run" / "training.json").read_text())
        and about["engine"] == "detectron2"
    )
    assert about["data"] == results["data"] and about["settings"]["SOLVER.MAX_ITER"] == about["steps"] == 4
    assert (
        about["overrides"] == ["SOLVER.CHECKPOINT_PERIOD", "2"]
        and about["changed"]["SOLVER.MAX_ITER"] == 40000
    )
    assert about["bn_batch_size"] == 1 and about["processes"] == 2 and about["data"]["images"] > 0
    assert about["categories"] == results["categories"] and len(results["per_class"]) == 18
    for task, ap in results["ap"].items():  # Detectron2's own, and the mean of pycocotools' of each class
        of_classes = [found[task]["AP"] for found in results["per_class"].values()]
        assert np.mean([v for v in of_classes if v is not None]) == pytest.approx(ap["AP"], abs=1e-9)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in row for row in rows) and max(row["iteration"] for row in rows) == 3
    assert rows[-1]["segm/AP"] == results["ap"]["segm"]["AP"] and rows[-1]["iteration"] == 3
    table = tool("report", tmp_path / "run", "--output", tmp_path / "report")
    assert table.returncode == 0 and "run (random)" in table.stdout, table.stderr
    page = (tmp_path / "report" / "report.md").read_text()
    assert "(errors.png)" in page and "(precision_recall.png)" in page and "## Classes of " in page
    again = tool("train_net", *arguments, "--eval-only", "--num-processes", 1)  # still the training's results
    assert again.returncode == 0, again.stderr[-3000:]
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["ap"] == results["ap"] and again["processes"] == 2 and not again["eval_only"]
    changed = tool("train_net", *arguments, "SOLVER.BASE_LR", 0.5)
    assert changed.returncode == 2 and "began with SOLVER.BASE_LR 0.01 and not 0.5" in changed.stderr, (
        changed.stderr[-900:]
    )
    judged = tool(
        "train_net",
        "--config-file",
        tmp_path / "run" / "config.yaml",
        "--eval-only",
        "MODEL.WEIGHTS",
        tmp_path / "run" / "model_final.pth",
        "OUTPUT_DIR",
        tmp_path / "judged",
    )
    assert judged.returncode == 0, judged.stderr[-3000:]
    judged = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert judged["ap"] == results["ap"] and judged["eval_only"] and judged["iterations"] == 4


def test_cocos_own_set_has_its_names_and_no_annotations_of_an_earlier_set(shapes, tmp_path):
    categories = d2_data.categories_of("coco_2017_train")
    assert len(categories) == 80 and categories[0] == {"id": 1, "name": "person"}
    assert categories[-1] == {"id": 90, "name": "toothbrush"}
    cfg = tiny(shapes, tmp_path)
    d2_engine.save_annotations(cfg, eval_only=True)
    assert (tmp_path / "inference" / "annotations.json").is_file()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_2017_val",)
    d2_engine.save_annotations(cfg, eval_only=True)  # the detections belong to COCO's own file
    assert not (tmp_path / "inference" / "annotations.json").exists()


@pytest.mark.parametrize(
    "images, processes, accumulate, message",
    [
        (16, 3, None, "16 does not divide among 3 processes x 1 passes"),
        (16, 2, 3, "among 2 processes x 3 passes"),
        (2, 4, None, "2 does not divide"),
    ],
)
def test_images_that_do_not_divide_are_refused(images, processes, accumulate, message):
    cfg = load("base_mask_rcnn_R50_FPN.yaml")
    cfg.MODEL.DEVICE, cfg.SOLVER.IMS_PER_BATCH = "cpu", images
    with pytest.raises(InputError, match=message):
        d2_engine.plan_passes(cfg, processes, accumulate)


@pytest.mark.parametrize(
    "gigabytes, processes, passes", [(80, 1, 1), (34, 1, 4), (24, 1, 4), (16, 8, 1), (11, 4, 2), (4, 8, 2)]
)
def test_passes_follow_from_memory(monkeypatch, capsys, gigabytes, processes, passes):
    """At 3.6 GB per image, with a fifth left free, 17, 7, 5, 3, 2 and 1 images fit."""

    class Properties:
        total_memory = gigabytes * 1e9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cfg = load("base_mask_rcnn_R50_FPN.yaml")
    assert d2_engine.plan_passes(cfg, processes) == passes
    each = 16 // processes // passes
    said = f"{processes} cuda x {passes} accumulated x {each}; BatchNorm sees {each * processes}"
    assert said in capsys.readouterr().out


def test_scaled_schedule_is_detectron2s_and_never_with_accumulation(capsys):
    cfg = load("mask_rcnn_R50_FPN_1x.yaml")
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    scaled = d2_engine.DefaultTrainer.auto_scale_workers(cfg, 2)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR, scaled.SOLVER.MAX_ITER) == (4, 0.005, 360000)
    with pytest.raises(InputError, match="--accumulate is 0: it must be at least 1"):
        d2_engine.plan_passes(cfg, 2, 0)
    assert d2_engine.plan_passes(scaled, 2) == 1 and "scaled from 8 GPUs" in capsys.readouterr().out
    with pytest.raises(InputError, match="choose one"):
        d2_engine.plan_passes(scaled, 2, 2)


def test_an_evaluation_of_a_scaled_training_is_its_own(shapes, tmp_path):
    """The masks are run-length encoded and the schedule is scaled. The results have the config of the
    training."""
    scaled = (
        "SOLVER.REFERENCE_WORLD_SIZE",
        2,
        "SOLVER.IMS_PER_BATCH",
        4,
        "SOLVER.MAX_ITER",
        2,
        "SOLVER.STEPS",
        (),
    )
    first = d2_engine.train(tiny(shapes, tmp_path, *scaled))
    again = d2_engine.train(tiny(shapes, tmp_path, *scaled), resume=True, eval_only=True)
    assert first["config"] == again["config"] and "MASK_FORMAT: bitmask" in first["config"]
    assert "MAX_ITER: 4" in first["config"] and "NUM_ITER: 6" in first["config"]  # 4 of 2 images, 6 of 2
    assert not again["eval_only"] and again["iterations"] == 4 and again["ap"] == first["ap"]


def test_schedule_that_cannot_be_scaled(shapes, tmp_path):
    with pytest.raises(
        InputError, match="SOLVER.IMS_PER_BATCH 4 does not divide: leave out --scale-schedule"
    ):
        d2_engine.train(tiny(shapes, tmp_path, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_WORLD_SIZE", 8))


def test_an_error_in_another_process_is_its_one_line(shapes, tmp_path):
    cfg = tiny(shapes, tmp_path, "SOLVER.BASE_LR", 1e12, "SOLVER.MAX_ITER", 8, *FROZEN)
    with pytest.raises(InputError, match="(?s)NaN.*lower SOLVER.BASE_LR") as error:
        d2_engine.train(cfg, d2_engine.Passes(Processes(2)))
    assert "Traceback" not in str(error.value)


def test_weights_of_another_input_are_refused_before_training(weights, shapes, tmp_path):
    cfg = tiny(shapes, tmp_path, "MODEL.WEIGHTS", str(weights), "INPUT.FORMAT", "BGR")
    with pytest.raises(InputError, match="INPUT.FORMAT 'RGB'"):
        d2_engine.train(cfg)
    assert not (tmp_path / "config.yaml").exists()


def zoo_file(weights, path, drop=()):
    """A file like those of Detectron2's zoo: with its names and author, and without provenance."""
    contents = pickle.loads(weights.read_bytes())
    path.write_bytes(
        pickle.dumps(
            {
                "model": {n: a for n, a in contents["model"].items() if n not in drop},
                "__author__": "torchvision",
                "matching_heuristics": True,
            }
        )
    )
    return str(path)


def test_zoo_weights_have_provenance_and_must_arrive_whole(weights, shapes, tmp_path, monkeypatch):
    name = "res4.2.conv2.norm.running_var"
    whole, part = zoo_file(weights, tmp_path / "whole.pkl"), zoo_file(weights, tmp_path / "part.pkl", [name])
    for path in (whole, part):
        monkeypatch.setitem(d2_weights.ZOO, path, RGB_IMAGENET)
    provenance = d2_weights.read_provenance(whole)
    assert provenance["method"] == "supervised" and provenance["input_format"] == "RGB"
    assert provenance["source"] == whole and len(provenance["sha256"]) == 64
    cfg = tiny(
        shapes,
        tmp_path,
        "MODEL.WEIGHTS",
        whole,
        "MODEL.RESNETS.DEPTH",
        50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        256,
    )
    d2_data.register_datasets(cfg)
    trainer = d2_trainer.Trainer(cfg)
    trainer.resume_or_load(False)
    d2_weights.assert_backbone_arrived(trainer.model, weights)
    trainer.cfg.MODEL.WEIGHTS = part
    with pytest.raises(InputError, match=f"1 backbone tensors did not arrive.*{name}"):
        trainer.resume_or_load(False)
    for norm, lost in (("GN", 106), ("", 212)):  # those of the file's 265 that have no place there
        other = tiny(
            shapes,
            tmp_path,
            "MODEL.WEIGHTS",
            whole,
            "MODEL.RESNETS.DEPTH",
            50,
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            256,
            "MODEL.RESNETS.NORM",
            norm,
        )
        with pytest.raises(
            InputError, match=f"{lost} backbone tensors did not arrive.*is its NORM a BatchNorm"
        ):
            d2_trainer.Trainer(other).resume_or_load(False)


def test_msra_weights_have_no_running_statistics(weights, shapes, tmp_path, monkeypatch):
    """A file like MSRA's: Caffe's names, BatchNorm folded into scale and bias, an unused bias of conv1, and
    fc."""

    def caffe(name):
        stage, block, layer, kind = (
            [*name.split("."), ""] if name.startswith("stem") else name.split(".", 3)
        )[:4]
        if stage == "stem":
            return {
                "stem.conv1.weight": "conv1_w",
                "stem.conv1.norm.weight": "res_conv1_bn_s",
                "stem.conv1.norm.bias": "res_conv1_bn_b",
            }[name]
        branch = "branch1" if layer == "shortcut" else f"branch2{'abc'[int(layer[-1]) - 1]}"
        end = {"weight": "_w", "norm.weight": "_bn_s", "norm.bias": "_bn_b"}[kind]
        return f"{stage}_{block}_{branch}{end}"

    arrays = {n: a for n, a in pickle.loads(weights.read_bytes())["model"].items() if "running" not in n}
    blobs = {caffe(n): a for n, a in arrays.items()}
    assert len(blobs) == 53 * 3
    path = tmp_path / "msra.pkl"
    path.write_bytes(
        pickle.dumps(
            {
                "blobs": blobs
                | {
                    "conv1_b": np.zeros(64, np.float32),
                    "fc1000_w": np.zeros((1000, 2048), np.float32),
                    "fc1000_b": np.zeros(1000, np.float32),
                    "conv1_w_momentum": np.zeros(3),
                }
            }
        )
    )
    cfg = tiny(
        shapes,
        tmp_path,
        "MODEL.WEIGHTS",
        str(path),
        "MODEL.RESNETS.DEPTH",
        50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        256,
    )
    d2_data.register_datasets(cfg)
    monkeypatch.setitem(d2_weights.ZOO, str(path), {"statistics": False})
    trainer = d2_trainer.Trainer(cfg)
    trainer.resume_or_load(False)
    found = trainer.model.backbone.bottom_up.state_dict()
    assert all(np.array_equal(found[n].numpy(), a) for n, a in arrays.items())
    monkeypatch.setitem(d2_weights.ZOO, str(path), {})
    with pytest.raises(InputError, match="106 backbone tensors did not arrive.*running_mean"):
        trainer.resume_or_load(False)


def test_a_resumed_run_goes_on_in_the_data(shapes, tmp_path):
    """It reads the images of the iterations after the checkpoint, not those of the first again, in every
    pass."""

    def images(trainer, iterations):
        batches = iter(trainer._trainer.data_loader)
        return [
            [image["image_id"] for image in next(batches)] for _ in range(iterations * trainer.accumulate)
        ]

    cfg = tiny(shapes, tmp_path, "INPUT.MASK_FORMAT", "bitmask")
    d2_data.register_datasets(cfg)
    first = d2_trainer.Trainer(cfg, 2)
    first.resume_or_load(False)
    whole = images(first, 8)
    # an epoch, one image a pass
    assert all(len(batch) == 1 for batch in whole) and len({i for [i] in whole[:8]}) == 8
    first.iter = 2
    first.checkpointer.save("model_0000002", iteration=2)
    again = d2_trainer.Trainer(cfg, 2)
    again.resume_or_load(True)
    assert again.start_iter == 3 and images(again, 5) == whole[6:]


def test_a_full_disk_keeps_the_checkpoint_before(shapes, tmp_path, monkeypatch, capsys):
    """Training goes on and ends with an error of one line; --resume then trains what is missing."""
    options = "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_tensors", full_after("model_0000000.pth"))
        with pytest.raises(InputError, match=r"model_final.pth \(No space left on device\): make room"):
            d2_engine.train(tiny(shapes, tmp_path, *options))
    assert "model_0000001.pth (No space left on device); training goes on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.pth*")] == ["model_0000000.pth"]
    assert d2_engine.train(tiny(shapes, tmp_path, *options), resume=True)["iterations"] == 3


def test_only_known_zoo_files(shapes, tmp_path):
    with pytest.raises(InputError, match="no weights detectron2://ImageNetPretrained/MSRA/R-101.pkl"):
        d2_engine.train(
            tiny(shapes, tmp_path, "MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-101.pkl")
        )


def with_objects_in(shapes, folder, kept):
    """Name of a copy of the data set with objects only in the first ``kept`` images."""
    path, images = shapes.split("::")
    coco = json.load(open(path))
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] <= kept]
    (folder / "some.json").write_text(json.dumps(coco))
    return dataset_name(folder / "some.json", images)


NEGATIVES = "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "INPUT.MASK_FORMAT", "bitmask"
NORMALIZED_HEADS = "MODEL.ROI_BOX_HEAD.NORM", "naiveSyncBN_N", "MODEL.ROI_MASK_HEAD.NORM", "naiveSyncBN_N"


@pytest.mark.parametrize(
    "processes, norms", [(1, ()), pytest.param(2, (), marks=pytest.mark.slow), (2, NORMALIZED_HEADS)]
)
def test_passes_and_iterations_without_any_object_train(shapes, tmp_path, processes, norms):
    """One image of eight has objects, so at least five of six iterations see none on any rank. One process
    has SyncBN; two have their own BatchNorm, or the synchronized one that Detectron2 gives the heads on
    GPUs."""
    one = with_objects_in(shapes, tmp_path, 1)
    cfg = tiny(one, tmp_path / "run", *NEGATIVES, *norms, "SOLVER.MAX_ITER", 6)
    d2_engine.train(cfg, d2_engine.Passes(Processes(processes)))
    assert all(tensor.isfinite().all() for tensor in final(tmp_path / "run").values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    [losses] = [row for row in rows if "total_loss" in row]  # figures of objects have rows of their own
    assert np.isfinite(losses["total_loss"]) and np.isfinite(losses["loss_mask"])


def test_only_the_backbone_takes_it_that_every_rank_has_values(shapes, tmp_path):
    """A head may get no region on a rank, so it keeps Detectron2's own norm."""
    model = d2_model.build_model(tiny(shapes, tmp_path))
    kinds = {
        part: {type(layer).__name__ for layer in module.modules() if "Norm" in type(layer).__name__}
        for part, module in model.named_children()
    }
    assert kinds == {
        "backbone": {"SyncBatchNorm"},
        "proposal_generator": set(),
        "roi_heads": {"NaiveSyncBatchNorm"},
    }
    assert all(
        type(layer) is SyncBatchNorm
        for layer in model.backbone.modules()
        if isinstance(layer, torch.nn.SyncBatchNorm)
    )


def record_gradients(cfg, folder, images):
    """Save a model's gradients and statistics after each process has seen its part of ``images``."""
    import detectron2.utils.comm as comm

    d2_data.register_datasets(cfg)
    torch.manual_seed(1)
    trainer = d2_trainer.Trainer(cfg)
    mapper = d2_data.Mapper(cfg, True)
    share = [mapper(trainer.images[n]) for n in images[comm.get_rank() :: comm.get_world_size()]]
    with EventStorage():
        sum(trainer._trainer.model(share).values()).backward()
    model = trainer.model.module if comm.get_world_size() > 1 else trainer.model
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    torch.save(
        [gradients, dict(model.named_buffers())], f"{folder}/{comm.get_world_size()}_{comm.get_rank()}.pth"
    )


@pytest.mark.parametrize("images", [[0, 7], [6, 7]])
def test_a_rank_without_objects_takes_part_in_the_synchronized_norm(shapes, tmp_path, images):
    """Compared with one process that has torch's own BatchNorm over both images, the mask head's gradient is
    half, because DDP takes the mean with the other rank's zero, and its statistics are the same. Without any
    object, nothing changes."""
    one = with_objects_in(shapes, tmp_path, 1)
    for processes, norms in (
        (1, [n.replace("naiveSyncBN_N", "BN") for n in NORMALIZED_HEADS]),
        (2, NORMALIZED_HEADS),
    ):
        cfg = tiny(one, tmp_path, *FROZEN, *norms, *NEGATIVES)
        launch(record_gradients, processes, dist_url="auto", args=(cfg, str(tmp_path), images))
    whole, first, second = (
        torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("1_0", "2_0", "2_1")
    )
    # each has a gradient, and the mean
    assert all(torch.equal(first[0][name], second[0][name]) for name in whole[0])
    masks = [name for name in whole[0] if "mask_head" in name]
    assert len(masks) == 7
    for name in masks:
        torch.testing.assert_close(2 * first[0][name], whole[0][name], rtol=1e-3, atol=1e-6)
        assert bool(whole[0][name].any()) == (images[0] == 0)
    for name in ("mask_fcn1", "conv1"):
        name = f"roi_heads.{'mask' if 'mask' in name else 'box'}_head.{name}.norm.running_"
        for moment in ("mean", "var"):  # torch's variance has Bessel's correction
            torch.testing.assert_close(first[1][name + moment], whole[1][name + moment], rtol=1e-2, atol=1e-5)
            assert torch.equal(first[1][name + moment], second[1][name + moment])


@pytest.fixture(scope="module")
def damaged(shapes, tmp_path_factory):
    """Name of a copy of the data set with every JPEG truncated, so that any batch has one."""
    folder = tmp_path_factory.mktemp("damaged")
    path, images = map(Path, shapes.split("::"))
    shutil.copytree(images, folder / "images")
    for image in (folder / "images").iterdir():
        image.write_bytes(image.read_bytes()[:-300])
    return dataset_name(path, folder / "images")


@pytest.mark.parametrize("workers, processes", [(0, 1), (1, 1), (2, 1), (1, 2)])
def test_a_truncated_image_is_named_in_one_line(shapes, damaged, tmp_path, capfd, workers, processes):
    cfg = tiny(damaged, tmp_path, "DATASETS.TEST", (shapes,), "DATALOADER.NUM_WORKERS", workers)
    with pytest.raises(
        InputError, match=r"images/train_000\d.jpg cannot be used \(OSError: image file is truncated"
    ) as error:
        d2_engine.train(cfg, d2_engine.Passes(Processes(processes)))
    assert "\n" not in str(error.value) and "DataLoader" not in str(error.value)
    assert "SIGTERM" not in capfd.readouterr().err
    logs = [path.read_text() for path in tmp_path.glob("log.txt*")]
    assert not any("Traceback" in log for log in logs)


def test_a_truncated_image_of_the_validation_set_is_named(shapes, damaged, tmp_path):
    cfg = tiny(damaged, tmp_path, "DATALOADER.NUM_WORKERS", 1)
    d2_data.register_datasets(cfg)
    with pytest.raises(InputError, match="train_0000.jpg cannot be used"):
        next(iter(d2_evaluation.build_test_loader(cfg, damaged)))


OURS = """
MODEL:
  WEIGHTS: "{weights}"
  DEVICE: "cpu"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS: {{NORM: "SyncBN", STRIDE_IN_1X1: False}}
  RPN: {{POST_NMS_TOPK_TRAIN: 10, POST_NMS_TOPK_TEST: 5}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 4}}
  ROI_BOX_HEAD: {{FC_DIM: 64}}
INPUT: {{FORMAT: "RGB", MASK_FORMAT: "bitmask", MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 1, STEPS: []}}
"""


@pytest.fixture(scope="module")
def one_image(tmp_path_factory):
    """Name of a data set of one drawn image, for evaluations."""
    folder = tmp_path_factory.mktemp("one")
    return dataset_name(write_coco(folder, "val", 1, 64, 1), folder / "images")


def stock(name, weights, data, folder, *overrides, val=None):
    """The configuration of a user's YAML file that inherits from Detectron2's ``name`` and sets what our
    weights need, as tools/train_net.py makes it if --train and --val are ``data``."""
    path = folder / "user.yaml"
    path.write_text(f'_BASE_: "{model_zoo.get_config_file(name)}"' + OURS.format(weights=weights))
    args = train_net.parse(
        [
            "--config-file",
            str(path),
            "--train",
            *data.split("::"),
            "--val",
            *(val or data).split("::"),
            "OUTPUT_DIR",
            str(folder / "run"),
            *map(str, overrides),
        ]
    )
    cfg = get_cfg()
    train_net.configure(cfg, args)
    return cfg


@pytest.mark.parametrize(
    "name, key, loss",
    [
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "MODEL.RETINANET.NUM_CLASSES", "loss_cls"),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", "loss_cls"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", "loss_mask"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", "loss_mask"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", "loss_cls_stage2"),
    ],
)
def test_other_architectures_train_from_our_weights(
    weights, shapes, one_image, tmp_path, monkeypatch, name, key, loss
):
    """All 265 tensors arrive, wherever the model has them, and its outputs are for the data set's 8
    classes."""
    arrived = []

    def compare(model, path):
        state = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith("anchor")}
        stored = pickle.loads(weights.read_bytes())["model"]
        found = [
            n for n in stored if any(k.endswith(n) and np.array_equal(t, stored[n]) for k, t in state.items())
        ]
        arrived.append(len(found))

    monkeypatch.setattr(d2_trainer, "assert_backbone_arrived", compare)
    cfg = stock(name, weights, shapes, tmp_path, val=one_image)
    assert value_of(cfg, key) == 18
    results = d2_engine.train(cfg)
    assert arrived == [265] and results["weights"]["format"] == "this project's pre-training"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert np.isfinite(rows[0]["total_loss"]) and loss in rows[0]
    classifier = {
        "loss_cls": "cls_score.",
        "loss_mask": "mask_head.predictor.",
        "loss_cls_stage2": "2.cls_score.",
    }[loss]
    sizes = {tensor.shape[0] for n, tensor in final(tmp_path / "run").items() if classifier + "bias" in n}
    # without and with a background, and for each of nine anchors
    assert sizes <= {18, 19, 162} and len(sizes) == 1
    assert protocol_of(yaml.safe_load(results["config"])) == "other"


def with_keypoints(shapes, folder, names):
    """Name of a copy of the data set in which every object has the keypoints ``names``, at the corners of its
    box."""
    path, images = shapes.split("::")
    coco = json.load(open(path))
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["keypoints"] = [
            v for n in range(len(names)) for v in (x + w * (n % 2), y + h * (n // 2 % 2), 2)
        ]
        annotation["num_keypoints"] = len(names)
    for category in coco["categories"]:
        category["keypoints"] = names
    (folder / "keypoints.json").write_text(json.dumps(coco))
    return dataset_name(folder / "keypoints.json", images)


KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"


def test_keypoints_train_and_are_measured(weights, shapes, one_image, tmp_path, capfd):
    (tmp_path / "val").mkdir()
    data, val = (
        with_keypoints(name, folder, ["left_top", "right_top", "bottom"])
        for name, folder in ((shapes, tmp_path), (one_image, tmp_path / "val"))
    )
    cfg = stock(
        KEYPOINT_RCNN,
        weights,
        data,
        tmp_path,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
        3,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS",
        [32, 32],
        "TEST.KEYPOINT_OKS_SIGMAS",
        [0.1] * 3,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        0.0,
        "TEST.PRECISE_BN.ENABLED",
        True,
        "TEST.PRECISE_BN.NUM_ITER",
        2,
        val=val,
    )
    results = d2_engine.train(cfg)
    assert (
        "keypoints that swap places in a mirrored image: left_top and right_top (" in capfd.readouterr().out
    )
    assert results["ap"]["keypoints"]["AP"] is not None and results["ap"]["keypoints"]["APs"] is None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert (
        np.isfinite(rows[0]["loss_keypoint"]) and rows[-1]["keypoints/AP"] == results["ap"]["keypoints"]["AP"]
    )


def test_keypoints_that_do_not_fit_are_refused_before_training(weights, shapes, tmp_path):
    def message(data, *overrides):
        with pytest.raises(InputError) as error:
            d2_engine.train(stock(KEYPOINT_RCNN, weights, data, tmp_path, *overrides))
        return str(error.value)

    assert "needs the names of the keypoints in each of the categories" in message(shapes)
    data = with_keypoints(shapes, tmp_path, ["a", "b"])
    assert "has 2 keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 17: add MODEL.ROI_KEYP" in message(
        data
    )
    two = ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2]
    assert "TEST.KEYPOINT_OKS_SIGMAS has 0 numbers: COCO's metric needs one for each of the 2" in message(
        data, *two
    )
    two += ["TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1]]
    path, images = data.split("::")
    coco = json.loads(Path(path).read_text())
    for key, words in (
        ("num_keypoints", "annotation 3 lacks num_keypoints"),
        ("keypoints", "annotation 3 has 0 numbers for its keypoints: 2 keypoints need 6, the x"),
    ):
        del coco["annotations"][2][key]
        (tmp_path / f"no_{key}.json").write_text(json.dumps(coco))
        assert words in message(dataset_name(tmp_path / f"no_{key}.json", images), *two)


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        (
            "COCO-Detection/rpn_R_50_FPN_1x.yaml",
            (),
            "MODEL.META_ARCHITECTURE is 'ProposalNetwork', but the detectron2 engine",
        ),
        (
            "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
            (),
            "MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals'",
        ),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
            (),
            "MODEL.META_ARCHITECTURE is 'PanopticFPN'",
        ),
        (
            "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
            ("MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 60),
            r"cannot build the network .*KeyError: 60",
        ),
        (
            "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
            ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]),
            "cannot build the network .*AssertionError: .*res5",
        ),
    ],
)
def test_architectures_that_cannot_be_trained_are_refused(
    weights, shapes, tmp_path, name, overrides, message
):
    with pytest.raises(InputError, match=message) as error:
        d2_engine.train(stock(name, weights, shapes, tmp_path, *overrides))
    assert "\n" not in str(error.value)


def test_code_in_a_config_file_is_not_run(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"A: !!python/object/apply:eval [\"open({str(tmp_path / 'it ran')!r}, 'w')\"]")
    with pytest.raises(InputError, match="is code, which is not run: write its value") as error:
        merge_config(get_cfg(), str(path), [])
    assert not (tmp_path / "it ran").exists() and "\n" not in str(error.value)
