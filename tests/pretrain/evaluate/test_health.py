"""The health of features whose answer is known, and of a run."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.pretrain.config import check, get_cfg
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.loader import MultiStageViews
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.evaluate import health
from rsa_detectron2.pretrain.evaluate.health import (
    alignment,
    effective_rank,
    measure_health,
    neighbor_consistency,
    uniformity,
)
from rsa_detectron2.tools._weights import load_features, untrained_features
from tests.conftest import assert_same, final_weights, tiny_cfg

NAMES = ["rank_backbone", "rank_projection", "alignment", "uniformity", "consistency"]


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def turned(frame, dim):
    """Features [N, D] whose singular values are those of ``frame``, [N, k], in a space turned at random."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0]
    return torch.from_numpy(frame @ rotation[: frame.shape[1]]).float()


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
@pytest.mark.parametrize("count", [16, 400])  # fewer images than dimensions, and more
def test_rank_of_equal_singular_values(rank, count):
    frame = np.linalg.qr(np.random.default_rng(0).normal(size=(count, rank)))[0]
    assert effective_rank(turned(5 * frame, 64)) == pytest.approx(rank, abs=1e-3)


@pytest.mark.parametrize("count, dim", [(400, 64), (20, 64), (2, 3)])
def test_rank_is_that_of_the_singular_values(count, dim):
    """numpy's SVD of float64, and the paper's formula."""
    features = draw(count, dim) * torch.logspace(0, -3, dim) + 0.5
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = values / values.sum() + 1e-7
    assert effective_rank(features) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert effective_rank(7 * features) == pytest.approx(effective_rank(features), rel=1e-6)


@pytest.mark.parametrize("count, dim", [(3000, 512), (100, 2048)])
def test_collapse_has_rank_1(count, dim):
    """Equal features; then such of any lengths, whose float32 rounding is the only difference."""
    collapsed = draw(dim).expand(count, dim)
    assert effective_rank(collapsed) == pytest.approx(1, abs=1e-3)
    assert effective_rank(collapsed * draw(count, 1).abs()) == pytest.approx(1, abs=1e-3)


def test_rank_of_nothing():
    assert effective_rank(torch.zeros(5, 8)) == 0
    assert math.isnan(effective_rank(torch.full((5, 8), torch.nan)))


def test_alignment_is_the_mean_squared_distance():
    first, second = draw(30, 8), draw(30, 8, seed=1)
    unit = [x.numpy() / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second)]
    expected = np.mean([np.sum((x - y) ** 2) for x, y in zip(*unit)])
    assert alignment(first, second) == pytest.approx(expected, rel=1e-5)
    assert alignment(first, 3 * first) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("count", [2, 3, 50])
@pytest.mark.parametrize("cosines", [1, 60, 2**24])  # in memory at once
def test_uniformity_is_a_loop_over_pairs(count, cosines, monkeypatch):
    monkeypatch.setattr(health, "COSINES", cosines)
    features = draw(count, 6)
    unit = features.double().numpy() / np.linalg.norm(features.double(), axis=1, keepdims=True)
    pairs = [np.sum((unit[i] - unit[j]) ** 2) for i in range(count) for j in range(i)]
    expected = math.log(np.mean(np.exp(-2 * np.array(pairs))))
    assert uniformity(features) == pytest.approx(expected, rel=1e-5)


def test_uniformity_of_equal_and_of_orthogonal_features():
    assert uniformity(draw(8).expand(20, 8)) == pytest.approx(0, abs=1e-5)
    assert uniformity(torch.eye(20)) == pytest.approx(-4, abs=1e-6)
    assert uniformity(torch.zeros(20, 8)) == 0


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("cosines", [500, 2**24])
def test_consistency_is_scikit_learns(noise, cosines, monkeypatch):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    monkeypatch.setattr(health, "COSINES", cosines)
    first = draw(120, 16)
    second = 4 * (first + noise * draw(120, 16, seed=1))
    both = torch.cat([first, second]).numpy()
    nearest = neighbors.NearestNeighbors(n_neighbors=1, metric="cosine").fit(both).kneighbors()[1][:, 0]
    expected = 100 * np.mean(nearest == (np.arange(240) + 120) % 240)
    assert neighbor_consistency(first, second) == pytest.approx(expected)
    assert noise or expected == 100
    assert noise != 1 or 10 < expected < 90  # otherwise agreement would prove little


