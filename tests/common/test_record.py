"""The record of a run: in its folder from its start, in its checkpoints, and in files made from them."""

import json

import pytest
import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common import record
from rsa_detectron2.common.config import origin
from rsa_detectron2.common.errors import Interrupted
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.method.networks import build_backbone
from rsa_detectron2.tools._weights import read_networks
from rsa_detectron2.transfer.convert.readers import read_checkpoint
from rsa_detectron2.transfer.convert.writers import convert, load_weights
from tests.conftest import ROOT, TINY, rsa_networks, tiny_cfg


def test_settings_that_are_not_the_defaults():
    defaults = CfgNode({"A": {"B": 1, "C": (1, 2), "D": "x"}})
    cfg = defaults.clone()
    cfg.A.B, cfg.A.C = 2, (1, 3)
    about = record.describe(
        "pretrain", cfg, record.Origin("r.yaml", ("A.B", 2), record.flatten(defaults)), steps=7
    )
    assert about["settings"] == {"A.B": 2, "A.C": [1, 3], "A.D": "x"}
    assert (
        about["changed"] == {"A.B": 1, "A.C": [1, 2]}
        and about["overrides"] == ["A.B", "2"]
        and about["steps"] == 7
    )
    assert (
        json.loads(json.dumps(about)) == about
        and about["versions"]["torch"] == torch.__version__.split("+")[0]
    )


def test_where_a_configuration_comes_from(tmp_path):
    ours = origin(ROOT / "configs" / "pretrain" / "cifar10_rsa_R18.yaml", ["SEED", 3], get_cfg())
    assert ours.recipe == "pretrain/cifar10_rsa_R18.yaml" and ours.overrides == ("SEED", 3)
    assert ours.defaults["SOLVER.EPOCHS"] == 200
    assert origin(tmp_path / "mine.yaml", [], get_cfg()).recipe == str(tmp_path / "mine.yaml")


