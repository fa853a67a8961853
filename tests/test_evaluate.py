"""kNN and linear evaluation on features whose answer is known."""

import math

import numpy as np
import pytest
import torch

from pretrain.config import get_cfg
from pretrain.evaluate import LINEAR, Features, evaluate_linear, knn_top1, shorten


def test_knn_equals_a_loop():
    """Weighted votes of the k nearest, one query at a time in numpy."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(60, 8)), rng.normal(size=(25, 8))
    bank_labels, labels = rng.integers(0, 4, 60), rng.integers(0, 4, 25)
    correct = 0
    for query, label in zip(queries, labels):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(4)
        for i in np.argsort(-cosine)[:7]:
            votes[bank_labels[i]] += math.exp(cosine[i] / 0.1)
        correct += votes.argmax() == label
    tensors = (torch.tensor(x) for x in (bank, bank_labels, queries, labels))
    bank, bank_labels, queries, labels = tensors
    assert knn_top1(bank.float(), bank_labels, queries.float(), labels, k=7) == pytest.approx(100 * correct / 25)


class Images:
    """Two classes of plain images, bright red or bright blue; labels may be shuffled."""

    classes = ["red", "blue"]

    def __init__(self, count, shuffle=None):
        self.labels = np.arange(count) % 2
        self.colors = self.labels.copy()
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(self.labels)

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        image = torch.full((3, 12, 12), 20, dtype=torch.uint8)
        image[0 if self.colors[index] == 0 else 2] = 200 + index % 50
        return image


@pytest.mark.parametrize("name", LINEAR)
def test_linear_separates_what_is_separable(name):
    cfg = get_cfg()
    cfg.merge_from_list(["DATA.IMAGE_SIZE", 8, "DATA.EVAL_RESIZE", 8, "DATA.NUM_WORKERS", 0])
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.BatchNorm1d(3))
    features = Features(backbone, cfg.DATA, None)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    top1 = evaluate_linear(features, Images(64), Images(32), shorten(LINEAR[name], 8), batch_size=16)
    assert len(top1) == 8 and top1[-1] == 100
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    chance = evaluate_linear(features, Images(64, shuffle=0), Images(64, shuffle=1), shorten(LINEAR[name], 4), batch_size=16)
    assert 20 <= chance[-1] <= 80


def test_milestones():
    assert shorten(LINEAR["small"], None).milestones == (60, 80) and LINEAR["large"].milestones == (15, 30)
    assert shorten(LINEAR["small"], 10).milestones == (6, 8)
