"""Pictures of runs: curves and APs."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from rsa_detectron2.common.fonts import literal_text
from rsa_detectron2.transfer.report.tables import COLUMNS, Row, difference_cell

Series = tuple[tuple[float, ...], tuple[float, ...]]  # values of x, and of y
Curve = tuple[str, Series]  # its label
# title, label of x, labels of both y axes, and the curves of each of these
Panel = tuple[str, str, tuple[str, str], list[list[Curve]]]

# Okabe and Ito's palette, whose colors stay apart for color-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# title: label of the left axis and {key: label} on it; then the same for the right axis
PANELS = {
    "Pre-training loss": (
        "loss",
        {"loss": "total", "loss_aa": "aggressive–aggressive", "loss_aw": "aggressive–weak"},
        "",
        {},
    ),
    "Evaluation": (
        "%",
        {"knn_top1": "kNN top-1", "consistency": "consistency"},
        "effective rank",
        {"rank_backbone": "effective rank"},
    ),
    "Similarity": (
        "cosine",
        {"cos_aa": "aggressive–aggressive", "cos_aw": "aggressive–weak"},
        "feature std",
        {"feature_std": "feature std"},
    ),
    "Schedules": ("β, learning rate", {"beta": "β", "lr": "learning rate"}, "τ", {"tau": "τ"}),
}
FINE_TUNING = {  # key of metrics.json: title and label of its panel, which has a curve for each run
    "total_loss": ("Fine-tuning loss", "total loss"),
    "validation/total_loss": ("Validation loss", "total loss"),
    "bbox/AP": ("Box AP", "AP (%)"),
    "segm/AP": ("Mask AP", "AP (%)"),
}
SMALL, SMALL_WIDTH = "Schedules", 0.75  # the panel that tells least


def read_series(path: str | Path, x: str, keys: list[str]) -> dict[str, Series]:
    """JSON lines -> {key: (x values, y values)} for the keys that occur, NaN and all, sorted by x.

    A resumed run writes some steps twice: the later row counts. A line that is damaged, or was cut short by a
    crash, is passed over.
    """
    points = {key: {} for key in keys}
    for line in Path(path).read_bytes().splitlines() if Path(path).is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_number(row.get(x)):
            for key in filter(lambda key: is_number(row.get(key)), keys):
                points[key][row[x]] = row[key]
    return {key: tuple(zip(*sorted(series.items()))) for key, series in points.items() if series}


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def plot_curves(pretrain_folder: str | Path | None, runs: dict[str, str | Path], path: Path) -> Path | None:
    """Draw the curves of pre-training, then of fine-tuning, a row of panels each, as one PNG.

    Of pre-training: losses, evaluation, similarities and schedules; of fine-tuning: loss and AP.

    pretrain_folder: a folder with ``metrics.jsonl``, or None; runs: {name: folder}.
    A panel without data is left out. Returns the path, or None when no panel has data.
    """
    rows = [pretraining_panels(pretrain_folder) if pretrain_folder else [], fine_tuning_panels(runs)]
    rows = [panels for panels in rows if panels]
    if not rows:
        return None
    with literal_text(*runs):
        draw_panels(rows, len(runs), path)
    return path


def pretraining_panels(folder: str | Path) -> list[Panel]:
    keys = [key for _, left, _, right in PANELS.values() for key in (*left, *right)]
    series = read_series(Path(folder, "metrics.jsonl"), "step", keys)
    panels = []
    for title, (ylabel, left, ylabel2, right) in PANELS.items():
        sides = [
            [(label, series[key]) for key, label in side.items() if key in series] for side in (left, right)
        ]
        if ylabel == "%" and len(sides[0]) == 1:  # which has no legend
            ylabel = f"{sides[0][0][0]} (%)"
        if any(sides):
            panels.append((title, "step", (ylabel, ylabel2), sides))
    return panels


def fine_tuning_panels(runs: dict[str, str | Path]) -> list[Panel]:
    series = {
        name: read_series(Path(folder, "metrics.json"), "iteration", list(FINE_TUNING))
        for name, folder in runs.items()
    }
    panels = []
    for key, (title, ylabel) in FINE_TUNING.items():
        curves = [(name, found[key]) for name, found in series.items() if key in found]
        if curves:
            panels.append((title, "iteration", (ylabel, ""), [curves, []]))
    return panels


def draw_panels(rows: list[list[Panel]], num_runs: int, path: Path) -> None:
    """Rows of panels -> PNG."""
    widths = [[SMALL_WIDTH if panel[0] == SMALL else 1.0 for panel in panels] for panels in rows]
    total = max(map(sum, widths))
    figure = Figure(figsize=(4.2 * total, 3 * len(rows)), dpi=150, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, panels, row_widths in zip(parts, rows, widths):
        spare = total - sum(row_widths)  # a shorter row leaves its right end empty
        if spare:
            row_widths = [*row_widths, spare]
        grid = part.add_gridspec(1, len(row_widths), width_ratios=row_widths)
        for cell, panel in zip(grid, panels):
            draw_panel(part.add_subplot(cell), panel, num_runs)
    figure.savefig(path)


def draw_panel(left: Axes, panel: Panel, num_runs: int) -> None:
    title, xlabel, ylabels, sides = panel
    both = all(sides)
    colors = iter(PALETTE * (1 + num_runs))
    for ax, ylabel, curves in zip((left, left.twinx() if both else left), ylabels, sides):
        for (label, (x, y)), color in zip(curves, colors):
            # A few evaluations are points; a line alone would hide how many there were.
            marker = "o" if len(x) < 30 else None
            # Legends leave out "_...".
            label = " " + label if label.startswith("_") else label
            ax.plot(x, y, color=color, linewidth=1.4, marker=marker, markersize=3, label=label)
        if curves:
            # An axis for one curve has that curve's color.
            ax.set_ylabel(ylabel, color=color if both and len(curves) == 1 else "black")
        if len(curves) > 1:
            # A legend does not see the curves of the other axis, and would cover them.
            beside = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2} if both else {}
            ax.legend(fontsize=8, frameon=False, **beside)
        ax.spines["top"].set_visible(False)
    left.set(xlabel=xlabel)
    left.set_title(title, fontsize=9 if both else 11, loc="left")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.grid(alpha=0.25)


def plot_ap(rows: list[Row], path: Path) -> Path:
    """Draw rows of ``tables.make_rows`` as a PNG: six APs of each run, ± std over seeds.

    Beside them stand the published ones and, where there is one, the difference.
    """
    rows = [row for row in rows if row.runs]
    with literal_text(*(row.title for row in rows)):
        draw_ap(rows, path)
    return path


def draw_ap(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(11, 2 * (0.4 * len(rows) + 1.1)), dpi=150, layout="constrained")
    for ax, column in zip(figure.subplots(2, 3, sharey=True).flat, COLUMNS["ap"]):
        for place, row in enumerate(rows):
            if row.figures[column]:
                mean, std = row.figures[column]
                ax.errorbar(mean, place, xerr=std, capsize=3, color=PALETTE[0], marker="o", linestyle="")
            if row.published.get(column):
                ax.plot(
                    row.published[column][0],
                    place,
                    color=PALETTE[1],
                    marker="D",
                    markerfacecolor="none",
                    linestyle="",
                )
            if row.difference(column) is not None:
                ax.annotate(
                    difference_cell(row, column),
                    (mean, place),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        ax.set(
            title=column, xlabel="AP (%)", yticks=range(len(rows)), yticklabels=[row.title for row in rows]
        )
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    if any(row.published for row in rows):
        figure.suptitle(
            "dots: these runs, ± standard deviation over seeds; diamonds: published; "
            "in figures: the difference, "
            "* where it exceeds what another seed may change",
            fontsize=9,
        )
    figure.savefig(path)


def plot_sweep(rows: list[Row], titles: dict[str, str], path: Path) -> Path:
    """Draw Figure 3 as a PNG: top-1 over beta_base, with a panel for each column, {name: title}.

    The dashed line is beta_base 0, the dotted one BYOL. Filled points have the paper's settings,
    hollow ones others; diamonds are published.
    """
    figure = Figure(figsize=(3.8 * len(titles), 3.4), dpi=150, layout="constrained")
    for ax, (column, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items()):
        for row in (row for row in rows if row.place[1:] == (column,)):
            name = next(iter(row.published), "best epoch" if row.figures.get("best epoch") else "")
            name = "train BN, best" if row.figures.get("train BN, best") else name
            ours, published = row.figures.get(name), row.published.get(name)
            if row.place[0] == "byol":
                level = ours or published
                ax.axhline(level[0], color="0.5", ls=":", label="BYOL" + " (published)" * (not ours))
                continue
            beta = float(row.place[0].removeprefix("beta_"))
            if beta == 0 and (ours or published):
                ax.axhline(
                    (ours or published)[0],
                    color=PALETTE[2],
                    ls="--",
                    label="β_base = 0" + " (published)" * (not ours),
                )
            if published:
                ax.plot(beta, published[0], "D", color=PALETTE[1], mfc="none", label="published")
            if ours:
                ax.errorbar(
                    beta,
                    ours[0],
                    ours[1],
                    fmt="o",
                    color=PALETTE[0],
                    mfc="none" if row.words else PALETTE[0],
                    label="other settings" if row.words else "these runs",
                )
        ax.set(title=title, xlabel="β_base", ylabel="top-1 (%)")
        handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
        if handles:
            ax.legend(handles.values(), handles.keys(), fontsize=8, frameon=False)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path
