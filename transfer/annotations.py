"""COCO-format annotation files: where they lie, and whether they are sound, before anything is trained on them."""

import functools
import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from transfer.config import InputError, classes_key, value_of

# Detectron2's built-in names that the recipes use, under $DETECTRON2_DATASETS (default: datasets/).
COCO_2017 = {
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
}


def dataset_name(annotations, images):
    """The name under which any COCO-format data set enters ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Raises InputError where :func:`locate_dataset` could not take it apart again.
    """
    name = f"{annotations}::{images}"
    if name.split("::") != [str(annotations), str(images)]:
        raise InputError(f"{annotations} and {images}: a data set's name is JSON::IMAGES, so neither path may "
                         "contain '::', nor the first end in ':': rename the file or folder")
    return name


def locate_dataset(name):
    """Data set name -> (annotation file, image folder), both checked to exist.

    ``name`` is one of :data:`COCO_2017` or a :func:`dataset_name`. Raises InputError.
    """
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    if name in COCO_2017:
        annotations, images = (Path(root) / part for part in COCO_2017[name])
    elif "::" in name:
        annotations, images = map(Path, name.split("::", 1))
    else:
        raise InputError(f"unknown data set {name!r}: use {', '.join(COCO_2017)}, or --train/--val JSON IMAGES")
    if not annotations.is_file():
        raise InputError(f"no annotation file {annotations}: put COCO 2017 under {root}/coco "
                         "(or set DETECTRON2_DATASETS), or give --train/--val JSON IMAGES")
    if not images.is_dir():
        raise InputError(f"no image folder {images}, which belongs to {annotations}")
    return str(annotations), str(images)


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)  # true is 1 in Python, in COCO's files it is no id


