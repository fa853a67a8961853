"""What a run shows of itself, and when it must stop: figures, alarms, signals."""

import json
import math
import signal
import sys
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.signals import stop_signals
from rsa_detectron2.pretrain.engine import checkpoint


class Stopped(BaseException):
    """Not an Exception: reading a file, for one, takes any of those for damage."""


class StopSignals:
    """While it is entered, each of common.signals' makes ``asked`` true, and the loop ends after
    its step. Before ``stepping`` there is nothing to save: a single process stops at once, with
    Stopped; with several, some may already be in the first step, and all finish it. A second SIGINT
    kills, except under a launcher, which hands one Ctrl-C on twice.
    """

    def __init__(self):
        self.asked = self.stepping = False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in stop_signals()}
        return self

    def handle(self, number, frame):
        again, self.asked = (
            self.asked,
            True,
        )  # first of all: Python drops what is raised amid a finalizer or a fork
        if not self.stepping and distributed.world_size() == 1:
            raise Stopped(
                f"stopped by {signal.Signals(number).name} before its first step; the same command goes on"
            )
        if number == signal.SIGINT and again and not distributed.launched():
            raise KeyboardInterrupt

    def __exit__(self, kind, value, traceback):
        if (
            distributed.world_size() == 1
        ):  # of several, one may be signalled when the others are saving already
            for number, handler in self.previous.items():
                signal.signal(number, handler)


class Meter:
    """Sums the figures of the steps since its last reading. They stay on the device until then,
    which spares it a synchronisation per step."""

    def __init__(self, batch_size, seconds=0.0):
        self.batch_size = batch_size  # global
        self.total = seconds  # of training, with its loader, but without kNN evaluations
        self.streak = torch.zeros(
            (), device=distributed.device()
        )  # steps in a row without a finite loss, up to now
        self.reset()

    def reset(self):
        self.sums, self.steps, self.waited = {}, 0, 0.0
        self.since = time.perf_counter()
        self.longest = self.streak

    def seconds(self):
        """Of training until now."""
        return self.total + time.perf_counter() - self.since

    def pause(self):
        """What comes until :meth:`reset` is not training."""
        self.total, self.since = self.seconds(), time.perf_counter()

    def timed(self, batches):
        """``batches``; the time that it takes to get them counts as ``data_wait``."""
        before = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    def add(self, figures):
        """A step's figures {name: 0-dim tensor}."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.streak = torch.where(figures["loss"].isfinite(), 0, self.streak + 1)
        self.longest = torch.maximum(self.longest, self.streak)
        self.steps += 1

    def read(self):
        """Means over the steps and the ranks, with ``nonfinite_steps``, the longest streak; starts anew."""
        means = distributed.mean(torch.stack(list(self.sums.values())).float() / self.steps)
        row = dict(zip(self.sums, means.tolist()))
        row["nonfinite_steps"] = -distributed.least(-int(self.longest))
        seconds = time.perf_counter() - self.since
        row |= {"images_per_s": self.steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        self.pause()
        self.reset()
        return row


class Alarms:
    """Stop a run that has failed before it burns days. The thresholds are the configuration's ALARM."""

    def __init__(self, thresholds):
        self.thresholds = thresholds
        self.collapsed = 0  # steps in a row

    def check(self, step, row, steps):
        """Raises InputError on a row of :meth:`Meter.read` over ``steps`` steps that shows
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
                "MODEL.TAU; the checkpoint from before is kept"
            )


DIVERGED = "lower SOLVER.BASE_LR, or try --amp bf16 or off; the last checkpoint is kept"


def assert_finite(networks, step):
    """Raises InputError when a weight or a running statistic is NaN or infinite, before it is saved
    over a good checkpoint."""
    sums = torch.stack([tensor.float().sum() for tensor in networks.state_dict().values()])
    if not math.isfinite(sums.sum()):
        raise InputError(f"weights are not finite at step {step}: {DIVERGED}")


# Figures on the progress bar: their short names and forms. The most telling come first, for a
# narrow terminal cuts it.
PROGRESS = {
    "loss": ("loss", ".3f"),
    "feature_std": ("std", ".2f"),
    "knn_top1": ("kNN", ".1f"),
    "images_per_s": ("img/s", ".0f"),
    "data_wait": ("wait", ".0%"),
    "cos_aw": ("cos aw", ".2f"),
    "cos_aa": ("aa", ".2f"),
    "loss_aw": ("loss aw", ".3f"),
    "loss_aa": ("aa", ".3f"),
    "beta": ("β", ".3f"),
    "tau": ("τ", ".4f"),
    "lr": ("lr", ".3g"),
    "bad_images": ("bad", "d"),
}


class Log:
    """Rows to metrics.jsonl and TensorBoard, and the progress bar. Rows of steps after ``start``,
    which a killed run wrote and the resumed one will write again, are dropped."""

    def __init__(self, folder, total, start):
        path = folder / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.is_file() and start else []
        rows = [row for row in rows if _step(row) <= start]
        checkpoint.write_atomically(path, lambda file: file.writelines(row.encode() for row in rows))
        self.file = open(path, "a", buffering=1)
        self.tensorboard = SummaryWriter(folder, purge_step=start + 1)
        self.complained, self.latest = False, {}
        self.progress = tqdm(
            total=total,
            initial=start,
            desc="pre-training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def row(self, row):
        """One row {"step": k, name: number}."""
        try:
            self.file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, row["step"])
        except OSError as error:  # a full disk loses rows, not the run
            if not self.complained:
                self.say(f"warning: cannot write metrics ({error.strerror}); the run goes on without them")
            self.complained = True
        self.latest |= row
        self.progress.set_postfix_str(
            " ".join(
                f"{short} {self.latest[name]:{form}}"
                for name, (short, form) in PROGRESS.items()
                if name in self.latest
            )
        )
        if "knn_top1" in row:
            self.say(f"step {row['step']}: kNN top-1 {row['knn_top1']:.2f} %")
            self.progress.unpause()  # the time left is that of the steps

    def say(self, line):
        """A line that the progress bar does not overwrite."""
        self.progress.write(line, file=sys.stderr)

    def close(self):
        self.progress.close()
        for writer in (self.tensorboard, self.file):
            try:
                writer.close()
            except OSError:
                pass  # said by row()


def _step(row):
    """Step of a line of metrics.jsonl; infinite for one that a kill or a full disk cut short."""
    try:
        return json.loads(row)["step"] if row.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
