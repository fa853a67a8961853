"""Detections drawn on images."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools import mask as rle

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.common.fonts import literal_text
from rsa_detectron2.transfer.data.coco_json import read_coco
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.data.images import read_image
from rsa_detectron2.transfer.data.masks import to_rle
from rsa_detectron2.transfer.report.pictures import PALETTE
from rsa_detectron2.transfer.report.quality import evaluated_set, read_detections

THRESHOLD = 0.5  # of the scores of detections that are drawn
LARGEST_JPEG = 65500  # pixels a side


def tint(image: np.ndarray, code: dict, color: np.ndarray) -> None:
    """Mix ``color`` (0-255) into the pixels of a mask, pycocotools' RLE, and draw its outline, in place.

    Only the mask's box is touched: a photograph has millions of pixels.
    """
    x, y, w, h = rle.toBbox(code).astype(int)
    inside, part = rle.decode(code)[y : y + h, x : x + w].astype(bool), image[y : y + h, x : x + w]
    part[inside] = 0.5 * part[inside] + 0.5 * color
    p = np.pad(inside, 1)
    core = p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    part[inside & ~core] = color


def draw_instances(
    ax: Axes, image: np.ndarray, instances: list[dict], names: dict[int, str], colors: dict[int, str]
) -> None:
    """Draw COCO instances over an image, uint8 [H, W, 3]: mask, box, class name and, if any, score."""
    height, width = image.shape[:2]
    tinted = image.copy()
    for instance in instances:
        if instance.get("segmentation"):
            code = to_rle(instance["segmentation"], height, width)
            tint(tinted, code, 255 * np.array(to_rgb(colors[instance["category_id"]])))
    ax.imshow(tinted)
    taken = []
    for instance in instances:
        x, y, w, h = instance["bbox"]
        color = colors[instance["category_id"]]
        ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=1))
        text = names[instance["category_id"]] + (f" {instance['score']:.2f}" if "score" in instance else "")
        # a label's size in pixels of the image, to find a place at the box that no other label has taken
        tw, th = 0.021 * (len(text) + 1) * width, 0.06 * width
        places = [(x, y), (x + w - tw, y), (x, y + h - th), (x + w - tw, y + h - th), (x, y - th), (x, y + h)]
        places = [(min(max(a, 0), width - tw), min(max(b, 0), height - th)) for a, b in places]
        place = next(
            (
                p
                for p in places
                if all(abs(p[1] - b) >= th or p[0] + tw <= a or p[0] >= a + u for a, b, u in taken)
            ),
            places[0],
        )
        taken.append((*place, tw))
        ax.text(
            place[0] + 0.01 * width,
            place[1] + th / 2,
            text,
            fontsize=7,
            color="white",
            va="center_baseline",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
            clip_on=True,
        )


def draw_on_copy(image: np.ndarray, detections: list[dict], categories: list[dict], path: Path) -> None:
    """Draw detections on an image, uint8 [H, W, 3], and write it as JPEG to ``path``, whole or not at all.

    The picture has the image's size, up to the largest that JPEG can hold.
    """
    scale = min(1, LARGEST_JPEG / max(image.shape))
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    names = {category["id"]: category["name"] for category in categories}
    colors = {category["id"]: PALETTE[n % len(PALETTE)] for n, category in enumerate(categories)}
    # draw_instances is made for a width of three inches. Half a pixel more, because matplotlib rounds down.
    dpi, (wide, high) = width / 3, (width + 0.5, height + 0.5)
    figure = Figure(figsize=(wide / dpi, high / dpi), dpi=dpi)
    ax = figure.add_axes((0, 0, width / wide, height / high))
    with literal_text(*names.values()):
        draw_instances(ax, image, detections, names, colors)
        ax.set_axis_off()
        write_atomically(path, lambda file: figure.savefig(file, format="jpeg", pil_kwargs={"quality": 92}))


def draw_detections(
    annotations: str | Path,
    image_folder: str | Path,
    runs: dict[str, str | Path],
    path: Path,
    num_images: int = 4,
) -> Path:
    """Draw ground truth, if any, then the detections of each run, {name: folder}, as one PNG.

    The first ``num_images`` images, by id, that have annotations, or detections where none has. Detections
    scoring at least THRESHOLD; where a run has none of those on an image, its three best. Raises
    InputError when a file is missing or useless.
    """
    sets = {name: evaluated_set(folder, annotations, image_folder) for name, folder in runs.items()}
    dataset = next(iter(sets.values()), None) or read_coco(str(annotations), str(image_folder))
    truth = [annotation for annotation in dataset.annotations if not annotation["iscrowd"]]
    columns = {"ground truth": (truth, dataset.categories)} if truth else {}
    columns |= {name: (read_detections(folder), sets[name].categories) for name, folder in runs.items()}
    marked = {a["image_id"] for a in truth or [a for instances, _ in columns.values() for a in instances]}
    images = [image for image in dataset.images if image["id"] in marked][:num_images]
    if not images:
        raise InputError(f"no annotations to draw in {annotations}")
    with literal_text(*runs, *(c["name"] for _, categories in columns.values() for c in categories)):
        draw_grid(dataset, images, columns, path)
    return path


def what_is_shown(detections: list[dict]) -> str:
    """The caption of a run's detections on an image, sorted by score."""
    if not detections:
        return "no detections"
    if detections[0]["score"] < THRESHOLD:
        return f"none scores {THRESHOLD:g} or more: the best {len(detections)}"
    return f"{len(detections)} scoring {THRESHOLD:g} or more"


def draw_grid(
    dataset: Dataset,
    images: list[dict],
    columns: dict[str, tuple[list[dict], list[dict]]],
    path: Path,
) -> None:
    """Images' entries and {title: (instances, categories)} -> PNG with a row for each image."""
    palette = {}
    for _, categories in columns.values():
        for category in categories:
            palette.setdefault(category["name"], PALETTE[len(palette) % len(PALETTE)])
    heights = [max(0.4, i["height"] / i["width"]) for i in images]
    figure = Figure(
        figsize=(3 * len(columns), 3 * sum(heights) + 0.25 * len(images) + 0.5), dpi=150, layout="constrained"
    )
    grid = figure.subplots(len(images), len(columns), squeeze=False, height_ratios=heights)
    for row, info in zip(grid, images):
        image = read_image(Path(dataset.folder, info["file_name"]))
        for ax, (title, (instances, categories)) in zip(row, columns.items()):
            shown = [a for a in instances if a["image_id"] == info["id"]]
            if title != "ground truth":
                ranked = sorted(shown, key=lambda a: -a["score"])
                shown = [a for a in ranked if a["score"] >= THRESHOLD] or ranked[:3]
                ax.set_xlabel(what_is_shown(shown), fontsize=8)
            names = {category["id"]: category["name"] for category in categories}
            draw_instances(ax, image, shown, names, {number: palette[name] for number, name in names.items()})
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, name in zip(grid[0], columns):
        ax.set_title(textwrap.fill(name, 36), fontsize=10)
    figure.savefig(path)
