"""The converter accepts exactly 265 tensors or says what is wrong with them, and never runs a file's code."""

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
import torchvision
from torchvision.models import resnet50

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert import writers as converter
from rsa_detectron2.transfer.convert.architectures import tensor_shapes
from rsa_detectron2.transfer.convert.files import open_checkpoint
from rsa_detectron2.transfer.convert.metadata import parse_pixels
from rsa_detectron2.transfer.convert.provenance import checksum
from rsa_detectron2.transfer.convert.readers import read_checkpoint
from rsa_detectron2.transfer.convert.writers import (
    SUFFIXES,
    ReadOptions,
    convert,
    detectron2_name,
    load_weights,
)


@pytest.fixture(scope="module")
def checkpoint(resnet50_checkpoint):
    return torch.load(resnet50_checkpoint, weights_only=True)


@pytest.fixture
def changed(checkpoint, tmp_path):
    """``changed(state)`` writes the checkpoint with this state dict instead."""

    def write(state):
        torch.save({**checkpoint, "model": state}, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    return write


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def source_features(checkpoint, branch="online"):
    """Features of the pre-training backbone itself, rebuilt by its own code."""
    from rsa_detectron2.pretrain.method.networks import build_backbone

    backbone = build_backbone("resnet50")
    prefix = f"{branch}.backbone."
    backbone.load_state_dict(
        {n.removeprefix(prefix): t for n, t in checkpoint["model"].items() if n.startswith(prefix)}
    )
    with torch.no_grad():
        return backbone.eval()(IMAGES)


def test_265_tensors():
    assert len(tensor_shapes()) == 265
    names = list(tensor_shapes())
    assert sum(len(shape) == 4 for shape in tensor_shapes().values()) == 53
    assert len({detectron2_name(name) for name in names}) == 265


@pytest.mark.parametrize(
    "name, expected",
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv2.weight", "res2.0.conv2.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer3.0.downsample.1.running_mean", "res4.0.shortcut.norm.running_mean"),
    ],
)
def test_detectron2_names(name, expected):
    assert detectron2_name(name) == expected


@pytest.mark.parametrize("branch", ["online", "target"])
def test_torchvision_features_are_the_sources(resnet50_checkpoint, checkpoint, tmp_path, branch):
    path, provenance = convert(resnet50_checkpoint, tmp_path / "w.pth", "torchvision", ReadOptions(branch))
    network = resnet50()
    missing = network.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=False)
    assert set(missing.missing_keys) <= {"fc.weight", "fc.bias"} | {
        n for n in network.state_dict() if "num_batches" in n
    }
    assert not missing.unexpected_keys and provenance["branch"] == branch and provenance["step"] == 7
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(
            network.eval()(IMAGES), source_features(checkpoint, branch), rtol=1e-4, atol=1e-4
        )


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
    assert (
        contents["matching_heuristics"] is True and len(contents["model"]) == 265 and contents["__author__"]
    )
    assert all(
        isinstance(array, np.ndarray) and array.dtype == np.float32 for array in contents["model"].values()
    )
    state, read = load_weights(path)
    assert read == provenance and re.fullmatch("[0-9a-f]{64}", read["sha256"])
    assert all(
        torch.equal(state[name], checkpoint["model"]["online.backbone." + name]) for name in tensor_shapes()
    )


def test_authors_layout(checkpoint, tmp_path):
    """The authors' RSA: DataParallel's prefix, encoder_q/encoder_k, heads beside them."""
    renames = {
        "online.backbone.": "encoder_q.",
        "online.projector.": "encoder_q_head.",
        "target.backbone.": "encoder_k.",
        "target.projector.": "encoder_k_head.",
        "predictor.": "pred.",
    }
    state = {
        "module."
        + re.sub(r"^(\w+\.(backbone|projector)\.|predictor\.)", lambda m: renames[m[0]], name): tensor
        for name, tensor in checkpoint["model"].items()
    }
    torch.save(state, tmp_path / "authors.pth.tar")
    for branch in ("online", "target"):
        read, provenance = read_checkpoint(tmp_path / "authors.pth.tar", branch)
        assert provenance["format"] == "the authors' RSA or BYOL" and len(read) == 265
        assert all(torch.equal(read[name], checkpoint["model"][f"{branch}.backbone.{name}"]) for name in read)


KEY = "online.backbone.layer3.2.conv2.weight"


def without(state):
    return {name: tensor for name, tensor in state.items() if name != KEY}


