"""COCO's metric, and the keys under which it is reported."""

import contextlib
import io

from rsa_detectron2.transfer.data.dataset import Dataset

AP_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def coco_ap(
    dataset: Dataset, detections: list[dict], tasks: tuple[str, ...] = ("bbox", "segm")
) -> dict[str, dict[str, float | None]]:
    """COCO's AP of ``detections``: {"bbox": {key: AP in percent for key in AP_KEYS}, "segm": the same}.

    An AP is None where the data set has no object of that size; {} where it has no annotations at all.
    """
    if not dataset.annotations:
        return {}
    from pycocotools.coco import COCO  # here, because reports need only the keys
    from pycocotools.cocoeval import COCOeval

    ap = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for task in tasks:
            truth = COCO()
            # pycocotools writes into the entries that it is given.
            truth.dataset = {**dataset.coco(), "annotations": [dict(entry) for entry in dataset.annotations]}
            truth.createIndex()
            # If a detection has a box, pycocotools judges the size of its mask by the area of the box.
            found = [{key: d[key] for key in d if key != "bbox" or task == "bbox"} for d in detections]
            evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            ap[task] = {key: float(100 * v) if v >= 0 else None for key, v in zip(AP_KEYS, evaluation.stats)}
    return ap
