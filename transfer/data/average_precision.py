"""COCO's metric, over all classes and of each, and the keys under which it is reported."""

from __future__ import annotations

import contextlib
import io
import math
from typing import TYPE_CHECKING

import numpy as np

from rsa_detectron2.transfer.data.dataset import Dataset

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

AP_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = [f"{task}/{key}" for task in ("bbox", "segm") for key in AP_KEYS]


def coco_ap(
    dataset: Dataset, detections: list[dict], tasks: tuple[str, ...] = ("bbox", "segm")
) -> dict[str, dict[str, float | None]]:
    """COCO's AP of ``detections``: {"bbox": {key: AP in percent for key in AP_KEYS}, "segm": the same}.

    An AP is None where the data set has no object of that size; {} where it has no annotations at all.
    """
    if not dataset.annotations:
        return {}
    ap = {}
    for task in tasks:
        evaluation = coco_evaluation(dataset, detections, task)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        ap[task] = {key: float(100 * v) if v >= 0 else None for key, v in zip(AP_KEYS, evaluation.stats)}
    return ap


def coco_evaluation(dataset: Dataset, detections: list[dict], task: str) -> COCOeval:
    """pycocotools' evaluation of ``detections``, evaluated and accumulated. task: "bbox" or "segm"."""
    from pycocotools.coco import COCO  # here, because reports need only the keys
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        # pycocotools writes into the entries that it is given.
        truth.dataset = {**dataset.coco(), "annotations": [dict(entry) for entry in dataset.annotations]}
        truth.createIndex()
        # If a detection has a box, pycocotools judges the size of its mask by the area of the box.
        found = [{key: d[key] for key in d if key != "bbox" or task == "bbox"} for d in detections]
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), task)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def class_ap(evaluation: COCOeval) -> list[dict[str, float | None]]:
    """The AP of each class alone, {key: AP in percent for key in AP_KEYS}, sorted by category id.

    An AP is None where the class has no object of that size.
    """
    # [IoU threshold, recall, class, range of area, most detections]; the last place of the last axis is 100.
    precision = evaluation.eval["precision"][..., -1]
    thresholds = {"AP": slice(None), "AP50": 0, "AP75": 5}  # the others take all, in their range of area
    areas = {"APs": 1, "APm": 2, "APl": 3}
    found = []
    for n in range(precision.shape[2]):
        values = {
            key: precision[thresholds.get(key, slice(None)), :, n, areas.get(key, 0)] for key in AP_KEYS
        }
        found.append({key: float(100 * v.mean()) if v.min() >= 0 else None for key, v in values.items()})
    return found


def precision_at(evaluation: COCOeval, iou: float) -> np.ndarray:
    """Precision-recall curves at an IoU threshold: float64 [K, 101], the precision of each class at
    COCO's recalls 0, 0.01, ... 1, of objects of all sizes; NaN where the class has no objects.

    As in COCO's metric, it is the best precision at that recall or a higher one.
    """
    (place,) = np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))
    precision = evaluation.eval["precision"][place, :, :, 0, -1].T
    return np.where(precision < 0, np.nan, precision)


def finite(value: float | None) -> float | None:
    """A number as float; None where it is missing, NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None
