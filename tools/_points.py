"""A panel of a picture in which every seed of every row is a point."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00")


def plot_seeds(ax: Axes, figures: dict[str, Sequence[Sequence[float]]], titles: Sequence[str]) -> None:
    """Every seed is a point, their mean a bar, the first row on top.

    figures: {name: for each row the values of its seeds} of two figures; titles: of the rows.
    """
    for offset, color, (name, rows) in zip((-0.13, 0.13), COLORS, figures.items()):
        for y, values in enumerate(rows):
            label = name if y == 0 else None
            heights = [y + offset] * len(values)
            ax.plot(values, heights, "o", ms=4, color=color, alpha=0.5, mec="none", label=label)
            bar = [y + offset - 0.1, y + offset + 0.1]
            ax.plot([statistics.fmean(values)] * 2, bar, color=color, lw=2)
    ax.set(yticks=range(len(titles)), yticklabels=titles, ylim=(len(titles) - 0.5, -0.5))
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
