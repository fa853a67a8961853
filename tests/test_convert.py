"""The converter takes exactly 265 tensors, or says what is wrong with them; and it never runs a file's code."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from torchvision.models import resnet50

from transfer.architectures import tensor_shapes
from transfer.config import InputError
from transfer.convert import convert, detectron2_name, load_weights
from transfer.readers import read_checkpoint


@pytest.fixture(scope="module")
def checkpoint(resnet50_checkpoint):
    return torch.load(resnet50_checkpoint, weights_only=True)


@pytest.fixture
def changed(checkpoint, tmp_path):
    """``changed(state)`` writes the checkpoint with another state dict."""

    def write(state):
        torch.save({**checkpoint, "model": state}, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    return write


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def source_features(checkpoint, branch="online"):
    """Features of the pre-training backbone itself, rebuilt by its own code."""
    from pretrain.networks import build_backbone

    backbone = build_backbone("resnet50")
    prefix = f"{branch}.backbone."
    backbone.load_state_dict({n.removeprefix(prefix): t for n, t in checkpoint["model"].items() if n.startswith(prefix)})
    with torch.no_grad():
        return backbone.eval()(IMAGES)


def test_265_tensors():
    assert len(tensor_shapes()) == 265
    names = list(tensor_shapes())
    assert sum(len(shape) == 4 for shape in tensor_shapes().values()) == 53
    assert len({detectron2_name(name) for name in names}) == 265


@pytest.mark.parametrize("name, expected", [
    ("conv1.weight", "stem.conv1.weight"), ("bn1.running_var", "stem.conv1.norm.running_var"),
    ("layer1.0.conv2.weight", "res2.0.conv2.weight"), ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
    ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
    ("layer3.0.downsample.1.running_mean", "res4.0.shortcut.norm.running_mean")])
def test_detectron2_names(name, expected):
    assert detectron2_name(name) == expected


@pytest.mark.parametrize("branch", ["online", "target"])
def test_torchvision_features_are_the_sources(resnet50_checkpoint, checkpoint, tmp_path, branch):
    path, provenance = convert(resnet50_checkpoint, tmp_path / "w.pth", "torchvision", branch)
    network = resnet50()
    missing = network.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=False)
    assert set(missing.missing_keys) <= {"fc.weight", "fc.bias"} | {n for n in network.state_dict() if "num_batches" in n}
    assert not missing.unexpected_keys and provenance["branch"] == branch and provenance["step"] == 7
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(IMAGES), source_features(checkpoint, branch), rtol=1e-4, atol=1e-4)


def test_timm_features_are_the_sources(resnet50_checkpoint, checkpoint, tmp_path):
    path, _ = convert(resnet50_checkpoint, tmp_path / "w.safetensors", "timm")
    network = timm.create_model("resnet50", num_classes=0)
    assert not network.load_state_dict(safetensors.torch.load_file(path), strict=False).unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(IMAGES), source_features(checkpoint), rtol=1e-4, atol=1e-4)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["provenance"])["method"] == "rsa"


def test_detectron2_file_reads_back(resnet50_checkpoint, checkpoint, tmp_path):
    path, provenance = convert(resnet50_checkpoint, tmp_path / "w.pkl")
    contents = pickle.loads(path.read_bytes())
    assert contents["matching_heuristics"] is True and len(contents["model"]) == 265 and contents["__author__"]
    assert all(isinstance(array, np.ndarray) and array.dtype == np.float32 for array in contents["model"].values())
    state, read = load_weights(path)
    assert read == provenance and re.fullmatch("[0-9a-f]{64}", read["sha256"])
    assert all(torch.equal(state[name], checkpoint["model"]["online.backbone." + name]) for name in tensor_shapes())


def test_authors_layout(checkpoint, tmp_path):
    """The authors' RSA: DataParallel's prefix, encoder_q/encoder_k, heads beside them."""
    renames = {"online.backbone.": "encoder_q.", "online.projector.": "encoder_q_head.", "target.backbone.": "encoder_k.",
               "target.projector.": "encoder_k_head.", "predictor.": "pred."}
    state = {"module." + re.sub(r"^(\w+\.(backbone|projector)\.|predictor\.)", lambda m: renames[m[0]], name): tensor
             for name, tensor in checkpoint["model"].items()}
    torch.save(state, tmp_path / "authors.pth.tar")
    for branch in ("online", "target"):
        read, provenance = read_checkpoint(tmp_path / "authors.pth.tar", branch)
        assert provenance["format"] == "the authors' RSA or BYOL" and len(read) == 265
        assert all(torch.equal(read[name], checkpoint["model"][f"{branch}.backbone.{name}"]) for name in read)


KEY = "online.backbone.layer3.2.conv2.weight"


def without(state):
    return {name: tensor for name, tensor in state.items() if name != KEY}


@pytest.mark.parametrize("change, message", [
    (without, f"1 of 265 tensors missing .{re.escape(KEY)}."),
    (lambda s: s | {"online.backbone.layer3.9.conv2.weight": s[KEY]}, "most like a ResNet-50, with 0 of 265.*not accounted for: online.backbone.layer3.9.conv2.weight"),
    (lambda s: s | {"momentum_queue": s[KEY]}, "online branch is whole.*not accounted for: momentum_queue"),
    (lambda s: s | {KEY: s[KEY][:, :-1]}, rf"{re.escape(KEY)} has shape \(256, 255, 3, 3\), .*\(256, 256, 3, 3\)"),
    (lambda s: s | {KEY: s[KEY] * torch.nan}, f"{re.escape(KEY)} holds NaN"),
    (lambda s: s | {KEY: "text"}, f"{re.escape(KEY)} has shape str"),
    (lambda s: {"a." + n: t for n, t in s.items()}, "unknown checkpoint, its keys begin with a"),
    (lambda s: {n: t for n, t in s.items() if not n.startswith("online.backbone")}, "without the online branch"),
    (lambda s: {}, "unknown checkpoint")])
def test_fails_closed_and_names_the_tensor(checkpoint, changed, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        convert(changed(change(checkpoint["model"])), tmp_path / "out.pkl")
    assert not (tmp_path / "out.pkl").exists()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_runs(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"model": {"online.backbone.conv1.weight": Hostile(trap)}}, tmp_path / "hostile.pth")
    with pytest.raises(InputError, match="hostile.pth"):
        read_checkpoint(tmp_path / "hostile.pth")
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps({"model": Hostile(trap), "provenance": {}}))
    with pytest.raises(InputError, match="hostile.pkl"):
        load_weights(tmp_path / "hostile.pkl")
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100), pickle.dumps([1, 2])])
def test_broken_files_are_one_line(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    for read in (read_checkpoint, load_weights):
        with pytest.raises(InputError, match="broken.pth") as error:
            read(path)
        assert "\n" not in str(error.value)
