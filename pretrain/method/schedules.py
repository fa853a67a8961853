"""beta, tau and the learning rate as pure functions of the step k = 1 ... K, so that resuming needs no state."""

from math import cos, pi


def half_cosine(k, K):
    """Falls from 1 at k = 0 to 0 at k = K."""
    return 0.5 * (cos(pi * k / K) + 1)


def beta(k, K, base, schedule="cosine"):
    """Weight of the aggressive-aggressive part (paper, eq. 6): from ``base`` down to 0, or ``base`` if fixed."""
    return base if schedule == "fixed" else base * half_cosine(k, K)


def tau(k, K, base, schedule="cosine"):
    """EMA coefficient of the target network: from ``base`` up to 1, or ``base`` if fixed."""
    return base if schedule == "fixed" else 1 - (1 - base) * half_cosine(k, K)


def learning_rate(k, K, peak, warmup):
    """Linear over the first ``warmup`` steps up to ``peak``, then half a cosine over the rest."""
    if k <= warmup:
        return peak * k / warmup
    return peak * half_cosine(k - 1 - warmup, K - warmup)
