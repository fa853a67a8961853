"""The objectives and a whole training run against derivations that share no code with the package."""

import copy
import math

import numpy as np
import pytest
import torch

from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.engine.step import TrainState, train_step
from rsa_detectron2.pretrain.method import schedules
from rsa_detectron2.pretrain.method.networks import KeyQueue, build_backbone
from rsa_detectron2.pretrain.method.objectives import (
    METHODS,
    byol,
    byol_aw,
    distance,
    moco,
    rsa,
    simclr,
    simsiam,
    simsiam_rsa,
)
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr
from tests.conftest import rsa_networks


class Lookup:
    """Stands for the networks: the "views" are the projections themselves, [B, 2, D], and the
    predictor a matrix.
    """

    def __init__(self, predictor=None, temperature=None, queue=None):
        self.predictor = (lambda z: z) if predictor is None else (lambda z: z @ predictor)
        self.temperature, self.queue = temperature, queue

    def online(self, view):
        return view

    def predict(self, view):
        return self.predictor(self.online(view))

    def project_target(self, view):
        return view.detach()


def reference_distance(q, z):
    """Squared distance of unit vectors (eq. 2), in numpy."""
    q, z = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, z))
    return ((q - z) ** 2).sum(1)


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    weak, strong = (torch.randn(5, 2, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    return weak, strong.requires_grad_()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rsa_equals_equation_5(outputs, beta):
    weak, strong = outputs
    w, a = weak.numpy(), strong.detach().numpy()
    expected = sum(
        (1 - beta) * reference_distance(a[:, i], w[:, 1 - i])
        + beta * reference_distance(a[:, i], a[:, 1 - i])
        for i in (0, 1)
    ).mean()
    figures = rsa(Lookup(), weak, strong, beta)
    assert figures["loss"].item() == pytest.approx(expected, abs=1e-12)
    assert figures["loss_aw"].item() == pytest.approx(
        rsa(Lookup(), weak, strong, 0.0)["loss"].item(), abs=1e-12
    )
    cosine = sum(torch.cosine_similarity(strong[:, 0], strong[:, 1]) for _ in (0, 1)).mean() / 2
    assert figures["cos_aa"].item() == pytest.approx(cosine.item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rsa_gradient_stops_at_the_targets(outputs, beta):
    """d/dq of 2 - 2 cos(q, z) is -2 (z/|z| - cos q/|q|) / |q|: each view moves toward fixed targets only."""
    weak, strong = outputs
    rsa(Lookup(), weak, strong, beta)["loss"].backward()
    w, a = weak.numpy(), strong.detach().numpy()

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def gradient(q, z):
        cosine = (unit(q) * unit(z)).sum(-1, keepdims=True)
        return -2 * (unit(z) - cosine * unit(q)) / np.linalg.norm(q, axis=-1, keepdims=True)

    expected = np.stack(
        [(1 - beta) * gradient(a[:, i], w[:, 1 - i]) + beta * gradient(a[:, i], a[:, 1 - i]) for i in (0, 1)],
        1,
    ) / len(a)
    np.testing.assert_allclose(strong.grad.numpy(), expected, atol=1e-12)


def test_byol_pairs_the_right_views(outputs):
    weak, strong = outputs
    w, a = weak.numpy(), strong.detach().numpy()
    assert byol(Lookup(), weak, strong, None)["loss"].item() == pytest.approx(
        2 * reference_distance(a[:, 0], a[:, 1]).mean(), abs=1e-12
    )
    assert byol_aw(Lookup(), weak, strong, None)["loss"].item() == pytest.approx(
        2 * reference_distance(a[:, 0], w[:, 1]).mean(), abs=1e-12
    )


def negative_cosine(p, z):
    """The values, and their gradient with respect to p in numpy: -z/|z| + cos p/|p|, all over |p|."""
    length = np.linalg.norm(p, axis=1, keepdims=True)
    p, z = p / length, z / np.linalg.norm(z, axis=1, keepdims=True)
    cosine = (p * z).sum(1, keepdims=True)
    return -cosine[:, 0], (cosine * p - z) / length


@pytest.mark.parametrize("beta", [None, 0.0, 0.3, 1.0])
def test_simsiam_and_its_rsa_with_their_stop_gradients(outputs, beta):
    """beta None is SimSiam itself.

    The projections are the leaves: a gradient that leaked into a target would show.
    """
    weak, strong = outputs
    matrix = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    networks = Lookup(matrix)
    figures = (
        simsiam(networks, weak, strong, None) if beta is None else simsiam_rsa(networks, weak, strong, beta)
    )
    figures["loss"].backward()
    w, a, m = weak.numpy(), strong.detach().numpy(), matrix.numpy()
    loss, gradient = 0, np.zeros_like(a)
    for i in (0, 1):
        targets = [(1, a[:, 1 - i])] if beta is None else [(1 - beta, w[:, 1 - i]), (beta, a[:, 1 - i] @ m)]
        for weight, target in targets:
            value, slope = negative_cosine(a[:, i] @ m, target)
            loss += weight * value.mean() / 2
            gradient[:, i] += weight * slope @ m.T / len(a) / 2
    assert figures["loss"].item() == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(strong.grad.numpy(), gradient, atol=1e-12)
    assert -1 <= figures["cos_aa"] <= 1 and figures["cos_aa"].item() == -figures["loss_aa"].item()


def test_simclr_equals_the_textbook_double_loop(outputs):
    """NT-Xent by equation 1 of the SimCLR paper, pair by pair, with gradients through both sides of each
    pair.
    """
    _, strong = outputs
    temperature = 0.3
    simclr(Lookup(temperature=temperature), None, strong, None)["loss"].backward()
    gradient, strong.grad = strong.grad, None

    z = [strong[k, view] for view in (0, 1) for k in range(5)]

    def similarity(i, j):
        return z[i] @ z[j] / (z[i] @ z[i]).sqrt() / (z[j] @ z[j]).sqrt()

    terms = []
    for i in range(10):
        j = (i + 5) % 10
        others = sum((similarity(i, k) / temperature).exp() for k in range(10) if k != i)
        terms.append(-((similarity(i, j) / temperature).exp() / others).log())
    loss = sum(terms) / 10
    loss.backward()
    figures = simclr(Lookup(temperature=temperature), None, strong, None)
    assert figures["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
    assert figures["cos_aa"].item() == pytest.approx(
        sum(similarity(i, i + 5).item() for i in range(5)) / 5, abs=1e-12
    )
    torch.testing.assert_close(gradient, strong.grad)


def test_moco_against_a_list_of_keys():
    """In steps of one or two micro-batches, past the end of the ring. Negatives are only keys of earlier
    steps.
    """
    torch.manual_seed(3)
    temperature, size = 0.2, 9
    queue = KeyQueue(size, 7).double()
    networks = Lookup(torch.randn(7, 7, dtype=torch.float64), temperature, queue)
    held = [key.clone() for key in queue.keys]
    for sizes in [(2,), (3,), (1, 2), (4,), (2, 2)]:
        entering = []
        for batch in sizes:
            strong = torch.randn(batch, 2, 7, dtype=torch.float64, requires_grad=True)
            figures = moco(networks, None, strong, None)
            figures["loss"].backward()
            gradient, strong.grad = strong.grad, None
            loss = 0
            for i in (0, 1):
                for view in strong:
                    query, key = view[i] @ networks.predictor(torch.eye(7).double()), view[1 - i].detach()
                    query, key = query / query.norm(), key / key.norm()
                    scores = torch.stack([query @ other for other in [key, *held]]) / temperature
                    loss = loss - (scores[0].exp() / scores.exp().sum()).log() / batch
            loss.backward()
            assert figures["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
            torch.testing.assert_close(gradient, strong.grad)
            entering += [view[i].detach() / view[i].detach().norm() for i in (0, 1) for view in strong]
        queue.end_step(skipped=False)
        held = (held + entering)[-size:]
    torch.testing.assert_close(queue.keys.roll(-int(queue.oldest), 0), torch.stack(held))


def test_distance_is_float32_under_autocast():
    q = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(q, q).dtype == torch.float32
    assert distance(q, q).abs().max() < 1e-5 and distance(q, -q).sub(4).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_float32_under_autocast(method):
    """The networks give bfloat16. The loss equals that of the same numbers in float64."""
    weak, strong = torch.randn(2, 4, 2, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(4))
    queue = KeyQueue(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = METHODS[method].objective(Lookup(None, 0.1, queue), weak, strong, 0.3)["loss"]
    exact = METHODS[method].objective(Lookup(None, 0.1, queue.double()), weak.double(), strong.double(), 0.3)[
        "loss"
    ]
    assert loss.dtype == torch.float32 and exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_feature_std_tells_collapse_from_health():
    healthy = torch.randn(512, 2, 64, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(512, 2, 64) + 1e-4 * healthy
    assert rsa(Lookup(), healthy, healthy, 0.4)["feature_std"].item() == pytest.approx(1, abs=0.02)
    assert rsa(Lookup(), healthy, collapsed, 0.4)["feature_std"].item() < 1e-3


@pytest.mark.parametrize(
    "k, beta, tau",
    [(1, 0.4 * (0.5 + 0.5 * math.cos(math.pi / 1000)), None), (500, 0.2, 0.995), (1000, 0.0, 1.0)],
)
def test_beta_and_tau(k, beta, tau):
    assert schedules.beta(k, 1000, 0.4) == pytest.approx(beta, abs=1e-15)
    if tau is not None:
        assert schedules.tau(k, 1000, 0.99) == pytest.approx(tau, abs=1e-15)
    else:
        assert 0.99 < schedules.tau(k, 1000, 0.99) < 0.99 + 1e-7


@pytest.mark.parametrize("k", [1, 500, 1000])
def test_fixed_beta_and_tau(k):
    assert schedules.beta(k, 1000, 0.4, "fixed") == 0.4 and schedules.tau(k, 1000, 0.99, "fixed") == 0.99
    assert schedules.beta(k, 1000, 0.4, "cosine") == schedules.beta(k, 1000, 0.4)
    assert schedules.tau(k, 1000, 0.99, "cosine") == schedules.tau(k, 1000, 0.99)


def test_learning_rate():
    rates = [schedules.learning_rate(k, 100, 2.0, 10) for k in range(1, 101)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(rates[10:], np.cos(np.pi * np.arange(90) / 90) + 1, atol=1e-12)
    assert schedules.learning_rate(1, 100, 2.0, 0) == 2.0


def straight_line_run(networks, batches, K, lr, momentum, decay, beta_base, tau_base):
    """Algorithm 1, written out with its own loss, SGD and EMA. Only the layers are those of the package."""
    online = [*networks.online.parameters(), *networks.predictor.parameters()]
    ema = list(zip(networks.target.parameters(), networks.online.parameters()))
    velocity = [torch.zeros_like(p) for p in online]
    for k, (weak, strong) in enumerate(batches, start=1):
        cosine = (math.cos(math.pi * k / K) + 1) / 2
        beta, tau = beta_base * cosine, 1 - (1 - tau_base) * cosine

        def unit(x):
            return x / x.norm(dim=1, keepdim=True)

        q1 = unit(networks.predictor(networks.online.projector(networks.online.backbone(strong[:, 0]))))
        q2 = unit(networks.predictor(networks.online.projector(networks.online.backbone(strong[:, 1]))))
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

    optimizer = build_optimizer(networks, solver("sgd", 5e-4))
    state = TrainState(networks.train(), optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
    for k, (weak, strong) in enumerate(batches, start=1):
        set_lr(optimizer, schedules.learning_rate(k, K, lr, 0), None)
        train_step(
            state,
            [(weak, strong)],
            1,
            schedules.beta(k, K, 0.4),
            schedules.tau(k, K, 0.9),
        )
    for name, tensor in networks.state_dict().items():
        expected = reference.state_dict()[name]
        assert (tensor - expected).abs().max() <= 1e-9 * max(1.0, expected.abs().max().item()), name
    moved = networks.target.backbone.conv1.weight - networks.online.backbone.conv1.weight
    assert moved.abs().max() > 1e-4  # the target follows, it is not the online network


def solver(name, decay):
    solver = get_cfg().SOLVER
    solver.OPTIMIZER, solver.WEIGHT_DECAY = name, decay
    return solver


def test_step_that_overflows_leaves_weights_and_target():
    torch.manual_seed(0)
    networks = rsa_networks(build_backbone("resnet18", small_stem=True), 32, 8)
    networks.predictor[3].weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer = build_optimizer(networks, solver("sgd", 5e-4))
    set_lr(optimizer, 0.1, None)
    before = {name: p.clone() for name, p in networks.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    state = TrainState(networks.train(), optimizer, scaler, None)
    train_step(state, [torch.randn(2, 4, 2, 3, 8, 8)], 1, 0.4, 0.5)
    assert all(torch.equal(p, before[name]) for name, p in networks.named_parameters())
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize(
    "decay, norm",
    [
        (1e-2, lambda p, g: g.norm() + 1e-2 * p.norm()),  # LARS as You et al. (2017) state it
        (
            1e-6,
            lambda p, g: (g + 1e-6 * p).norm(),
        ),  # as in the authors' code: the same at the recipe's decay
        (0.0, lambda p, g: g.norm()),  # the scaling stays
    ],
)
def test_lars_equals_a_straight_line_derivation(decay, norm):
    torch.manual_seed(0)
    networks = rsa_networks(build_backbone("resnet18"), 32, 8).double()
    optimizer = build_optimizer(networks, solver("lars", decay))
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
