"""What is written of a run's detections: AP by class, curves and errors, as JSON, CSV and pictures."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.data.average_precision import AP_KEYS, coco_ap
from rsa_detectron2.transfer.data.detection_errors import KINDS
from rsa_detectron2.transfer.report.quality import class_names, judge
from rsa_detectron2.transfer.report.quality_pictures import plot_errors, plot_precision_recall, read_curves
from rsa_detectron2.transfer.report.runs import Outcome, Setup, load_results, write_results
from rsa_detectron2.transfer.report.tables import class_table
from tests.conftest import write_json
from tests.transfer.data.test_detection_errors import random_set


def evaluated(folder, masks=True):
    """A run's configuration and data set, after an evaluation that left its files in ``folder``."""
    dataset, detections = random_set()
    dataset.save(folder / "inference" / "annotations.json")
    write_json(detections, folder / "inference", "coco_instances_results.json")
    (folder / "images").mkdir()
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR, cfg.MODEL.MASK_ON = str(folder), masks
    name = dataset_name(folder / "inference" / "annotations.json", folder / "images")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    return cfg, coco_ap(dataset, detections)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_says_what_it_is_good_at(tmp_path):
    cfg, ap = evaluated(tmp_path)
    results = write_results(cfg, Setup("torchvision"), Outcome(ap, 700, 12.5, quality=judge(cfg)))
    assert load_results(tmp_path) == json.loads(json.dumps(results))
    assert [c["name"] for c in results["categories"]] == list(results["per_class"]) == list("abcde")
    assert [c["id"] for c in results["categories"]] == [2, 5, 9, 11, 12]
    for task in ("bbox", "segm"):
        for key in AP_KEYS:
            values = [found[task][key] for found in results["per_class"].values()]
            known = [value for value in values if value is not None]
            assert np.mean(known) == pytest.approx(ap[task][key]) if known else ap[task][key] is None
        curves = read_curves(tmp_path)
        for iou, key in ((0.5, "AP50"), (0.75, "AP75")):
            assert 100 * np.mean(curves[task, iou]) == pytest.approx(ap[task][key], abs=0.01)
    assert results["per_class"]["e"]["objects"] == 0
    assert results["per_class"]["e"]["bbox"] == dict.fromkeys(AP_KEYS)
    rows = read_csv(tmp_path / "inference" / "errors.csv")
    assert [(row["task"], row["class"]) for row in rows] == [
        (task, name) for task in ("bbox", "segm") for name in ("all classes", *"abcde")
    ]
    for start, task in ((0, "bbox"), (6, "segm")):
        total, *classes = rows[start : start + 6]
        assert float(total["AP50"]) == pytest.approx(ap[task]["AP50"], abs=1e-4)
        assert int(total["objects"]) == sum(found["objects"] for found in results["per_class"].values())
        assert classes[-1]["AP50"] == classes[-1]["dAP50 both"] == ""
        for kind in KINDS:
            error = results["errors"][task][kind]
            assert error["count"] == int(total[kind]) == sum(int(row[kind]) for row in classes)
            assert error["dAP50"] == pytest.approx(float(total[f"dAP50 {kind}"]), abs=1e-4)
    curves = read_csv(tmp_path / "inference" / "precision_recall.csv")
    assert len(curves) == 2 * 2 * 6 and list(curves[0])[:4] == ["task", "IoU", "class", "0.00"]
    assert len(curves[0]) == 3 + 101 and list(curves[0])[-1] == "1.00"


def test_boxes_alone(tmp_path):
    cfg, _ = evaluated(tmp_path, masks=False)
    found = judge(cfg)
    assert list(found["errors"]) == ["bbox"] and found["per_class"]["a"]["segm"] == dict.fromkeys(AP_KEYS)


def test_cocos_own_set_is_read_where_it_lies(tmp_path, monkeypatch):
    """Detectron2 evaluates on COCO's file itself, and no copy of it lies beside the detections."""
    cfg, _ = evaluated(tmp_path)
    found = judge(cfg)
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    own = tmp_path / "inference" / "annotations.json"
    own.rename(root / "annotations" / "instances_val2017.json")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_2017_val",)
    assert judge(cfg) == found


def test_without_annotations_nothing_is_measured(tmp_path):
    cfg, _ = evaluated(tmp_path)
    path = tmp_path / "inference" / "annotations.json"
    write_json(json.loads(path.read_text()) | {"annotations": []}, path.parent, path.name)
    found = judge(cfg)
    assert list(found["per_class"]) == list("abcde") and found["errors"] == {}
    assert found["per_class"]["a"] == {"objects": 0} | {t: dict.fromkeys(AP_KEYS) for t in ("bbox", "segm")}
    assert plot_errors({"run": found}, tmp_path / "e.png") is None
    assert plot_precision_recall({"run": tmp_path}, tmp_path / "p.png") is None
    assert not list(tmp_path.glob("*.png"))


def test_a_name_that_occurs_twice_has_its_id():
    categories = [{"id": 1, "name": "dog"}, {"id": 4, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert class_names(categories) == ["dog (id 1)", "cat", "dog (id 7)"]


def test_classes_are_sorted_by_ap():
    def entry(objects, ap):
        values = dict.fromkeys(AP_KEYS) | {"AP": ap, "AP50": ap}
        return {"objects": objects, "bbox": values, "segm": dict.fromkeys(AP_KEYS)}

    per_class = {
        "absent": entry(0, None),
        "low": entry(3, 0.0),
        "high": entry(20, 61.25),
        "mid": entry(9, 7.0),
    }
    assert class_table({"per_class": per_class}) == [
        ["class", "objects", "box AP", "box AP50"],
        ["high", "20", "61.2", "61.2"],
        ["mid", "9", "7.0", "7.0"],
        ["low", "3", "0.0", "0.0"],
        ["absent", "0", "–", "–"],
    ]
    assert class_table({}) is None  # the results of an older version


def test_pictures_show_runs_with_and_without_figures(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    cfg, _ = evaluated(tmp_path / "new")
    found, drawn = judge(cfg), []
    monkeypatch.setattr("matplotlib.axes.Axes.barh", lambda ax, y, width, *_, **__: drawn.append(width))
    runs = {"old": {}, "_new": found}
    assert plot_errors(runs, tmp_path / "e.png") == tmp_path / "e.png"
    assert drawn == [found["errors"][task][kind]["dAP50"] for task in ("bbox", "segm") for kind in KINDS]
    folders = {"old": tmp_path, "_new": tmp_path / "new"}
    assert plot_precision_recall(folders, tmp_path / "p.png") == tmp_path / "p.png"
    assert np.asarray(Image.open(tmp_path / "p.png")).std() > 5
    assert plot_errors({"old": {}}, tmp_path / "x.png") is None
