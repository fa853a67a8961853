"""Drawn data sets: no download, a thousand small images in a few seconds on one core.

Two worlds, whose classes are pairs of a form and a color ("star-blue"). TOYS serves the quick start and the
tests: a class shows in color, form and marking, objects are large, few and apart. CONTROLLED serves the
controlled test of the method's claim: the colors have one luma and differ in hue alone.

Image ``i`` of a set is a pure function of (seed, i): writing a set twice gives the same bytes.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.data.shapes import (
    FINE_MARKINGS,
    FORMS,
    MARKINGS,
    Canvas,
    blotches,
    local_grid,
    texture,
)


@dataclass(frozen=True)
class World:
    """Classes, and how the picture of one is drawn."""

    forms: tuple[str, ...]
    # (generator, size in pixels, class) -> uint8 [size, size, 3], an object of the class in the middle
    draw: Callable[[np.random.Generator, int, str], np.ndarray]

    @property
    def classes(self) -> list[str]:
        return [f"{form}-{color}" for form in self.forms for color in HUES]


def color_of(hue: float, luma: float, chroma: float) -> np.ndarray:
    """RGB float [3] of a hue in degrees; chroma is the largest channel less the smallest."""
    pure = np.clip(abs((hue / 60 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return luma + chroma * (pure - pure @ [0.2989, 0.587, 0.114])


HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}  # in degrees


# ---- toys ----

TOY_HUE_STD, TOY_CHROMA = 8, 85


def toy_background(rng: np.random.Generator, size: int) -> np.ndarray:
    color = rng.uniform(70, 185) + rng.uniform(-25, 25, 3)
    return (color + 22 * blotches(rng, size, rng.integers(3, 7))).astype(np.float32)


def paint_toy(rng: np.random.Generator, canvas: Canvas, name: str, place: tuple[float, float, float]) -> None:
    """Paint an object of the class ``name``, turned at random; place: x, y, radius in sides of the image."""
    form, color = name.split("-")
    (x, y, radius), angle, size = place, rng.uniform(0, 2 * np.pi), canvas.size
    hue, luma = rng.normal(HUES[color], TOY_HUE_STD), rng.uniform(110, 145)
    fill = color_of(hue, luma, TOY_CHROMA) + 10 * blotches(rng, size, rng.integers(3, 7))
    marking = MARKINGS[form](*local_grid(size, x * size, y * size, radius * size, angle))
    canvas.paint(form, (x, y, radius, angle), fill + 80 * marking[..., None])


def draw_toy(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """One large toy, and half of the time part of another at the border."""
    canvas = Canvas(toy_background(rng, size))
    if rng.random() < 0.5:
        paint_toy(rng, canvas, str(rng.choice(TOYS.classes)), (*at_border(rng), rng.uniform(0.1, 0.2)))
    paint_toy(rng, canvas, name, (*rng.uniform(0.42, 0.58, 2), rng.uniform(0.38, 0.48)))
    return canvas.finish(rng)[0]


def draw_toys(
    rng: np.random.Generator, size: int, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Toys of the classes ``names``, apart from each other where there is room; returns as Canvas.finish."""
    canvas, places = Canvas(toy_background(rng, size)), []
    for name in names:
        for _ in range(60):
            radius = rng.uniform(0.16, 0.28)
            x, y = rng.uniform(0.9 * radius, 1 - 0.9 * radius, 2)
            if all(np.hypot(x - x_, y - y_) > 0.95 * (radius + radius_) for x_, y_, radius_ in places):
                break
        places.append((x, y, radius))
        paint_toy(rng, canvas, name, places[-1])
    return canvas.finish(rng)


