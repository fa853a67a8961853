"""The objectives against derivations that share no code with the package."""

import numpy as np
import pytest
import torch

from rsa_detectron2.pretrain.method.networks import KeyQueue
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
    weak, aggressive = (torch.randn(5, 2, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    return weak, aggressive.requires_grad_()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rsa_equals_equation_5(outputs, beta):
    weak, aggressive = outputs
    w, a = weak.numpy(), aggressive.detach().numpy()
    expected = sum(
        (1 - beta) * reference_distance(a[:, i], w[:, 1 - i])
        + beta * reference_distance(a[:, i], a[:, 1 - i])
        for i in (0, 1)
    ).mean()
    figures = rsa(Lookup(), weak, aggressive, beta)
    assert figures["loss"].item() == pytest.approx(expected, abs=1e-12)
    assert figures["loss_aw"].item() == pytest.approx(
        rsa(Lookup(), weak, aggressive, 0.0)["loss"].item(), abs=1e-12
    )
    cosine = sum(torch.cosine_similarity(aggressive[:, 0], aggressive[:, 1]) for _ in (0, 1)).mean() / 2
    assert figures["cos_aa"].item() == pytest.approx(cosine.item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rsa_gradient_stops_at_the_targets(outputs, beta):
    """d/dq of 2 - 2 cos(q, z) is -2 (z/|z| - cos q/|q|) / |q|: each view moves toward fixed targets only."""
    weak, aggressive = outputs
    rsa(Lookup(), weak, aggressive, beta)["loss"].backward()
    w, a = weak.numpy(), aggressive.detach().numpy()

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def gradient(q, z):
        cosine = (unit(q) * unit(z)).sum(-1, keepdims=True)
        return -2 * (unit(z) - cosine * unit(q)) / np.linalg.norm(q, axis=-1, keepdims=True)

    expected = np.stack(
        [(1 - beta) * gradient(a[:, i], w[:, 1 - i]) + beta * gradient(a[:, i], a[:, 1 - i]) for i in (0, 1)],
        1,
    ) / len(a)
    np.testing.assert_allclose(aggressive.grad.numpy(), expected, atol=1e-12)


def test_byol_pairs_the_right_views(outputs):
    weak, aggressive = outputs
    w, a = weak.numpy(), aggressive.detach().numpy()
    assert byol(Lookup(), weak, aggressive, None)["loss"].item() == pytest.approx(
        2 * reference_distance(a[:, 0], a[:, 1]).mean(), abs=1e-12
    )
    assert byol_aw(Lookup(), weak, aggressive, None)["loss"].item() == pytest.approx(
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
    weak, aggressive = outputs
    matrix = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    networks = Lookup(matrix)
    figures = (
        simsiam(networks, weak, aggressive, None)
        if beta is None
        else simsiam_rsa(networks, weak, aggressive, beta)
    )
    figures["loss"].backward()
    w, a, m = weak.numpy(), aggressive.detach().numpy(), matrix.numpy()
    loss, gradient = 0, np.zeros_like(a)
    for i in (0, 1):
        targets = [(1, a[:, 1 - i])] if beta is None else [(1 - beta, w[:, 1 - i]), (beta, a[:, 1 - i] @ m)]
        for weight, target in targets:
            value, slope = negative_cosine(a[:, i] @ m, target)
            loss += weight * value.mean() / 2
            gradient[:, i] += weight * slope @ m.T / len(a) / 2
    assert figures["loss"].item() == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(aggressive.grad.numpy(), gradient, atol=1e-12)
    assert -1 <= figures["cos_aa"] <= 1 and figures["cos_aa"].item() == -figures["loss_aa"].item()


def test_simclr_equals_the_textbook_double_loop(outputs):
    """NT-Xent by equation 1 of the SimCLR paper, pair by pair, with gradients through both sides of each
    pair.
    """
    _, aggressive = outputs
    temperature = 0.3
    simclr(Lookup(temperature=temperature), None, aggressive, None)["loss"].backward()
    gradient, aggressive.grad = aggressive.grad, None

    z = [aggressive[k, view] for view in (0, 1) for k in range(5)]

    def similarity(i, j):
        return z[i] @ z[j] / (z[i] @ z[i]).sqrt() / (z[j] @ z[j]).sqrt()

    terms = []
    for i in range(10):
        j = (i + 5) % 10
        others = sum((similarity(i, k) / temperature).exp() for k in range(10) if k != i)
        terms.append(-((similarity(i, j) / temperature).exp() / others).log())
    loss = sum(terms) / 10
    loss.backward()
    figures = simclr(Lookup(temperature=temperature), None, aggressive, None)
    assert figures["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
    assert figures["cos_aa"].item() == pytest.approx(
        sum(similarity(i, i + 5).item() for i in range(5)) / 5, abs=1e-12
    )
    torch.testing.assert_close(gradient, aggressive.grad)


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
            aggressive = torch.randn(batch, 2, 7, dtype=torch.float64, requires_grad=True)
            figures = moco(networks, None, aggressive, None)
            figures["loss"].backward()
            gradient, aggressive.grad = aggressive.grad, None
            loss = 0
            for i in (0, 1):
                for view in aggressive:
                    query, key = view[i] @ networks.predictor(torch.eye(7).double()), view[1 - i].detach()
                    query, key = query / query.norm(), key / key.norm()
                    scores = torch.stack([query @ other for other in [key, *held]]) / temperature
                    loss = loss - (scores[0].exp() / scores.exp().sum()).log() / batch
            loss.backward()
            assert figures["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
            torch.testing.assert_close(gradient, aggressive.grad)
            entering += [view[i].detach() / view[i].detach().norm() for i in (0, 1) for view in aggressive]
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
    weak, aggressive = torch.randn(
        2, 4, 2, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(4)
    )
    queue = KeyQueue(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = METHODS[method].objective(Lookup(None, 0.1, queue), weak, aggressive, 0.3)["loss"]
    exact = METHODS[method].objective(
        Lookup(None, 0.1, queue.double()), weak.double(), aggressive.double(), 0.3
    )["loss"]
    assert loss.dtype == torch.float32 and exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_feature_std_tells_collapse_from_health():
    healthy = torch.randn(512, 2, 64, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(512, 2, 64) + 1e-4 * healthy
    assert rsa(Lookup(), healthy, healthy, 0.4)["feature_std"].item() == pytest.approx(1, abs=0.02)
    assert rsa(Lookup(), healthy, collapsed, 0.4)["feature_std"].item() < 1e-3