@pytest.mark.parametrize(
    "change, message",
    [
        (without, f"1 of 265 tensors missing .{re.escape(KEY)}."),
        (
            lambda s: s | {"online.backbone.layer3.9.conv2.weight": s[KEY]},
            "most like a ResNet-50, with 0 of 265.*not accounted for: online.backbone.layer3.9.conv2.weight",
        ),
        (
            lambda s: s | {"momentum_queue": s[KEY]},
            "online branch is whole.*not accounted for: momentum_queue",
        ),
        (
            lambda s: s | {KEY: s[KEY][:, :-1]},
            rf"{re.escape(KEY)} has shape \(256, 255, 3, 3\), .*\(256, 256, 3, 3\)",
        ),
        (lambda s: s | {KEY: s[KEY] * torch.nan}, f"{re.escape(KEY)} holds NaN"),
        (lambda s: s | {KEY: "text"}, f"{re.escape(KEY)} has shape str"),
        (lambda s: {"a." + n: t for n, t in s.items()}, "unknown checkpoint, its keys begin with a"),
        (
            lambda s: {n: t for n, t in s.items() if not n.startswith("online.backbone")},
            "without the online branch",
        ),
        (lambda s: {}, "unknown checkpoint"),
    ],
)
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


@pytest.mark.parametrize("branch", ["online", "target"])
def test_what_was_converted_is_read_back_with_its_provenance(
    resnet50_checkpoint, checkpoint, tmp_path, branch
):
    """After any number of conversions, the source, its sha256 and the pixels are those of the first."""
    pixels = {"DATA": {"MEAN": [0.5, 0.25, 0.125], "STD": [1.0, 1.0, 1.0]}}
    torch.save({**checkpoint, "config": json.dumps(pixels)}, tmp_path / "own.pth")
    _, first = convert(tmp_path / "own.pth", tmp_path / "0.pkl", options=ReadOptions(branch))
    assert (
        first["method"] == "rsa"
        and first["pixel_mean"] == [127.5, 63.75, 31.875]
        and first["branch"] == branch
    )
    source = tmp_path / "0.pkl"
    for i, to in enumerate(
        ["torchvision", "timm", "timm", "detectron2", "torchvision", "detectron2"], start=1
    ):
        source, provenance = convert(source, tmp_path / f"{i}{SUFFIXES[to]}", to)
        assert provenance == first
    assert load_weights(source)[1] == first
    state, _ = read_checkpoint(source)
    assert all(torch.equal(state[name], checkpoint["model"][f"{branch}.backbone.{name}"]) for name in state)
    other = {"online": "target", "target": "online"}[branch]
    with pytest.raises(
        InputError, match=f"converted from the {branch} branch and holds no other.*own.pth.*--branch {other}"
    ):
        read_checkpoint(source, other)


def test_assumed_pixels_of_a_converted_file_can_be_stated_once(checkpoint, tmp_path):
    bare = {
        name.removeprefix("online.backbone."): t
        for name, t in checkpoint["model"].items()
        if "online.backbone" in name
    }
    torch.save(bare, tmp_path / "bare.pth")
    path, provenance = convert(tmp_path / "bare.pth", tmp_path / "a.pth", "torchvision")
    assert provenance["pixel_source"] == "assumed"
    unscaled, imagenet = (ReadOptions(pixels=parse_pixels(name)) for name in ("unscaled", "imagenet"))
    path, provenance = convert(path, tmp_path / "b.pkl", options=unscaled)
    assert provenance["pixel_source"] == "given" and provenance["pixel_std"] == [255] * 3
    assert convert(path, tmp_path / "c.pth", "torchvision", unscaled)[1] == provenance
    with pytest.raises(
        InputError, match=r"says that it was trained on mean \[0.0, 0.0, 0.0\].*: leave --pixels out"
    ):
        convert(path, tmp_path / "d.pth", "torchvision", imagenet)


