"""A fine-tuning with Detectron2 on a CPU that is stopped at any moment ends with the same bits as one that
was not."""

import functools
import json
import os
import pickle
import signal
import socket

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler

from rsa_detectron2.common.errors import REQUEUE, InputError, Interrupted
from rsa_detectron2.common.launch import Processes
from rsa_detectron2.tools import train_net
from rsa_detectron2.transfer.d2 import data as d2_data
from rsa_detectron2.transfer.d2 import engine, evaluation, hooks
from rsa_detectron2.transfer.d2 import trainer as d2_trainer
from tests.conftest import Program, assert_same
from tests.transfer import stops
from tests.transfer.d2.test_trainer import tiny

ITERATIONS = 14
SETTINGS = (
    *("SEED", 1, "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.STEPS", (9,), "SOLVER.CHECKPOINT_PERIOD", 4),
    *("TEST.EVAL_PERIOD", 5, "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 16),
    *("INPUT.MIN_SIZE_TRAIN", (48, 56, 64), "INPUT.RANDOM_FLIP", "horizontal"),
    *("INPUT.MASK_FORMAT", "bitmask", "DATALOADER.ASPECT_RATIO_GROUPING", True),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "DATALOADER.NUM_WORKERS", 0),
)


def start(cfg, workers=0):
    cfg.DATALOADER.NUM_WORKERS = workers
    stops.run(engine.train, (d2_trainer.Trainer, "run_step"), cfg)


@pytest.fixture(scope="module")
def uninterrupted(shapes, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    stops.finish(functools.partial(start, tiny(shapes, folder, *SETTINGS)))
    return folder


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_stopped_at_random_moments(shapes, tmp_path, uninterrupted, workers):
    """By SIGKILL, with or without workers of the loader; in the end by SIGTERM."""
    (tmp_path / "steps").write_bytes(b"")
    # Each start makes three steps at most: some of them end after a checkpoint.
    cfg = tiny(shapes, tmp_path, *SETTINGS, "SOLVER.CHECKPOINT_PERIOD", 2)
    run = functools.partial(start, cfg, workers)
    codes = stops.stop_again_and_again(run, tmp_path, signal.SIGKILL, 8 if workers == 0 else 3)
    assert set(codes) == {-signal.SIGKILL}
    codes = stops.stop_again_and_again(run, tmp_path, signal.SIGTERM, 1)
    assert set(codes) <= {REQUEUE, -signal.SIGTERM}
    stops.finish(run)
    stops.assert_equal(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "parts, message",
    [
        (
            [(hooks, "update_statistics"), (evaluation, "inference_on_dataset")],
            f"stopped after iteration 5 of {ITERATIONS}, saved",
        ),
        ([(evaluation.Mapper, "__call__")], f"stopped after iteration 1 of {ITERATIONS}, saved"),
        ([(d2_trainer, "build_model")], "stopped by SIGTERM, with nothing to save"),
    ],
)
def test_stopped_in_each_part(shapes, tmp_path, uninterrupted, monkeypatch, parts, message):
    """One start after the other is stopped, the last of them at the same evaluation as the first."""
    for where, name in parts:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, stops.after_a_signal(getattr(where, name)))
            with pytest.raises(Interrupted, match=f"{message}; the same command with --resume goes on"):
                engine.train(tiny(shapes, tmp_path, *SETTINGS), resume=True)
    engine.train(tiny(shapes, tmp_path, *SETTINGS), resume=True)
    stops.assert_equal(tmp_path, uninterrupted)


