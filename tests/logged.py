"""What the loggers of a training have got, for tests of the three trainings; a wandb that only records."""

import json
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class FakeRun:
    """``rows`` are (step, figures)."""

    def __init__(self):
        self.rows, self.open = [], True

    def define_metric(self, name, step_metric):
        assert name == "*"
        self.step = step_metric

    def log(self, figures):
        assert self.open
        self.rows.append((figures[self.step], {k: v for k, v in figures.items() if k != self.step}))

    def finish(self):
        self.open = False


class FakeWandb(ModuleType):
    """A run for each id."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="a test")
        self.runs, self.given, self.Image = {}, [], np.asarray

    def init(self, **given):
        self.given.append(given)
        run = self.runs.setdefault(given["id"], FakeRun())
        run.open = True
        return run


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def counted(rows, measured=()):
    """[(step, {name: value})] -> how often there is each (step, name, value in float32).

    Figures without a value are left out. Those that are ``measured`` count with any value.
    """
    return Counter(
        (step, name, "" if name in measured else str(np.float32(value)))
        for step, figures in rows
        for name, value in figures.items()
        if value is not None
    )


def tensorboard(folder):
    """The scalars in a folder's event files, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(e.step, {name: e.value}) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def assert_same_rows(folder, name, step, wandb, again=(), measured=()):
    """The file, TensorBoard and the one run of wandb have the same figures; returns the rows of the file.

    Each is there once, but those of the steps ``again`` twice in wandb, of which ``measured`` (times and
    speeds) may differ.
    """
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    rows = [(line[step], {name: value for name, value in line.items() if name != step}) for line in lines]
    assert rows and set(counted(rows).values()) == {1}
    assert counted(tensorboard(folder)) == counted(rows)
    (run,) = wandb.runs.values()
    twice = [(i, figures) for i, figures in rows if i in again]
    assert counted(run.rows, measured) == counted(rows + twice, measured) and not run.open
    return lines
