"""The loggers of a fine-tuning with the embedded engine have the rows of metrics.json."""

import pytest

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.tv import engine, trainer
from tests.logged import assert_same_rows, wandb
from tests.transfer.tv.test_engine import RESNET18, config

__all__ = ["wandb"]


def test_loggers_have_the_rows_of_the_file(coco, tmp_path, wandb, monkeypatch):
    """The first process fails in iteration 45; the checkpoint is after 40, where the run had evaluated.

    Losses and APs are made up, which takes less time.
    """
    keys = "SOLVER.MAX_ITER", 50, "SOLVER.CHECKPOINT_PERIOD", 20, "TEST.EVAL_PERIOD", 20
    cfg = config(coco, tmp_path, *RESNET18, *keys, "LOGGERS", ("tensorboard", "wandb"))
    made = []

    def step(self, i, images, targets):
        made.append(i)
        if len(made) == 46:
            raise KeyError("failed")
        return {"total_loss": 1 / (i + 1), "loss_mask": i / 3}

    monkeypatch.setattr(trainer.Trainer, "step", step)
    for module in (trainer, engine):
        monkeypatch.setattr(module, "evaluate", lambda *_: {"bbox": {"AP": 40.0, "APl": None}})
    monkeypatch.setattr(trainer, "validation_losses", lambda *_: {"total_loss": 0.7})
    monkeypatch.setattr(engine, "judge", lambda cfg: {})
    with pytest.raises(KeyError):
        engine.train(cfg)
    results = engine.train(cfg, resume=True)
    assert made == [*range(46), *range(40, 50)]
    rows = assert_same_rows(tmp_path, "metrics.json", "iteration", wandb)
    assert [row["iteration"] for row in rows] == [19, 19, 39, 39, 49, 49]
    assert rows[3]["validation/total_loss"] == 0.7
    assert rows[-1]["bbox/AP"] == results["ap"]["bbox"]["AP"] == 40.0 and rows[-1]["segm/AP"] is None
    assert wandb.given[0]["config"]["SOLVER.MAX_ITER"] == 50
    engine.train(cfg, resume=True)  # the finished run, evaluated once more
    assert assert_same_rows(tmp_path, "metrics.json", "iteration", wandb) == rows


def test_a_missing_logger_is_one_line_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="LOGGERS is .*'mlflow' is none of tensorboard, wandb"):
        engine.train(config("absent::absent", tmp_path, "LOGGERS", ("mlflow",)))
