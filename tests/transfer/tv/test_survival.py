"""A fine-tuning of the embedded engine that is stopped at any moment ends with the same bits as one that was
not."""

import functools
import json
import os
import signal

import pytest
import torch

from rsa_detectron2.common.errors import REQUEUE, InputError, Interrupted
from rsa_detectron2.tools import report
from rsa_detectron2.transfer.report import best, pictures
from rsa_detectron2.transfer.tv import engine, evaluation, trainer, weights
from tests.conftest import Program, assert_same
from tests.transfer import stops
from tests.transfer.tv.test_engine import RESNET18, config

ITERATIONS = 16
SETTINGS = (
    *RESNET18,
    *("SEED", 1, "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.STEPS", (11,), "SOLVER.CHECKPOINT_PERIOD", 5),
    *("TEST.EVAL_PERIOD", 9, "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2),
)


def start(cfg):
    stops.run(engine.train, (trainer.Trainer, "step"), cfg)


@pytest.fixture(scope="module")
def uninterrupted(coco, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    stops.finish(functools.partial(start, config(coco, folder, *SETTINGS)))
    return folder


@pytest.mark.parametrize(
    "number, count, code",
    [(signal.SIGKILL, 4, -9), pytest.param(signal.SIGTERM, 3, REQUEUE, marks=pytest.mark.slow)],
)
def test_stopped_at_random_moments(coco, tmp_path, uninterrupted, number, count, code):
    (tmp_path / "steps").write_bytes(b"")
    # Each start makes three steps at most: some of them end after a checkpoint.
    run = functools.partial(start, config(coco, tmp_path, *SETTINGS, "SOLVER.CHECKPOINT_PERIOD", 2))
    codes = stops.stop_again_and_again(run, tmp_path, number, count)
    assert code in codes and 0 not in codes
    if number == signal.SIGTERM:  # a process that has not set its handlers yet simply ends
        assert set(codes) <= {code, -number}
    stops.finish(run)
    stops.assert_equal(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "parts, message",
    [
        (
            [(trainer, "update_statistics"), (evaluation, "detect_one"), (trainer, "validation_losses")],
            f"stopped after iteration 9 of {ITERATIONS}, saved",
        ),
        ([(trainer.Trainer, "step")], f"stopped after iteration 1 of {ITERATIONS}, saved"),
        ([(trainer, "load_start")], "stopped by SIGTERM, with nothing to save"),
    ],
)
def test_stopped_in_each_part(coco, tmp_path, uninterrupted, monkeypatch, parts, message):
    """One start after the other is stopped, the last of them at the same evaluation as the first."""
    cfg = config(coco, tmp_path, *SETTINGS)
    for where, name in parts:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, stops.after_a_signal(getattr(where, name)))
            with pytest.raises(Interrupted, match=f"{message}; the same command with --resume goes on"):
                engine.train(cfg, resume=True)
    engine.train(cfg, resume=True)
    stops.assert_equal(tmp_path, uninterrupted)


def test_stopped_in_the_last_precise_statistics(coco, tmp_path, uninterrupted, monkeypatch):
    cfg = config(coco, tmp_path, *SETTINGS)
    part = trainer.Trainer.make_statistics_precise
    with monkeypatch.context() as patch:

        def signaled(trainer, start):
            if start == ITERATIONS:
                signal.raise_signal(signal.SIGTERM)
            part(trainer, start)

        patch.setattr(trainer.Trainer, "make_statistics_precise", signaled)
        with pytest.raises(Interrupted, match=f"iteration {ITERATIONS} of {ITERATIONS}, saved"):
            engine.train(cfg)
    assert not (tmp_path / "model_final.pth").exists()
    engine.train(cfg, resume=True)
    stops.assert_equal(tmp_path, uninterrupted)


def test_the_command_saves_at_a_signal(coco, tmp_path):
    (tmp_path / "c.yaml").write_text(
        config(coco, tmp_path / "run", *SETTINGS, "SOLVER.MAX_ITER", 9999).dump()
    )
    command = ["train_net", "--engine", "torchvision", "--config-file", tmp_path / "c.yaml"]
    program = Program(tmp_path, *command)
    program.wait_for(tmp_path / "run" / "metrics.json", "bbox/AP")
    os.kill(program.process.pid, signal.SIGUSR1)
    done = program.finish()
    assert done.returncode == REQUEUE
    assert done.stderr.strip().splitlines()[-1].endswith("saved; the same command with --resume goes on")


def test_the_best_model_is_kept(coco, tmp_path, monkeypatch):
    """AP rises, falls, and training ends after two evaluations without a better one."""
    aps = iter([10.0, 30.0, 20.0, 25.0, 25.0])

    def coco_ap(*_):
        value = next(aps)
        return {"bbox": {"AP": value, "AP50": 1.0}, "segm": {"AP": value}}

    monkeypatch.setattr(evaluation, "coco_ap", coco_ap)
    monkeypatch.setattr(engine, "judge", lambda cfg: {})
    more = "TEST.EVAL_PERIOD", 3, "TEST.PATIENCE", 2, "SOLVER.MAX_ITER", 60, "SOLVER.STEPS", ()
    results = engine.train(config(coco, tmp_path, *SETTINGS, *more))
    assert results["iterations"] == 12  # evaluated after 3, 6, 9 and 12
    assert results["ap"]["bbox"]["AP"] == 25.0
    assert results["best"]["iterations"] == 6 and results["best"]["ap"]["segm"]["AP"] == 30.0
    assert report.best_model(results) == "bbox/AP 30.0 after 6"
    panels = {panel[0]: panel[3][0] for panel in pictures.fine_tuning_panels({"run": tmp_path})}
    assert panels["Box AP"][0][1] == ((2, 5, 8, 11), (10.0, 30.0, 20.0, 25.0))
    assert len(panels["Validation loss"][0][1][1]) == 4
    saved = stops.model(tmp_path / "model_best.pth")
    assert saved.keys() == stops.model(tmp_path / "model_final.pth").keys()
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    evaluated = [row for row in rows if "validation/total_loss" in row]
    assert [row["iteration"] for row in evaluated] == [2, 5, 8, 11]
    assert all(row["validation/total_loss"] > row["validation/loss_mask"] > 0 for row in evaluated)


def test_the_final_model_may_be_the_best(coco, tmp_path, monkeypatch):
    aps = iter([10.0, 30.0])
    monkeypatch.setattr(evaluation, "coco_ap", lambda *_: {"bbox": {"AP": next(aps)}})
    monkeypatch.setattr(engine, "judge", lambda cfg: {})
    results = engine.train(config(coco, tmp_path, *SETTINGS, "SOLVER.MAX_ITER", 10))
    assert results["best"] == {
        "iterations": 10,
        "metric": "bbox/AP",
        "ap": {"bbox": {"AP": 30.0} | dict.fromkeys(("AP50", "AP75", "APs", "APm", "APl"))},
    }
    assert_same(stops.model(tmp_path / "model_best.pth"), stops.model(tmp_path / "model_final.pth"))


def test_the_best_model_is_found_again_by_its_ap(coco, tmp_path, uninterrupted):
    """--eval-only of model_best.pth gives the AP that results.json states."""
    (about,) = [json.loads((uninterrupted / best.ABOUT_BEST).read_text())]
    cfg = config(coco, tmp_path, *SETTINGS, "MODEL.WEIGHTS", str(uninterrupted / "model_best.pth"))
    assert engine.train(cfg, eval_only=True)["ap"] == about["ap"]


def test_validation_losses_change_nothing(coco, tmp_path, uninterrupted):
    """A run without evaluations has the same final model."""
    cfg = config(coco, tmp_path, *SETTINGS, "TEST.EVAL_PERIOD", 0)
    assert engine.train(cfg)["best"] is None
    assert_same(stops.model(tmp_path / "model_final.pth"), stops.model(uninterrupted / "model_final.pth"))


def test_a_finished_run_is_extended(coco, tmp_path, uninterrupted, capsys):
    """It ends with the bits of a run that was longer from the start."""
    cfg = config(coco, tmp_path, *SETTINGS, "SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (7,))
    assert engine.train(cfg)["iterations"] == 8
    for refused in (("SOLVER.STEPS", (6, 12)), ("SOLVER.BASE_LR", 0.02), ("SOLVER.MAX_ITER", 7)):
        with pytest.raises(InputError, match="began with .*MODEL.WEIGHTS its model to start from that"):
            engine.train(config(coco, tmp_path, *SETTINGS, *refused), resume=True)
    longer = "SOLVER.STEPS", (7, 12)
    assert engine.train(config(coco, tmp_path, *SETTINGS, *longer), resume=True)["iterations"] == ITERATIONS
    said = "is extended: SOLVER.MAX_ITER 8 and not 16; SOLVER.STEPS [7] and not (7, 12)"
    assert said in capsys.readouterr().out.replace("[7, 12]", "(7, 12)")
    whole = config(coco, tmp_path / "whole", *SETTINGS, *longer)
    engine.train(whole)
    assert_same(stops.model(tmp_path / "model_final.pth"), stops.model(tmp_path / "whole/model_final.pth"))
    assert engine.train(config(coco, tmp_path, *SETTINGS, *longer), resume=True)["iterations"] == ITERATIONS


def test_training_starts_from_a_detector(coco, tmp_path, uninterrupted):
    """All of it arrives; with another number of classes all but the layers that depend on it."""
    path = str(uninterrupted / "model_final.pth")
    stored = stops.model(path)
    for classes in (3, 2):
        cfg = config(coco, tmp_path, *SETTINGS, "MODEL.WEIGHTS", path, "MODEL.ROI_HEADS.NUM_CLASSES", classes)
        torch.manual_seed(5)
        model = engine.build_model(cfg)
        assert weights.load_start(cfg, model)["source"] == path
        state = model.state_dict()
        anew = {
            name
            for name, tensor in state.items()
            if "num_batches" not in name and not torch.equal(tensor, stored[name])
        }
        layers = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        wanted = {f"roi_heads.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        assert anew == (set() if classes == 3 else wanted)
    results = engine.train(config(coco, tmp_path, *SETTINGS, "MODEL.WEIGHTS", path, "SOLVER.MAX_ITER", 1))
    assert results["method"] == "detector" and results["iterations"] == 1


def test_a_detector_of_other_layers_is_refused(coco, tmp_path, uninterrupted):
    path = str(uninterrupted / "model_final.pth")
    cfg = config(coco, tmp_path, *SETTINGS, "MODEL.WEIGHTS", path, "MODEL.FPN.OUT_CHANNELS", 16)
    with pytest.raises(InputError, match="is a detector that lacks .* in another shape.*convert_to_d2.py"):
        engine.train(cfg)
