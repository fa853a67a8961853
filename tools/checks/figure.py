"""What a check hands back."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Figure:
    """A measured value, and the largest one that passes; None where any value does."""

    name: str
    value: float
    limit: float | None = None

    @property
    def passes(self) -> bool:
        return self.limit is None or self.value <= self.limit  # NaN does not pass

    def __str__(self) -> str:
        value = f"{self.value:.0f}" if self.value >= 100 else f"{self.value:.3g}"
        text = f"{self.name} {value}"
        if self.limit is None:
            return text
        return f"{text} ({'limit' if self.passes else 'OVER'} {self.limit:.3g})"


def worst(trials: Iterable[list[Figure]]) -> list[Figure]:
    """The largest of each figure over several trials, and NaN where one is NaN."""
    return [
        replace(same[0], value=torch.tensor([figure.value for figure in same]).double().max().item())
        for same in zip(*trials)
    ]
