"""What features keep of the parts of a label, where classes are pairs "form-color" ("star-blue")."""

import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate import linear
from rsa_detectron2.pretrain.evaluate.features import Features, Labeled
from rsa_detectron2.pretrain.evaluate.knn import check_labeled, knn_top1

PARTS = {"pair": "form and color", "form": "form", "color": "color"}
K = 20  # nearest neighbors: the sets are small


def evaluate_parts(features: Features, train: Source, val: Source, seed: int) -> dict[str, float]:
    """Top-1 in percent of kNN and of a linear classifier: {"knn_pair": ..., "linear_pair": ..., ...}.

    Both read center-crop features, the linear classifier without random crops. Raises InputError for
    classes that are no pairs.
    """
    check_labeled(train, val)
    known, wanted = features.of(train, "features"), features.of(val, "features")
    result = {}
    for part in PARTS:
        index = torch.tensor(part_of(train, part), device=known.labels.device)
        bank, queries = (Labeled(values, index[labels]) for values, labels in (known, wanted))
        result[f"knn_{part}"] = knn_top1(bank, queries, k=K)
        top1 = linear.evaluate_linear_on(bank, queries, linear.LINEAR["small"], linear.Trial(seed))
        result[f"linear_{part}"] = top1[-1]
    return result


def part_of(source: Source, part: str) -> list[int]:
    """The index of each class's pair, form or color, in alphabetical order. Raises InputError."""
    for name in source.classes:
        if name.count("-") != 1:
            raise InputError(
                f"{printable(source.root)} has the class {printable(name)}: parts are judged "
                'where each class is a pair such as "star-blue"'
            )
    words = [name if part == "pair" else name.split("-")[part == "color"] for name in source.classes]
    return [sorted(set(words)).index(word) for word in words]
