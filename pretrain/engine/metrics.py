"""The figures of a run: averaged over steps, logged, and shown on a progress bar."""

import sys
import time
from collections.abc import Iterable, Iterator

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common import distributed
from rsa_detectron2.common.loggers import Rows
from rsa_detectron2.common.progress import long_bar


class Meter:
    """Sums the figures of the steps since the last :meth:`read`.

    They stay on the device until then, which saves a synchronization in each step.
    """

    def __init__(self, batch_size: int, seconds: float = 0.0):
        self.batch_size = batch_size  # global
        self.total = seconds  # of training, with its loader, but without evaluations
        # steps without a finite loss, in a row up to now
        self.streak = torch.zeros((), device=distributed.device())
        self.reset()

    def reset(self) -> None:
        self.sums, self.steps, self.waited = {}, 0, 0.0
        self.longest = self.streak
        self.begun = self.total
        self.resume()

    def resume(self) -> None:
        """Start the clock again."""
        self.since = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training until now."""
        return self.total + time.perf_counter() - self.since

    def pause(self) -> None:
        """Stop the clock: the time until :meth:`resume` does not count as training."""
        self.total, self.since = self.seconds(), time.perf_counter()

    def timed(self, batches: Iterable[dict]) -> Iterator[dict]:
        """``batches``; the time that it takes to get them counts as ``data_wait``."""
        before = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Add the figures of a step, {name: 0-dim tensor}; "loss" is one of them."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.streak = torch.where(figures["loss"].isfinite(), 0, self.streak + 1)
        self.longest = torch.maximum(self.longest, self.streak)
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means over the steps and the ranks, then start anew.

        Besides: ``nonfinite_steps``, the most steps in a row without a finite loss; ``images_per_s``;
        ``data_wait``, the part of the time spent on waiting for the loader.
        """
        means = distributed.mean(torch.stack(list(self.sums.values())).float() / self.steps)
        row = dict(zip(self.sums, means.tolist()))
        row["nonfinite_steps"] = -distributed.least(-int(self.longest))
        seconds = self.seconds() - self.begun
        row |= {"images_per_s": self.steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        self.pause()
        self.reset()
        return row


# Figures on the progress bar: short name and format. Most useful first: narrow terminals truncate.
PROGRESS = {
    "loss": ("loss", ".3f"),
    "feature_std": ("std", ".2f"),
    "knn_top1": ("kNN", ".1f"),
    "rank_backbone": ("rank", ".1f"),
    "consistency": ("cons", ".0f"),
    "alignment": ("align", ".2f"),
    "uniformity": ("unif", ".2f"),
    "rank_projection": ("rank z", ".1f"),
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
    "skipped_steps": ("skipped", "d"),
    "loss_scale": ("scale", ".3g"),
}


# Figures of an evaluation, which a line of its own tells.
EVALUATED = {
    "knn_top1": "kNN top-1 {:.2f} %",
    "rank_backbone": "effective rank {:.1f}",
    "rank_projection": "of the projection {:.1f}",
    "alignment": "alignment {:.3f}",
    "uniformity": "uniformity {:.2f}",
    "consistency": "consistency {:.1f} %",
}


class Log:
    """Rows to metrics.jsonl and the loggers, and the progress bar. ``start``: the steps made before."""

    def __init__(self, cfg: CfgNode, total: int, start: int):
        self.rows = Rows(cfg, "metrics.jsonl", "step", start or None)
        self.latest = {}
        self.progress = long_bar("pre-training", total, start)

    def row(self, row: dict[str, float]) -> None:
        """Write a row {"step": k, name: number}."""
        self.rows.write(row["step"], {name: value for name, value in row.items() if name != "step"})
        self.latest |= row
        self.progress.set_postfix_str(
            " ".join(
                f"{short} {self.latest[name]:{form}}"
                for name, (short, form) in PROGRESS.items()
                if name in self.latest
            )
        )
        if told := [words.format(row[name]) for name, words in EVALUATED.items() if name in row]:
            self.say(f"step {row['step']}: {', '.join(told)}")
            self.progress.unpause()  # the evaluation's time must not count in the speed of the steps

    @property
    def evaluated(self) -> bool:
        """Whether the network that the run goes on with has its row of an evaluation."""
        return any(name in EVALUATED for _, name in self.rows.written)

    def say(self, line: str) -> None:
        """Print a line to stderr, above the progress bar."""
        self.progress.write(line, file=sys.stderr)

    def close(self) -> None:
        self.progress.close()
        self.rows.close()
