"""What a model is good at, from the detections that either engine leaves in OUTPUT_DIR/inference.

:func:`judge` runs once, after the last evaluation. AP by class and the errors by kind go into results.json.
``inference/precision_recall.csv`` has the curves, and ``inference/errors.csv`` the errors of each class.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from tqdm import tqdm

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import write_rows
from rsa_detectron2.transfer.data.annotations import locate_dataset
from rsa_detectron2.transfer.data.average_precision import AP_KEYS, class_ap, coco_evaluation, precision_at
from rsa_detectron2.transfer.data.coco_json import read_coco
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.data.detection_errors import KINDS, RECALLS, Errors, find_errors

TASKS = {"bbox": "box", "segm": "mask"}
IOUS = (0.5, 0.75)  # of the precision-recall curves
ALL = "all classes"  # in a file's column of classes: their sum or mean
CURVES, ERRORS = "precision_recall.csv", "errors.csv"


def judge(cfg: CfgNode) -> dict:
    """Judge the detections in ``cfg.OUTPUT_DIR``/inference, and write the two CSV files there.

    Returns entries of results.json: ``categories``, COCO's [{"id", "name"}]; ``per_class``,
    {class: {"objects": number, "bbox": {key: AP in percent for key in AP_KEYS}, "segm": the same}};
    ``errors``, {task: {kind: {"count": number, "dAP50": AP50 gained if it is mended}}}. An AP is None where
    the class has no object of that size.
    """
    folder = Path(cfg.OUTPUT_DIR)
    dataset, detections = (
        evaluated_set(folder, *locate_dataset(cfg.DATASETS.TEST[0])),
        read_detections(folder),
    )
    names = class_names(dataset.categories)
    objects = Counter(a["category_id"] for a in dataset.annotations if not a["iscrowd"])
    per_class = {
        name: {"objects": objects[category["id"]], **{task: dict.fromkeys(AP_KEYS) for task in TASKS}}
        for name, category in zip(names, dataset.categories)
    }
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    curves, rows, errors = [], [], {}
    for task in tqdm(tasks if objects else (), "AP by class", dynamic_ncols=True, disable=None):
        evaluation = coco_evaluation(dataset, detections, task)
        for name, ap in zip(names, class_ap(evaluation)):
            per_class[name][task] = ap
        curves += curve_rows(task, names, {iou: precision_at(evaluation, iou) for iou in IOUS})
        found = find_errors(evaluation)
        rows += error_rows(task, names, found)
        errors[task] = totals(found)
    write_rows(
        folder / "inference" / CURVES, ["task", "IoU", "class", *(f"{r:.2f}" for r in RECALLS)], curves
    )
    header = ["task", "class", "objects", "AP50", *KINDS, *(f"dAP50 {kind}" for kind in KINDS)]
    write_rows(folder / "inference" / ERRORS, header, rows)
    return {"categories": dataset.categories, "per_class": per_class, "errors": errors}


def evaluated_set(folder: str | Path, annotations: str | Path, image_folder: str | Path) -> Dataset:
    """The data set that a run's detections belong to: the run's own copy, if it has one, knows their ids."""
    own = Path(folder, "inference", "annotations.json")
    return read_coco(str(own if own.is_file() else annotations), str(image_folder))


def read_detections(folder: str | Path) -> list[dict]:
    """Run folder -> COCO detections. Raises InputError."""
    file = Path(folder, "inference", "coco_instances_results.json")
    if not file.is_file():
        raise InputError(f"no detections in {file}: tools/train_net.py writes them when it evaluates")
    return json.loads(file.read_text())


def class_names(categories: list[dict]) -> list[str]:
    """The name of each category; one that occurs twice has its id added."""
    times = Counter(category["name"] for category in categories)
    return [c["name"] if times[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories]


def curve_rows(task: str, names: list[str], curves: dict[float, np.ndarray]) -> list[list]:
    """Lines of precision_recall.csv. curves: {IoU: precision of each class, float64 [K, 101]}."""
    rows = []
    for iou, precision in curves.items():
        measured = precision[~np.isnan(precision[:, 0])]
        for name, values in zip([ALL, *names], [measured.mean(0), *precision]):
            rows.append([task, iou, name, *map(rounded, values)])
    return rows


def error_rows(task: str, names: list[str], errors: Errors) -> list[list]:
    """Lines of errors.csv."""
    objects, ap50, counts, gains = errors.objects, errors.ap50, errors.counts, errors.gains
    lines = [(objects.sum(), np.nanmean(ap50), counts.sum(0), np.nanmean(gains, 0))]
    lines += zip(objects, ap50, counts, gains)
    return [
        [task, name, number, rounded(ap), *of_kinds, *map(rounded, gained)]
        for name, (number, ap, of_kinds, gained) in zip([ALL, *names], lines)
    ]


def rounded(value: float) -> float | None:
    """Four decimals; None for NaN."""
    return None if np.isnan(value) else round(float(value), 4)


def totals(errors: Errors) -> dict[str, dict]:
    """{kind: {"count": number, "dAP50": AP50 over all classes gained if it is mended}}."""
    figures = zip(KINDS, errors.counts.sum(0).tolist(), np.nanmean(errors.gains, 0).tolist())
    return {kind: {"count": count, "dAP50": gain} for kind, count, gain in figures}
