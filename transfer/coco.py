"""COCO-format annotations as training targets, and COCO's metric, with pycocotools alone."""

import contextlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transfer.config import COCO_2017, InputError, check_num_classes, locate_dataset, read_categories
from transfer.results import AP_KEYS


def check_datasets(cfg, eval_only=False):
    """Raises InputError unless the data sets of ``cfg`` exist, are sound, and fit the model and each other.

    COCO's own files are taken as sound. Returns what :func:`check_annotations` says of the other training sets.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"DATASETS.TEST is {cfg.DATASETS.TEST}: results are of one data set")
    if not cfg.DATASETS.TRAIN and not eval_only:
        raise InputError("DATASETS.TRAIN is empty: give --train JSON IMAGES")
    found, categories, training = [], {}, () if eval_only else cfg.DATASETS.TRAIN
    for name in (*training, *cfg.DATASETS.TEST):
        annotations, images = locate_dataset(name)
        check_num_classes(name, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        if name not in COCO_2017:
            summary = check_annotations(annotations, images, evaluated=name in cfg.DATASETS.TEST)
            categories[annotations] = [category["id"] for category in read_categories(annotations)]
            if name in training:
                if not summary.annotated:
                    raise InputError(f"{annotations} has no image with a usable annotation")
                found.append(summary)
    for annotations, ids in categories.items():
        if ids != list(categories.values())[-1]:
            raise InputError(f"{annotations} and {list(categories)[-1]} have different category ids")
    return found


@dataclass(frozen=True)
class Annotations:
    """images, annotated: how many there are, and how many with an object that is no crowd; rle: whether any object's
    mask is run-length encoded."""

    images: int
    annotated: int
    rle: bool


def check_annotations(path, folder=None, evaluated=False):
    """COCO JSON -> :class:`Annotations`. Raises InputError that names the file and its first bad annotation.

    folder: of the images, which are then checked to exist; evaluated: ask for what COCO's metric needs as well.
    """
    try:
        coco = json.loads(Path(path).read_text())
        images, annotations = coco["images"], coco["annotations"]
        categories = {category["id"] for category in coco["categories"]}
        if not isinstance(images, list) or not isinstance(annotations, list):
            raise TypeError("images or annotations is no list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a COCO annotation file ({type(error).__name__}: {error})") from None
    sizes, bad = {}, []
    for image in images:
        lacking = _lacking(image, ("id", "file_name", "width", "height"))
        if lacking:
            bad.append(f"image {_name(image)} lacks {lacking}")
        elif not isinstance(image["id"], int):
            bad.append(f"image id {image['id']!r} is no integer")
        elif not (isinstance(image["file_name"], str) and isinstance(image["width"], int)
                  and isinstance(image["height"], int)):
            bad.append(f"image {image['id']} has a file_name that is no string, or a size that is no integer")
        elif image["id"] in sizes:
            bad.append(f"image id {image['id']} occurs twice")
        else:
            sizes[image["id"]] = (image["height"], image["width"])
            if folder is not None and not Path(folder, image["file_name"]).is_file():
                bad.append(f"image {image['id']}: no file {Path(folder, image['file_name'])}")
    ids, annotated, rle = set(), set(), False
    keys = ("id", "image_id", "category_id", "bbox", "segmentation", *(("area", "iscrowd") if evaluated else ()))
    for annotation in annotations:
        problem = _lacking(annotation, keys)
        problem = f"lacks {problem}" if problem else _annotation_problem(annotation, sizes, categories)
        if problem is None and annotation["id"] in ids:
            problem = "has the id of another"
        if problem:
            bad.append(f"annotation {_name(annotation)} {problem}")
            continue
        ids.add(annotation["id"])
        if not annotation.get("iscrowd"):
            annotated.add(annotation["image_id"])
            rle |= isinstance(annotation["segmentation"], dict)
    if bad:
        raise InputError(f"{path}: {bad[0]}" + (f" (and {len(bad) - 1} more such errors)" if bad[1:] else ""))
    return Annotations(len(images), len(annotated), rle)


def _name(entry):
    return entry.get("id", "without an id") if isinstance(entry, dict) else repr(entry)[:40]


def _lacking(entry, keys):
    return ", ".join(key for key in keys if not isinstance(entry, dict) or key not in entry)


def _annotation_problem(annotation, sizes, categories):
    """What is wrong with an annotation that has all keys, in words, or None. sizes: {image id: (height, width)}."""
    def numbers(values):
        return isinstance(values, list) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)

    for key in ("id", "image_id", "category_id"):
        if not isinstance(annotation[key], int):
            return f"has {key} {annotation[key]!r}, which is no integer"
    if annotation["image_id"] not in sizes:
        return f"has the unknown image_id {annotation['image_id']}"
    if annotation["category_id"] not in categories:
        return f"has the unknown category_id {annotation['category_id']}"
    box, segmentation, size = annotation["bbox"], annotation["segmentation"], sizes[annotation["image_id"]]
    if not numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return f"has the bbox {box}, which is not [x, y, width, height] of no negative size"
    if isinstance(segmentation, list):
        if not segmentation:
            return "has an empty segmentation"
        for polygon in segmentation:
            if not numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                return "has a polygon that is not a list of x, y pairs of at least three points"
        return None
    if not isinstance(segmentation, dict) or _lacking(segmentation, ("size", "counts")):
        return "has a segmentation that is neither polygons nor RLE with size and counts"
    if segmentation["size"] != list(size):
        return f"has an RLE of size {segmentation['size']}, but its image is {list(size)} (height, width)"
    counts = segmentation["counts"]
    if isinstance(counts, list) and (not numbers(counts) or sum(counts) != size[0] * size[1]):
        return f"has RLE counts that do not add up to its image's {size[0]} x {size[1]} pixels"
    if not isinstance(counts, (list, str)):
        return "has RLE counts that are neither a list nor a string"
    return None


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
