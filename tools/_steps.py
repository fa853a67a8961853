"""Steps of a long job: commands that each leave a file, run several at a time.

What stops the job stops all of it: when a step fails or a signal comes, the running steps get SIGTERM, at
which a training saves, and the runner waits for them. The same job started again goes on, because a step
whose file is there is done.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from rsa_detectron2.common.cli import say_last
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import REQUEUE, InputError
from rsa_detectron2.common.signals import stop_signals

PAUSE = 0.1  # seconds between two looks at the running steps


@dataclass
class Step:
    """A command, and the file that is there once it has run."""

    done: Path
    command: list[str]  # a tool and its arguments
    needs: Path | None = None  # the file of an earlier step
    hours: float = 0.0  # on whatever machine the steps' costs are stated for; 0: next to nothing

    @property
    def log(self) -> Path:
        """Where the command prints, unless that is the terminal."""
        return self.done.with_suffix(".log")

    def line(self, missing: Sequence["Step"], cost: str = "to run") -> str:
        """What a dry run prints of it: its command, if it is one of the ``missing`` steps, else its file."""
        if self in missing:
            return f"[{cost}] {shlex.join(self.command)}"
        return f"[{'done' if self.done.is_file() else 'not needed'}] {self.done}"


def missing_steps(steps: Sequence[Step]) -> list[Step]:
    """The steps to run: neither what is done nor what only led to it."""
    needed = {step.done for step in steps} - {step.needs for step in steps}
    missing = []
    for step in reversed(steps):
        if step.done in needed and not step.done.is_file():
            missing.insert(0, step)
            needed.add(step.needs)
    return missing


def refuse_other_runs(steps: Sequence[Step], differences: Callable[[Step], list[str]]) -> None:
    """Raises InputError for a finished run that is not the one of its step.

    ``differences(step)``: words for everything in which they differ.
    """
    for step in steps:
        if step.done.is_file() and (found := differences(step)):
            raise InputError(
                f"{step.done.parent} holds another run ({'; '.join(found)}): "
                "move it away, or give another --output-dir"
            )


class Job(Protocol):
    """Steps that lead to one report, such as a test of tools/reproduce.py."""

    def steps(self) -> list[Step]: ...

    def differences(self, step: Step) -> list[str]:
        """Words for everything in which the run of a finished step is not the one that the step makes."""

    def prepare(self) -> None:
        """Make what the steps need besides each other's files."""

    def report(self) -> str:
        """Write the report of the finished steps; returns what to print of it."""


def run_job(job: Job, jobs: int, dry_run: bool, cost: Callable[[float], str]) -> int:
    """Run what is missing of a job, ``jobs`` steps at a time, and report; returns the status of the runner.

    cost: words for the hours of the steps. A dry run only prints the steps and their cost. Raises InputError.
    """
    steps = job.steps()
    refuse_other_runs(steps, job.differences)
    missing = missing_steps(steps)
    for step in steps:
        print(step.line(missing))
    total = cost(sum(step.hours for step in missing))
    print(f"{len(missing)} of {len(steps)} to run, {total}", flush=True)
    if dry_run:
        return 0
    job.prepare()
    status = Runner(missing, jobs).run()
    if status == 0:
        print(job.report())
    return status


