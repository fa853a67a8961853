"""The loggers of a pre-training have the rows of metrics.jsonl."""

import pytest

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import check
from rsa_detectron2.pretrain.engine import trainer as train_loop
from tests.conftest import tiny_cfg
from tests.logged import assert_same_rows, wandb

__all__ = ["wandb"]


def test_loggers_have_the_rows_of_the_file(image_folder, tmp_path, wandb, monkeypatch):
    """The first process fails in step 9, and the checkpoint is of step 6."""
    cfg = tiny_cfg(image_folder, tmp_path, "LOGGERS", ("tensorboard", "wandb"), "KNN.PERIOD", 1)
    step, steps = train_loop.train_step, []

    def failing(*arguments):
        steps.append(1)
        if len(steps) == 9:
            raise KeyError("failed")
        return step(*arguments)

    monkeypatch.setattr(train_loop, "train_step", failing)
    with pytest.raises(KeyError):
        train_loop.train(cfg)
    train_loop.train(cfg)
    times = "images_per_s", "data_wait"
    rows = assert_same_rows(tmp_path / "run", "metrics.jsonl", "step", wandb, (7, 8), times)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 3, 6, 9]
    assert wandb.given[0]["config"]["METHOD"] == "rsa" and wandb.given[0]["name"] == "run"


def test_a_signal_closes_the_loggers(image_folder, tmp_path, wandb, stop_after):
    cfg = tiny_cfg(image_folder, tmp_path, "LOGGERS", ("tensorboard", "wandb"))
    stop_after(4)
    with pytest.raises(train_loop.Interrupted):
        train_loop.train(cfg)
    assert_same_rows(tmp_path / "run", "metrics.jsonl", "step", wandb)


def test_other_loggers_may_go_on(image_folder, tmp_path, wandb, stop_after):
    stop_after(4)
    with pytest.raises(train_loop.Interrupted):
        train_loop.train(tiny_cfg(image_folder, tmp_path, "LOGGERS", ()))
    assert not list((tmp_path / "run").glob("events*"))
    train_loop.train(tiny_cfg(image_folder, tmp_path, "LOGGERS", ("wandb",)))
    (run,) = wandb.runs.values()
    assert {step for step, _ in run.rows} == {5, 6, 7, 8, 9}


def test_an_unknown_logger_is_one_line(image_folder, tmp_path):
    with pytest.raises(InputError, match="LOGGERS is .*'mlflow' is none of tensorboard, wandb"):
        check(tiny_cfg(image_folder, tmp_path, "LOGGERS", ("mlflow",)))
