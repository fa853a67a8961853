"""Pictures of what the aggressive augmentation does to images, and of how far features move with it."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchvision.transforms.v2 import functional as TF

from rsa_detectron2.pretrain.data.loader import MultiStageViews
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.drift import OPERATIONS, caption, choose, load_views
from rsa_detectron2.pretrain.method.augment import GRAY, ORDER, SIGMA, aggressive, to_float

WEAK, AGGRESSIVE, NEUTRAL = "#0072b2", "#d55e00", "0.55"
LEGEND = "b, c, s: factors of brightness, contrast, saturation; h: turn of the hue; blur: sigma in pixels"


def draw_views(images: Source, size: int, seed: int, count: int, path: Path) -> Path:
    """A row for each of ``count`` images: the original, then the weak and the aggressive view of both crops,
    each with what was drawn. Returns ``path``.
    """
    rows = []
    for batch in load_views(images, size, seed, choose(len(images), count), 0):
        aggressive_views = to_uint8(aggressive(batch["views"], batch["params"]))
        for index, views, shifted, params in zip(
            batch["index"].tolist(), batch["views"], aggressive_views, batch["params"]
        ):
            rows.append(
                (
                    [images.read(index), views[0], shifted[0], views[1], shifted[1]],
                    ["", "", caption(params[0]), "", caption(params[1])],
                )
            )
    titles = ("original", "weak  $v_w$", "aggressive  $v_a$", "weak  $v_w'$", "aggressive  $v_a'$")
    figure = Figure(figsize=(9, 1.93 * len(rows) + 0.5), dpi=130, layout="constrained")
    grid = figure.subplots(len(rows), 5, squeeze=False)
    for axes, (pictures, captions) in zip(grid, rows):
        for ax, picture, words in zip(axes, pictures, captions):
            show(ax, square(picture), words)
    for ax, title in zip(grid[0], titles):
        ax.set_title(title, fontsize=10)
    figure.supxlabel(LEGEND, fontsize=7)
    figure.savefig(path)
    return path


def draw_noisy(panels: dict[str, tuple[Source, int]], seed: int, path: Path, limit: int = 400) -> Path:
    """Figure 1: the images that augmentation changes most, squared, above their aggressive views.

    ``panels``: {title: (source, size in pixels of its views)}. Each shows five of at most ``limit`` images,
    see :func:`noisiest`. Returns ``path``.
    """
    figure = Figure(figsize=(9, 3.9 * len(panels)), dpi=130, layout="constrained")
    parts = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for part, (title, (images, size)) in zip(parts, panels.items()):
        part.suptitle(title, fontsize=11)
        grid = part.subplots(2, 5)
        for (above, below), (index, view, words) in zip(grid.T, noisiest(images, size, seed, limit)):
            show(above, to_array(TF.resize(images.read(index), [224, 224], antialias=True)), "")
            show(below, square(view), words)
        for ax in grid.flat:
            ax.set_axis_off()
    figure.savefig(path)
    return path


def noisiest(images: Source, size: int, seed: int, limit: int) -> list[tuple[int, torch.Tensor, str]]:
    """The five views that changed most: (index, aggressive view uint8 [3, S, S], what was drawn).

    Of those with jitter alone: the brightest, the darkest, and the one whose mean color moves most. Of those
    in grayscale: the one from the most colorful image. Of the others: the strongest blur.
    """
    found = []
    for batch in load_views(images, size, seed, choose(len(images), limit), 0):
        weak, aggressive_views = (
            to_float(batch["views"][:, 0]),
            aggressive(batch["views"], batch["params"])[:, 0],
        )
        for index, before, after, params in zip(
            batch["index"].tolist(), weak, aggressive_views, batch["params"][:, 0]
        ):
            found.append(
                {
                    "sample": (index, to_uint8(after), caption(params)),
                    "jittered": bool(params[ORDER][0] >= 0),
                    "light": after.mean().item(),
                    "moved": (after - before).mean((1, 2)).abs().max().item(),
                    "gray": bool(params[GRAY]),
                    "colorful": before.std(0).mean().item(),
                    "blur": params[SIGMA].item(),
                }
            )
    jittered = [view for view in found if view["jittered"] and not view["gray"] and not view["blur"]]
    gray = [view for view in found if view["gray"]]
    wanted = [
        (jittered, lambda view: view["light"]),
        (jittered, lambda view: -view["light"]),
        (jittered, lambda view: view["moved"]),
        (gray, lambda view: view["colorful"]),
        ([view for view in found if not view["gray"]], lambda view: view["blur"]),
    ]
    chosen = []
    for views, measure in wanted:
        taken = [view["sample"][0] for view in chosen]
        views = [view for view in views or found if view["sample"][0] not in taken] or found
        chosen.append(max(views, key=measure))
    return [view["sample"] for view in chosen]


def draw_pairs(pairs: dict[str, np.ndarray], dataset: MultiStageViews, count: int, path: Path) -> Path:
    """The ``count`` pairs of :func:`measure_pairs` that drifted most and, below, the eight that drifted
    least.

    Weak and aggressive view stand side by side, with their cosine and what was drawn. ``dataset`` draws the
    views again; its images, size and seed are those that ``pairs`` were measured with. Returns ``path``.
    """
    columns = 4
    total = len(pairs["cosine"])
    count = max(1, min(count, total))
    least = np.arange(max(count, total - 2 * columns), total)
    blocks = [
        (f"{count} of {total} pairs with the least agreement (weak | aggressive)", np.arange(count)),
        ("the most agreement", least[::-1]),
    ]
    blocks = [(title, ranks) for title, ranks in blocks if len(ranks)]
    heights = [-(-len(ranks) // columns) for _, ranks in blocks]
    figure = Figure(
        figsize=(3.1 * columns, 1.85 * sum(heights) + 0.4 * len(blocks)), dpi=130, layout="constrained"
    )
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=[1.85 * n + 0.4 for n in heights])[
        :, 0
    ]
    for part, (title, ranks), rows in zip(parts, blocks, heights):
        part.suptitle(title, fontsize=11)
        grid = part.subplots(rows, columns, squeeze=False)
        for ax in grid.flat:
            ax.set_axis_off()
        for ax, rank in zip(grid.flat, ranks):
            sample = dataset[0, int(pairs["index"][rank])]
            view = pairs["view"][rank]
            weak, params = sample["views"][view], sample["params"][view]
            shifted = to_uint8(aggressive(weak[None, None], params[None, None]))[0, 0]
            gap = np.full((dataset.size, max(1, dataset.size // 40), 3), 255, dtype=np.uint8)
            both = np.concatenate([to_array(weak), gap, to_array(shifted)], 1)
            show(ax, both, f"cos {pairs['cosine'][rank]:.2f}   {caption(params)}")
    parts[-1].supxlabel(LEGEND, fontsize=7)
    figure.savefig(path)
    return path


def plot_operations(drifts: dict[str, np.ndarray], path: Path) -> Path:
    """The drifts of :func:`measure_operations`, a box for each operation.

    A box holds the middle half of the images, with their median and mean (dot); whiskers reach from the 5th
    to the 95th percentile. The pairs that set the scale are gray. Returns ``path``.
    """
    single = sorted(OPERATIONS, key=lambda name: drifts[name].mean())
    names = [*single, "as drawn", "another crop", "another image"]
    labels = {name: f"{name} alone" for name in single} | {"as drawn": "aggressive view, as drawn"}
    colors = [*(AGGRESSIVE for _ in single), WEAK, NEUTRAL, NEUTRAL]
    figure = Figure(figsize=(7.5, 0.36 * len(names) + 1.1), dpi=150, layout="constrained")
    ax = figure.subplots()
    boxes = ax.boxplot(
        [drifts[name] for name in names],
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        widths=0.6,
        medianprops={"color": "black"},
        meanprops={"marker": "o", "ms": 4, "mfc": "white", "mec": "black"},
    )
    for box, color in zip(boxes["boxes"], colors):
        box.set(facecolor=color, alpha=0.7)
    ax.set(
        yticklabels=[labels.get(name, name) for name in names],
        xlim=(0, None),
        xlabel=f"drift from the weak view, 1 − cos of backbone features ({len(drifts['blur'])} images)",
    )
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    return images.mul(255).round().byte()


def to_array(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] -> [H, W, 3] for matplotlib."""
    return image.permute(1, 2, 0).cpu().numpy()


def square(image: torch.Tensor, side: int = 224) -> np.ndarray:
    """A whole image, uint8 [3, H, W], scaled to fit a white square, uint8 [side, side, 3]."""
    height, width = image.shape[-2:]
    scale = side / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    image = to_array(TF.resize(image, [h, w], antialias=True))
    canvas = np.full((side, side, 3), 255, dtype=np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    canvas[top : top + h, left : left + w] = image
    return canvas


def show(ax: Axes, picture: np.ndarray, words: str) -> None:
    ax.imshow(picture)
    ax.set_axis_off()
    ax.text(0.5, -0.02, words, transform=ax.transAxes, ha="center", va="top", fontsize=6.5)
