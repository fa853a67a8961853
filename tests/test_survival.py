"""A run that is killed again and again, at any moment, against one that was not: the same bits at the end."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain import checkpoint, train_loop
from pretrain.config import InputError, Interrupted
from tests.conftest import assert_same, final_weights, processes, tiny_cfg

LONG = ("SOLVER.EPOCHS", 100, "CHECKPOINT.KEEP_PERIOD", 0)


def run(cfg):
    """A run as tools/pretrain.py makes it, in a process of its own."""
    try:
        train_loop.train(cfg)
    except Interrupted:
        os._exit(train_loop.REQUEUE)


def start(cfg):
    process = processes.Process(target=run, args=(cfg,))
    process.start()
    return process


def wait_for_step(cfg, process):
    """Until the run has made one."""
    metrics = Path(cfg.OUTPUT_DIR, "metrics.jsonl")
    while process.is_alive() and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    """Its final weights, and the seconds that it took."""
    since = time.perf_counter()
    process = start(tiny_cfg(image_folder, tmp_path_factory.mktemp("whole"), *LONG))
    process.join()
    assert process.exitcode == 0
    return final_weights(tmp_path_factory.getbasetemp() / "whole0" / "run" / checkpoint.FINAL), time.perf_counter() - since


@pytest.mark.parametrize("number, kills, code", [(signal.SIGKILL, 20, None), (signal.SIGTERM, 6, train_loop.REQUEUE)])
def test_killed_at_random_moments(image_folder, tmp_path, uninterrupted, number, kills, code):
    """The moments are uniform over a fraction of the whole run's time that leaves something to the last start; so they
    fall into starting, stepping and writing. Each start takes another number of workers."""
    weights, seconds = uninterrupted
    rng = np.random.default_rng(0)
    codes, reached = [], set()
    while len(codes) < kills:
        process = start(tiny_cfg(image_folder, tmp_path, *LONG, "DATA.NUM_WORKERS", int(rng.integers(0, 3))))
        process.join(rng.uniform(0, 1.2 * seconds / kills))
        assert process.exitcode is None, "the run ended before it was killed often enough: make it longer"
        os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
        reached.add(checkpoint.load(path)["step"] if (path := checkpoint.newest(tmp_path / "run")) else 0)
    if number == signal.SIGTERM:  # before the loop has begun, it simply ends the process
        assert set(codes) <= {code, -signal.SIGTERM} and code in codes
    assert len(reached) > kills // 4  # the kills fell into the run, not all into its start
    process = start(tiny_cfg(image_folder, tmp_path, *LONG))
    process.join()
    assert process.exitcode == 0
    assert_same(final_weights(tmp_path / "run" / checkpoint.FINAL), weights)


def test_second_run_in_a_folder_is_refused(image_folder, tmp_path):
    cfg = tiny_cfg(image_folder, tmp_path, *LONG)
    process = start(cfg)
    wait_for_step(cfg, process)
    with pytest.raises(InputError, match=f"another run is at work in .* .process {process.pid} on "):
        train_loop.train(cfg)
    os.kill(process.pid, signal.SIGUSR1)
    process.join()
    assert process.exitcode == train_loop.REQUEUE
