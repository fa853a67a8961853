"""A run that is killed again and again at any moment ends with the same bits as one that was not."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from rsa_detectron2.common import files
from rsa_detectron2.common.errors import REQUEUE, InputError, Interrupted
from rsa_detectron2.pretrain.engine import checkpoint, past
from rsa_detectron2.pretrain.engine import trainer as train_loop
from tests.conftest import TINY, Program, assert_same, final_weights, processes, tiny_cfg

STEPS = 60  # 20 epochs of three
LONG = ("SOLVER.EPOCHS", STEPS // 3, "CHECKPOINT.KEEP_PERIOD", 0)


def run(cfg):
    """Start a run as tools/pretrain.py does, in its own process."""
    try:
        train_loop.train(cfg)
    except Interrupted:
        os._exit(REQUEUE)


def start(cfg):
    process = processes.Process(target=run, args=(cfg,))
    process.start()
    return process


def last_step(cfg):
    """The last step in the run's metrics, or 0; a line may be half written."""
    metrics = Path(cfg.OUTPUT_DIR, "metrics.jsonl")
    return (
        max(map(int, re.findall(r'"step": (\d+)', metrics.read_text())), default=0)
        if metrics.is_file()
        else 0
    )


def wait_for_step(cfg, process, step=1):
    """Wait until the run has made the step or has ended."""
    while process.is_alive() and last_step(cfg) < step:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    """The final weights of an uninterrupted run, and the seconds with nothing to save."""
    cfg = tiny_cfg(image_folder, tmp_path_factory.mktemp("whole"), *LONG)
    server = processes.Process(target=int)  # the first start includes that of the server
    server.start()
    server.join()
    since = time.perf_counter()
    process = start(cfg)
    wait_for_step(cfg, process)
    seconds = time.perf_counter() - since
    process.join()
    assert process.exitcode == 0
    return final_weights(Path(cfg.OUTPUT_DIR, checkpoint.FINAL)), seconds


