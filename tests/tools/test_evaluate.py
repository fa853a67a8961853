"""tools/evaluate.py health and trust; the other protocols have their tests in tests/pretrain/evaluate."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.engine import trainer
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.tools import _trust, evaluate
from tests.conftest import tiny_cfg


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """The folder of a run on labeled images that has kept five checkpoints of 15 steps."""
    cfg = tiny_cfg(image_folder, tmp_path_factory.mktemp("kept"), "SOLVER.EPOCHS", 5, "HEALTH.IMAGES", 12)
    return Path(trainer.train(cfg)).parent


@pytest.fixture
def judge(monkeypatch, capsys):
    """``judge("health", ...)`` runs the tool; returns what it prints to stdout."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
        evaluate.main()
        return capsys.readouterr().out

    return call


def test_health_of_our_checkpoint_is_its_row(run, judge, tmp_path):
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    told = json.loads(judge("health", run / "model_final.pth", "--output", tmp_path / "health.json"))
    assert told == json.loads((tmp_path / "health.json").read_text())
    assert told["kind"] == "health" and told["train"]["images"] == 24 and "val" not in told
    names = row.keys() - {"step", "knn_top1"}
    assert {name: told[name] for name in names} == pytest.approx(
        {name: row[name] for name in names}, rel=1e-4
    )


def test_health_of_another_project_without_labels(image_folder, judge, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "images").mkdir()
    for i, path in enumerate(sorted(image_folder.glob("*/*"))[:3]):
        shutil.copy(path, tmp_path / "images" / f"{i}{path.suffix}")
    words = (tmp_path / "resnet18.pth", "--train", tmp_path / "images", "--workers", 0)
    told = json.loads(judge("health", *words, "--images", 2))
    assert 1 <= told["rank_backbone"] <= 2 and "rank_projection" not in told
    with pytest.raises(InputError, match="no labels .* knn needs labels: give .* .health needs none"):
        judge("knn", *words)
    with pytest.raises(InputError, match="--images is 1: it must be at least 2"):
        judge("health", *words, "--images", 1)
    with pytest.raises(InputError, match="--range: it takes the values that become black and white"):
        judge("health", *words, "--range", 9, 1)


@pytest.mark.parametrize("words", [("knn", "--epochs", 3), ("health", "--val", "b"), ("linear", "--bank", 0)])
def test_an_option_of_another_protocol_is_refused(judge, words):
    protocol, option, _ = words
    with pytest.raises(InputError, match=f"{option} is for .*, not for {protocol}: leave it out"):
        judge(*words)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_trust_ranks_the_checkpoints_of_a_run(run, judge, tmp_path, monkeypatch):
    stats = pytest.importorskip("scipy.stats", reason="scikit-learn is not installed")
    options = ("trust", run, "--output", tmp_path / "trust", "--epochs", 5)
    told = judge(*options)
    table, ranks = read(tmp_path / "trust" / "table.csv"), read(tmp_path / "trust" / "ranks.csv")
    assert [row["step"] for row in table] == ["3", "6", "9", "12", "15"]
    assert [row["figure"] for row in ranks] == list(_trust.FIGURES)
    columns = {name: np.array([float(row[name]) for row in table]) for name in table[0]}
    for row in ranks:
        for top1, label in _trust.TOP1.items():
            pair = columns[row["figure"]], columns[top1]
            for end, (a, b) in (("", pair), (", changes", map(np.diff, pair))):
                expected = stats.spearmanr(a, b).statistic if np.ptp(b) and np.ptp(a) else np.nan
                assert float(row[label + end]) == pytest.approx(expected, nan_ok=True)

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row and 6 < row["step"] <= 9]
    assert len(losses) == 3 and columns["loss"][2] == pytest.approx(np.mean(losses))
    [last] = [row for row in rows if row["step"] == 15 and "consistency" in row]
    assert columns["consistency"][-1] == last["consistency"]
    assert columns["knn_top1"][-1] == pytest.approx(last["knn_top1"])
    assert "over 5 checkpoints" in told and (tmp_path / "trust" / "trust.png").is_file()

    monkeypatch.setattr(
        Features, "__call__", None
    )  # whatever needs the network is kept beside its checkpoint
    assert judge(*options) == told


def test_trust_needs_several_checkpoints(run, judge, tmp_path):
    shutil.copy(run / "model_final.pth", tmp_path)
    with pytest.raises(InputError, match=r"has 1 checkpoints .* too few .* CHECKPOINT.KEEP_PERIOD 1"):
        judge("trust", tmp_path)
    for step in (3, 6, 15):  # the last is model_final.pth's
        shutil.copy(run / f"checkpoint_{step:07d}.pth", tmp_path)
    with pytest.raises(InputError, match="has 3 checkpoints"):
        judge("trust", tmp_path, "--epochs", 1)


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_is_scipys(seed):
    """Values of few kinds, so that many are equal."""
    stats = pytest.importorskip("scipy.stats", reason="scikit-learn is not installed")
    a, b = np.random.default_rng(seed).integers(0, 5, (2, 12)).tolist()
    assert _trust.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert _trust.rank_correlation(a, np.exp(a).tolist()) == pytest.approx(1)
    assert np.isnan(_trust.rank_correlation(a, [1.0] * 12))
