"""Pictures of which images a backbone finds similar: neighbors, and a map. No labels are needed."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsa_detectron2.common.fonts import literal_text
from rsa_detectron2.pretrain.data.bad_images import read_or_next
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.drift import choose
from rsa_detectron2.pretrain.evaluate.features import label_of
from rsa_detectron2.pretrain.evaluate.pictures import WEAK, square

SAME, OTHER = "#009e73", "#cc3311"  # frames: a neighbor of the query's class, or of another
NEIGHBORS = 8


def draw_neighbors(
    images: Source, features: dict[str, torch.Tensor], queries: Sequence[int], path: Path
) -> Path:
    """A row for each of ``queries``, indices of images: the image, then its nearest neighbors among
    all images, by cosine, once for each of ``features``.

    features: {title: float [N, D] of the N images}. Where images have labels, a green frame means
    the class of the query, a red one another class. The next image stands in for one that cannot be decoded.
    """
    group = [0.2, *[1] * NEIGHBORS]  # widths: a gap, and the neighbors
    widths = [1, *group * len(features)]
    size = (0.9 * sum(widths) + 0.3, 0.95 * len(queries) + 0.5)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(len(queries), len(widths), squeeze=False, width_ratios=widths)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    grid[0][0].set_title("image", fontsize=9)
    starts = range(2, len(widths), len(group))
    for start, title in zip(starts, features):
        grid[0][start].set_title(title, fontsize=9, loc="left")
    for row, query in zip(grid, queries):
        label = show_small(row[0], images, query)
        for start, vectors in zip(starts, features.values()):
            for ax, index in zip(row[start:], nearest(vectors, query)):
                frame(ax, label, show_small(ax, images, index))
    figure.savefig(path)
    return path


def show_small(ax: Axes, images: Source, index: int) -> int:
    """Show an image, or the next that can be decoded, and return its label."""
    image, skipped = read_or_next(images, index)
    ax.imshow(square(image, 96))
    return label_of(images, index + skipped)


def nearest(features: torch.Tensor, query: int) -> list[int]:
    """The NEIGHBORS images of the largest cosine with ``query``, itself left out; features float [N, D]."""
    vectors = F.normalize(features, dim=1)
    cosine = vectors @ vectors[query]
    cosine[query] = -torch.inf
    return cosine.topk(min(NEIGHBORS, len(vectors) - 1)).indices.tolist()


def frame(ax: Axes, label: int, other: int) -> None:
    """Frame a neighbor by whether its class is the query's; -1 is no label, and gets no frame."""
    if label < 0 or other < 0:
        return
    ax.spines[:].set(visible=True, color=SAME if label == other else OTHER, linewidth=2)


MAPPED = 10_000  # points of a map: more hide each other
LEGEND_ENTRIES = 20  # as many as tab20 has colors
PALE = "0.85"  # no class has this color


def draw_map(features: torch.Tensor, labels: torch.Tensor | None, classes: Sequence[str], path: Path) -> Path:
    """A point for each image: the first two principal components of its l2-normalized features.

    Features float [N, D], at least two images; at most MAPPED are drawn, evenly spaced. Points have the color
    of their class: ``labels``, int64 [N], are places in ``classes``. Those without a label, -1, are pale.
    Without any label all are blue. Up to LEGEND_ENTRIES classes have a legend. Returns ``path``.
    """
    chosen = torch.from_numpy(choose(len(features), MAPPED))
    labels = torch.full((len(features),), -1) if labels is None else labels
    labels = labels.cpu()[chosen].numpy()
    points, variance = principal_components(F.normalize(features[chosen.to(features.device)], dim=1))
    figure = Figure(figsize=(7, 6), dpi=150, layout="constrained")
    ax = figure.subplots()
    area = min(30, max(3, 20_000 / len(points)))  # in square points

    def scatter(part: np.ndarray, **style: object) -> None:
        ax.scatter(*points[part].T, s=area, linewidths=0, alpha=0.7, **style)

    for axis, number, share in zip((ax.xaxis, ax.yaxis), ("first", "second"), variance):
        axis.set_label_text(f"{number} principal component, {share:.1%} of the variance")
    ax.spines[["top", "right"]].set_visible(False)
    present = np.unique(labels[labels >= 0])
    scatter(labels < 0, color=PALE if len(present) else WEAK)
    named = present if len(present) <= LEGEND_ENTRIES else []
    if len(named) < len(present):
        scatter(labels >= 0, c=labels[labels >= 0], cmap="turbo")
    names = [printable(classes[label]) for label in named]
    with literal_text(*names):
        colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
        for place, (label, name) in enumerate(zip(named, names)):
            scatter(labels == label, color=colors(place), label=" " + name)
        if names:
            figure.legend(loc="outside right upper", fontsize=8, frameon=False, markerscale=2)
        figure.savefig(path)
    return path


def principal_components(features: torch.Tensor) -> tuple[np.ndarray, list[float]]:
    """float [N, D] -> the first two principal components float64 [N, 2], and each one's share of the
    variance; zero where all are equal."""
    centered = features.double() - features.double().mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered)  # ascending
    axes = vectors[:, -2:].flip(1)
    # An axis has no direction of its own. Without a rule, the same features could be drawn mirrored.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    shares = values[-2:].flip(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return (centered @ axes).cpu().numpy(), shares.tolist()
