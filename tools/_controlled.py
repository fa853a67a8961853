"""The controlled test of the claim: tools/reproduce.py controlled.

Which method keeps a part of the label that aggressive augmentation destroys? The classes of the drawn
images are pairs of a form and a color (transfer/data/drawn.py); 31 % of the aggressive views have lost
their color or show that of another class. Each method pre-trains a small ResNet-18 by its recipe
configs/pretrain/shapes_colour_<method>_R18.yaml. Then kNN and a linear classifier read the pair, the form
alone and the color alone from its features of center crops.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.tables import cell, mean_std, to_markdown, write_rows
from rsa_detectron2.pretrain.evaluate.parts import PARTS
from rsa_detectron2.tools._points import plot_seeds
from rsa_detectron2.tools._steps import Step
from rsa_detectron2.transfer.data.drawn import CONTROLLED, HUES, write_image_folder
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.tables import read_run

UNTRAINED = "untrained"
IMAGES = {"train": (80, 0), "val": (40, 1)}  # per class, and the seed that they are drawn with
SIZE = 48  # pixels; the recipes' crops are scaled to 32
CHANCE = {
    "pair": 100 / len(CONTROLLED.classes),
    "form": 100 / len(CONTROLLED.forms),
    "color": 100 / len(HUES),
}
JUDGES = {"linear": "linear", "knn": "kNN"}
FIGURES = {
    f"{judge}_{part}": f"{name}, {words}" for judge, name in JUDGES.items() for part, words in PARTS.items()
}


class ControlledTest:
    """The steps of the test for some of its rows, and the report of what they leave in ``folder``."""

    ROWS = {
        "rsa": "RSA, β fades out",
        "rsa_fixed_beta": "RSA, β fixed",
        "rsa_beta_0": "RSA, β = 0",
        "byol": "BYOL AA",
        "byol_aw": "BYOL AW",
        "simsiam": "SimSiam",
        "simsiam_rsa": "SimSiam with RSA",
    }
    SEEDS = 3
    HOURS = {"pretrain": 3.5 / 60, "judge": 0.2 / 60}  # on one core of an AMD EPYC

    def __init__(self, folder: Path, rows: Sequence[str], seeds: int, overrides: Sequence[str]) -> None:
        """overrides: [KEY, VALUE, ...] of every pre-training."""
        self.folder, self.overrides = folder, list(overrides)
        self.rows, self.seeds = [UNTRAINED, *rows], range(seeds)

    def steps(self) -> list[Step]:
        steps = []
        for seed in self.seeds:
            for row in self.rows:
                if row != UNTRAINED:
                    steps.append(self.pre_training(row, seed))
                steps.append(self.judging(row, seed))
        return steps

    def place(self, row: str, seed: int) -> Path:
        return self.folder / f"seed{seed}" / row

    def result(self, row: str, seed: int) -> Path:
        return self.place(row, seed) / "top1.json"

    def pre_training(self, row: str, seed: int) -> Step:
        folder = self.place(row, seed)
        command = [
            "tools/pretrain.py",
            "--config-file",
            recipe(row),
            "--data",
            self.folder / "images" / "train",
        ]
        # One process, so that BatchNorm sees the same images on any machine.
        command += ["--output-dir", folder, "--seed", seed, "--num-processes", 1]
        command += ([] if device().type == "cuda" else ["--workers", 0]) + self.overrides
        return Step(folder / "model_final.pth", list(map(str, command)), hours=self.HOURS["pretrain"])

    def judging(self, row: str, seed: int) -> Step:
        needs = None if row == UNTRAINED else self.place(row, seed) / "model_final.pth"
        done, images = self.result(row, seed), self.folder / "images"
        command = ["tools/evaluate.py", "parts", needs or recipe("rsa"), "--train", images / "train"]
        command += ["--val", images / "val", "--workers", 0, "--seed", seed, "--output", done]
        return Step(done, list(map(str, command)), needs, self.HOURS["judge"])

    def differences(self, step: Step) -> list[str]:
        """Words for everything in which the run of a finished step is not the one that the step makes."""
        row = step.done.parent.name
        if row == UNTRAINED:
            return []
        pairs = zip(self.overrides[::2], map(paper.literal, self.overrides[1::2]))
        training = paper.Training("pretrain", recipe(row), tuple(pairs), seeds=len(self.seeds), bn=64)
        return paper.setting_differences(training, read_run(step.done.parent))

    def prepare(self) -> None:
        """Draw the images, unless they are there. Raises InputError for a folder of other images."""
        for split, (count, seed) in IMAGES.items():
            write_image_folder(self.folder / "images" / split, count, SIZE, seed, CONTROLLED)

    def report(self) -> str:
        """Write table.csv, controlled.png and report.md; returns the table in Markdown."""
        results = {
            row: [json.loads(self.result(row, seed).read_text()) for seed in self.seeds] for row in self.rows
        }
        return write_report(self.folder, results)


def recipe(row: str) -> str:
    return f"pretrain/shapes_colour_{row}_R18.yaml"


def write_report(folder: Path, results: dict[str, list[dict]]) -> str:
    """The report of {row: results of its seeds}; returns the table in Markdown."""
    names = {UNTRAINED: "untrained network", **ControlledTest.ROWS}
    table, lines = [["top-1 (%)", *FIGURES.values()]], []
    for row, seeds in results.items():
        figures = [mean_std([seed[name] for seed in seeds]) for name in FIGURES]
        lines.append([row, len(seeds), *(value for pair in figures for value in pair)])
        table.append([names[row], *map(cell, figures)])
    columns = [column for name in FIGURES for column in (name, f"{name} std")]
    write_rows(folder / "table.csv", ["row", "seeds", *columns], lines)
    plot({names[row]: seeds for row, seeds in results.items()}, folder / "controlled.png")
    count, markdown = len(next(iter(results.values()))), to_markdown(table)
    chance = "{:.1f}, {:.1f} and {:.1f} %".format(*CHANCE.values())
    (folder / "report.md").write_text(
        f"# The controlled test\n\n{count} seed{'s' * (count > 1)}, mean ± sample standard deviation. "
        f"{len(CONTROLLED.forms)} forms, {len(HUES)} colors: chance is {chance}.\n\n{markdown}\n"
        "![top-1 by method](controlled.png)\n",
        encoding="utf-8",
    )
    return markdown


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """A panel for each part of the label. ``results``: {title of a row: results of its seeds}."""
    figure = Figure(figsize=(11, 0.42 * len(results) + 1.3), dpi=150, layout="constrained")
    for ax, (part, words) in zip(figure.subplots(1, len(PARTS), sharey=True), PARTS.items()):
        figures = {
            name: [[seed[f"{judge}_{part}"] for seed in seeds] for seeds in results.values()]
            for judge, name in JUDGES.items()
        }
        plot_seeds(ax, figures, list(results))
        ax.axvline(CHANCE[part], color="0.5", lw=1, ls="--", label="chance")
        ax.set(title=words, xlabel="top-1 (%)")
    figure.axes[-1].legend(fontsize=8, loc="best")
    figure.savefig(path)
