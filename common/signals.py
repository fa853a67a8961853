"""The signals that tell a program to save and stop."""

import contextlib
import signal
from collections.abc import Iterator

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
