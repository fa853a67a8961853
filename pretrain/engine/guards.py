"""What ends a run: signals, diverged losses, collapsed features, weights that are not finite."""

import math
import signal
from types import FrameType, TracebackType

import torch
from fvcore.common.config import CfgNode
from torch import nn

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.signals import stop_signals


class Stopped(BaseException):
    """A signal came before the first step.

    It is no Exception, because code that reads files takes any Exception for a damaged file.
    """


class StopSignals:
    """A context in which the stop signals (common/signals.py) set ``asked``, so that the loop ends after
    its step.

    Until ``stepping`` is set there is nothing to save, and a single process stops at once: Stopped is
    raised. Of several processes, some may be in the first step already, so all finish it. A second SIGINT
    kills, but not under a launcher, which passes one Ctrl-C on twice.
    """

    def __init__(self) -> None:
        self.asked = self.stepping = False

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in stop_signals()}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        # Set it before anything is raised: Python drops exceptions that are raised in a finalizer or a fork.
        again, self.asked = self.asked, True
        if not self.stepping and distributed.world_size() == 1:
            raise Stopped(
                f"stopped by {signal.Signals(number).name} before its first step; the same command goes on"
            )
        if number == signal.SIGINT and again and not distributed.launched():
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # One of several processes may get its signal while the others are saving already.
        if distributed.world_size() == 1:
            for number, handler in self.previous.items():
                signal.signal(number, handler)


class Alarms:
    """Stop a run that has failed before it burns days. ``thresholds``: ALARM of a configuration."""

    def __init__(self, thresholds: CfgNode):
        self.thresholds = thresholds
        self.collapsed = 0  # steps in a row

    def check(self, step: int, row: dict, steps: int) -> None:
        """Check a ``row`` of :meth:`Meter.read` over ``steps`` steps. Raises InputError where it shows
        divergence or collapse."""
        if row["nonfinite_steps"] >= self.thresholds.NONFINITE_STEPS:
            raise InputError(
                f"the loss is {row['loss']} at step {step}, not finite for "
                f"{row['nonfinite_steps']} steps: {DIVERGED}"
            )
        self.collapsed = self.collapsed + steps if row["feature_std"] < self.thresholds.FEATURE_STD else 0
        if self.collapsed >= self.thresholds.COLLAPSE_STEPS:
            raise InputError(
                f"the features have collapsed: their standard deviation is {row['feature_std']:.4f} at step "
                f"{step}, below ALARM.FEATURE_STD for {self.collapsed} steps; lower SOLVER.BASE_LR or raise "
                "MODEL.TAU; the last good checkpoint is kept"
            )


DIVERGED = "lower SOLVER.BASE_LR, or try --amp bf16 or off; the last checkpoint is kept"


def assert_finite(networks: nn.Module, step: int) -> None:
    """Raises InputError when a weight or a running statistic is NaN or infinite. Call it before each save, so
    that a good checkpoint is not replaced."""
    sums = torch.stack([tensor.float().sum() for tensor in networks.state_dict().values()])
    if not math.isfinite(sums.sum()):
        raise InputError(f"weights are not finite at step {step}: {DIVERGED}")
