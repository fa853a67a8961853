"""The parts of a label: classes that share a form or a color, and features that keep one of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.evaluate.features import Labeled
from rsa_detectron2.pretrain.evaluate.parts import PARTS, evaluate_parts, part_of
from rsa_detectron2.transfer.data.drawn import CONTROLLED


def source(classes, count=1):
    labels = np.arange(len(classes) * count) % len(classes)
    return SimpleNamespace(classes=classes, labels=labels, root=Path("images"))


def test_parts_of_the_label():
    classes = sorted(CONTROLLED.classes)
    pair, form, color = (part_of(source(classes), part) for part in PARTS)
    assert pair == list(range(24)) and len({*form}) == 4 and len({*color}) == 6
    assert len({*zip(form, color)}) == 24
    for name, f, c in zip(classes, form, color):
        assert ["circle", "cross", "square", "star"][f] == name.split("-")[0]
        assert ["blue", "cyan", "green", "magenta", "red", "yellow"][c] == name.split("-")[1]


def test_classes_that_are_no_pairs():
    with pytest.raises(InputError, match="images has the class plane: parts are judged where each class is"):
        part_of(source(["plane", "star-blue"]), "pair")


def test_features_of_the_color_alone():
    """They tell every color, and the form as often as chance does."""
    train = source(sorted(CONTROLLED.classes), 40)
    val = source(sorted(CONTROLLED.classes), 20)
    colors = torch.tensor(part_of(train, "color"))

    def features(images, description):
        labels = torch.from_numpy(images.labels)
        noise = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(len(labels)))
        return Labeled(5 * torch.eye(6)[colors[labels]] + noise / 2, labels)

    top1 = evaluate_parts(SimpleNamespace(of=features), train, val, seed=0)
    assert {*top1} == {f"{judge}_{part}" for judge in ("knn", "linear") for part in PARTS}
    assert top1["knn_color"] == top1["linear_color"] == 100
    assert all(15 < top1[f"{judge}_form"] < 35 for judge in ("knn", "linear"))  # of four
    assert all(10 < top1[f"{judge}_pair"] < 40 for judge in ("knn", "linear"))
