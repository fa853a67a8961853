"""COCO-format annotations as training targets, and COCO's metric, with pycocotools alone."""

import contextlib
import functools
import io
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from transfer.config import (COCO_2017, InputError, check_num_classes, is_integer, locate_dataset, read_categories,
                             read_coco)
from transfer.results import AP_KEYS


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
        check_num_classes(name, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
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
    counts, value, bits = [], 0, 0
    for character in text:
        code = ord(character) - ord("0")
        if not 0 <= code < 64:
            raise ValueError(f"has the character {character!r}")
        value |= (code & 31) << bits
        bits += 5
        if bits > 30:  # more than an image has, and than pycocotools reads
            raise ValueError("has a number of more than 30 bits")
        if code < 32:
            value -= (code >> 4) << bits
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    if bits:
        raise ValueError("ends amid a number")
    return counts


class CocoInstances:
    """A COCO-format data set; ``self[index, flip]`` is (image uint8 [3, H, W], target), mirrored if ``flip``.

    target: boxes float32 [N, 4] (x0, y0, x1, y1 in pixels), labels int64 [N] from 1 in the order of the category ids,
    masks uint8 [N, H, W]. ``training`` leaves out images without objects. Raises InputError.
    """

    def __init__(self, name, training):
        self.annotations, self.folder = locate_dataset(name)
        self.categories = [category["id"] for category in read_categories(self.annotations)]
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(self.annotations)
        self.ids = [i for i in sorted(self.coco.imgs) if not training or self.objects(i)]
        if not self.ids:
            raise InputError(f"{self.annotations} has no image" + training * " with a usable annotation")

    def objects(self, image_id):
        """Image id -> [(box, annotation)] of what Detectron2 would train on: no crowds, no broken polygons."""
        info, found = self.coco.imgs[image_id], []
        for annotation in self.coco.imgToAnns[image_id]:
            if isinstance(annotation.get("segmentation"), list):
                annotation["segmentation"] = [p for p in annotation["segmentation"] if len(p) >= 6 and len(p) % 2 == 0]
            x, y, w, h = annotation["bbox"]
            x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, info["width"]), min(y + h, info["height"])
            if annotation.get("segmentation") and not annotation.get("iscrowd") and min(x1 - x0, y1 - y0) > 0.01:
                found.append(([x0, y0, x1, y1], annotation))
        return found

    def image(self, image_id):
        """Image id -> uint8 [3, H, W], RGB, upright."""
        info = self.coco.imgs[image_id]
        path = Path(self.folder, info["file_name"])
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error}") from None
        if image.size != (info["width"], info["height"]):
            raise InputError(f"{path} is {image.size}, but {self.annotations} says {info['width'], info['height']}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __getitem__(self, key):
        index, flip = key
        image, (boxes, annotations) = self.image(self.ids[index]), zip(*self.objects(self.ids[index]))
        boxes = torch.tensor(boxes, dtype=torch.float32)
        masks = torch.from_numpy(np.stack([self.coco.annToMask(annotation) for annotation in annotations]))
        labels = torch.tensor([self.categories.index(annotation["category_id"]) + 1 for annotation in annotations])
        if flip:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": labels, "masks": masks}


def coco_ap(annotations_json, detections):
    """-> {"bbox": {key: AP in percent, or None without such objects, for key in AP_KEYS}, "segm": the same}."""
    ap = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations_json)
        for task in ("bbox", "segm"):
            # Where there is a box, pycocotools would call a mask small, medium or large by the area of its box.
            found = [{key: d[key] for key in d if key != "bbox" or task == "bbox"} for d in detections]
            evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            ap[task] = {key: float(100 * v) if v >= 0 else None for key, v in zip(AP_KEYS, evaluation.stats)}
    return ap
