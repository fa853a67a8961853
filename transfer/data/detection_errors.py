"""The errors of a detector by kind, and what each kind costs, after TIDE (Bolya et al., ECCV 2020).

COCO's metric at IoU 0.5 says which detections are false, and which objects are not detected. A false
detection counts once: localization is tried first, then classification, then the other kinds. Crowds are no
objects here, and a detection that COCO's metric ignores, because it is on a crowd, is not false.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from pycocotools import mask as rle

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

ON, OFF = 0.5, 0.1  # IoU: a detection is on an object from the one, and off it below the other
KINDS = {
    "classification": f"on an object of another class, IoU at least {ON}",
    "localization": f"on an object of its class, IoU from {OFF} to {ON}",
    "both": f"on an object of another class, IoU from {OFF} to {ON}",
    "duplicate": f"on an object of its class, IoU at least {ON}, that a better detection has taken",
    "background": f"on no object, all IoUs below {OFF}",
    "missed": "an object without a detection, and without a classification or localization error on it",
}
PLACES = {kind: place for place, kind in enumerate(KINDS)}
ON_OBJECTS = ("classification", "localization")  # errors that become true detections when they are mended
RECALLS = np.linspace(0, 1, 101)  # COCO's


@dataclass(frozen=True)
class Errors:
    """The errors of a detector. Axes: the K classes, sorted by category id, and :data:`KINDS`.

    A false detection counts for the class that it was given, a missed object for its own.
    """

    counts: np.ndarray  # int64 [K, 6]
    objects: np.ndarray  # int64 [K], without crowds
    ap50: np.ndarray  # float64 [K], in percent; NaN where the class has no objects
    gains: np.ndarray  # float64 [K, 6], AP50 gained if errors of this kind alone are mended, of all classes


@dataclass(frozen=True)
class Matches:
    """The N detections and M objects of all images, and which belong together. Nothing on crowds."""

    classes: np.ndarray  # int64 [N], places in the classes
    scores: np.ndarray  # float64 [N]
    hits: np.ndarray  # bool [N], whether the detection is true
    kinds: np.ndarray  # int64 [N], places in KINDS, of a false detection
    targets: np.ndarray  # int64 [N], the object that an error of localization or classification is on
    object_classes: np.ndarray  # int64 [M]
    detected: np.ndarray  # bool [M]


def find_errors(evaluation: COCOeval) -> Errors:
    """The errors in what :func:`transfer.data.average_precision.coco_evaluation` returns.

    False detections are mended by :func:`mend`, missed objects by leaving them out of the objects.
    """
    matches, num_classes = match(evaluation), len(evaluation.params.catIds)
    false = ~matches.hits
    counts = np.zeros((num_classes, len(KINDS)), dtype=np.int64)
    np.add.at(counts, (matches.classes[false], matches.kinds[false]), 1)
    objects = np.bincount(matches.object_classes, minlength=num_classes)
    left = np.bincount(matches.object_classes[~missed(matches)], minlength=num_classes)
    counts[:, PLACES["missed"]] = objects - left
    curves = [average_precision(matches, objects)]
    curves += [average_precision(mend(matches, kind), objects) for kind in KINDS if kind != "missed"]
    curves.append(average_precision(matches, left))
    values = np.where(objects, curves, np.nan)
    return Errors(counts, objects, values[0], (values[1:] - values[0]).T)


def match(evaluation: COCOeval) -> Matches:
    params, results = evaluation.params, evaluation.evalImgs
    num_images, num_areas = len(params.imgIds), len(params.areaRng)
    # pycocotools has a result for each class, range of area and image, in this order; None is for nothing.
    found = [
        (image, place, result)
        for image in range(num_images)
        for place in range(len(params.catIds))
        if (result := results[place * num_areas * num_images + image])
    ]
    images, places, results = zip(*found)

    def joined(side: str) -> tuple[np.ndarray, ...]:
        """Image, class, id and whether it has a match, of all detections ("dt") or objects ("gt")."""
        lengths = [len(result[f"{side}Ids"]) for result in results]
        ids = np.concatenate([result[f"{side}Ids"] for result in results]).astype(int)
        # The first line of matches is that of IoU 0.5.
        matched = np.concatenate([result[f"{side}Matches"][0] for result in results]) > 0
        return np.repeat(images, lengths), np.repeat(places, lengths), ids, matched

    counts = ~np.concatenate([result["dtIgnore"][0] for result in results])
    image_of, classes, ids, hits = (values[counts] for values in joined("dt"))
    scores = np.concatenate([result["dtScores"] for result in results])[counts]
    counts = np.concatenate([result["gtIgnore"] for result in results]) == 0
    image_of_object, object_classes, object_ids, detected = (values[counts] for values in joined("gt"))
    kinds, targets = np.empty_like(ids), np.empty_like(ids)
    for image in range(num_images):
        here = slice(*np.searchsorted(image_of, (image, image + 1)))
        there = slice(*np.searchsorted(image_of_object, (image, image + 1)))
        iou = overlaps(evaluation, ids[here], object_ids[there])
        kinds[here], targets[here] = kinds_of(iou, classes[here], object_classes[there])
        targets[here] += there.start
    return Matches(classes, scores, hits, kinds, targets, object_classes, detected)


def overlaps(evaluation: COCOeval, ids: np.ndarray, object_ids: np.ndarray) -> np.ndarray:
    """IoUs of an image's n detections and m objects, of any classes: float64 [n, m]."""
    if not len(ids) or not len(object_ids):
        return np.zeros((len(ids), len(object_ids)))
    key = {"bbox": "bbox", "segm": "segmentation"}[evaluation.params.iouType]
    regions = [evaluation.cocoDt.anns[number][key] for number in ids]
    return rle.iou(
        regions, [evaluation.cocoGt.anns[number][key] for number in object_ids], [0] * len(object_ids)
    )


