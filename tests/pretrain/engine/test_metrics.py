"""What stops a run, and which files it leaves."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data import loader, source
from rsa_detectron2.pretrain.data.images import decode
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.engine.guards import Alarms, assert_finite
from rsa_detectron2.pretrain.engine.metrics import Meter
from tests.conftest import tiny_cfg


def figures(loss, std=1.0):
    return {"loss": torch.tensor(loss), "feature_std": torch.tensor(std)}


def test_meter_means_and_longest_streak():
    meter = Meter(8)
    for loss in (1.0, math.nan, math.inf, 3.0):
        meter.add(figures(loss))
    assert meter.read()["nonfinite_steps"] == 2
    for loss, std in ((1.0, 0.5), (2.0, 0.7)):
        meter.add(figures(loss, std))
    row = meter.read()
    assert (
        row["loss"] == pytest.approx(1.5)
        and row["feature_std"] == pytest.approx(0.6)
        and row["nonfinite_steps"] == 0
    )


def test_streak_goes_on_over_readings():
    """Three steps before a reading and two after it are five in a row."""
    meter, alarms = Meter(8), Alarms(get_cfg().ALARM)
    for _ in range(3):
        meter.add(figures(math.nan))
    alarms.check(3, meter.read(), 3)
    for _ in range(2):
        meter.add(figures(math.nan))
    with pytest.raises(
        InputError, match="loss is nan at step 5, not finite for 5 steps: lower SOLVER.BASE_LR"
    ):
        alarms.check(5, meter.read(), 2)


def test_single_overflow_is_no_alarm():
    meter, alarms = Meter(8), Alarms(get_cfg().ALARM)
    for step in range(1, 100):
        meter.add(figures(math.inf if step % 3 == 0 else 1.0))
        if step % 10 == 0:
            alarms.check(step, meter.read(), 10)


def test_collapse_must_last():
    alarms = Alarms(get_cfg().ALARM)
    row = {"loss": 0.0, "nonfinite_steps": 0, "feature_std": 0.001}
    for step in range(10, 1000, 10):
        alarms.check(step, row, 10)
    alarms.check(1000, row | {"feature_std": 0.5}, 10)  # it recovered
    for step in range(1010, 2000, 10):
        alarms.check(step, row, 10)
    with pytest.raises(InputError, match="features have collapsed: .* 0.0010 at step 2000"):
        alarms.check(2000, row, 10)


def test_collapsed_run_stops_and_keeps_the_checkpoint_before(image_folder, tmp_path):
    """The threshold is one that these features fall below after the first epoch, as collapsed ones would."""
    calm = tiny_cfg(image_folder, tmp_path, "SOLVER.EPOCHS", 6, "CHECKPOINT.KEEP_PERIOD", 0)
    train_loop.train(calm)
    rows = [json.loads(line) for line in Path(calm.OUTPUT_DIR, "metrics.jsonl").read_text().splitlines()]
    stds = [row["feature_std"] for row in rows if "loss" in row]
    # a new low, after the first epoch
    first = next(i for i in range(3, len(stds)) if stds[i] < min(stds[:i]))
    cfg = tiny_cfg(
        image_folder,
        tmp_path / "stopped",
        "SOLVER.EPOCHS",
        6,
        "CHECKPOINT.KEEP_PERIOD",
        0,
        "ALARM.FEATURE_STD",
        (stds[first] + min(stds[:first])) / 2,
        "ALARM.COLLAPSE_STEPS",
        1,
    )
    with pytest.raises(InputError, match=f"collapsed.*at step {first + 1},"):
        train_loop.train(cfg)
    assert checkpoint.load(Path(cfg.OUTPUT_DIR, checkpoint.LAST))["step"] == first // 3 * 3


def test_diverged_run_stops_with_one_line(image_folder, tmp_path):
    """The weights of step 3 are not finite, so they are not saved."""
    with pytest.raises(InputError, match="not finite at step 3: lower SOLVER.BASE_LR"):
        train_loop.train(tiny_cfg(image_folder, tmp_path, "SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_EPOCHS", 0))
    assert not list((tmp_path / "run").glob("*.pth"))


def test_assert_finite():
    layer = torch.nn.Linear(3, 3)
    assert_finite(layer, 1)
    layer.weight.data[0, 0] = math.inf
    with pytest.raises(InputError, match="weights are not finite at step 2"):
        assert_finite(layer, 2)
    norm = torch.nn.BatchNorm1d(3)
    norm.running_var[1] = math.nan
    with pytest.raises(InputError, match="weights are not finite at step 4"):
        assert_finite(norm, 4)


def test_metrics_hold_every_figure(image_folder, tmp_path):
    train_loop.train(tiny_cfg(image_folder, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row.get("loss") is not None)
    assert {
        "step",
        "loss",
        "loss_aw",
        "loss_aa",
        "cos_aw",
        "cos_aa",
        "feature_std",
        "lr",
        "beta",
        "tau",
        "images_per_s",
        "data_wait",
        "bad_images",
        "nonfinite_steps",
    } == set(row)
    assert 0 <= row["data_wait"] <= 1 and row["beta"] == pytest.approx(0.4 * (1 + math.cos(math.pi / 9)) / 2)


def test_loss_scale_and_skipped_steps_of_fp16(image_folder, tmp_path, monkeypatch, capsys):
    """The first scales overflow even float32. Each step that is skipped halves the scale."""
    monkeypatch.setenv("COLUMNS", "300")  # a narrow bar would cut its last figures off
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    train_loop.train(tiny_cfg(image_folder, tmp_path, "LOG_PERIOD", 3, "SOLVER.EPOCHS", 6))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    skipped = [row["skipped_steps"] for row in rows]
    assert len(rows) == 6 and 0 < sum(skipped) < 18
    scales = [2.0 ** (127 - sum(skipped[: i + 1])) for i in range(len(rows))]
    assert [row["loss_scale"] for row in rows] == scales
    assert f"skipped {skipped[-1]} scale {scales[-1]:.3g}" in capsys.readouterr().err


def test_tf32_is_a_key(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # restored after the test
    train_loop.train(tiny_cfg(image_folder, tmp_path, "SOLVER.EPOCHS", 2))
    assert torch.backends.cudnn.allow_tf32
    train_loop.train(tiny_cfg(image_folder, tmp_path / "off", "SOLVER.EPOCHS", 2, "SOLVER.TF32", False))
    assert not torch.backends.cudnn.allow_tf32


def test_a_bad_image_in_24_is_listed_and_decoded_once(image_folder, tmp_path, monkeypatch):
    """The run has three epochs, with kNN after each. If no image may be bad, a run that goes on stops at its
    start."""
    copy = shutil.copytree(image_folder, tmp_path / "train")
    broken = sorted(copy.glob("*/*.png"))[0]
    broken.write_bytes(b"")
    reads = []

    def counted(data, name, value_range=()):
        reads.append(name)
        return decode(data, name, value_range)

    for module in (source, loader):
        monkeypatch.setattr(module, "decode", counted)
    shutil.copytree(image_folder.parent / "val", tmp_path / "val")
    train_loop.train(tiny_cfg(copy, tmp_path, "KNN.PERIOD", 1))
    assert (tmp_path / "run" / "bad_images.txt").read_text() == f'"{broken.relative_to(copy)}"\n'
    assert reads.count(str(broken)) == 1 and reads.count(str(sorted(copy.glob("*/*.png"))[1])) >= 6
    (tmp_path / "run" / "model_final.pth").unlink()
    with pytest.raises(
        InputError, match=f"lists 1 of 24 .*{broken.name} first, and DATA.MAX_BAD allows 0: replace or remove"
    ):
        train_loop.train(tiny_cfg(copy, tmp_path, "DATA.MAX_BAD", 0.0))
