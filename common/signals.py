"""The signals that tell a program to save and stop, and how a training answers them."""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

from rsa_detectron2.common import distributed

AGAIN = "the same command"  # what goes on from there, for messages

T = TypeVar("T")

# SIGTERM: kill, and schedulers at the end of a job. SIGINT, SIGQUIT: Ctrl-C and Ctrl-\ in a
# terminal. SIGUSR1: SLURM's warning before the time limit. SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


def stop_signals() -> list[signal.Signals]:
    """STOP_SIGNALS, without SIGHUP if it is ignored already, as it is under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Delay STOP_SIGNALS until the ``with`` block ends. Processes that start in the block never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(BaseException):
    """A signal came where there was nothing to save.

    It is no Exception, because code that reads files takes any Exception for a damaged file.
    """


class StopSignals:
    """A context in which the stop signals set ``asked``, so that a training ends after its step.

    While ``stepping`` is not set there is nothing to save, and a single process stops at once: Stopped is
    raised. Of several processes, some may be in the first step already, so all finish it. A second SIGINT
    kills, but not under a launcher, which passes one Ctrl-C on twice. ``again``: what goes on, for messages.
    """

    def __init__(self, again: str = AGAIN) -> None:
        self.asked = self.stepping = False
        self.name, self.again = "", again

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in stop_signals()}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        # Set it before anything is raised: Python drops exceptions that are raised in a finalizer or a fork.
        again, self.asked, self.name = self.asked, True, signal.Signals(number).name
        if not self.stepping and distributed.world_size() == 1:
            raise self.stopped()
        if number == signal.SIGINT and again and not distributed.launched():
            raise KeyboardInterrupt

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a single process is asked to stop: then Stopped is raised between two of them."""
        for item in items:
            if self.asked and distributed.world_size() == 1:
                raise self.stopped()
            yield item

    def stopped(self) -> Stopped:
        return Stopped(f"stopped by {self.name}, with nothing to save; {self.again} goes on")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # One of several processes may get its signal while the others are saving already.
        if distributed.world_size() == 1:
            for number, handler in self.previous.items():
                signal.signal(number, handler)
