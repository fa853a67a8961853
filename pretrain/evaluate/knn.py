"""kNN on the features of a frozen backbone, and the labeled images for it."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import images_of, open_images
from rsa_detectron2.pretrain.data.folders import find_folders, part_of, rank
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.features import Features, Labeled

SIMILARITIES = 2**27  # numbers in memory at once: half a GB


def neighbors(bank_labels: torch.Tensor) -> int:
    """k of kNN: 200 (Wu et al. 2018), or a quarter of the bank's images per class where that is less.

    More neighbors than a class has images would be outvoted by other classes however good the features are.
    """
    return max(1, min(200, len(bank_labels) // (4 * len(bank_labels.unique()))))


def knn_top1(bank: Labeled, queries: Labeled, k: int | None = None, temperature: float = 0.1) -> float:
    """Top-1 in percent of ``queries`` by weighted kNN (Wu et al. 2018): the k nearest by cosine vote with
    exp(cos / T).

    k, by default that of :func:`neighbors`, is cut to the size of the bank.
    """
    # The similarities are scaled, not the bank: a copy of it may not fit in memory.
    known, known_labels = bank
    k = k or neighbors(known_labels)
    lengths = known.norm(dim=1).clamp(min=1e-12)
    directions, correct = F.normalize(queries.features, dim=1), 0
    size = max(1, min(1024, SIMILARITIES // len(known)))
    for features, labels in zip(directions.split(size), queries.labels.split(size)):
        similarity, nearest = (features @ known.T).div_(lengths).topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(features), int(known_labels.max()) + 1, device=known.device)
        votes.scatter_add_(1, known_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(directions)


def evaluate_knn(
    features: Features, train: Source, val: Source, bank_size: int, replace: bool = False
) -> float:
    """kNN top-1 in percent of the ``val`` images against a bank of ``train`` images.

    The bank has at most ``bank_size`` images; 0: all. With ``replace``, the next image stands in
    for a val image that cannot be decoded; without, UnreadableImage is raised. Raises InputError
    as :func:`check_labeled` does.
    """
    check_labeled(train, val)
    return knn_top1(
        features.of(train, "kNN bank", bank_size, replace=True),
        features.of(val, "kNN queries", replace=replace),
    )


class NoValidation(InputError):
    """There is nothing to classify; the message says why."""


def unlabeled(images: Source) -> str:
    """What the labels of a source lack for classification; "" if nothing."""
    root, missing = printable(images.root), np.flatnonzero(np.asarray(images.labels) < 0)
    if not images.classes:
        return f"{root} has no labels (class folders)"
    if len(missing):
        first = printable(images.name(missing[0]))
        return f"{len(missing)} of the {len(images)} images of {root} have no label, {first} first"
    if len(images.classes) == 1:
        return f"{root} has one class only, {printable(images.classes[0])}"
    return ""


def mismatch(train: Source, val: Source) -> str:
    """Why ``val`` cannot be classified by ``train``; "" if it can."""
    why = unlabeled(train) or unlabeled(val)
    if why or train.classes == val.classes:
        return why
    parts = []
    if missing := sorted({*train.classes} - {*val.classes}):
        parts.append(f"without {_few(missing)}")
    if other := sorted({*val.classes} - {*train.classes}):
        parts.append(f"with other {_few(other)}")
    if parts:
        return f"{printable(val.root)} has other classes than {printable(train.root)}: {', '.join(parts)}"
    return f"{printable(val.root)} and {printable(train.root)} have their classes in another order"


def _few(names):
    """Their number, and the first three."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(map(printable, names[:3]))}{more})"


def check_labeled(train: Source, val: Source) -> None:
    """Raise InputError unless both have the same classes and a label for every image."""
    if why := mismatch(train, val):
        raise InputError(
            "kNN and linear evaluation need the same classes in training and validation images, and a "
            f"label for every image: {why}"
        )


def find_labeled(cfg: CfgNode, images: Source) -> tuple[Source, Source]:
    """(bank, val): the labeled training images and those to classify.

    ``images`` are those of pre-training. val is DATA.VAL; else the validation images that belong
    to the data set or lie beside its folder, if they are labeled as the bank is. Raises
    NoValidation where there are none, and InputError for a DATA.VAL that does not fit.
    """
    bank = images
    if images.classes and images.labels.min() < 0:  # STL-10: only its training set is labeled
        bank = images_of(cfg.DATA, "train")
    if cfg.DATA.VAL:
        val = _open_val(cfg, cfg.DATA.VAL, images)
        check_labeled(bank, val)
        return bank, val
    if why := unlabeled(bank):
        raise NoValidation(why)
    reasons = []
    for place in [cfg.DATA.PATH] if bank.own_val else beside(bank.root.absolute()):
        try:
            val = _open_val(cfg, place, images)
            why = mismatch(bank, val)
        except InputError as error:
            why = str(error)
        if not why:
            return bank, val
        reasons.append(why)
    if reasons:
        raise NoValidation(reasons[0])
    raise NoValidation(f"there are no validation images (val/ or test/) beside {printable(bank.root)}")


def _open_val(cfg, place, images):
    """The validation images of ``place``, with the range of values of ``images``."""
    val = open_images(place, "val", cfg.DATA.CLASSES, cfg.DATA.LIMIT)
    val.value_range = images.value_range
    return val


def beside(root: Path) -> list[Path]:
    """Folders beside ``root`` whose names say that they hold validation images, best first."""
    try:
        folders = find_folders(root.parent)
    except InputError:  # the parent folder may not be readable
        return []
    names = [name for name in folders if part_of(name) == "val" and name != root.name]
    return [root.parent / name for name in sorted(names, key=rank)]