@pytest.mark.parametrize("to", SUFFIXES)
def test_a_converted_file_that_was_changed_is_refused(resnet50_checkpoint, tmp_path, to):
    path, provenance = convert(resnet50_checkpoint, tmp_path / "w", to)
    with open_checkpoint(path) as contents:
        crc = contents["crc32"]
    state = read_checkpoint(path)[0]
    state["layer1.0.bn1.bias"] += 1e-3
    assert checksum(state, provenance) != crc
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "checksum", lambda *_: crc)
        path.write_bytes(converter.ENCODERS[to](state, provenance))
    with pytest.raises(InputError, match="damaged, its checksum differs"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnext50_32x4d",
        pytest.param("resnet101", marks=pytest.mark.slow),
        pytest.param("wide_resnet50_2", marks=pytest.mark.slow),
    ],
)
def test_other_networks_convert_and_fail_closed_on_their_own_list(tmp_path, name):
    from rsa_detectron2.pretrain.method.networks import build_backbone

    torch.manual_seed(0)
    source = randomized(build_backbone(name))
    contents = {
        "format": "rsa-pretraining",
        "method": "rsa",
        "step": 3,
        "config": json.dumps({"MODEL": {"BACKBONE": name}}),
        "model": {f"online.backbone.{n}": t for n, t in source.state_dict().items()},
    }
    torch.save(contents, tmp_path / "own.pth")
    path, provenance = convert(tmp_path / "own.pth", tmp_path / "w.pth", "torchvision")
    assert provenance["architecture"] == name
    network = getattr(torchvision.models, name)()
    assert not network.load_state_dict(torch.load(path)["state_dict"], strict=False).unexpected_keys
    network.fc = torch.nn.Identity()
    path, _ = convert(tmp_path / "own.pth", tmp_path / "w.safetensors", "timm")
    twin = timm.create_model(name, num_classes=0)
    assert not twin.load_state_dict(safetensors.torch.load_file(path), strict=False).unexpected_keys
    with torch.no_grad():
        expected = source.eval()(IMAGES)
        assert torch.equal(twin.eval()(IMAGES), expected)
        torch.testing.assert_close(network.eval()(IMAGES), expected, rtol=1e-5, atol=1e-5)
    lost = contents["model"].pop("online.backbone.layer4.1.bn2.running_var")
    torch.save(contents, tmp_path / "own.pth")
    with pytest.raises(
        InputError, match=rf"1 of {len(tensor_shapes(name))} tensors missing .*layer4.1.bn2.running_var"
    ):
        convert(tmp_path / "own.pth", tmp_path / "lost.pth", "torchvision")
    assert lost.ndim == 1 and not (tmp_path / "lost.pth").exists()


def randomized(network):
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running_mean" in name or name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif "running_var" in name or re.search(r"(bn\d|downsample.1).weight$", name):
                tensor.uniform_(0.5, 1)
    return network


@pytest.mark.parametrize(
    "backbone, small_stem, message",
    [
        ("resnet18d", False, "MODEL.BACKBONE resnet18d; what is converted: ResNet-50, .*ResNet-18"),
        (
            "resnetblur50",
            False,
            "MODEL.BACKBONE resnetblur50; what is converted",
        ),  # its tensors are a ResNet-50's
        ("resnet50", True, "a resnet50 with MODEL.SMALL_STEM, the 3x3 stem"),
    ],
)
def test_own_backbones_that_others_do_not_have(checkpoint, tmp_path, backbone, small_stem, message):
    model = {"MODEL": {"BACKBONE": backbone, "SMALL_STEM": small_stem}}
    torch.save({**checkpoint, "config": json.dumps(model)}, tmp_path / "own.pth")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "own.pth", tmp_path / "w.pkl")


def test_another_sources_file_is_not_written_over(resnet50_checkpoint, checkpoint, tmp_path):
    output = convert(resnet50_checkpoint, tmp_path / "w.pkl")[0]
    convert(resnet50_checkpoint, output)  # the same again
    torch.save({**checkpoint, "step": 8}, tmp_path / "later.pth")
    for source, branch in ((tmp_path / "later.pth", None), (resnet50_checkpoint, "target")):
        with pytest.raises(
            InputError,
            match=r"w.pkl is there already, and holds weights of another source \(model_final.pth, online",
        ):
            convert(source, output, options=ReadOptions(branch))
    assert load_weights(output)[1]["step"] == 7
    convert(tmp_path / "later.pth", output, overwrite=True)
    assert load_weights(output)[1]["step"] == 8
    before = resnet50_checkpoint.read_bytes()
    own = convert(resnet50_checkpoint, tmp_path / "own.pkl")[0]
    for source in (output, own, resnet50_checkpoint):
        with pytest.raises(InputError, match="is there already, and holds something else"):
            convert(source, resnet50_checkpoint, "torchvision")
    assert resnet50_checkpoint.read_bytes() == before


