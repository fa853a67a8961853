"""The bytes that operators move, against counts by hand; those of the aggressive stage stay small."""

import pytest
import torch

from rsa_detectron2.pretrain.engine.step import normalized_views
from rsa_detectron2.pretrain.method.augment import Output
from rsa_detectron2.tools.benchmarks.augment import synthetic_views
from rsa_detectron2.tools.benchmarks.traffic import measure_traffic

A, B = torch.ones(10, 6), torch.ones(10, 6)  # 240 bytes each
INDEX = torch.tensor([1, 5])  # 16 bytes


@pytest.mark.parametrize(
    "work, moved",
    [
        (lambda _: A + B, 720),
        (lambda _: A.add_(1), 480),
        (lambda _: torch.add(A, B, out=torch.empty(10, 6)), 720),
        (lambda _: A + B[:1].expand(10, 6), 480 + 24),
        (lambda _: A.half(), 240 + 120),
        (lambda _: A.copy_(B), 480),
        (lambda _: A[INDEX], 48 + 48 + 16),
        (lambda _: A.index_select(0, INDEX), 48 + 48 + 16),
        (lambda _: A.__setitem__(INDEX, B[:2]), 48 + 48 + 16),
        (lambda _: A.t().view(2, 3, 10)[1], 0),
        (lambda _: torch.empty(10, 6), 0),
        (lambda _: A @ B.t(), 240 + 240 + 400),
    ],
)
def test_operators_by_hand(work, moved):
    traffic = measure_traffic(work, "cpu")
    assert traffic.bytes == moved and traffic.operators == (moved > 0)


def test_only_the_given_device_counts():
    assert measure_traffic(lambda _: A + B, "meta").operators == 0
    assert measure_traffic(lambda _: A.to("meta") + 1, "meta").operators > 0


@pytest.mark.parametrize("weak, most", [(True, 6.0e9), (False, 5.8e9)])
def test_the_aggressive_stage_of_256_images_moves_less_than_6_gb(weak, most):
    """224 px, in half precision, from uint8 views to those that the networks take; 26.2 GB before it was
    done in place. The least for its input and output alone is 0.7 GB.
    """
    _, params = synthetic_views(256, 8)
    views = torch.empty(256, 2, 3, 224, 224, dtype=torch.uint8, device="meta")
    output = Output(torch.ones(3, device="meta"), torch.ones(3, device="meta"), torch.float16)
    batch = {"views": views, "params": params}
    traffic = measure_traffic(lambda _: normalized_views(batch, output, weak), "meta")
    assert 0.5e9 < traffic.bytes < most
    assert traffic.operators < 600
