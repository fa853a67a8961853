"""A run that was stopped, killed or moved, against one that was not: the same bits at the end."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pretrain import train_loop
from pretrain.checkpoint import FINAL, LAST, PREVIOUS
from pretrain.config import METHODS, InputError, Interrupted
from tests.conftest import assert_same, final_weights
from tests.conftest import tiny_cfg as tiny


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    return train_loop.train(tiny(image_folder, tmp_path_factory.mktemp("whole")))


@pytest.fixture
def stop_after(monkeypatch):
    """``stop_after(n)``: SIGTERM arrives during the n-th step; returns a list that grows with the steps."""

    def install(n):
        step, steps = train_loop.train_step, []

        def counted(*arguments):
            steps.append(1)
            if len(steps) == n:
                signal.raise_signal(signal.SIGTERM)
            return step(*arguments)

        monkeypatch.setattr(train_loop, "train_step", counted)
        return steps

    return install


def test_lars_and_bfloat16_go_on_bit_for_bit(image_folder, tmp_path, stop_after):
    recipe = ("SOLVER.OPTIMIZER", "lars", "SOLVER.AMP", "bf16", "SOLVER.EPOCHS", 2)
    whole = train_loop.train(tiny(image_folder, tmp_path / "whole", *recipe))
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(image_folder, tmp_path, *recipe))
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path, *recipe))), final_weights(whole))


@pytest.mark.parametrize("after, workers", [(1, 0), (4, 1), (8, 0)])
def test_stopped_run_goes_on_bit_for_bit(image_folder, tmp_path, stop_after, uninterrupted, after, workers):
    """Stop in mid-epoch after some steps, resume with another number of workers."""
    cfg = tiny(image_folder, tmp_path)
    steps = stop_after(after)
    with pytest.raises(Interrupted, match=f"step {after} of 9"):
        train_loop.train(cfg)
    assert torch.load(Path(cfg.OUTPUT_DIR, LAST), weights_only=True)["step"] == after
    final = train_loop.train(tiny(image_folder, tmp_path, "DATA.NUM_WORKERS", workers))
    assert len(steps) == 9
    assert_same(final_weights(final), final_weights(uninterrupted))
    rows = [json.loads(line) for line in Path(cfg.OUTPUT_DIR, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 9]


def test_evaluating_on_the_way_changes_nothing(image_folder, tmp_path, uninterrupted):
    """kNN after every epoch: BatchNorm's running statistics must not see the evaluation."""
    final = train_loop.train(tiny(image_folder, tmp_path, "KNN.PERIOD", 1))
    assert_same(final_weights(final), final_weights(uninterrupted))


def test_signal_while_a_checkpoint_is_read(image_folder, tmp_path, uninterrupted, stop_after, monkeypatch):
    """It is not taken for damage."""
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(image_folder, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match="before its first step; the same command goes on"):
            train_loop.train(tiny(image_folder, tmp_path))
    assert not list((tmp_path / "run").glob("*.damaged"))
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path))), final_weights(uninterrupted))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signal_before_the_first_step(image_folder, tmp_path, uninterrupted, monkeypatch, number):
    """While the data set is opened, or the first kNN runs: nothing is lost, and a scheduler is told to come again."""
    evaluate = train_loop.evaluate_knn
    monkeypatch.setattr(train_loop, "evaluate_knn", lambda *_, **__: signal.raise_signal(number))
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="before its first step"):
        train_loop.train(tiny(image_folder, tmp_path))
    assert signal.getsignal(number) == handler
    monkeypatch.setattr(train_loop, "evaluate_knn", evaluate)
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path))), final_weights(uninterrupted))


def test_an_epoch_is_saved_before_its_knn(image_folder, tmp_path, uninterrupted, monkeypatch):
    """Which may take longer than a launcher waits before it kills."""
    with monkeypatch.context() as patch:
        calls = iter([50.0])  # before the first step
        patch.setattr(train_loop, "evaluate_knn", lambda *_, **__: next(calls))
        with pytest.raises(StopIteration):
            train_loop.train(tiny(image_folder, tmp_path, "KNN.PERIOD", 1))
        assert torch.load(tmp_path / "run" / LAST, weights_only=True)["step"] == 3
        with pytest.raises(StopIteration):  # at the end
            train_loop.train(tiny(image_folder, tmp_path))
        assert torch.load(tmp_path / "run" / LAST, weights_only=True)["step"] == 9
    final = train_loop.train(tiny(image_folder, tmp_path))
    assert_same(final_weights(final), final_weights(uninterrupted))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 9]


def test_changed_data_set_is_refused(image_folder, tmp_path):
    copy = shutil.copytree(image_folder, tmp_path / "train")
    cfg = tiny(copy, tmp_path)
    train_loop.train(cfg)
    Path(cfg.OUTPUT_DIR, FINAL).unlink()
    next(copy.glob("*/*.png")).unlink()
    with pytest.raises(InputError, match="24 images, but .* has 23"):
        train_loop.train(tiny(copy, tmp_path))


def test_validation_folder_that_does_not_fit_is_left_alone(image_folder, tmp_path):
    """Unlabelled images beside each other: a run without kNN, not an error; but an explicit DATA.VAL is one."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i, path in enumerate(sorted(image_folder.glob("*/*"))):
            shutil.copy(path, tmp_path / split / f"{i}{path.suffix}")
    final = train_loop.train(tiny(tmp_path / "train", tmp_path, "SOLVER.EPOCHS", 2))
    assert "knn" not in Path(final).with_name("metrics.jsonl").read_text()
    with pytest.raises(InputError, match="not labelled alike"):
        train_loop.train(tiny(tmp_path / "train", tmp_path / "other", "DATA.VAL", str(tmp_path / "val")))


def test_finished_run_is_left_alone(image_folder, uninterrupted, capsys):
    before = Path(uninterrupted).stat().st_mtime_ns
    assert train_loop.train(tiny(image_folder, Path(uninterrupted).parents[1])) == uninterrupted
    assert Path(uninterrupted).stat().st_mtime_ns == before and "complete" in capsys.readouterr().out


def test_killed_before_the_final_file(image_folder, uninterrupted, tmp_path):
    """The last checkpoint is there, model_final.pth is not: the same command only writes that."""
    folder = shutil.copytree(Path(uninterrupted).parent, tmp_path / "run")
    (folder / FINAL).unlink()
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path))), final_weights(uninterrupted))


def test_another_configuration_is_refused(image_folder, uninterrupted):
    with pytest.raises(InputError, match=r"MODEL.BETA: 0.4 -> 0.3; SEED: 0 -> 1"):
        train_loop.train(tiny(image_folder, Path(uninterrupted).parents[1], "SEED", 1, "MODEL.BETA", 0.3))


def test_kept_checkpoints(uninterrupted):
    names = sorted(path.name for path in Path(uninterrupted).parent.glob("*.pth"))
    assert names == ["checkpoint_0000003.pth", "checkpoint_0000006.pth", "checkpoint_0000009.pth", LAST, PREVIOUS, FINAL]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_bit_for_bit(image_folder, tmp_path, stop_after, method):
    """MoCo's queue of 40 keys wraps round in three steps."""
    options = ("METHOD", method, "MODEL.QUEUE", 40, "SOLVER.MICRO_BATCH", 4)
    whole = train_loop.train(tiny(image_folder, tmp_path / "whole", *options))
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(image_folder, tmp_path, *options))
    final = train_loop.train(tiny(image_folder, tmp_path, *options))
    assert torch.load(final, weights_only=True)["method"] == method
    assert_same(final_weights(final), final_weights(whole))

