"""What only Detectron2 itself can confirm: names and values of the weights, and what the configs change."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2 import model_zoo  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from transfer import d2_trainer  # noqa: E402
from transfer.config import InputError, torchvision_defaults  # noqa: E402
from transfer.convert import convert  # noqa: E402

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


PROTOCOL = {  # DESIGN's list of what InfoMin's protocol changes
    "MODEL.WEIGHTS": "output/weights/rsa_r50.pkl",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
    "INPUT.FORMAT": "RGB",
    "TEST.PRECISE_BN.ENABLED": True,
}


@pytest.mark.parametrize("name, schedule", [
    ("mask_rcnn_R50_FPN_1x", {}),
    ("mask_rcnn_R50_FPN_2x", {"SOLVER.BASE_LR": 0.03, "SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000})])
def test_configs_are_stock_but_for_the_protocol(name, schedule):
    stock = get_cfg()
    stock.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    ours, stock = dict(flat(load(name + ".yaml"))), dict(flat(stock))
    assert {k: v for k, v in ours.items() if stock[k] != v} == {**PROTOCOL, **schedule, "OUTPUT_DIR": f"output/{name}"}


def test_embedded_defaults_are_detectron2s():
    detectron2 = dict(flat(get_cfg()))
    assert {k: v for k, v in flat(torchvision_defaults()) if detectron2[k] != v} == {}


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
    """A real photograph where the sample lies beside the project, noise elsewhere."""
    found = sorted((ROOT.parent / "shared" / "data" / "imagenet_sample" / "train").glob("*/*"))
    if found:
        return Image.open(found[0]).convert("RGB").resize((224, 224))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))


def test_features_are_those_of_the_pretraining_backbone(model, resnet50_checkpoint):
    """Detectron2's own pre-processing and backbone against the timm network that was trained, stage by stage."""
    from pretrain.networks import build_backbone

    backbone = build_backbone("resnet50")
    prefix = "online.backbone."
    state = torch.load(resnet50_checkpoint, weights_only=True)["model"]
    backbone.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    pixels = torch.from_numpy(np.array(photograph())).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        x = backbone.eval().maxpool(backbone.act1(backbone.bn1(backbone.conv1(((pixels / 255 - mean) / std)[None]))))
        features = model.backbone.bottom_up(model.preprocess_image([{"image": pixels}]).tensor)
        for stage in (1, 2, 3, 4):
            x = getattr(backbone, f"layer{stage}")(x)
            difference = (features[f"res{stage + 1}"] - x).abs().max() / x.abs().max()
            assert difference < 1e-4, (stage, difference)


def test_a_tensor_that_did_not_arrive_is_named(model, weights):
    d2_trainer.assert_backbone_arrived(model, weights)
    tensor = model.backbone.bottom_up.res3[1].conv2.norm.running_var
    kept = tensor.clone()
    tensor.add_(1e-3)
    with pytest.raises(InputError, match=r"1 of 265 .*res3.1.conv2.norm.running_var"):
        d2_trainer.assert_backbone_arrived(model, weights)
    tensor.copy_(kept)


def test_wrong_number_of_classes_is_named(tmp_path):
    from transfer.shapes import write_coco

    annotations = write_coco(tmp_path, "val", 2, 64, 0)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (f"{annotations}::{tmp_path / 'images'}",)
    with pytest.raises(InputError, match="NUM_CLASSES 8"):
        d2_trainer.register_datasets(cfg)
