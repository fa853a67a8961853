"""Keypoints of COCO-format files: their names, and whether they are what training and COCO's metric need."""

from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.data.annotations import COCO_2017, load_datasets, locate_dataset
from rsa_detectron2.transfer.data.dataset import Dataset


def keypoint_metadata(dataset: Dataset) -> dict:
    """Data set -> Detectron2's ``keypoint_names`` (list of str) and ``keypoint_flip_map`` (pairs of names).

    The pairs swap places in a mirrored image: their names differ only in left and right. Raises InputError.
    """
    found = list(dataset.keypoints.values())
    names = found[0]
    if not names or any(other != names for other in found):
        raise InputError(
            f"{dataset.path}: MODEL.KEYPOINT_ON needs the names of the keypoints in each of the "
            'categories, the same in all: give every category "keypoints": [...], '
            "as COCO's person_keypoints do"
        )
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    return {"keypoint_names": names, "keypoint_flip_map": [pair for pair in pairs if pair[1] in names]}


def check_keypoints(cfg: CfgNode, eval_only: bool = False) -> None:
    """Raises InputError unless the data sets of ``cfg`` have the keypoints that its model learns.

    Prints which of them swap places in a mirrored image. COCO 2017's built-in names mean its instances
    files, which have no keypoints.
    """
    training = () if eval_only else cfg.DATASETS.TRAIN
    for name in dict.fromkeys((*training, *cfg.DATASETS.TEST)):
        if name in COCO_2017:
            raise InputError(
                f"{locate_dataset(name)[0]} has no keypoints: give COCO's person_keypoints files with "
                "--train and --val"
            )
    for name, dataset in load_datasets(cfg, eval_only).items():
        metadata = keypoint_metadata(dataset)
        names = metadata["keypoint_names"]
        key, number = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        if len(names) != number:
            raise InputError(
                f"{dataset.path} has {len(names)} keypoints, but {key} is {number}: add {key} {len(names)}"
            )
        sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        if (sigmas or 17) != len(names):  # by default they are those of COCO's 17 keypoints
            raise InputError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} numbers: COCO's metric needs one for each of the "
                f"{len(names)} keypoints of {dataset.path}, such as 0.05 each"
            )
        _check_annotations(dataset, len(names), evaluated=name in cfg.DATASETS.TEST)
        if name in training and cfg.INPUT.RANDOM_FLIP == "horizontal":
            pairs = ", ".join(map(" and ".join, metadata["keypoint_flip_map"])) or "none"
            print(
                f"keypoints that swap places in a mirrored image: {pairs} "
                "(INPUT.RANDOM_FLIP none mirrors no image)",
                flush=True,
            )


def _check_annotations(dataset, number, evaluated):
    for annotation in dataset.annotations:
        if annotation["iscrowd"] and not evaluated:  # not trained on
            continue
        found, where = len(annotation.get("keypoints", [])), f"{dataset.path}: {dataset.name(annotation)}"
        if found != 3 * number:
            raise InputError(
                f"{where} has {found} numbers for its keypoints: {number} keypoints need {3 * number}, "
                "the x, y and visibility of each (0, 0, 0 if it is not labeled)"
            )
        if evaluated and "num_keypoints" not in annotation:
            raise InputError(
                f"{where} lacks num_keypoints, which COCO's metric needs: give the number of its keypoints "
                "whose visibility is not 0"
            )