def read_coco(path, *keys):
    """COCO JSON -> the lists under ``keys``, "categories" as of :func:`read_categories`. Raises InputError."""
    try:
        coco = json.loads(Path(path).read_text())
        lists = [coco[key] for key in keys]
        if not all(isinstance(entries, list) for entries in lists):
            raise TypeError(f"{' or '.join(keys)} is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # RecursionError: nested without end
        raise InputError(f"{path} is not a COCO annotation file ({type(error).__name__}: {error})") from None
    return [_categories(path, entries) if key == "categories" else entries for key, entries in zip(keys, lists)]


def _categories(path, entries):
    found = {}
    for entry in entries:
        if not (isinstance(entry, dict) and is_integer(entry.get("id")) and isinstance(entry.get("name"), str)):
            raise InputError(f"{path}: category {repr(entry)[:80]} needs an id that is an integer and a name that is a "
                             "string")
        if entry["id"] in found:
            raise InputError(f"{path}: category id {entry['id']} occurs twice, for {found[entry['id']]!r} and "
                             f"{entry['name']!r}: give every category an id of its own")
        found[entry["id"]] = entry["name"]
    if not found:
        raise InputError(f"{path} has no categories")
    return [{"id": number, "name": found[number]} for number in sorted(found)]


def read_categories(annotations):
    """COCO JSON -> its categories ``[{"id": int, "name": str}]`` sorted by id. Raises InputError."""
    return read_coco(annotations, "categories")[0]


def check_num_classes(name, cfg):
    """Raises InputError unless the model of ``cfg`` has as many classes as data set ``name`` has categories."""
    key = classes_key(cfg)
    num_classes = value_of(cfg, key)
    annotations, _ = locate_dataset(name)
    found = 80 if name in COCO_2017 else len(read_categories(annotations))  # COCO's file takes long to parse
    if found != num_classes:
        raise InputError(f"{annotations} has {found} categories, but {key} is {num_classes}: add {key} {found}")


def check_datasets(cfg, eval_only=False):
    """Raises InputError unless the data sets of ``cfg`` exist, are sound, and fit the model and each other.

    COCO's own files are taken as sound. Returns what :func:`check_annotations` says of the other training sets.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"DATASETS.TEST is {cfg.DATASETS.TEST}: results are of one data set")
    if not cfg.DATASETS.TRAIN and not eval_only:
        raise InputError("DATASETS.TRAIN is empty: give --train JSON IMAGES")
    found, training = [], () if eval_only else cfg.DATASETS.TRAIN
    names = dict.fromkeys((*training, *cfg.DATASETS.TEST))
    for name in names:
        check_num_classes(name, cfg)
    _check_categories(names)
    for name in [name for name in names if name not in COCO_2017]:
        annotations, images = locate_dataset(name)
        summary = check_annotations(annotations, images, evaluated=name in cfg.DATASETS.TEST)
        if name in training:
            if not summary.annotated:
                raise InputError(f"{annotations} has no image with a usable annotation")
            found.append(summary)
    return found


def _check_categories(names):
    """Raises InputError, with the first category that differs, unless the data sets ``names`` have the same ones."""
    files = {name: locate_dataset(name)[0] for name in names}
    compared = [file for name, file in files.items() if name not in COCO_2017]
    for name in COCO_2017.keys() & files.keys() if compared else ():
        # COCO's two files have the same categories: those of val are read in a second, those of train in many.
        val = Path(files[name]).with_name(Path(COCO_2017["coco_2017_val"][0]).name)
        compared += [str(val)] * val.is_file()
    for file, other in itertools.pairwise(compared):
        for a, b in itertools.zip_longest(read_categories(file), read_categories(other)):
            if a != b:
                a, b = (f"{c['id']} {c['name']!r}" if c else "none" for c in (a, b))
                raise InputError(f"{file} has category {a} where {other} has {b}: give both the same ids and names")


@dataclass(frozen=True)
class Annotations:
    """images, annotated: how many there are, and how many with an object that is no crowd; rle: whether any object's
    mask is run-length encoded."""

    images: int
    annotated: int
    rle: bool


def check_annotations(path, folder=None, evaluated=False):
    """COCO JSON -> :class:`Annotations`. Raises InputError that names the file and its first bad annotation.

    folder: of the images, whose files are then checked to exist and to be of the size that the JSON gives; evaluated:
    ask for what COCO's metric needs as well.
    """
    images, annotations, categories = read_coco(path, "images", "annotations", "categories")
    categories = {category["id"] for category in categories}
    known, bad = {}, []
    for image in images:
        problem = _image_problem(image, known)
        if problem:
            bad.append(problem)
        else:
            known[image["id"]] = image
    if evaluated and not images:
        bad.append("has no image to evaluate")
    ids, annotated, rle = set(), set(), False
    for annotation in annotations:
        problem = _annotation_problem(annotation, known, categories, evaluated)
        if problem is None and annotation["id"] in ids:
            problem = "has the id of another"
        if problem:
            bad.append(f"annotation {_name(annotation)} {problem}")
            continue
        ids.add(annotation["id"])
        if not annotation.get("iscrowd"):
            annotated.add(annotation["image_id"])
            rle |= isinstance(annotation["segmentation"], dict)
    _refuse(path, bad)
    if folder is not None:
        _refuse(path, _file_problems(images, folder))
    return Annotations(len(images), len(annotated), rle)


def _refuse(path, bad):
    if bad:
        raise InputError(f"{path}: {bad[0]}" + (f" (and {len(bad) - 1} more such errors)" if bad[1:] else ""))


def _name(entry):
    return entry.get("id", "without an id") if isinstance(entry, dict) else repr(entry)[:40]


def _lacking(entry, keys):
    return ", ".join(key for key in keys if not isinstance(entry, dict) or key not in entry)


def _finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values):
    return isinstance(values, list) and all(map(_finite, values))


def _image_problem(image, known):
    """What is wrong with an image's entry, in words, or None. known: {image id: entry} of those before it."""
    lacking, name = _lacking(image, ("id", "file_name", "width", "height")), _name(image)
    if lacking:
        return f"image {name} lacks {lacking}"
    if not is_integer(image["id"]):
        return f"image id {name!r} is no integer"
    if not (isinstance(image["file_name"], str) and is_integer(image["width"]) and is_integer(image["height"])):
        return f"image {name} has a file_name that is no string, or a size that is no integer"
    if min(image["width"], image["height"]) < 1:
        return (f"image {name} is {image['width']} x {image['height']} pixels (width x height): give the size of "
                f"{image['file_name']}")
    if image["id"] in known:
        return (f"image id {name} occurs twice, for {known[name]['file_name']} and {image['file_name']}: give every "
                "image an id of its own")
    return None


def _file_problems(images, folder):
    """What is wrong with the images' files, in words, of each that is not sound."""
    with ThreadPoolExecutor(16) as pool:  # on network storage opening a file is waiting
        problems = pool.map(functools.partial(_file_problem, folder), images)
        quiet = None if len(images) > 5000 else True  # None: only where stderr is no terminal
        return [problem for problem in tqdm(problems, desc="sizes of images", total=len(images), unit="image",
                                            dynamic_ncols=True, disable=quiet) if problem]


def _file_problem(folder, image):
    path, given = Path(folder, image["file_name"]), (image["width"], image["height"])
    try:
        with Image.open(path) as file:
            size = _upright_size(file)
            if size != given:  # a PNG may have its orientation behind its pixels, and PIL itself may turn a TIFF
                size = ImageOps.exif_transpose(file).size
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"image {image['id']}: no file {path}"
    except Exception as error:  # PIL raises errors of almost any type for a damaged file
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        return f"image {image['id']}: {path} cannot be read as an image ({reason}): restore or replace it"
    if size != given:
        return (f"image {image['id']}: {path} is {size[0]} x {size[1]} pixels (width x height, upright), but its width "
                f"and height say {given[0]} x {given[1]}: give those of the file")
    return None


def _upright_size(file):
    """(width, height) of an opened PIL image as its EXIF orientation turns it, from the header alone."""
    try:
        turned = Image.Image.getexif(file).get(0x0112) in (5, 6, 7, 8)  # the method of PNGs would decode the pixels
    except Exception:  # damaged EXIF data, which Detectron2 ignores as well
        turned = False
    return file.size[::-1] if turned else file.size


def _annotation_problem(annotation, images, categories, evaluated):
    """What is wrong with an annotation, in words, or None. images: {id: entry}; categories: their ids."""
    lacking = _lacking(annotation, ("id", "image_id", "category_id", "bbox", "segmentation",
                                    *(("area", "iscrowd") if evaluated else ())))
    if lacking:
        return f"lacks {lacking}"
    for key in ("id", "image_id", "category_id"):
        if not is_integer(annotation[key]):
            return f"has {key} {annotation[key]!r}, which is no integer"
    if annotation["image_id"] not in images:
        return f"has the unknown image_id {annotation['image_id']}"
    if annotation["category_id"] not in categories:
        return f"has the unknown category_id {annotation['category_id']}"
    if annotation.get("iscrowd", 0) not in (0, 1):  # "0" or null would make a crowd or an error, late
        return f"has iscrowd {annotation['iscrowd']!r}: it must be 0 or 1"
    if annotation.get("ignore", 0) != 0:
        return "has ignore, which Detectron2 refuses: give it iscrowd 1 instead, or leave it out"
    if evaluated and annotation["id"] < 1:  # pycocotools marks a detection by the id of its object, and 0 is "none"
        return "has an id below 1, with which COCO's metric is wrong: number the annotations from 1"
    if evaluated and not (_finite(annotation["area"]) and annotation["area"] >= 0):
        return f"has the area {annotation['area']!r}: it must be a number of pixels, at least 0"
    if not _numbers(annotation["bbox"]) or len(annotation["bbox"]) != 4 or min(annotation["bbox"][2:]) < 0:
        return f"has the bbox {annotation['bbox']}, which is not [x, y, width, height] of no negative size"
    image = images[annotation["image_id"]]
    return _mask_problem(annotation["segmentation"], image["height"], image["width"])


def _mask_problem(segmentation, height, width):
    """What is wrong with an annotation's segmentation, in words, or None."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "has an empty segmentation"
        if any(not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
            return "has a polygon that is not a list of x, y pairs of at least three points"
        return None
    if not isinstance(segmentation, dict) or _lacking(segmentation, ("size", "counts")):
        return "has a segmentation that is neither polygons nor RLE with size and counts"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width] or not all(map(is_integer, size)):
        return f"has an RLE of size {size}, but its image is {[height, width]} (height, width)"
    if isinstance(counts, str):
        try:
            counts = run_lengths(counts)
        except ValueError as error:
            return f"has an RLE string that {error}: encode its mask again"
    if not isinstance(counts, list):
        return "has RLE counts that are neither a list nor a string"
    if not all(is_integer(count) and count >= 0 for count in counts):
        return "has RLE counts that are not integers of at least 0: encode its mask again"
    if sum(counts) != height * width:
        return f"has RLE counts that do not add up to its image's {height} x {width} pixels: encode its mask again"
    return None


def run_lengths(text):
    """COCO's run-length string -> its counts. Raises ValueError, where pycocotools would read what lies behind it.

    A number is characters of five bits each, counted from "0", the lowest first; 32 is set in all but the last, whose
    16 is the sign. From the fourth on, a number is the difference to the count two before.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64) - ord("0")
    strange = (codes < 0) | (codes >= 64)
    if strange.any():
        raise ValueError(f"has the character {text[strange.argmax()]!r}")
    if not len(codes):
        return []
    if codes[-1] >= 32:
        raise ValueError("ends amid a number")
    ends = np.flatnonzero(codes < 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 6:  # more than an image has, and than pycocotools reads
        raise ValueError("has a number of more than 30 bits")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes & 31) << 5 * place, starts) - ((codes[ends] >> 4) << 5 * lengths)
    for first in (1, 2):
        counts[first::2] = counts[first::2].cumsum()
    return counts.tolist()