class Runner:
    """Runs steps in their order, ``jobs`` at a time.

    With ``logged``, and always with several jobs, each prints to its log. Several jobs on a CPU have one
    thread each.
    """

    def __init__(self, steps: Sequence[Step], jobs: int = 1, logged: bool = False) -> None:
        self.waiting, self.running, self.finished = list(steps), [], []
        self.jobs, self.logged, self.total = jobs, logged or jobs > 1, len(steps)
        self.signals, self.status, self.reason = [], 0, ""

    def run(self) -> int:
        """Run all; returns 0, the status of the first step that failed, or 75 after a signal."""
        self.start_time = time.monotonic()
        handlers = {number: signal.signal(number, self.note_signal) for number in stop_signals()}
        try:
            while self.running or (self.waiting and not self.status):
                self.start_ready()
                time.sleep(PAUSE)
                self.heed_signals()
                self.collect()
        finally:  # an error of our own leaves no step behind
            self.send(signal.SIGTERM)
            for _, process in self.running:
                process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.status:
            say_last(f"{self.reason}; the same command goes on")
        return self.status

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def start_ready(self) -> None:
        """Start the next steps whose needs are done, as far as there is room."""
        while len(self.running) < self.jobs and not (self.status or self.signals):
            pending = [step.done for step in self.waiting] + [step.done for step, _ in self.running]
            step = next((step for step in self.waiting if step.needs not in pending), None)
            if step is None:
                return
            self.waiting.remove(step)
            number = self.total - len(self.waiting)
            blank = "" if self.logged else "\n"
            print(f"{blank}[{number} of {self.total}] $ {shlex.join(step.command)}", flush=True)
            self.running.append((step, self.start(step)))

    def start(self, step: Step) -> subprocess.Popen:
        """Start a step, in a session of its own: Ctrl-C in a terminal then reaches the runner alone."""
        options = {"env": dict(os.environ), "stdin": subprocess.DEVNULL, "start_new_session": True}
        if self.jobs > 1 and device().type == "cpu":
            options["env"] |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if not self.logged:
            return subprocess.Popen(command_line(step), **options)
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with open(step.log, "a") as log:
            log.write(f"$ {shlex.join(step.command)}\n")
            log.flush()
            return subprocess.Popen(command_line(step), stdout=log, stderr=log, **options)

    def heed_signals(self) -> None:
        """Pass the first signal on as SIGTERM. A second Ctrl-C kills, as it would a training."""
        if self.signals and not self.status:
            name = signal.Signals(self.signals[0]).name
            self.stop(REQUEUE, f"stopped by {name}{self.printed([step for step, _ in self.running])}")
        if self.signals.count(signal.SIGINT) > 1:
            self.send(signal.SIGKILL)

    def collect(self) -> None:
        """Take note of the steps that have ended. The first that failed stops the others."""
        for step, process in list(self.running):
            if process.poll() is None:
                continue
            self.running.remove((step, process))
            if process.returncode == 0 and step.done.is_file():
                self.finished.append(step)
                if self.total > 1:
                    print(f"{len(self.finished)} of {self.total} steps done{self.time_left()}", flush=True)
            elif not self.status:
                status = exit_status(process.returncode)
                what = f"{step.command[0]} stopped with status {status}, without {step.done}"
                self.stop(status, what + self.printed([step]))

    def stop(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        self.send(signal.SIGTERM)

    def send(self, number: int) -> None:
        for _, process in self.running:
            process.send_signal(number)

    def printed(self, steps: Sequence[Step]) -> str:
        """Words that name the logs of some steps; "" where they printed to the terminal."""
        logs = ", ".join(str(step.log) for step in steps)
        return f" (printed: {logs})" if self.logged and logs else ""

    def time_left(self) -> str:
        """Words for it, by the costs of what is done and of what is left; "" where these are not known."""
        done = sum(step.hours for step in self.finished)
        left = sum(step.hours for step in [*self.waiting, *(step for step, _ in self.running)])
        if not done or not left:
            return ""
        minutes = (time.monotonic() - self.start_time) / 60 * left / done
        return (
            f", about {minutes / 60:.1f} hours left" if minutes >= 90 else f", about {minutes:.0f} min left"
        )


def command_line(step: Step) -> list[str]:
    """The tool beside this file, run by the Python that runs this."""
    return [sys.executable, str(Path(__file__).with_name(Path(step.command[0]).name)), *step.command[1:]]


def exit_status(code: int) -> int:
    """The status of a process as a shell states it; 1 for one that ended well without its file."""
    return 128 - code if code < 0 else code or 1