def test_consistency_of_collapsed_features_is_chance():
    features = draw(8).expand(50, 8)
    assert neighbor_consistency(features, features) <= 1


# ---- of a run ----


def rows(folder):
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in lines if "consistency" in row}


@pytest.fixture(scope="module")
def measured(image_folder, tmp_path_factory):
    """The final file of a run with health after each of three epochs, without kNN."""
    folder = tmp_path_factory.mktemp("measured")
    train = shutil.copytree(image_folder, folder / "train")  # no val/ beside it
    return train_loop.train(tiny_cfg(train, folder, "KNN.PERIOD", 1, "HEALTH.IMAGES", 10))


def test_a_run_without_labels_has_rows_of_its_health(measured):
    found = rows(Path(measured).parent)
    assert list(found) == [0, 3, 6, 9]
    for row in found.values():
        assert list(row) == ["step", *NAMES]
        assert 1 <= row["rank_backbone"] <= 10 and 1 <= row["rank_projection"] <= 8
        assert 0 < row["alignment"] < 2 and -4 < row["uniformity"] < 0 and 0 <= row["consistency"] <= 100
    assert len({row["rank_backbone"] for row in found.values()}) == 4


def test_measuring_changes_nothing(measured, image_folder, tmp_path):
    """The run without it has the same weights and statistics. Both kinds of evaluation are one row."""
    with_both = ("KNN.PERIOD", 1, "HEALTH.IMAGES", -1)
    without = train_loop.train(tiny_cfg(image_folder, tmp_path / "without"))
    final = train_loop.train(tiny_cfg(image_folder, tmp_path, *with_both))
    assert_same(final_weights(final), final_weights(without))
    assert_same(final_weights(measured), final_weights(without))
    assert not rows(Path(without).parent)
    assert [list(row) for row in rows(Path(final).parent).values()] == [["step", "knn_top1", *NAMES]] * 4


def test_modes_are_restored(measured, monkeypatch):
    modes = []
    original = train_loop.train_step

    def spy(state, *arguments):
        modes.extend(module.training for module in state.model.modules())
        return original(state, *arguments)

    monkeypatch.setattr(train_loop, "train_step", spy)
    run = Path(measured).parent
    cfg = tiny_cfg(run.parent / "train", run.parent / "modes", "KNN.PERIOD", 1, "HEALTH.IMAGES", 4)
    train_loop.train(cfg)
    assert modes and all(modes)


def test_a_checkpoint_has_the_figures_of_its_row(measured):
    """They are computed from the two views, written out, and kept beside the checkpoint."""
    features, cfg, _ = load_features(measured)
    images = open_images(cfg.DATA.PATH)
    figures = measure_health(features, images, 10)
    row = rows(Path(measured).parent)[9]
    assert figures == pytest.approx({name: row[name] for name in NAMES}, rel=1e-4)
    features.backbone = None
    assert measure_health(features, images, 10) == figures
    with pytest.raises(AttributeError):  # other figures would be computed
        measure_health(features, images, 9)


