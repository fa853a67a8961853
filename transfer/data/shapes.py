"""A procedural data set: colored, textured shapes that overlap on a textured background, with exact masks.

It serves the quick start and the tests: no download, a thousand small images in a few seconds on
one core. A class is a form with its marking; color, rotation, scale and background are drawn
independently of it. In a second set, for the controlled test of the method's claim, the class also
includes the subject's color (COLOR_CLASSES). Image ``i`` of a set is a pure function of
(seed, i): writing a set twice gives the same bytes.

A form is a function of the plane that approximates the signed distance to its outline, negative
inside. Mask and picture both follow from this number: the mask holds the pixels whose center is inside
(distance < 0), and the image blends the shape in over one pixel around the outline (opacity 1/2 -
distance). So the mask is exactly where the shape is more than half opaque.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from rsa_detectron2.common.errors import InputError


def _star(u, v, inner=0.45):
    """Five tips at radius 1, with notches at ``inner``.

    The plane is folded into half a tip, in which the outline is a single line.
    """
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(v, u) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    # normal of the line from tip to notch
    nx, ny = (inner * np.sin(sector / 2), 1 - inner * np.cos(sector / 2))
    return ((radius * np.cos(angle) - 1) * nx + radius * np.sin(angle) * ny) / np.hypot(nx, ny)


# (u, v) float32 grids in units of the shape's radius -> signed distance; every form lies within radius 1.1.
FORMS = {
    "circle": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(abs(u) * 0.75**0.5 + v / 2, -v) - 0.5,
    "star": _star,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.68) - 0.2,
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.3, np.maximum(abs(u), abs(v)) - 0.95),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.75 - np.hypot(u - 0.5, v)),
    "heart": lambda u, v: (
        np.minimum(
            np.maximum(abs(u), abs(v)),  # a square, and a disc on each of two sides
            np.minimum(np.hypot(u - 0.5, v), np.hypot(u, v - 0.5)),
        )
        - 0.5
    ),
}
# The marking of a form: its brightness from -1 to 1 on the same grids. So a class also shows in its
# texture, as an animal's does, which a short run can learn. Color says nothing about the class.
MARKINGS = {
    "circle": lambda u, v: np.sin(14 * u),
    "square": lambda u, v: np.sin(9 * u) * np.sin(9 * v),
    "triangle": lambda u, v: np.sin(20 * np.hypot(u, v)),
    "star": lambda u, v: 0 * u,
    "ring": lambda u, v: np.sin(26 * v),
    "cross": lambda u, v: np.sin(6 * u),
    "crescent": lambda u, v: np.sin(18 * u) * np.sin(18 * v),
    "heart": lambda u, v: np.sin(9 * np.arctan2(v, u)),
}

CLASSES = tuple(FORMS)
# The second set, whose classes are the pairs of a form and a color ("star-blue"): the colors have
# one luma and one chroma (largest less smallest channel) and differ in hue alone, by 60 degrees. So
# the aggressive augmentation destroys a known part of the label. Grayscale (p 0.2) makes the
# colors of a form the same picture, except for clipping at 0 and 255. The jitter (p 0.8) turns the
# hue by up to 36 degrees either way; in 1 of 6 cases by more than 30 degrees, beyond which
# another color is nearer. Of all aggressive views 0.2 + 0.8 * 0.8 / 6 = 31 % have lost their
# color or show another's, and 52 % of the pairs of two have at least one such view. Form and
# marking survive; only blur affects them.
COLOR_FORMS = ("circle", "square", "star", "cross")
HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}
COLOR_CLASSES = {f"{form}-{color}": (form, color) for form in COLOR_FORMS for color in HUES}
LUMA, CHROMA = 125, 70
MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE = 16, 0.05


def local_grid(size: int, x: float, y: float, radius: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) of every pixel's center in a shape's own frame: two float32 [size, size],
    in units of radius.

    ``x``, ``y`` (the middle) and ``radius`` are in pixels, where pixel column 0 spans 0 to 1;
    ``angle`` in radians.
    """
    centers = np.arange(size, dtype=np.float32) + 0.5
    dx, dy = (centers[None, :] - x) / radius, (centers[:, None] - y) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    return (dx * cos + dy * sin).astype(np.float32), (dy * cos - dx * sin).astype(np.float32)