def test_a_file_is_whole_or_as_it_was(tmp_path):
    record.write(tmp_path / "new", {"a": 1})
    with pytest.raises(ValueError):
        record.write(tmp_path / "new", {"a": float("nan")})
    assert json.loads((tmp_path / "new" / record.FILE).read_text()) == {"a": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == [record.FILE]


def test_a_pretraining_says_what_it_is(image_folder, tmp_path, monkeypatch):
    """From its start and through an interruption, which the run's clock survives."""
    cfg = tiny_cfg(image_folder, tmp_path, "KNN.PERIOD", 1)
    came_from = record.Origin("pretrain/x.yaml", ("SEED", 0), record.flatten(get_cfg()))
    step, steps = train_loop.train_step, []

    def stop(*arguments):
        steps.append(json.loads((tmp_path / "run" / record.FILE).read_text()))
        if len(steps) == 4:
            raise Interrupted("enough")
        return step(*arguments)

    monkeypatch.setattr(train_loop, "train_step", stop)
    with pytest.raises(Interrupted):
        train_loop.train(cfg.clone(), came_from)
    first = steps[0]
    assert (
        first["kind"] == "pretrain"
        and first["recipe"] == "pretrain/x.yaml"
        and first["overrides"] == ["SEED", "0"]
    )
    assert first["settings"]["SOLVER.EPOCHS"] == 3 and first["changed"]["SOLVER.EPOCHS"] == 200
    assert first["method"] == "rsa" and first["seed"] == 0 and (first["step"], first["steps"]) == (0, 9)
    assert (
        first["data"]["images"] == 24 and first["data"]["classes"] == 2 and len(first["data"]["sha256"]) == 64
    )
    assert first["bn_batch_size"] == 8 and first["processes"] == 1 and first["device"] == "CPU"
    saved = checkpoint.load(tmp_path / "run" / checkpoint.LAST)["run"]  # of the first epoch's end
    assert (
        saved["step"] == 3 and saved["seconds"] > first["seconds"] and saved["settings"] == first["settings"]
    )

    monkeypatch.setattr(train_loop, "train_step", step)
    final = checkpoint.load(train_loop.train(cfg.clone(), came_from))["run"]
    assert final["step"] == 9 and final["seconds"] > saved["seconds"]
    left = json.loads((tmp_path / "run" / record.FILE).read_text())
    assert {**left, "seconds": 0} == {**final, "seconds": 0} and left["seconds"] >= final["seconds"]


def test_the_clock_stands_while_a_run_judges_itself(image_folder, tmp_path, monkeypatch):
    """The kNN evaluations seem to take an hour each, which must not count."""
    clock = train_loop.Meter.__init__.__globals__["time"]
    ahead, real = [0.0], clock.perf_counter
    monkeypatch.setattr(clock, "perf_counter", lambda: real() + ahead[0])

    def judge(*_, **__):
        ahead[0] += 3600
        return 50.0

    monkeypatch.setattr(train_loop, "evaluate_knn", judge)
    train_loop.train(tiny_cfg(image_folder, tmp_path, "KNN.PERIOD", 1))
    assert ahead[0] >= 4 * 3600
    assert 0 < json.loads((tmp_path / "run" / record.FILE).read_text())["seconds"] < 3600


def test_tools_hand_it_on(tool, image_folder, tmp_path):
    """tools/pretrain.py writes it to the checkpoint, tools/evaluate.py copies it; a converted file has it,
    too."""
    overrides = [*TINY, "SOLVER.EPOCHS", "2", "KNN.PERIOD", "0"]
    done = tool(
        "pretrain",
        "--config-file",
        "pretrain/cifar10_byol_R18.yaml",
        "--data",
        image_folder,
        "--output-dir",
        tmp_path / "run",
        "--seed",
        4,
        *overrides,
        "MODEL.SMALL_STEM",
        "False",
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / record.FILE).read_text())
    assert (
        about["recipe"] == "pretrain/cifar10_byol_R18.yaml"
        and about["seed"] == 4
        and about["method"] == "byol"
    )
    assert about["overrides"][-2:] == ["MODEL.SMALL_STEM", "False"] and "SEED" in about["overrides"]
    judged = tool(
        "evaluate",
        "linear",
        tmp_path / "run" / "model_final.pth",
        "--epochs",
        2,
        "--train-bn",
        "--output",
        tmp_path / "linear.json",
    )
    assert judged.returncode == 0, judged.stderr
    result = json.loads((tmp_path / "linear.json").read_text())
    assert result["pretrain"]["settings"] == about["settings"] and result["kind"] == "linear"
    assert result["val"]["images"] == 24 and result["epochs"] == 2 and result["protocol"] == "small"
    for prefix in ("linear_top1", "train_bn_top1"):
        assert 0 <= result[f"{prefix}_last"] <= result[f"{prefix}_best"] <= 100


def test_converted_weights_carry_it(tmp_path):
    model = rsa_networks(build_backbone("resnet18"), 64, 16).state_dict()
    saved = {"format": checkpoint.FORMAT, "method": "rsa", "step": 7, "config": "", "model": model}
    about = {"kind": "pretrain", "settings": {"SOLVER.EPOCHS": 200}, "data": {"images": 5}}
    torch.save(saved | {"run": about}, tmp_path / "a.pth")
    for to, name in (("detectron2", "w.pkl"), ("torchvision", "w.pth"), ("timm", "w.safetensors")):
        path, provenance = convert(tmp_path / "a.pth", tmp_path / name, to)
        assert json.loads(provenance["run"]) == about
        assert json.loads(read_checkpoint(path)[1]["run"]) == about
        assert read_networks(path)[2]["pretrain"] == about  # of tools/evaluate.py and tools/embed.py
    convert(tmp_path / "w.pth", tmp_path / "again.pkl")  # through any number of conversions
    assert json.loads(load_weights(tmp_path / "again.pkl")[1]["run"]) == about
