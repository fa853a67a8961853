"""beta, tau and the learning rate as pure functions of the step k = 1 ... K, with no state to resume."""

from math import cos, pi


def half_cosine(k: int, K: int) -> float:
    """Falls from 1 at k = 0 to 0 at k = K."""
    return 0.5 * (cos(pi * k / K) + 1)


def beta(k: int, K: int, base: float, schedule: str = "cosine") -> float:
    """Weight of the aggressive-aggressive part (paper, eq. 6): ``base`` down to 0, unless fixed."""
    return base if schedule == "fixed" else base * half_cosine(k, K)


def tau(k: int, K: int, base: float, schedule: str = "cosine") -> float:
    """EMA coefficient of the target network: from ``base`` up to 1, or ``base`` if fixed."""
    return base if schedule == "fixed" else 1 - (1 - base) * half_cosine(k, K)


def learning_rate(k: int, K: int, peak: float, warmup: int) -> float:
    """Linear over the first ``warmup`` steps up to ``peak``, then half a cosine over the rest."""
    if k <= warmup:
        return peak * k / warmup
    return peak * half_cosine(k - 1 - warmup, K - warmup)
