"""Pictures of what models are good at: precision-recall curves, and errors by kind."""

import csv
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from rsa_detectron2.common.fonts import literal_text
from rsa_detectron2.transfer.data.detection_errors import KINDS
from rsa_detectron2.transfer.report.pictures import PALETTE
from rsa_detectron2.transfer.report.quality import ALL, CURVES, IOUS, TASKS

STYLES = dict(zip(IOUS, ("-", "--")))


def plot_precision_recall(runs: dict[str, str | Path], path: Path) -> Path | None:
    """Draw the precision-recall curves of runs, {name: folder}, mean over classes, as a PNG.

    A panel for boxes and one for masks. Returns the path, or None where no run has curves.
    """
    curves = {name: read_curves(folder) for name, folder in runs.items()}
    tasks = [task for task in TASKS if any((task, iou) in found for found in curves.values() for iou in IOUS)]
    if not tasks:
        return None
    figure = Figure(figsize=(5 * len(tasks), 3.8 + 0.2 * len(runs)), dpi=150, layout="constrained")
    with literal_text(*runs):
        for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
            for found, color in zip(curves.values(), PALETTE * len(runs)):
                for iou in IOUS:
                    if values := found.get((task, iou)):
                        recalls = range(len(values))
                        ax.plot(recalls, [100 * v for v in values], STYLES[iou], color=color, linewidth=1.4)
            ax.set(title=TASKS[task].capitalize(), xlabel="recall (%)", ylabel="precision (%)")
            ax.set(xlim=(0, 100), ylim=(0, 101))
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        styles = [Line2D([], [], color="0.4", linestyle=style) for style in STYLES.values()]
        figure.axes[0].legend(styles, [f"IoU {iou:g}" for iou in STYLES], loc="upper right", frameon=False)
        add_names(figure, runs)
        figure.savefig(path)
    return path


def read_curves(folder: str | Path) -> dict[tuple[str, float], list[float]]:
    """The curves over all classes in a run's precision_recall.csv: {(task, IoU): 101 precisions}."""
    file, curves = Path(folder, "inference", CURVES), {}
    if file.is_file():
        with open(file, newline="", encoding="utf-8") as lines:
            for task, iou, name, *values in list(csv.reader(lines))[1:]:
                if name == ALL:  # a class of that name comes later
                    curves.setdefault((task, float(iou)), list(map(float, values)))
    return curves


def plot_errors(runs: dict[str, dict], path: Path) -> Path | None:
    """Draw the errors of runs, {name: results}, by kind, as a PNG.

    Bars show how much AP50 a run would gain if it made no errors of this kind, figures how many there are.
    Returns the path, or None where no run has errors in its results.
    """
    found = {name: results.get("errors", {}) for name, results in runs.items()}
    tasks = [task for task in TASKS if any(task in errors for errors in found.values())]
    if not tasks:
        return None
    height = 1.6 + len(KINDS) * (0.2 + 0.2 * len(runs))
    figure = Figure(figsize=(5.5 * len(tasks), height), dpi=150, layout="constrained")
    with literal_text(*runs):
        axes = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
        for ax, task in zip(axes, tasks):
            draw_errors(ax, [errors.get(task) for errors in found.values()])
            ax.set_title(TASKS[task].capitalize())
        add_names(figure, runs)
        figure.savefig(path)
    return path


def add_names(figure: Figure, runs: Iterable[str]) -> None:
    """A legend of the runs' colors below the panels, where there are several runs."""
    names = [f" {name}" for name in runs]  # a space, because legends leave out "_..."
    if len(names) > 1:
        colors = [Patch(color=color) for _, color in zip(names, PALETTE * len(names))]
        figure.legend(colors, names, loc="outside lower center", fontsize=8, frameon=False)


def draw_errors(ax: Axes, runs: list[dict | None]) -> None:
    """Draw {kind: {"count": number, "dAP50": AP50}} of each run, if it has any, as groups of bars."""
    width, most = 0.8 / len(runs), 0
    for n, (errors, color) in enumerate(zip(runs, PALETTE * len(runs))):
        for place, kind in enumerate(KINDS if errors else ()):
            gain, count, y = errors[kind]["dAP50"], errors[kind]["count"], place + (n + 0.5) * width - 0.4
            ax.barh(y, gain, 0.9 * width, color=color)
            ax.annotate(
                f"{gain:+.1f}  ({count:,})",
                (max(gain, 0), y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            most = max(most, gain)
    ax.set(
        yticks=range(len(KINDS)),
        yticklabels=KINDS,
        xlabel="AP50 gained without these errors (number of errors)",
    )
    ax.set_xlim(0, max(1.35 * most, ax.get_xlim()[1]))  # of both panels; the figures need room
    ax.set_ylim(len(KINDS) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