def kinds_of(
    iou: np.ndarray, classes: np.ndarray, object_classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each detection if it is false, and the object that it is on.

    iou: float64 [n, m]. Returns places in KINDS and in the m objects, both int64 [n].
    """
    iou = np.pad(iou, ((0, 0), (0, 1)))  # a last object that nothing overlaps, for images without objects
    same = classes[:, None] == np.append(object_classes, -1)
    on_own, on_other = np.where(same, iou, 0), np.where(same, 0, iou)
    own, other = on_own.max(1), on_other.max(1)
    rules = {
        "localization": (own >= OFF) & (own < ON),
        "classification": other >= ON,
        "duplicate": own >= ON,
        "background": other < OFF,
    }
    kinds = np.select(list(rules.values()), [PLACES[kind] for kind in rules], PLACES["both"])
    targets = np.where(kinds == PLACES["classification"], on_other.argmax(1), on_own.argmax(1))
    return kinds, targets


def is_kind(matches: Matches, *kinds: str) -> np.ndarray:
    """Whether each detection is a false one of these kinds: bool [N]."""
    return ~matches.hits & np.isin(matches.kinds, [PLACES[kind] for kind in kinds])


def missed(matches: Matches) -> np.ndarray:
    """Whether each object is missed: bool [M]."""
    found = matches.detected.copy()
    found[matches.targets[is_kind(matches, *ON_OBJECTS)]] = True
    return ~found


def mend(matches: Matches, kind: str) -> Matches:
    """What the matches are if the false detections of this kind are mended: they are taken away.

    But of those of localization or classification on one object, which is not detected, the one with the
    highest score is kept, as a true one of the object's class.
    """
    wrong = is_kind(matches, kind)
    classes, hits = matches.classes.copy(), matches.hits.copy()
    if kind in ON_OBJECTS:
        places = np.flatnonzero(wrong)
        places = places[~matches.detected[matches.targets[places]]]
        places = places[np.argsort(-matches.scores[places], kind="stable")]
        targets, first = np.unique(matches.targets[places], return_index=True)
        kept = places[first]
        classes[kept], hits[kept], wrong[kept] = matches.object_classes[targets], True, False
    return replace(
        matches,
        classes=classes[~wrong],
        scores=matches.scores[~wrong],
        hits=hits[~wrong],
        kinds=matches.kinds[~wrong],
        targets=matches.targets[~wrong],
    )


def average_precision(matches: Matches, objects: np.ndarray) -> np.ndarray:
    """COCO's AP50 of each class in percent: float64 [K]. objects: int64 [K], how many there are.

    A class without objects has 100 if nothing was detected, else 0.
    """
    order = np.lexsort((-matches.scores, matches.classes))
    bounds = np.searchsorted(matches.classes[order], np.arange(len(objects) + 1))
    found = np.empty(len(objects))
    for place, (count, start, end) in enumerate(zip(objects, bounds, bounds[1:])):
        hits = matches.hits[order[start:end]]
        if not count:
            found[place] = 100.0 * (len(hits) == 0)
            continue
        true = hits.cumsum()
        precision = true / np.arange(1, len(hits) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
        at = np.searchsorted(true / count, RECALLS)
        found[place] = 100 * np.append(best, 0)[at].mean()
    return found
