"""What ends a run that has failed: diverged losses, collapsed features, weights that are not finite."""

import math

import torch
from fvcore.common.config import CfgNode
from torch import nn

from rsa_detectron2.common.errors import InputError


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