def test_stopped_in_the_last_precise_statistics(shapes, tmp_path, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        part = hooks.PreciseBN.work

        def signaled(hook, done):
            if done == ITERATIONS:
                signal.raise_signal(signal.SIGTERM)
            part(hook, done)

        patch.setattr(hooks.PreciseBN, "work", signaled)
        with pytest.raises(Interrupted, match=f"iteration {ITERATIONS} of {ITERATIONS}, saved"):
            engine.train(tiny(shapes, tmp_path, *SETTINGS))
    assert not (tmp_path / "model_final.pth").exists()
    engine.train(tiny(shapes, tmp_path, *SETTINGS), resume=True)
    stops.assert_equal(tmp_path, uninterrupted)


def test_two_processes_save_at_a_signal(shapes, tmp_path):
    """The launcher gets it, passes it on, and ends with 75."""
    cfg = tiny(shapes, tmp_path / "run", *SETTINGS, "SOLVER.MAX_ITER", 9999, "TEST.EVAL_PERIOD", 0)
    (tmp_path / "c.yaml").write_text(cfg.dump())
    command = ["train_net", "--config-file", tmp_path / "c.yaml", "--num-processes", 2]
    program = Program(tmp_path, *command)
    program.wait_for(tmp_path / "run" / "metrics.json", "total_loss")
    os.kill(program.process.pid, signal.SIGTERM)
    done = program.finish()
    assert done.returncode == REQUEUE, done.stderr
    assert "the same command with --resume goes on" in done.stderr.strip().splitlines()[-1]
    assert (tmp_path / "run" / "last_checkpoint").is_file()


def test_two_machines_equal_one(shapes, tmp_path):
    """Two commands, one for each machine, which meet at an address, against one with two processes."""
    cfg = tiny(shapes, tmp_path, *SETTINGS, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ())
    (tmp_path / "c.yaml").write_text(cfg.dump())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    command = ["train_net", "--config-file", tmp_path / "c.yaml"]
    machines = [*command, "--num-machines", 2, "--dist-url", address, "OUTPUT_DIR", tmp_path / "two"]
    programs = [Program(tmp_path, *machines, "--machine-rank", rank) for rank in (1, 0)]
    done = [program.finish() for program in programs]
    assert [program.returncode for program in done] == [0, 0], done
    assert [program.stdout.count("done: ") for program in done] == [0, 1]
    one = tiny(shapes, tmp_path / "one", *SETTINGS, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ())
    engine.train(one, engine.Passes(Processes(2)))
    assert_same(stops.model(tmp_path / "two/model_final.pth"), stops.model(tmp_path / "one/model_final.pth"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-machines", "2"], "--dist-url 'auto': give tcp://HOST:PORT"),
        (["--num-machines", "2", "--machine-rank", "2"], "the machines are 0 to .* which is 1"),
    ],
)
def test_machines_that_cannot_meet_are_refused(options, message):
    args = train_net.parse(["--config-file", "c.yaml", *options])
    with pytest.raises(InputError, match=message):
        train_net.processes(args)


def test_training_ends_when_patience_runs_out(shapes, tmp_path, monkeypatch):
    aps = iter([10.0, 30.0, 20.0, 5.0, 25.0])
    for module in (hooks, engine):
        monkeypatch.setattr(module, "evaluate", lambda *_: {"bbox": {"AP": next(aps)}})
    monkeypatch.setattr(engine, "judge", lambda cfg: {})
    more = "TEST.EVAL_PERIOD", 2, "TEST.PATIENCE", 2, "SOLVER.MAX_ITER", 60, "SOLVER.STEPS", ()
    results = engine.train(tiny(shapes, tmp_path, *SETTINGS, *more))
    assert results["iterations"] == 8 and results["ap"]["bbox"]["AP"] == 25.0
    assert results["best"]["iterations"] == 4 and results["best"]["ap"]["bbox"]["AP"] == 30.0
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any(row.get("validation/total_loss", 0) > 0 for row in rows)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_order_is_that_of_detectron2(batch_size):
    """Detectron2's own loader, which groups images when they are read, gives the same batches."""
    images = [{"width": 10 + n % 3, "height": 11, "image_id": n} for n in range(24)]  # every third is wide
    theirs = build_detection_train_loader(
        DatasetFromList(images),
        mapper=lambda image: image,
        sampler=TrainingSampler(24, seed=3),
        total_batch_size=batch_size,
        aspect_ratio_grouping=True,
    )
    batches = [[image["image_id"] for image in batch] for batch, _ in zip(theirs, range(30))]
    wide = [image["width"] > image["height"] for image in images]
    for first in (0, 7):
        order = d2_data.Order(TrainingSampler(24, seed=3), wide, batch_size, first)
        wanted = [image for batch in batches[first:] for image in batch]
        found = [index for index, _ in zip(order, wanted)]
        assert [index % 24 for index in found] == wanted
        places = range(first * batch_size, first * batch_size + len(found))
        assert [index // 24 for index in found] == list(places)


def test_a_finished_run_is_extended(shapes, tmp_path, uninterrupted):
    """It ends as a run that was longer from the start."""
    cfg = tiny(shapes, tmp_path, *SETTINGS, "SOLVER.MAX_ITER", 11)
    assert engine.train(cfg)["iterations"] == 11
    cosine = tiny(shapes, tmp_path, *SETTINGS, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")
    with pytest.raises(InputError, match="began with .*MODEL.WEIGHTS its model to start from that"):
        engine.train(cosine, resume=True)
    assert engine.train(tiny(shapes, tmp_path, *SETTINGS), resume=True)["iterations"] == ITERATIONS
    found, wanted = (stops.model(folder / "model_final.pth") for folder in (tmp_path, uninterrupted))
    # Detectron2 computes the warm-up's learning rate from iterations / SOLVER.MAX_ITER, and so rounds it.
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stock", [False, True])
def test_training_starts_from_a_detector(shapes, tmp_path, uninterrupted, capsys, stock):
    """A model of this project, or a pickle as in Detectron2's model zoo.

    With another number of classes, three layers start anew."""
    stored = stops.model(uninterrupted / "model_final.pth")
    path = uninterrupted / "model_final.pth"
    if stock:
        path = tmp_path / "zoo.pkl"
        arrays = {name: tensor.numpy() for name, tensor in stored.items() if "num_batches" not in name}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    for classes in (18, 5):
        cfg = tiny(
            shapes, tmp_path, *SETTINGS, "MODEL.WEIGHTS", str(path), "MODEL.ROI_HEADS.NUM_CLASSES", classes
        )
        d2_data.register_datasets(cfg)
        trainer = d2_trainer.Trainer(cfg)
        trainer.resume_or_load(False)
        state = trainer.model.state_dict()
        anew = {
            name.rpartition(".")[0]
            for name, tensor in state.items()
            if "num_batches" not in name and not torch.equal(tensor, stored[name])
        }
        layers = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
        assert anew == (set() if classes == 18 else {f"roi_heads.{layer}" for layer in layers})
        said = capsys.readouterr().out
        assert ("all of it is used" if classes == 18 else "starting anew: roi_heads.box_predictor") in said
    run = tiny(shapes, tmp_path / "run", *SETTINGS, "MODEL.WEIGHTS", str(path), "SOLVER.MAX_ITER", 1)
    assert engine.train(run)["method"] == "detector"
