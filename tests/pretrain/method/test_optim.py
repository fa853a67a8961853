"""LARS against a derivation that shares no code with the package or timm."""

import pytest
import torch

from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.method.networks import build_backbone
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr
from tests.conftest import rsa_networks


@pytest.mark.parametrize(
    "decay, norm",
    [
        (1e-2, lambda p, g: g.norm() + 1e-2 * p.norm()),  # LARS as You et al. (2017) state it
        # as in the authors' code: the same at the recipe's decay
        (1e-6, lambda p, g: (g + 1e-6 * p).norm()),
        (0.0, lambda p, g: g.norm()),  # the scaling stays
    ],
)
def test_lars_equals_a_straight_line_derivation(decay, norm):
    torch.manual_seed(0)
    networks, solver = rsa_networks(build_backbone("resnet18"), 32, 8).double(), get_cfg().SOLVER
    solver.WEIGHT_DECAY = decay
    optimizer = build_optimizer(networks, solver)
    decayed, plain = (
        [p for group in optimizer.param_groups if group["always_adapt"] == decays for p in group["params"]]
        for decays in (True, False)
    )
    assert all(group["weight_decay"] == decay * group["always_adapt"] for group in optimizer.param_groups)
    assert all(p.ndim > 1 for p in decayed) and all(p.ndim <= 1 for p in plain)
    assert len(decayed) + len(plain) == sum(p.requires_grad for p in networks.parameters())
    assert not {id(p) for p in networks.target.parameters()} & {id(p) for p in (*decayed, *plain)}

    parameters = decayed[:3] + decayed[-1:] + plain[:3]
    expected = [p.detach().clone() for p in parameters]
    velocity = [torch.zeros_like(p) for p in expected]
    for step in range(10):
        set_lr(optimizer, 0.3 + 0.1 * step, None)
        for p, e, v in zip(parameters, expected, velocity):
            p.grad = torch.randn_like(p)
            update = p.grad
            if p.ndim > 1:
                update = (update + decay * e) * 0.001 * e.norm() / norm(e, update)
            v.mul_(0.9).add_(update)
            e.sub_((0.3 + 0.1 * step) * v)
        optimizer.step()
    for p, e in zip(parameters, expected):
        torch.testing.assert_close(p.detach(), e, rtol=1e-5, atol=1e-9)
