"""The runner of steps: order, several at a time, logs, and what a failure or a signal leaves.

Small programs stand for the tools. Each writes its file last.
"""

import signal
import sys
import time

import pytest

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import _steps
from rsa_detectron2.tools._steps import Runner, Step, missing_steps, refuse_other_runs

WORK = """
import os, signal, sys, time
from pathlib import Path
done = Path(sys.argv[1])
folder = done.parent
def wait_for(name):
    for _ in range(1000):
        if (folder / name).is_file():
            return
        time.sleep(0.01)
    sys.exit(name + " did not come")
def save(number, frame):
    done.with_suffix(".saved").touch()
    os._exit(75)
"""
TRAIN = 'signal.signal(signal.SIGTERM, save); (folder / "training").touch(); time.sleep(60)'


@pytest.fixture
def step(tmp_path, monkeypatch):
    def command_line(step):
        return [sys.executable, "-c", f"{WORK}{step.command[1]}\ndone.touch()", str(step.done)]

    monkeypatch.setattr(_steps, "command_line", command_line)

    def make(name, code="", needs=None, hours=0.0):
        return Step(tmp_path / f"{name}.pth", ["tools/work.py", code], needs and needs.done, hours)

    return make


def test_one_at_a_time_in_order(step, tmp_path, capfd):
    """Each prints to the terminal, and finds the file of the one before."""
    first = step("a", "print('the first')", hours=1.0)
    second = step("b", "assert (folder / 'a.pth').is_file()", needs=first, hours=3.0)
    assert Runner([first, second]).run() == 0
    said = capfd.readouterr().out
    assert "[1 of 2] $ tools/work.py" in said and "\nthe first\n" in said and "2 of 2 steps done\n" in said
    assert "1 of 2 steps done, about 0 min left\n" in said and not list(tmp_path.glob("*.log"))


def test_time_left_is_by_costs(step, monkeypatch):
    runner = Runner([step("a", hours=2.0), step("b", hours=6.0), step("c")])
    runner.start_time = time.monotonic() - 1200
    assert runner.time_left() == ""  # nothing is done yet
    runner.finished.append(runner.waiting.pop(0))
    assert runner.time_left() == ", about 60 min left"
    runner.start_time -= 1200
    assert runner.time_left() == ", about 2.0 hours left"


def test_several_at_a_time(step, tmp_path, monkeypatch, capfd):
    """Each waits for the other, so both run at once, with one thread; what needs one of them comes later."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    a = step("a", "print(os.environ['OMP_NUM_THREADS'], 'thread'); wait_for('b.running')")
    needs_a = step("c", "assert (folder / 'a.pth').is_file()", needs=a)
    b = step("b", "(folder / 'b.running').touch(); wait_for('a.pth')")
    assert Runner([a, needs_a, b], jobs=2).run() == 0
    assert "1 thread" not in capfd.readouterr().out
    assert (tmp_path / "a.log").read_text().endswith("\n1 thread\n")


def test_threads_are_left_alone_for_one_job(step, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Runner([step("a", "print(os.environ['OMP_NUM_THREADS'])")], logged=True).run() == 0
    assert (tmp_path / "a.log").read_text().endswith("\n3\n")


def test_a_failure_stops_the_others(step, tmp_path, capfd):
    """A training beside it saves; nothing else is started; one line names the log."""
    broken = step("broken", "wait_for('training'); print('why'); sys.exit(3)")
    steps = [step("run", TRAIN), broken, step("later")]
    assert Runner(steps, jobs=2).run() == 3
    error = capfd.readouterr().err
    assert f"tools/work.py stopped with status 3, without {broken.done} (printed: {broken.log})" in error
    assert error.count("\n") == 1 and "why\n" in broken.log.read_text()
    assert (tmp_path / "run.saved").is_file() and not steps[2].done.is_file()


def test_a_step_without_its_file_has_failed(step, capfd):
    assert Runner([step("a", "sys.exit(0)")]).run() == 1
    assert "stopped with status 1, without" in capfd.readouterr().err
    assert Runner([step("a", "os.kill(os.getpid(), signal.SIGKILL)")]).run() == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_steps_save(step, tmp_path, number, capfd):
    handler = signal.getsignal(number)
    asks = step("asks", f"wait_for('training'); os.kill(os.getppid(), {number}); time.sleep(60)")
    steps = [step("run", TRAIN), asks, step("later")]
    assert Runner(steps, jobs=2).run() == 75
    error = capfd.readouterr().err
    assert error.startswith(
        f"stopped by {number.name} (printed: {steps[0].log}, {asks.log}); the same command"
    )
    assert error.count("\n") == 1 and signal.getsignal(number) is handler
    assert (tmp_path / "run.saved").is_file() and not steps[2].done.is_file()
    assert Runner([steps[2]]).run() == 0  # what was stopped does not stop the next


def test_a_second_ctrl_c_kills(step, tmp_path):
    """A step that does not end at SIGTERM does not hold the terminal."""
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: (folder / 'asked').touch())\n"
        "os.kill(os.getppid(), signal.SIGINT); wait_for('asked')\n"
        "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    )
    start = time.monotonic()
    assert Runner([step("a", code)]).run() == 75 and time.monotonic() - start < 30
    assert not (tmp_path / "a.pth").is_file()


def test_missing_steps(step):
    """What is done is skipped, and so is what only led to it."""
    run = step("run")
    judge, other = step("judge", needs=run), step("other")
    assert missing_steps([run, judge, other]) == [run, judge, other]
    judge.done.touch()
    assert missing_steps([run, judge, other]) == [other]
    assert [one.line([other])[:8] for one in (run, judge, other)] == ["[not nee", "[done] /", "[to run]"]


def test_other_runs_are_refused(step):
    steps = [step("a"), step("b")]
    steps[1].done.touch()
    refuse_other_runs(steps, lambda step: [])
    with pytest.raises(InputError, match=r"holds another run \(b.pth\): move it away, or give another"):
        refuse_other_runs(steps, lambda step: [step.done.name])