def test_two_views_of_two_images_in_eval_mode(measured):
    features, cfg, _ = load_features(measured)
    features.cache = None
    images = open_images(cfg.DATA.PATH, limit=2)
    for module in (features.backbone, features.projector):
        module.train()
    figures = measure_health(features, images, 50)
    assert not any(part.training for part in (*features.backbone.modules(), *features.projector.modules()))

    views = MultiStageViews(images, 32, 0)
    pair = [torch.stack([views[0, i]["views"][k] for i in (0, 1)]) for k in (0, 1)]
    mean, std = (torch.tensor(value)[:, None, None] for value in (cfg.DATA.MEAN, cfg.DATA.STD))
    with torch.no_grad():
        first, second = (features.backbone((x / 255 - mean) / std) for x in pair)
        projection = features.projector(first)
    expected = {
        "rank_backbone": effective_rank(first),
        "rank_projection": effective_rank(projection),
        "alignment": alignment(first, second),
        "uniformity": uniformity(first),
        "consistency": neighbor_consistency(first, second),
    }
    assert figures == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="has one image"):
        measure_health(features, open_images(cfg.DATA.PATH, limit=1))


def test_the_untrained_network_is_that_of_the_first_row(measured):
    run = Path(measured).parent
    features, cfg, _ = untrained_features(str(run / "config.yaml"), 0)
    figures = measure_health(features, open_images(cfg.DATA.PATH), 10)
    row = rows(run)[0]
    assert figures == pytest.approx({name: row[name] for name in NAMES}, rel=1e-4)


def test_a_signal_while_it_measures(measured, image_folder, tmp_path, monkeypatch):
    """Before the first step the run ends at once. Later it finishes measuring, makes a step, and saves."""
    measure, calls = train_loop.measure_health, []

    def signaled(*arguments):
        calls.append(1)
        if len(calls) in (1, 3):
            signal.raise_signal(signal.SIGTERM)
        return measure(*arguments)

    monkeypatch.setattr(train_loop, "measure_health", signaled)
    cfg = tiny_cfg(image_folder, tmp_path, "KNN.PERIOD", 1, "HEALTH.IMAGES", 4)
    with pytest.raises(Interrupted, match="nothing to save"):
        train_loop.train(cfg)
    with pytest.raises(Interrupted, match="stopped at step 4 of 9, saved"):
        train_loop.train(cfg)
    assert list(rows(cfg.OUTPUT_DIR)) == [0, 3]
    assert_same(final_weights(train_loop.train(cfg)), final_weights(measured))
    assert list(rows(cfg.OUTPUT_DIR)) == [0, 3, 6, 9]


def test_the_number_of_images_may_change(measured, tmp_path):
    """A checkpoint of an earlier version lacks the key, and goes on."""
    run = shutil.copytree(Path(measured).parent, tmp_path / "run")
    train = Path(measured).parents[1] / "train"
    (run / checkpoint.FINAL).unlink()
    last = torch.load(run / checkpoint.LAST, weights_only=True)
    last["config"] = last["config"].replace("HEALTH:\n  IMAGES: 10\n", "")
    assert "HEALTH" not in last["config"]
    torch.save(last, run / checkpoint.LAST)
    final = train_loop.train(tiny_cfg(train, tmp_path, "HEALTH.IMAGES", 5))
    assert_same(final_weights(final), final_weights(measured))
    assert list(rows(run)) == [0, 3, 6, 9]


@pytest.mark.parametrize("value", [1, -2])
def test_a_number_of_images_that_compares_nothing_is_refused(value):
    cfg = get_cfg()
    cfg.HEALTH.IMAGES = value
    with pytest.raises(InputError, match=f"HEALTH.IMAGES is {value}: it takes two or more"):
        check(cfg)


def test_the_line_of_an_evaluation(measured, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    run = Path(measured).parent
    cfg = tiny_cfg(run.parent / "train", tmp_path, "SOLVER.EPOCHS", 2, "HEALTH.IMAGES", 4)
    train_loop.train(cfg)
    told, row = capsys.readouterr().err, rows(cfg.OUTPUT_DIR)[6]
    assert f"step 6: effective rank {row['rank_backbone']:.1f}, of the projection " in told
    assert f"consistency {row['consistency']:.1f} %" in told
    assert f" rank {row['rank_backbone']:.1f} cons {row['consistency']:.0f} " in told