@pytest.mark.parametrize(
    "number, kills, code",
    [
        (signal.SIGKILL, 5, None),
        pytest.param(signal.SIGKILL, 10, None, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 6, REQUEUE, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(image_folder, tmp_path, uninterrupted, number, kills, code):
    """Some runs are killed at a random time of their start, the others after a random number of further
    steps, whether they are in a step or writing a file. Each start uses another number of workers."""
    weights, seconds = uninterrupted
    rng = np.random.default_rng(0)
    codes, reached = [], set()
    for _ in range(kills):
        cfg = tiny_cfg(image_folder, tmp_path, *LONG, "DATA.NUM_WORKERS", int(rng.integers(0, 3)))
        before = last_step(cfg)
        process = start(cfg)
        if rng.random() < 0.3:
            until = time.perf_counter() + rng.uniform(0, seconds)
            while process.is_alive() and time.perf_counter() < until and last_step(cfg) <= before:
                time.sleep(0.01)
        else:
            wait_for_step(cfg, process, before + rng.integers(1, STEPS // kills))
        assert process.is_alive(), "it came to its end before it could be killed"
        os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
        reached.add(checkpoint.load(path)["step"] if (path := checkpoint.newest(tmp_path / "run")) else 0)
    assert 0 not in codes
    if number == signal.SIGTERM:  # before the loop begins, the signal simply ends the process
        assert set(codes) <= {code, -signal.SIGTERM} and code in codes
    assert len(reached) > kills // 4  # not all kills fell into the start of the run
    process = start(tiny_cfg(image_folder, tmp_path, *LONG))
    process.join()
    assert process.exitcode == 0
    assert_same(final_weights(tmp_path / "run" / checkpoint.FINAL), weights)


def command(image_folder, folder, *more):
    return ["pretrain", "--data", image_folder, "--output-dir", folder, *TINY, *LONG, *more]


def test_killed_command_goes_on_bit_for_bit(image_folder, tmp_path, uninterrupted, tool):
    """SIGKILL comes as soon as the first epoch's checkpoint exists; then the same command runs again."""
    folder = tmp_path / "run"
    first = Program(tmp_path, *command(image_folder, folder))
    first.wait_for(folder / checkpoint.LAST)
    first.process.kill()
    first.finish()
    assert not Path(folder, checkpoint.FINAL).exists()
    again = tool(*command(image_folder, folder))
    assert again.returncode == 0 and "goes on after step" in again.stdout, again.stderr
    assert_same(final_weights(folder / checkpoint.FINAL), uninterrupted[0])


def test_signal_to_the_whole_group_saves(image_folder, tmp_path, uninterrupted):
    """A scheduler's SIGTERM also reaches the loader's workers. The command still saves, and its status is
    75."""
    first = Program(tmp_path, *command(image_folder, tmp_path / "run", "DATA.NUM_WORKERS", 1))
    first.wait_for(tmp_path / "run" / "metrics.jsonl", '"loss"')
    os.killpg(first.process.pid, signal.SIGTERM)
    done = first.finish()
    assert done.returncode == 75 and "the same command goes on" in done.stderr, done.stderr
    assert_same(final_weights(train_loop.train(tiny_cfg(image_folder, tmp_path, *LONG))), uninterrupted[0])


def run_signaled_while_it_saves(cfg):
    save = files.save_tensors

    def signaled(*arguments, **how):
        os.kill(os.getpid(), signal.SIGUSR1)
        return save(*arguments, **how)

    files.save_tensors = signaled
    run(cfg)


def test_signals_while_it_saves(image_folder, tmp_path):
    """The first signal stops the run at the end of the first epoch; the second comes while it saves for
    that."""
    process = processes.Process(
        target=run_signaled_while_it_saves, args=(tiny_cfg(image_folder, tmp_path, *LONG),)
    )
    process.start()
    process.join()
    assert process.exitcode == REQUEUE
    assert checkpoint.load(checkpoint.newest(tmp_path / "run"))["step"] > 3


def test_signal_as_the_handlers_are_set(image_folder, tmp_path, monkeypatch):
    install = signal.signal

    def signaled(number, handler):
        previous = install(number, handler)
        if number == signal.SIGUSR1:
            signal.raise_signal(signal.SIGTERM)
        return previous

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", signaled)
        with pytest.raises(Interrupted, match="stopped by SIGTERM, with nothing to save"):
            train_loop.train(tiny_cfg(image_folder, tmp_path))
    for number, handler in handlers.items():
        signal.signal(number, handler)


class SignalsWhenItEnds:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def run_signaled_in_a_finalizer(cfg):
    images_of = past.images_of

    def signaled(*arguments):
        SignalsWhenItEnds()
        return images_of(*arguments)

    past.images_of = signaled
    run(cfg)


def test_signal_whose_exception_python_drops(image_folder, tmp_path):
    """The signal comes during a finalizer while the run starts (a fork's callbacks drop exceptions, too): the
    run then stops after its first step."""
    process = processes.Process(
        target=run_signaled_in_a_finalizer, args=(tiny_cfg(image_folder, tmp_path, *LONG),)
    )
    process.start()
    process.join()
    assert process.exitcode == REQUEUE
    assert checkpoint.load(checkpoint.newest(tmp_path / "run"))["step"] == 1


def test_second_run_in_a_folder_is_refused(image_folder, tmp_path):
    cfg = tiny_cfg(image_folder, tmp_path, *LONG, "SOLVER.EPOCHS", 200)
    process = start(cfg)
    wait_for_step(cfg, process)
    with pytest.raises(InputError, match=f"another run is at work in .* .process {process.pid} on "):
        train_loop.train(cfg)
    os.kill(process.pid, signal.SIGUSR1)
    process.join()
    assert process.exitcode == REQUEUE