def at_border(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation([rng.choice([0.03, 0.97]), rng.uniform(0, 1)])


TOYS = World(("circle", "square", "star"), draw_toy)


# ---- the controlled test ----

# The colors have one luma and one chroma and differ in hue alone, by 60 degrees. So the aggressive
# augmentation destroys a known part of the label. Grayscale (p 0.2) makes the colors of a form the
# same picture, except for clipping at 0 and 255. The jitter (p 0.8) turns the hue by up to 36
# degrees either way; in 1 of 6 cases by more than 30 degrees, beyond which another color is nearer.
# Of all aggressive views 0.2 + 0.8 * 0.8 / 6 = 31 % have lost their color or show another's, and
# 52 % of the pairs of two have at least one such view. Form and marking survive; only blur affects
# them.
LUMA, CHROMA = 125, 70


def draw_controlled(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """The subject, large and near the middle, of a class's form and color; up to two small shapes of random
    forms and colors at the border; a background of any color."""
    form, color = name.split("-")
    forms = [list(FORMS)[i] for i in rng.integers(len(FORMS), size=rng.integers(3))]
    return draw_subject(rng, size, [*forms, form], color_of(HUES[color], LUMA, CHROMA))[0]


def draw_subject(
    rng: np.random.Generator, size: int, forms: Sequence[str], color: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last of ``forms`` in ``color`` (RGB), after the others; returns as Canvas.finish.

    The color changes nothing else in the picture.
    """
    # Of a few random colors, take the one farthest from those already used, so that every shape stays
    # visible against the others.
    colors = [rng.uniform(30, 225, 3)]
    for _ in forms:
        candidates = rng.uniform(10, 245, (6, 3))
        gaps = np.linalg.norm(candidates[:, None] - np.stack(colors), axis=-1).min(1)
        colors.append(candidates[gaps.argmax()])
    colors[-1] = color
    canvas = Canvas(texture(rng, size, colors[0], 30))
    for i, (form, color) in enumerate(zip(forms, colors[1:])):
        if i == len(forms) - 1:
            (x, y), radius = rng.uniform(0.42, 0.58, 2), rng.uniform(0.36, 0.48)
        else:
            (x, y), radius = at_border(rng), rng.uniform(0.1, 0.2)
        angle = rng.uniform(0, 2 * np.pi)
        marking = FINE_MARKINGS[form](*local_grid(size, x * size, y * size, radius * size, angle))
        canvas.paint(form, (x, y, radius, angle), texture(rng, size, color, 20) + 45 * marking[..., None])
    return canvas.finish(rng)


CONTROLLED = World(("circle", "square", "star", "cross"), draw_controlled)


# ---- files ----


def write_image_folder(
    root: str | Path, images_per_class: int, size: int, seed: int, world: World = TOYS
) -> Path:
    """Write ``root/<class>/<nnnn>.jpg``, ``images_per_class`` each of ``size`` pixels square, in
    ImageFolder layout.

    ``root/shapes.json``, written last, marks the folder as complete: then a second call returns at
    once. Raises InputError if ``root`` holds all or part of a set with other parameters. Returns
    ``root`` as a Path.
    """
    root, names = Path(root), world.classes
    info = {"images_per_class": images_per_class, "size": size, "seed": seed, "classes": names}
    marker, started = root / "shapes.json", root / "shapes.started.json"
    if _is_written(marker, info):
        return root
    # Leftovers of an interrupted set with other parameters would mix with this one.
    _is_written(started, info)
    root.mkdir(parents=True, exist_ok=True)
    _write_json(started, {"info": info})
    for i, name in enumerate(names):
        (root / name).mkdir(exist_ok=True)
        for n in range(images_per_class):
            rng = np.random.default_rng((seed, n * len(names) + i))
            _write_jpeg(root / name / f"{n:04d}.jpg", world.draw(rng, size, name))
    os.replace(started, marker)
    return root


def write_coco(root: str | Path, name: str, num_images: int, size: int, seed: int) -> Path:
    """Write ``root/images/<name>_<nnnn>.jpg`` and ``root/<name>.json`` (COCO instances); returns
    the JSON's Path.

    One to three TOYS per image. Category ids are 1..18; ``file_name`` is relative to
    ``root/images``; ``segmentation`` is compressed RLE of the visible pixels, ``area`` their number
    and ``bbox`` the tight [x, y, width, height] in pixels. Splits that share ``root`` need
    different names, and different seeds, or they hold the same pictures. The JSON is written last:
    where it exists the set is complete and the call returns at once. Raises InputError if it was
    written for other parameters.
    """
    classes = TOYS.classes
    path = Path(root) / f"{name}.json"
    info = {"num_images": num_images, "size": size, "seed": seed, "classes": classes}
    if _is_written(path, info):
        return path
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for n in range(num_images):
        rng = np.random.default_rng((seed, n))
        labels = rng.integers(len(classes), size=rng.integers(1, 4))
        image, masks, shown = draw_toys(rng, size, [classes[label] for label in labels])
        images.append({"id": n + 1, "file_name": f"{name}_{n:04d}.jpg", "height": size, "width": size})
        _write_jpeg(path.parent / "images" / images[-1]["file_name"], image)
        for mask, label in zip(masks, labels[shown]):
            code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": n + 1,
                    "category_id": int(label) + 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": rle.toBbox(code).tolist(),
                    "segmentation": {"size": [size, size], "counts": code["counts"].decode("ascii")},
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    _write_json(path, {"info": info, "images": images, "annotations": annotations, "categories": categories})
    return path


def _is_written(path, info):
    """Whether ``path`` exists; raises InputError if it was written for parameters other than ``info``."""
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())["info"]
    except (ValueError, KeyError, TypeError):
        found = None  # not written by this function: never overwrite it
    if found != info:
        raise InputError(
            f"{path.parent} holds another data set (see {path.name}) than the one asked for, "
            f"{json.dumps(info)}: remove that folder or choose another"
        )
    return True


def _write_json(path, content):
    """Write under a temporary name, then rename: an interrupted write leaves no file at ``path``."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _write_jpeg(path, image):
    """Write a JPEG whose color has full resolution.

    JPEG's default halves it, which smears the outlines in small pictures beyond their masks.
    """
    Image.fromarray(image).save(path, quality=92, subsampling=0)
