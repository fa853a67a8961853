"""Which figures without labels may be trusted? They are compared with top-1 over the checkpoints of a run."""

import math
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import to_markdown, write_rows
from rsa_detectron2.pretrain.engine.checkpoint import FINAL
from rsa_detectron2.transfer.report.pictures import PALETTE, read_series

FEWEST = 4  # checkpoints that can be ranked
IMAGES = 10_000  # of training and of validation, by default
TOP1 = {"knn_top1": "kNN", "linear_top1": "linear"}
LOGGED = {"loss": "loss", "feature_std": "feature std"}
FIGURES = {
    "rank_backbone": "effective rank",
    "rank_projection": "effective rank of the projection",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "consistency": "consistency",
    **LOGGED,
    "step": "step",
}
ABOUT = """Spearman's rank correlation of each figure with top-1, over {count} checkpoints of one run: 1 or -1
where the figure puts them in the order of their top-1, or in the reverse. Whatever rises throughout a run
that learns has 1, as the step itself has. So the correlation of the changes from one checkpoint to the next
stands beside it. Loss and feature std are means of metrics.jsonl since the checkpoint before."""

Rows = dict[int, dict[str, float]]  # step: figures


def kept_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, first to last. Raises InputError for fewer than FEWEST files."""
    found = sorted(Path(folder).glob("checkpoint_[0-9]*.pth"))
    found += [path for path in [Path(folder, FINAL)] if path.is_file()]
    if len(found) < FEWEST:
        raise too_few(folder, len(found))
    return found


def too_few(folder: str | Path, count: int) -> InputError:
    return InputError(
        f"{folder} has {count} checkpoints (checkpoint_<step>.pth, model_final.pth), too few to rank: "
        "pre-train with CHECKPOINT.KEEP_PERIOD 1"
    )


def logged(folder: str | Path, steps: list[int]) -> Rows:
    """For each of ``steps``, ascending, the means of what was logged since the one before."""
    means = {step: {} for step in steps}
    series = read_series(Path(folder, "metrics.jsonl"), "step", list(LOGGED))
    for name, (logged_at, values) in series.items():
        for before, step in zip([0, *steps], steps):
            if part := [value for at, value in zip(logged_at, values) if before < at <= step]:
                means[step][name] = statistics.fmean(part)
    return means


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: the correlation of ranks, where equal values share their mean rank. NaN if one is
    constant."""

    def centered_ranks(values: list[float]) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (counts.cumsum() - (counts - 1) / 2)[place]
        return ranks - ranks.mean()

    a, b = centered_ranks(a), centered_ranks(b)
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else math.nan


def correlations(rows: Rows) -> dict[str, list[float]]:
    """{figure: [with kNN, with linear top-1, and both of the changes]} of the figures that every row has."""
    table = {name: [row.get(name) for row in rows.values()] for name in (*FIGURES, *TOP1)}
    table["step"] = list(rows)
    found = {}
    for name in FIGURES:
        if None in table[name]:
            continue
        pairs = [(table[name], table[top1]) for top1 in TOP1]
        changes = [(np.diff(a).tolist(), np.diff(b).tolist()) for a, b in pairs]
        found[name] = [rank_correlation(*pair) for pair in (*pairs, *changes)]
    return found


def report(run: str | Path, rows: Rows, folder: str | Path) -> str:
    """Write table.csv, ranks.csv, trust.md and trust.png; returns what trust.md says."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    more = logged(run, list(rows))
    rows = {step: row | more[step] for step, row in rows.items()}
    names = [name for name in (*FIGURES, *TOP1) if name != "step"]
    lines = [[step, *(row.get(name) for name in names)] for step, row in rows.items()]
    write_rows(folder / "table.csv", ["step", *names], lines)
    found = correlations(rows)
    header = ["figure", *TOP1.values(), *(f"{name}, changes" for name in TOP1.values())]
    write_rows(folder / "ranks.csv", header, [[name, *values] for name, values in found.items()])
    cells = [[FIGURES[name], *(f"{value:.2f}" for value in values)] for name, values in found.items()]
    plot(rows, found, folder / "trust.png")
    text = f"{ABOUT.format(count=len(rows))}\n\n{to_markdown([header, *cells])}"
    (folder / "trust.md").write_text(f"{text}\n![the figures over top-1](trust.png)\n", encoding="utf-8")
    return f"{text}{folder / 'trust.png'}"


def plot(rows: Rows, found: dict[str, list[float]], path: Path) -> None:
    """A panel for each figure: top-1 over it, a point for each checkpoint, joined in their order."""
    columns = 4
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3.2 * columns, 3 * lines), dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for ax in grid.flat[len(found) :]:
        ax.set_axis_off()
    for ax, (name, values) in zip(grid.flat, found.items()):
        x = list(rows) if name == "step" else [row[name] for row in rows.values()]
        for (top1, label), color in zip(TOP1.items(), PALETTE):
            y = [row[top1] for row in rows.values()]
            ax.plot(x, y, "o-", color=color, ms=3, lw=0.6, label=f"{label} top-1")
        ax.set(xlabel=FIGURES[name])
        ax.set_title(f"ρ {values[0]:.2f} (kNN), {values[1]:.2f} (linear)", fontsize=9, loc="left")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in grid[:, 0]:
        ax.set_ylabel("top-1 (%)")
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path)
