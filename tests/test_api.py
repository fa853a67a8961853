"""The Python API: the examples of the README and of the converter's docs, run as they are written, and what
each function returns."""

import re
import sys

import pytest
import safetensors.torch
import timm
import torch

import rsa_detectron2 as rsa
from rsa_detectron2.tools import embed
from tests.conftest import ROOT, TINY

CONVERTER = (ROOT / "docs" / "commands.md").read_text().split("## tools/")[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text() + CONVERTER, re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch, image_folder, resnet50_checkpoint):
    """A working directory that holds what the examples name: images and a pre-trained checkpoint."""
    (tmp_path / "images").symlink_to(image_folder)
    (tmp_path / "pretrained.pth").symlink_to(resnet50_checkpoint)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples(folder, monkeypatch):
    assert len(EXAMPLES) == 5
    pretrain_backbone = rsa.pretrain_backbone

    def tiny(recipe, overrides):  # as the example says, but for the size
        short = "SOLVER.EPOCHS", 1, "SOLVER.WARMUP_EPOCHS", 0
        return pretrain_backbone(recipe, [*overrides, *TINY, "MODEL.BACKBONE", "resnet50", *short])

    monkeypatch.setattr(rsa, "pretrain_backbone", tiny)
    namespace = {}
    for example in EXAMPLES:
        if "detectron2" in re.sub("rsa_detectron2", "", example):
            pytest.importorskip("detectron2")
        if "features.npy" in example:
            monkeypatch.setattr(sys, "argv", ["embed"])
            embed.main()
        exec(example, namespace)
    assert namespace["features"].shape == (24, 2048) and len(namespace["names"]) == 24


@pytest.mark.parametrize("to, suffix", (("torchvision", "pth"), ("timm", "safetensors")))
def test_features_are_those_of_the_checkpoint(folder, to, suffix):
    """The converted file gives the features of the checkpoint itself, in float32 to 1e-6 relative."""
    path = folder / f"backbone.{suffix}"
    provenance = rsa.convert_backbone("pretrained.pth", path, to=to)
    assert (provenance["method"], provenance["step"], provenance["branch"]) == ("rsa", 7, "online")
    names, features = rsa.extract_features("pretrained.pth", "images", limit=3)
    again, same = rsa.extract_features(path, "images", limit=3)
    assert names == again and features.shape == (3, 2048)
    torch.testing.assert_close(same, features, rtol=1e-6, atol=1e-6)


def test_stock_detectron2_gives_the_same_features(folder):
    """res2 to res5 of stock Detectron2 after add_rsa_config equal timm's stages to 1e-5 relative."""
    checkpoint = pytest.importorskip("detectron2.checkpoint")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    rsa.convert_backbone("pretrained.pth", "r50.pkl")
    cfg = get_cfg()
    rsa.add_rsa_config(cfg)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.DEVICE = "cpu"
    stock = build_backbone(cfg).eval()
    checkpoint.DetectionCheckpointer(stock).load("r50.pkl")

    rsa.convert_backbone("pretrained.pth", "r50.safetensors", to="timm")
    network = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    network.load_state_dict(safetensors.torch.load_file("r50.safetensors"), strict=False)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, given = network(images), stock(images)
    for name, features in zip(("res2", "res3", "res4", "res5"), wanted):
        difference = (given[name] - features).abs().max() / features.abs().max()
        assert difference < 1e-5, name
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375] and cfg.INPUT.FORMAT == "RGB"


def test_length_chooses_the_learning_rate_in_python_too(folder, monkeypatch, capsys):
    from rsa_detectron2.pretrain.engine import trainer

    monkeypatch.setattr(trainer, "train", lambda cfg, origin, reader: f"{cfg.SOLVER.BASE_LR}")
    rate = rsa.pretrain_backbone("pretrain/imagenet_rsa_R50.yaml", ["SOLVER.EPOCHS", 100])
    assert str(rate) == "0.9" and "published for 100 epochs" in capsys.readouterr().out


def test_mistakes_are_one_line(folder):
    with pytest.raises(rsa.InputError, match="^no config file absent.yaml: looked in"):
        rsa.pretrain_backbone("absent.yaml")
    with pytest.raises(rsa.InputError, match="^no checkpoint absent.pth"):
        rsa.convert_backbone("absent.pth", "a.pkl")
    with pytest.raises(rsa.InputError, match="results.json"):
        rsa.read_results(folder)
