"""COCO-format annotations as training targets, and COCO's metric, with pycocotools alone."""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transfer.annotations import locate_dataset, read_categories
from transfer.config import InputError
from transfer.results import AP_KEYS


class CocoInstances:
    """A COCO-format data set; ``self[index, flip]`` is (image uint8 [3, H, W], target), mirrored if ``flip``.

    target: boxes float32 [N, 4] (x0, y0, x1, y1 in pixels), labels int64 [N] from 1 in the order of the category ids,
    and with ``masks`` uint8 [N, H, W]. N may be 0. ``training`` leaves out images without objects where ``filter_empty``.
    Raises InputError.
    """

    def __init__(self, name, training, masks=True, filter_empty=True):
        self.masks = masks
        self.annotations, self.folder = locate_dataset(name)
        self.categories = [category["id"] for category in read_categories(self.annotations)]
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(self.annotations)
        self.ids = [i for i in sorted(self.coco.imgs) if not (training and filter_empty) or self.objects(i)]
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
            usable = annotation.get("segmentation") or not self.masks
            if usable and not annotation.get("iscrowd") and min(x1 - x0, y1 - y0) > 0.01:
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
        image, objects = self.image(self.ids[index]), self.objects(self.ids[index])
        boxes = torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4)
        labels = [self.categories.index(annotation["category_id"]) + 1 for _, annotation in objects]
        target = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}
        if self.masks:
            target["masks"] = torch.zeros(len(objects), *image.shape[1:], dtype=torch.uint8)
            for mask, (_, annotation) in zip(target["masks"], objects):
                mask.copy_(torch.from_numpy(self.coco.annToMask(annotation)))
        if flip:
            image = image.flip(-1)
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
            target |= {"masks": target["masks"].flip(-1)} if self.masks else {}
        return image, target


def coco_ap(annotations_json, detections, tasks=("bbox", "segm")):
    """-> {"bbox": {key: AP in percent, or None without such objects, for key in AP_KEYS}, "segm": the same}."""
    ap = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations_json)
        for task in tasks:
            # Where there is a box, pycocotools would call a mask small, medium or large by the area of its box.
            found = [{key: d[key] for key in d if key != "bbox" or task == "bbox"} for d in detections]
            evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            ap[task] = {key: float(100 * v) if v >= 0 else None for key, v in zip(AP_KEYS, evaluation.stats)}
    return ap
