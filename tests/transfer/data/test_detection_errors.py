"""Errors by kind: planted ones are found, each once, and what each costs is what pycocotools measures when
they are mended by hand."""

import numpy as np
import pytest
from pycocotools import mask as rle

from rsa_detectron2.transfer.data.average_precision import coco_ap, coco_evaluation
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.data.detection_errors import KINDS, find_errors

SIZE = 200
CATEGORIES = [{"id": number, "name": name} for number, name in ((2, "a"), (5, "b"), (9, "c"), (11, "d"))]
TASKS = ("bbox", "segm")


def instance(image, category, box, **more):
    """A COCO entry of a rectangle: its box, and the same as a mask."""
    x, y, w, h = box
    code = rle.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], SIZE, SIZE)[0]
    mask = {"size": [SIZE, SIZE], "counts": code["counts"].decode()}
    return {"image_id": image, "category_id": category, "bbox": list(box), "segmentation": mask, **more}


def make_set(truth):
    """The data set of entries that :func:`instance` makes."""
    numbers = sorted({entry["image_id"] for entry in truth})
    images = [
        {"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(numbers[-1] + 2)
    ]
    annotations = [
        {"id": n, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry}
        for n, entry in enumerate(truth, start=1)
    ]
    return Dataset("", "", images, annotations, CATEGORIES)


def random_set(num_images=12, seed=0):
    """A data set and detections near and off its objects. The fifth class has no objects, only detections."""
    rng = np.random.default_rng(seed)
    categories = [*CATEGORIES, {"id": 12, "name": "e"}]
    truth, detections = [], []
    for image in range(num_images):
        here = []
        for _ in range(rng.integers(4)):
            box = (
                *rng.integers(0, 80, 2).tolist(),
                *rng.integers(*rng.choice([(8, 30), (33, 90), (97, 119)]), 2).tolist(),
            )
            here.append(instance(image, int(rng.choice([2, 5, 9, 11])), box, iscrowd=int(rng.random() < 0.1)))
        truth += here
        for _ in range(8):
            box, category = (
                np.append(
                    rng.integers(0, 80, 2), rng.integers(*rng.choice([(8, 30), (33, 90), (97, 119)]), 2)
                ),
                rng.choice([2, 5, 9, 11, 12]),
            )
            if here and rng.random() < 0.7:
                near = here[rng.integers(len(here))]
                box = np.maximum(np.array(near["bbox"]) + rng.integers(-8, 9, 4), 0) + [0, 0, 1, 1]
                category = near["category_id"] if rng.random() < 0.7 else category
            detections.append(instance(image, int(category), box.tolist(), score=float(rng.random())))
    dataset = make_set(truth)
    return Dataset("", "", dataset.images, dataset.annotations, categories), detections


class Planted:
    """A drawn set with planted errors, and the same detections with one kind of them mended."""

    def __init__(self):
        self.truth, self.detections, self.mended, self.images = [], [], {kind: {} for kind in KINDS}, 0
        self.counts, self.rng = dict.fromkeys(KINDS, 0), np.random.default_rng(0)

    def image(self, box=(10, 10, 40, 40)):
        """A new image with an object of one class after the other; returns its number and class."""
        self.images += 1
        category = CATEGORIES[self.images % 4]["id"]
        self.truth.append(instance(self.images, category, box))
        return self.images, category

    def detect(self, image, category, box, kind=None, mended=None):
        """A detection. kind: of the error that it is; mended: what it is without this error, if anything."""
        entry = instance(image, category, box, score=float(self.rng.random()))
        if kind:
            self.counts[kind] += 1
            self.mended[kind][len(self.detections)] = mended and instance(
                image, *mended, score=entry["score"]
            )
        self.detections.append(entry)

    def without(self, kind):
        """The detections with this kind mended."""
        found = [self.mended[kind].get(n, entry) for n, entry in enumerate(self.detections)]
        return [entry for entry in found if entry]


def other(category):
    return 2 if category == 11 else 11


@pytest.fixture(scope="module")
def planted():
    """Errors on objects of 40 x 40 pixels at (10, 10). A shift by 20 gives IoU 1/3, one by 4 gives 0.82."""
    plan, box, shifted, near, far = (
        Planted(),
        (10, 10, 40, 40),
        (30, 10, 40, 40),
        (14, 10, 40, 40),
        (70, 70, 40, 40),
    )
    for _ in range(20):
        image, category = plan.image()
        plan.detect(image, category, box)
    for _ in range(5):
        image, category = plan.image()
        plan.detect(image, other(category), box, "classification", (category, box))
    for _ in range(4):
        image, category = plan.image()
        plan.detect(image, category, shifted, "localization", (category, box))
    for _ in range(3):
        image, category = plan.image()
        plan.detect(image, category, box)
        plan.detect(image, other(category), shifted, "both")
    for _ in range(6):
        image, category = plan.image()
        first, second = sorted(plan.rng.random(2))
        plan.detect(image, category, near, "duplicate")
        plan.detect(image, category, box)
        plan.detections[-2]["score"], plan.detections[-1]["score"] = first, second
    for _ in range(7):
        image, category = plan.image()
        plan.detect(image, category, box)
        plan.detect(image, category, far, "background")
    for _ in range(2):
        plan.image()
        plan.counts["missed"] += 1
    return plan


@pytest.mark.parametrize("task", TASKS)
def test_planted_errors_are_counted_exactly(planted, task):
    errors = find_errors(coco_evaluation(make_set(planted.truth), planted.detections, task))
    assert dict(zip(KINDS, errors.counts.sum(0))) == planted.counts
    assert list(planted.counts.values()) == [5, 4, 3, 6, 7, 2]
    assert errors.objects.tolist() == [11, 12, 12, 12]


def ap50(dataset, detections, task):
    return coco_ap(dataset, detections, (task,))[task]["AP50"]


@pytest.mark.parametrize("task", TASKS)
def test_a_kind_costs_what_pycocotools_measures_without_it(planted, task):
    dataset = make_set(planted.truth)
    errors = find_errors(coco_evaluation(dataset, planted.detections, task))
    before = ap50(dataset, planted.detections, task)
    assert errors.ap50.mean() == pytest.approx(before, abs=1e-9)
    for kind, gain in zip(KINDS, errors.gains.mean(0)):
        left = make_set(planted.truth[:-2]) if kind == "missed" else dataset
        assert gain == pytest.approx(ap50(left, planted.without(kind), task) - before, abs=1e-9)
        assert gain > 0.1


def kinds_of(truth, detections):
    errors = find_errors(coco_evaluation(make_set(truth), detections, "bbox"))
    return {kind: count for kind, count in zip(KINDS, errors.counts.sum(0).tolist()) if count}, errors


def test_one_error_in_the_order_of_the_kinds():
    """A box that is badly on an object of its class and well on one of another class is badly located; one
    that is well on both is of the wrong class, although it is a duplicate, too."""
    truth = [instance(0, 2, (0, 0, 40, 40)), instance(0, 5, (20, 0, 40, 40))]
    hits = [instance(0, 2, (0, 0, 40, 40), score=0.9), instance(0, 5, (20, 0, 40, 40), score=0.9)]
    assert kinds_of(truth, hits)[0] == {}
    assert kinds_of(truth, [*hits, instance(0, 2, (22, 0, 40, 40), score=0.5)])[0] == {"localization": 1}
    truth[1] = instance(0, 5, (8, 0, 40, 40))
    hits[1] = instance(0, 5, (8, 0, 40, 40), score=0.9)
    assert kinds_of(truth, [*hits, instance(0, 2, (4, 0, 40, 40), score=0.5)])[0] == {"classification": 1}


def test_the_best_error_on_an_object_is_mended_and_the_others_go():
    """All go that are on an object which is detected, even if their score is higher."""
    box, shifted, far = (0, 0, 40, 40), (20, 0, 40, 40), (70, 70, 40, 40)
    truth = [instance(0, 2, box), instance(0, 2, far), instance(1, 2, box)]
    wrong = [instance(0, 2, shifted, score=score) for score in (0.4, 0.8, 0.6)]
    wrong.append(instance(1, 2, shifted, score=0.9))
    others = [
        instance(0, 2, far, score=0.7),
        instance(1, 2, box, score=0.3),
        instance(1, 2, far, score=0.75),  # background
    ]
    counts, errors = kinds_of(truth, [*wrong, *others])
    assert counts == {"localization": 4, "background": 1}
    mended = errors.ap50[0] + errors.gains[0, list(KINDS).index("localization")]
    by_hand = [instance(0, 2, box, score=0.8), *others]
    assert mended == pytest.approx(ap50(make_set(truth), by_hand, "bbox"), abs=1e-9)
    assert mended == pytest.approx(100 * (34 + 67 * 0.75) / 101)


def test_crowds_and_images_without_objects():
    """A detection on a crowd of its class is no error. Without an object, everything is background."""
    truth = [instance(0, 2, (0, 0, 100, 100), iscrowd=1), instance(1, 2, (0, 0, 40, 40))]
    detections = [instance(0, 2, (10, 10, 40, 40), score=0.9), instance(2, 2, (0, 0, 40, 40), score=0.9)]
    counts, errors = kinds_of(truth, detections)
    assert counts == {"background": 1, "missed": 1} and errors.objects.tolist() == [1, 0, 0, 0]
    assert np.isnan(errors.ap50[1:]).all() and np.isnan(errors.gains[1:]).all()
    counts, errors = kinds_of(truth, [])  # a class that was never detected gains everything
    assert counts == {"missed": 1} and errors.gains[0].tolist() == [0, 0, 0, 0, 0, 100]


@pytest.mark.parametrize("task", TASKS)
def test_random_detections_have_one_kind_each(task):
    """As many errors as false detections, and COCO's AP50 of each class."""
    dataset, detections = random_set(seed=1)
    evaluation = coco_evaluation(dataset, detections, task)
    results = [
        evaluation.evalImgs[(k * 4) * len(dataset.images) + i]
        for k in range(5)
        for i in range(len(dataset.images))
    ]
    false = sum(int((~(r["dtMatches"][0] > 0) & ~r["dtIgnore"][0]).sum()) for r in results if r)
    errors = find_errors(evaluation)
    assert errors.counts[:, :-1].sum() == false
    assert np.nanmean(errors.ap50) == pytest.approx(ap50(dataset, detections, task), abs=1e-9)
    assert (errors.counts[:, :-1].sum(0) > 0).all()