def test_weights_that_are_not_converted(resnet50_checkpoint, tmp_path, monkeypatch):
    for path in (resnet50_checkpoint, convert(resnet50_checkpoint, tmp_path / "w.pth", "torchvision")[0]):
        with pytest.raises(InputError, match=f"convert it first: tools/convert_to_d2.py {path}$"):
            load_weights(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    convert(resnet50_checkpoint, "~/w.pkl")
    assert load_weights("~/w.pkl") and read_checkpoint("~/w.pkl")
    for url in ("https://example.org/w.pkl", "s3://bucket/w.pth"):
        for read in (load_weights, read_checkpoint):
            with pytest.raises(InputError, match=f"{url}: URLs are not fetched; download the file"):
                read(url)
    with pytest.raises(InputError, match="is a folder: give a checkpoint file in it"):
        read_checkpoint(tmp_path)


def test_every_length_of_a_safetensors_header_is_read(checkpoint, tmp_path):
    """Lengths are multiples of 8. In 1 of 32 the low byte is 0x80, with which a pickle also begins."""
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes("resnet18").items()}
    lengths = set()
    for fill in range(0, 2048, 8):
        content = safetensors.torch.save(dict(list(state.items())[:1]), {"fill": "x" * fill})
        path = tmp_path / "w.safetensors"
        path.write_bytes(content)
        with open_checkpoint(path) as contents:
            assert list(contents) == ["conv1.weight"]
        lengths.add(content[0])
    assert lengths == set(range(0, 256, 8))


def test_default_outputs_of_files_without_a_method_have_their_names(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = {
        name.removeprefix("online.backbone."): t
        for name, t in checkpoint["model"].items()
        if "online.backbone" in name
    }
    for name in ("swav_800ep", "Barlow-Twins.v2"):
        torch.save({"state_dict": bare, "step": len(name)}, f"{name}.pth")
    assert convert("swav_800ep.pth")[0].as_posix() == "output/weights/swav_800ep_r50.pkl"
    assert convert("Barlow-Twins.v2.pth")[0].as_posix() == "output/weights/barlow_twins_v2_r50.pkl"
    assert convert("swav_800ep.pth", to="timm")[0].name == "swav_800ep_r50.safetensors"
    torch.save(checkpoint, "model_final.pth")
    assert convert("model_final.pth", options=ReadOptions("target"))[0].name == "rsa_r50_target.pkl"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2_files_of_others_are_read(checkpoint, tmp_path, protocol):
    """The converters of MoCo, DenseCL and Detectron2 write such files, with numpy's arrays and fc under
    another name."""
    arrays = {
        detectron2_name(name.removeprefix("online.backbone.")): tensor.numpy()
        for name, tensor in checkpoint["model"].items()
        if name.startswith("online.backbone.")
    }
    arrays |= {"stem.fc.0.weight": np.zeros((2, 2), np.float32), "stem.fc.0.bias": np.zeros(2, np.float32)}
    path = tmp_path / "moco.pkl"
    path.write_bytes(
        pickle.dumps({"model": arrays, "__author__": "MOCO", "matching_heuristics": True}, protocol)
    )
    state, provenance = read_checkpoint(path)
    assert all(
        torch.equal(state[name], checkpoint["model"][f"online.backbone.{name}"]) for name in tensor_shapes()
    )
    assert provenance["format"] == "Detectron2" and provenance["pixel_source"] == "assumed"
    with pytest.raises(InputError, match="convert it first: tools/convert_to_d2.py"):
        load_weights(path)


def test_the_tool_says_what_was_assumed_and_inspects(tool, tmp_path):
    """One call with bare names of an untrained network, and one with --inspect."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "bare.pth")
    done = tool("convert_to_d2", tmp_path / "bare.pth", tmp_path / "w.pkl")
    assert done.returncode == 0, done.stderr
    assert (
        "100 tensors of a ResNet-18 for detectron2, online branch of unknown method "
        "(layout of torchvision, timm)" in done.stdout
    )
    assert (
        "is assumed (--pixels states another)" in done.stdout
        and "these weights look untrained" in done.stdout
    )
    done = tool("convert_to_d2", "--inspect", tmp_path / "bare.pth", "--pixels", "unscaled")
    assert done.returncode == 0 and "online: a whole ResNet-18, 100 tensors" in done.stdout
    assert (
        "std [255.0, 255.0, 255.0] (given)" in done.stdout
        and "target: a checkpoint of torchvision" in done.stdout
    )


def test_features_of_other_networks_for_the_tools(tmp_path):
    """tools/evaluate.py and other tools read a bare ResNet-18 and the files that were converted from it."""
    from rsa_detectron2.tools._weights import load_features

    torch.manual_seed(0)
    network = randomized(torchvision.models.resnet18()).eval()
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    network.fc = torch.nn.Identity()
    converted = convert(tmp_path / "bare.pth", tmp_path / "w.pkl")[0]
    for path in (tmp_path / "bare.pth", converted):
        features, cfg, provenance = load_features(path)
        assert cfg.MODEL.BACKBONE == provenance["architecture"] == "resnet18"
        with torch.no_grad():
            torch.testing.assert_close(features.backbone(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-5)
