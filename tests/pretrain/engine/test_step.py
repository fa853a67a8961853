"""A whole training of five steps against Algorithm 1, and a step that overflows."""

import copy
import math

import torch

from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.engine.step import TrainState, train_step
from rsa_detectron2.pretrain.method import schedules
from rsa_detectron2.pretrain.method.networks import build_backbone
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr
from tests.conftest import rsa_networks


def sgd(networks):
    solver = get_cfg().SOLVER
    solver.OPTIMIZER, solver.WEIGHT_DECAY = "sgd", 5e-4
    return build_optimizer(networks, solver)


def straight_line_run(networks, batches, K, lr, momentum, decay, beta_base, tau_base):
    """Algorithm 1, written out with its own loss, SGD and EMA. Only the layers are those of the package."""
    online = [*networks.online.parameters(), *networks.predictor.parameters()]
    ema = list(zip(networks.target.parameters(), networks.online.parameters()))
    velocity = [torch.zeros_like(p) for p in online]
    for k, (weak, aggressive) in enumerate(batches, start=1):
        cosine = (math.cos(math.pi * k / K) + 1) / 2
        beta, tau = beta_base * cosine, 1 - (1 - tau_base) * cosine

        def unit(x):
            return x / x.norm(dim=1, keepdim=True)

        q1 = unit(networks.predictor(networks.online.projector(networks.online.backbone(aggressive[:, 0]))))
        q2 = unit(networks.predictor(networks.online.projector(networks.online.backbone(aggressive[:, 1]))))
        with torch.no_grad():
            z1 = unit(networks.target.projector(networks.target.backbone(weak[:, 0])))
            z2 = unit(networks.target.projector(networks.target.backbone(weak[:, 1])))

        def square(x, y):
            return (x - y).pow(2).sum(1)

        loss = (
            (1 - beta) * square(q1, z2)
            + beta * square(q1, q2.detach())
            + (1 - beta) * square(q2, z1)
            + beta * square(q2, q1.detach())
        ).mean()
        gradients = torch.autograd.grad(loss, online)
        with torch.no_grad():
            for parameter, gradient, v in zip(online, gradients, velocity):
                v.mul_(momentum).add_(gradient + decay * parameter)
                parameter -= lr * (math.cos(math.pi * (k - 1) / K) + 1) / 2 * v
            for target, source in ema:
                target.copy_(tau * target + (1 - tau) * source)


def test_five_steps_equal_algorithm_1():
    torch.manual_seed(0)
    K, lr = 5, 0.05
    networks = rsa_networks(build_backbone("resnet18", small_stem=True), 32, 8).double()
    with torch.no_grad():  # zero-initialized residual branches would hide half of the backbone
        for name, parameter in networks.named_parameters():
            if name.endswith("bn2.weight"):
                parameter.fill_(0.7)
    networks.target.load_state_dict(networks.online.state_dict())
    reference = copy.deepcopy(networks).train()
    batches = [tuple(torch.randn(6, 2, 3, 8, 8, dtype=torch.float64) for _ in range(2)) for _ in range(K)]
    straight_line_run(reference, batches, K, lr, 0.9, 5e-4, 0.4, 0.9)

    optimizer = sgd(networks)
    state = TrainState(networks.train(), optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
    for k, (weak, aggressive) in enumerate(batches, start=1):
        set_lr(optimizer, schedules.learning_rate(k, K, lr, 0), None)
        beta, tau = schedules.beta(k, K, 0.4), schedules.tau(k, K, 0.9)
        train_step(state, [(weak, aggressive)], 1, beta, tau)
    for name, tensor in networks.state_dict().items():
        expected = reference.state_dict()[name]
        assert (tensor - expected).abs().max() <= 1e-9 * max(1.0, expected.abs().max().item()), name
    moved = networks.target.backbone.conv1.weight - networks.online.backbone.conv1.weight
    assert moved.abs().max() > 1e-4  # the target follows, it is not the online network


def test_step_that_overflows_leaves_weights_and_target():
    torch.manual_seed(0)
    networks = rsa_networks(build_backbone("resnet18", small_stem=True), 32, 8)
    networks.predictor[3].weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer = sgd(networks)
    set_lr(optimizer, 0.1, None)
    before = {name: p.clone() for name, p in networks.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    state = TrainState(networks.train(), optimizer, scaler, None)
    train_step(state, [torch.randn(2, 4, 2, 3, 8, 8)], 1, 0.4, 0.5)
    assert all(torch.equal(p, before[name]) for name, p in networks.named_parameters())
    assert scaler.get_scale() == 8.0
