"""Schedules of beta, tau and the learning rate."""

import math

import numpy as np
import pytest

from rsa_detectron2.pretrain.method import schedules


@pytest.mark.parametrize(
    "k, beta, tau",
    [(1, 0.4 * (0.5 + 0.5 * math.cos(math.pi / 1000)), None), (500, 0.2, 0.995), (1000, 0.0, 1.0)],
)
def test_beta_and_tau(k, beta, tau):
    assert schedules.beta(k, 1000, 0.4) == pytest.approx(beta, abs=1e-15)
    if tau is not None:
        assert schedules.tau(k, 1000, 0.99) == pytest.approx(tau, abs=1e-15)
    else:
        assert 0.99 < schedules.tau(k, 1000, 0.99) < 0.99 + 1e-7


@pytest.mark.parametrize("k", [1, 500, 1000])
def test_fixed_beta_and_tau(k):
    assert schedules.beta(k, 1000, 0.4, "fixed") == 0.4 and schedules.tau(k, 1000, 0.99, "fixed") == 0.99
    assert schedules.beta(k, 1000, 0.4, "cosine") == schedules.beta(k, 1000, 0.4)
    assert schedules.tau(k, 1000, 0.99, "cosine") == schedules.tau(k, 1000, 0.99)


def test_learning_rate():
    rates = [schedules.learning_rate(k, 100, 2.0, 10) for k in range(1, 101)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(rates[10:], np.cos(np.pi * np.arange(90) / 90) + 1, atol=1e-12)
    assert schedules.learning_rate(1, 100, 2.0, 0) == 2.0
