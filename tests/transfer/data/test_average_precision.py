"""The AP of each class and the curves, against pycocotools' own evaluation of that class alone."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rsa_detectron2.transfer.data.average_precision import (
    AP_KEYS,
    class_ap,
    coco_ap,
    coco_evaluation,
    precision_at,
)
from tests.transfer.data.test_detection_errors import random_set


@pytest.fixture(scope="module", params=("bbox", "segm"))
def evaluated(request):
    dataset, detections = random_set(num_images=40)
    return dataset, detections, request.param, coco_evaluation(dataset, detections, request.param)


def alone(dataset, detections, task, category):
    """pycocotools' evaluation with ``catIds`` restricted to one category."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**dataset.coco(), "annotations": [dict(a) for a in dataset.annotations]}
        truth.createIndex()
        found = [{k: v for k, v in d.items() if task == "bbox" or k != "bbox"} for d in detections]
        evaluation = COCOeval(truth, truth.loadRes(found), task)
        evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_a_class_has_the_ap_that_pycocotools_gives_it_alone(evaluated):
    dataset, detections, task, evaluation = evaluated
    found = class_ap(evaluation)
    for category, ap in zip(dataset.categories, found):
        expected = [None if v < 0 else 100 * v for v in alone(*evaluated[:3], category["id"]).stats[:6]]
        assert [ap[key] for key in AP_KEYS] == pytest.approx(expected, abs=1e-9)
    assert found[-1] == dict.fromkeys(AP_KEYS)  # the last class has no objects, only detections
    assert all(value is not None for ap in found[:-1] for value in ap.values())
    means = {key: np.mean([ap[key] for ap in found[:-1]]) for key in AP_KEYS}
    assert means == pytest.approx(coco_ap(dataset, detections, (task,))[task], abs=1e-9)


@pytest.mark.parametrize("iou, key", ((0.5, "AP50"), (0.75, "AP75")))
def test_curves_are_those_of_the_ap(evaluated, iou, key):
    curves = precision_at(evaluated[-1], iou)
    assert curves.shape == (5, 101) and np.isnan(curves[-1]).all()
    assert 100 * curves[:-1].mean(1) == pytest.approx([ap[key] for ap in class_ap(evaluated[-1])[:-1]])
    assert (np.diff(curves[:-1]) <= 0).all()
