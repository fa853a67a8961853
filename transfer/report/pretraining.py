"""Pre-training runs side by side: what each is, how they differ, and how they went.

A run is known by its record (run.json); its figures come from metrics.jsonl. A run that is still at work, or
was stopped, is shown as far as it has come.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsa_detectron2.common import record
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.fonts import literal_text
from rsa_detectron2.common.tables import write_rows
from rsa_detectron2.transfer.report.page import Body, write_report
from rsa_detectron2.transfer.report.pictures import Series, draw_panels, read_series
from rsa_detectron2.transfer.report.run_folder import TRAINING
from rsa_detectron2.transfer.report.tables import read_run, weights_label

# Key of metrics.jsonl: title and decimals. Each is a column of the table and a panel of the picture.
FIGURES = {
    "loss": ("loss", 3),
    "loss_aw": ("loss, aggressive–weak", 3),
    "loss_aa": ("loss, aggressive–aggressive", 3),
    "feature_std": ("feature std", 2),
    "knn_top1": ("kNN top-1 (%)", 1),
    "rank_backbone": ("effective rank, backbone", 1),
    "rank_projection": ("effective rank, projection", 1),
    "alignment": ("alignment", 3),
    "uniformity": ("uniformity", 2),
    "consistency": ("consistency (%)", 1),
}
BEST = "knn_top1"  # the figure whose highest value is told
FACTS = ("device", "processes", "bn_batch_size", "versions")  # what may differ besides settings
COLUMNS = 4  # panels side by side
SHORT = 8  # digits of a sha256


@dataclass(frozen=True)
class Run:
    """A run: its folder, its record, and what metrics.jsonl says."""

    name: str
    about: dict
    series: dict[str, Series]  # of FIGURES, over the steps
    step: int  # the last step so far
    seconds: float  # of training until then
    speed: float | None  # images per second: the median of its rows


def read(folder: str | Path) -> Run:
    """The pre-training in a folder. Raises InputError where there is none, or it is damaged."""
    if Path(folder, TRAINING).is_file():
        raise InputError(f"{folder} holds a fine-tuning run: give it before --pretrain")
    about = read_run(folder)
    series = read_series(Path(folder, "metrics.jsonl"), "step", [*FIGURES, "images_per_s"])
    if not series:
        print(f"{folder} has no metrics.jsonl with figures: only its record is shown", file=sys.stderr)
    steps, speeds = series.pop("images_per_s", ((), ()))
    step = max([about["step"], *steps, *(x[-1] for x, _ in series.values())])
    seconds = about["seconds"]
    if about["step"] < about["steps"]:
        # The record gets the time when the run ends. Until then it follows from the speed of the steps.
        counts = (now - before for before, now in zip((0, *steps), steps))
        seconds = sum(about["settings"]["SOLVER.BATCH_SIZE"] * n / speed for n, speed in zip(counts, speeds))
    return Run(str(folder), about, series, step, seconds, statistics.median(speeds) if speeds else None)


def write(folders: Sequence[str | Path], output: str | Path) -> list[tuple[str, Body]]:
    """Write a comparison of the runs in ``folders`` into ``output``.

    It is pretrain.md, pretrain.html, pretrain.csv and pretrain.png. Returns the sections of the page. Raises
    InputError.
    """
    runs, output = [read(folder) for folder in folders], Path(output)
    differences = settings_that_differ(runs)
    figures = [key for key in FIGURES if any(key in run.series for run in runs)]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(runs, differences, output / "pretrain.csv")
    sections = [("Runs", run_table(runs))]
    if len({run.about["data"]["sha256"] for run in runs}) > 1:
        sections.append(("Images", "The runs have different images, so their figures compare only roughly."))
    if differences:
        lines = [[key, *map(shown, values)] for key, values in differences.items()]
        sections.append(("Settings that differ", [["", *(run.name for run in runs)], *lines]))
    if figures:
        sections.append(("First and last figures", figure_table(runs, figures)))
        plot(runs, figures, output / "pretrain.png")
        sections.append(("Curves", output / "pretrain.png"))
    write_report(output, "Pre-training", sections, "pretrain")
    return sections


def run_table(runs: list[Run]) -> list[list[str]]:
    """What the runs are: header and rows of strings."""
    lines = [["", "method", "recipe", "images", "starts from", "steps", "hours", "images/s"]]
    for run in runs:
        about, data = run.about, run.about["data"]
        lines.append(
            [
                run.name,
                about["method"],
                about["recipe"] or "–",
                f"{data['name']}, {data['images']} ({data['sha256'][:SHORT]})",
                start_of(about.get("init")),
                f"{run.step} of {about['steps']}",
                f"{run.seconds / 3600:.2f}",
                f"{run.speed:.0f}" if run.speed else "–",
            ]
        )
    return lines


def start_of(init: dict | None) -> str:
    """The weights that a run started from, by the ``init`` of its record, and what these started from."""
    text = weights_label({"weights": init})
    if init:
        text += f" ({init['source']}, {init['sha256'][:SHORT]})"
        if init.get("init"):
            text += f", from {start_of(init['init'])}"
    return text


def settings_that_differ(runs: list[Run]) -> dict[str, list]:
    """{key: its value in each run}, of the settings and FACTS that are not the same in all runs."""
    known = {}  # a setting that the record of an early version lacks had its default
    for run in runs:
        known |= {**run.about["settings"], **run.about["changed"]}
    facts = [record.flatten({key: run.about.get(key) for key in FACTS}) for run in runs]
    values = [known | run.about["settings"] | of_run for run, of_run in zip(runs, facts)]
    keys = dict.fromkeys(key for settings in values for key in settings if key != "OUTPUT_DIR")
    found = {key: [settings.get(key) for settings in values] for key in keys}
    return {key: row for key, row in found.items() if any(value != row[0] for value in row)}


def shown(value: object) -> str:
    return "–" if value in (None, "") else str(value)


def figure_table(runs: list[Run], figures: list[str]) -> list[list[str]]:
    """The first and the last value of each figure, and the best kNN: header and rows of strings."""
    lines = [["", *(FIGURES[key][0] for key in figures)]]
    return lines + [[run.name, *(course(run, key) for key in figures)] for run in runs]


def course(run: Run, key: str) -> str:
    """How a figure went: "10.5 → 21.5 (best 22.5 at step 900)"."""
    if key not in run.series:
        return "–"
    steps, values = run.series[key]
    digits = FIGURES[key][1]
    text = f"{values[0]:.{digits}f} → {values[-1]:.{digits}f}"
    best = max(values)
    if key == BEST and best > values[-1]:
        text += f" (best {best:.{digits}f} at step {steps[values.index(best)]})"
    return text


def plot(runs: list[Run], figures: list[str], path: Path) -> None:
    """A panel for each figure, with a curve for each run over the images that it has seen, as a PNG."""
    panels = []
    for key in figures:
        curves = []
        for run in runs:
            steps, values = run.series.get(key, ((), ()))  # without points it keeps its color from the others
            seen = tuple(run.about["settings"]["SOLVER.BATCH_SIZE"] * step for step in steps)
            curves.append((run.name, (seen, values)))
        panels.append((FIGURES[key][0], "images seen", ("", ""), [curves, []]))
    with literal_text(*(run.name for run in runs)):
        draw_panels([panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)], len(runs), path)


def write_csv(runs: list[Run], differences: dict[str, list], path: Path) -> None:
    """A line for each run: record, first, last and highest figures, and the settings that differ."""
    facts = ["run", "method", "recipe", "images", "number of images", "sha256 of the list", "init"]
    facts += ["step", "steps", "seconds", "images per second"]
    parts = ("first", "last", "highest")
    lines = []
    for n, run in enumerate(runs):
        about, data = run.about, run.about["data"]
        line = [run.name, about["method"], about["recipe"], data["name"], data["images"], data["sha256"]]
        line += [json.dumps(about.get("init")), run.step, about["steps"], run.seconds, run.speed]
        for key in FIGURES:
            values = run.series[key][1] if key in run.series else None
            line += [values[0], values[-1], max(values)] if values else [None] * len(parts)
        lines.append(line + [row[n] for row in differences.values()])
    write_rows(path, [*facts, *(f"{key} {part}" for key in FIGURES for part in parts), *differences], lines)
