"""The loggers of a fine-tuning with Detectron2 have the rows of metrics.json."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.engine import hooks as d2_stock_hooks
from detectron2.utils.events import EventStorage, JSONWriter

from rsa_detectron2.transfer.d2 import engine, hooks
from rsa_detectron2.transfer.d2 import trainer as d2_trainer
from rsa_detectron2.transfer.d2.config import get_cfg
from rsa_detectron2.transfer.report.runs import open_rows
from tests.logged import assert_same_rows, wandb
from tests.transfer.d2.test_survival import SETTINGS
from tests.transfer.d2.test_trainer import tiny

__all__ = ["wandb"]


def test_loggers_have_the_rows_of_the_file(shapes, tmp_path, wandb, monkeypatch):
    """The first process is killed in iteration 21; the checkpoint is after 20, where it had evaluated.

    APs and validation losses are made up, which takes less time.
    """
    keys = "SOLVER.MAX_ITER", 23, "SOLVER.CHECKPOINT_PERIOD", 20, "TEST.EVAL_PERIOD", 20
    keys += "TEST.PRECISE_BN.ENABLED", False
    for module in (hooks, engine):
        monkeypatch.setattr(module, "evaluate", lambda *_: {"bbox": {"AP": 40.0, "APl": math.nan}})
    monkeypatch.setattr(hooks, "validation_losses", lambda *_: {"total_loss": 0.7})
    monkeypatch.setattr(engine, "judge", lambda cfg: {})
    cfg = tiny(shapes, tmp_path, *SETTINGS, *keys, "LOGGERS", ("tensorboard", "wandb"))
    step = d2_trainer.Trainer.run_step
    with monkeypatch.context() as patch:

        def killed(trainer):
            if trainer.iter == 21:
                raise KeyError("killed")
            step(trainer)

        patch.setattr(d2_trainer.Trainer, "run_step", killed)
        patch.setattr(d2_stock_hooks.PeriodicWriter, "after_train", lambda self: None)
        with pytest.raises(KeyError):
            engine.train(cfg.clone())
    results = engine.train(cfg.clone(), resume=True)
    rows = assert_same_rows(tmp_path, "metrics.json", "iteration", wandb)
    assert [row["iteration"] for row in rows] == [19, 22, 22]
    assert rows[0]["bbox/AP"] == 40 and rows[0]["validation/total_loss"] == 0.7 and rows[0]["total_loss"] > 0
    assert rows[-1]["bbox/AP"] == results["ap"]["bbox"]["AP"] == 40 and rows[-1]["segm/AP"] is None


def test_rows_are_those_of_detectron2s_own_writer(tmp_path, wandb):
    """Images, which VIS_PERIOD makes, go to the loggers as well."""
    cfg = get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "LOGGERS", ("wandb",)])
    with open_rows(cfg, 0) as rows, EventStorage() as storage:
        writers = JSONWriter(tmp_path / "theirs.json"), hooks.RowWriter(rows)
        for storage.iter in range(50):
            storage.put_scalars(loss=storage.iter**2 % 17, time=0.1)
            if storage.iter % 15 == 0:
                storage.put_scalar("bbox/AP", storage.iter, smoothing_hint=False)
                storage.put_image("seen", np.full((3, 4, 4), storage.iter, np.uint8))
            if storage.iter % 20 == 19:
                for writer in writers:
                    writer.write()
        writers[0].close()
    theirs, ours = (
        sorted(map(json.loads, (tmp_path / name).read_text().splitlines()), key=lambda row: row["iteration"])
        for name in ("theirs.json", "metrics.json")
    )
    assert ours == theirs and [row["iteration"] for row in ours] == [15, 19, 30, 39]
    (run,) = wandb.runs.values()
    images = [(step, figures["seen"].max()) for step, figures in run.rows if "seen" in figures]
    assert images == [(0, 0), (15, 15), (30, 30)]
