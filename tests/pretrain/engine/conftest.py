"""A run that is stopped in the middle."""

import signal

import pytest

from rsa_detectron2.pretrain.engine import trainer as train_loop


@pytest.fixture
def stop_after(monkeypatch):
    """``stop_after(n)`` sends SIGTERM during the n-th step, and returns a list that grows with the steps."""

    def install(n):
        step, steps = train_loop.train_step, []

        def counted(*arguments):
            steps.append(1)
            if len(steps) == n:
                signal.raise_signal(signal.SIGTERM)
            return step(*arguments)

        monkeypatch.setattr(train_loop, "train_step", counted)
        return steps

    return install
