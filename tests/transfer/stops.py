"""Fine-tunings that are stopped again and again; for tests of both engines."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from rsa_detectron2.common.errors import REQUEUE, Interrupted
from tests.conftest import assert_same, processes


def run(train, trainer, cfg):
    """``train(cfg, resume=True)`` as tools/train_net.py does it; each step adds a byte to OUTPUT_DIR/steps.

    ``trainer``: (class, name of its method that makes a step).
    """
    kind, name = trainer
    step = getattr(kind, name)

    def counted(*arguments):
        with open(Path(cfg.OUTPUT_DIR, "steps"), "ab") as steps:
            steps.write(b".")
        return step(*arguments)

    setattr(kind, name, counted)
    try:
        train(cfg, resume=True)
    except Interrupted as stopped:
        print(stopped)
        os._exit(REQUEUE)


def after_a_signal(part):
    """The function ``part``, before each call of which a signal comes."""
    return lambda *given: [signal.raise_signal(signal.SIGTERM), part(*given)][1]


def stop_again_and_again(start, folder, number, stops):
    """Start ``start()`` ``stops`` times, and send it ``number`` after a random number of steps; returns the
    exit codes. Some runs get it while they start."""
    rng, codes, steps = np.random.default_rng(0), [], folder / "steps"
    for _ in range(stops):
        before = steps.stat().st_size if steps.is_file() else 0
        wanted = before + int(rng.integers(0, 4))
        process = processes.Process(target=start)
        process.start()
        while process.is_alive() and (steps.stat().st_size if steps.is_file() else 0) < wanted:
            time.sleep(0.005)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.2))  # anywhere in the step, or in what follows it
        os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
    return codes


def finish(start):
    process = processes.Process(target=start)
    process.start()
    process.join()
    assert process.exitcode == 0


def model(path):
    return torch.load(path, weights_only=True, map_location="cpu")["model"]


def assert_equal(folder, other):
    """Two runs have the same final model, best model and results."""
    for name in ("model_final.pth", "model_best.pth"):
        assert_same(model(folder / name), model(other / name))
    found, wanted = (json.loads((run / "results.json").read_text()) for run in (folder, other))
    assert found["ap"] == wanted["ap"] and found["best"] == wanted["best"]