def signed_distance(form: str, size: int, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    """Distance to the outline in pixels, float32 [size, size], negative inside.

    The arguments are those of :func:`local_grid`.
    """
    return FORMS[form](*local_grid(size, x, y, radius, angle)) * radius


def _texture(rng, size, color, contrast):
    """``color`` (RGB) with smooth colored blotches and a grating over it: float32 [size, size,
    3], about 0 to 255."""
    cells = rng.integers(3, 9)
    blotches = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    blotches = np.asarray(blotches.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    direction, cycles, phase = rng.uniform(0, np.pi), rng.uniform(2, size / 6), rng.uniform(0, 2 * np.pi)
    along = np.linspace(0, 2 * np.pi * cycles, size, dtype=np.float32)
    wave = np.sin(
        (along[None, :] * np.cos(direction) + along[:, None] * np.sin(direction) + phase).astype(np.float32)
    )
    tint = rng.uniform(-0.6, 0.6, 3).astype(np.float32)
    return color.astype(np.float32) + contrast * ((blotches / 127.5 - 1) + wave[..., None] * tint)


def equal_luma(hue: float) -> np.ndarray:
    """RGB float [3] of a hue in degrees, with LUMA and CHROMA."""
    pure = np.clip(abs((hue / 60 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return LUMA + CHROMA * (pure - pure @ [0.2989, 0.587, 0.114])


def draw_scene(
    rng: np.random.Generator,
    size: int,
    classes: Sequence[int] | np.ndarray,
    main: bool = False,
    color: Sequence[float] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image with one shape per entry of ``classes`` (indices into CLASSES), each on top of
    those before it.

    With ``main``, the last shape is the subject: large and near the middle, the others small and
    cut by the border; ``color`` (RGB) is the subject's, in place of a random one, and changes
    nothing else. Returns image uint8 [size, size, 3], masks bool [N, size, size] and labels int64
    [N], in drawing order. Masks are modal: what a later shape covers is taken out of the earlier
    masks, so no pixel belongs to two. A shape that is almost hidden (fewer than 16 pixels visible,
    or under 5 % of what it would show alone) stays in the picture but has no mask, so N may be
    smaller than ``len(classes)``.
    """
    # Of a few random colors, take the one farthest from those already used, so that every shape stays
    # visible against the others.
    colors = [rng.uniform(30, 225, 3)]
    for _ in classes:
        candidates = rng.uniform(10, 245, (6, 3))
        gaps = np.linalg.norm(candidates[:, None] - np.stack(colors), axis=-1).min(1)
        colors.append(candidates[gaps.argmax()])
    if color is not None:
        colors[-1] = np.asarray(color)
    image = _texture(rng, size, colors[0], 30)

    masks, alone = np.zeros((len(classes), size, size), dtype=bool), []
    for i, (label, color) in enumerate(zip(classes, colors[1:])):
        if not main:
            (x, y), radius = rng.uniform(0.12, 0.88, 2), rng.uniform(0.11, 0.28)
        elif i == len(classes) - 1:
            (x, y), radius = rng.uniform(0.42, 0.58, 2), rng.uniform(0.36, 0.48)
        else:
            x, y = rng.permutation([rng.choice([0.03, 0.97]), rng.uniform(0, 1)])
            radius = rng.uniform(0.1, 0.2)
        placement = size, x * size, y * size, radius * size, rng.uniform(0, 2 * np.pi)
        distance = signed_distance(CLASSES[label], *placement)
        opacity = np.clip(0.5 - distance, 0, 1)[..., None]
        fill = (
            _texture(rng, size, color, 20) + 45 * MARKINGS[CLASSES[label]](*local_grid(*placement))[..., None]
        )
        image += opacity * (fill - image)
        inside = distance < 0
        masks[:i] &= ~inside
        masks[i] = inside
        alone.append(inside.sum())
    image += 6 * rng.standard_normal((size, size, 1), dtype=np.float32)  # grain, like that of a sensor

    visible = masks.sum((1, 2))
    keep = (visible >= MIN_VISIBLE_PIXELS) & (visible >= MIN_VISIBLE_SHARE * np.array(alone))
    return image.clip(0, 255).astype(np.uint8), masks[keep], np.array(classes, dtype=np.int64)[keep]


def write_image_folder(
    root: str | Path, images_per_class: int, size: int, seed: int, colors: bool = False
) -> Path:
    """Write ``root/<class>/<nnnn>.jpg``, ``images_per_class`` each of ``size`` pixels square, in
    ImageFolder layout.

    The subject of a picture has the class of its folder, one of CLASSES or, with ``colors``, of
    COLOR_CLASSES; up to two small shapes at the border are distractors. ``root/shapes.json``,
    written last, marks the folder as complete: then a second call returns at once. Raises
    InputError if ``root`` holds all or part of a set with other parameters. Returns ``root`` as a
    Path.
    """
    root = Path(root)
    names = list(COLOR_CLASSES if colors else CLASSES)
    info = {"images_per_class": images_per_class, "size": size, "seed": seed, "classes": names}
    marker, started = root / "shapes.json", root / "shapes.started.json"
    if _is_written(marker, info):
        return root
    _is_written(
        started, info
    )  # leftovers of an interrupted set with other parameters would mix with this one
    root.mkdir(parents=True, exist_ok=True)
    _write_json(started, {"info": info})
    for i, name in enumerate(names):
        form, hue = COLOR_CLASSES.get(name, (name, None))
        label, color = CLASSES.index(form), equal_luma(HUES[hue]) if hue else None
        (root / name).mkdir(exist_ok=True)
        for n in range(images_per_class):
            rng = np.random.default_rng((seed, n * len(names) + i))
            distractors = rng.integers(len(CLASSES), size=rng.integers(3))
            image = draw_scene(rng, size, [*distractors, label], main=True, color=color)[0]
            _write_jpeg(root / name / f"{n:04d}.jpg", image)
    os.replace(started, marker)
    return root


def write_coco(root: str | Path, name: str, num_images: int, size: int, seed: int) -> Path:
    """Write ``root/images/<name>_<nnnn>.jpg`` and ``root/<name>.json`` (COCO instances); returns
    the JSON's Path.

    Two to five shapes per image. Category ids are 1..len(CLASSES); ``file_name`` is relative to
    ``root/images``; ``segmentation`` is compressed RLE of the visible pixels, ``area`` their number
    and ``bbox`` the tight [x, y, width, height] in pixels. Almost hidden shapes are not annotated
    (see :func:`draw_scene`). Splits that share ``root`` need different names, and different
    seeds, or they hold the same pictures. The JSON is written last: where it exists the set is complete
    and the call returns at once. Raises InputError if it was written for other parameters.
    """
    path = Path(root) / f"{name}.json"
    info = {"num_images": num_images, "size": size, "seed": seed, "classes": list(CLASSES)}
    if _is_written(path, info):
        return path
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for n in range(num_images):
        rng = np.random.default_rng((seed, n))
        image, masks, labels = draw_scene(rng, size, rng.integers(len(CLASSES), size=rng.integers(2, 6)))
        images.append({"id": n + 1, "file_name": f"{name}_{n:04d}.jpg", "height": size, "width": size})
        _write_jpeg(path.parent / "images" / images[-1]["file_name"], image)
        for mask, label in zip(masks, labels):
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
    categories = [{"id": i + 1, "name": form} for i, form in enumerate(CLASSES)]
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
