"""Each method's networks: their parts, what learns, what follows as a target, and that processes agree."""

import math
from collections import deque

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from rsa_detectron2.pretrain import config
from rsa_detectron2.pretrain.method.networks import (
    KeyQueue,
    build_backbone,
    build_networks,
    check_backbone,
)
from rsa_detectron2.pretrain.method.objectives import METHODS


def networks_of(name, **model):
    """A method's networks around a small ResNet-18 whose residual branches are all open."""
    cfg = config.get_cfg()
    model = {"BACKBONE": "resnet18", "SMALL_STEM": True, "HIDDEN_DIM": 16, "OUT_DIM": 8, "QUEUE": 12, **model}
    cfg.merge_from_list([item for key, value in model.items() for item in (f"MODEL.{key}", value)])
    torch.manual_seed(0)
    networks = build_networks(cfg, METHODS[name]).double().train()
    for branch in filter(None, (networks.online, networks.target)):
        for block in branch.backbone.modules():
            if hasattr(block, "bn2"):
                torch.nn.init.constant_(block.bn2.weight, 0.7)
    return networks


def views(batch=4):
    return torch.randn(2, batch, 2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_methods_are_those_of_the_configuration():
    assert tuple(METHODS) == config.METHODS


PARTS = {
    "rsa": "online.backbone online.projector predictor target.backbone target.projector",
    "byol": "online.backbone online.projector predictor target.backbone target.projector",
    "byol_aw": "online.backbone online.projector predictor target.backbone target.projector",
    "simsiam": "online.backbone online.projector predictor",
    "simsiam_rsa": "online.backbone online.projector predictor",
    "simclr": "online.backbone online.projector",
    "moco": "online.backbone online.projector queue target.backbone target.projector",
}


@pytest.mark.parametrize("name", PARTS)
def test_every_parameter_learns_and_no_target_does(name):
    """DistributedDataParallel waits for a gradient of each parameter that requires one."""
    networks = networks_of(name)
    parts = {
        n.split(".")[0] if n.startswith(("predictor", "queue")) else ".".join(n.split(".")[:2])
        for n in networks.state_dict()
    }
    assert parts == set(PARTS[name].split())
    figures = networks(*views(), 0.4)
    assert figures["loss"].requires_grad and figures["loss"].ndim == 0 and 0 < figures["feature_std"] < 1.5
    assert not any(value.requires_grad for figure, value in figures.items() if figure != "loss")
    figures["loss"].backward()
    for n, parameter in networks.named_parameters():
        if n.startswith("target."):
            assert parameter.grad is None and not parameter.requires_grad, n
        else:
            assert parameter.grad is not None, n
            assert parameter.ndim == 1 or parameter.grad.abs().max() > 0, n


def layers(module):
    return " ".join(type(layer).__name__ for layer in module.children())


def test_heads_are_those_of_the_papers():
    rsa, simsiam, simclr, moco = map(networks_of, ("rsa", "simsiam", "simclr", "moco"))
    two = "Linear BatchNorm1d ReLU Linear"
    assert layers(rsa.online.projector) == layers(rsa.predictor) == layers(simclr.online.projector) == two
    assert rsa.online.projector[3].bias is None and rsa.predictor[3].bias is None
    assert (
        layers(simsiam.online.projector)
        == "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d"
    )
    assert not simsiam.online.projector[7].affine and simsiam.online.projector[6].bias is None
    assert layers(simsiam.predictor) == two and simsiam.predictor[0].out_features == 2 == 8 // 4
    assert layers(moco.online.projector) == "Linear ReLU Linear"
    assert simclr.predictor(torch.ones(2)).sum() == 2  # the identity
    assert layers(simclr.predictor) == layers(moco.predictor) == ""
    assert rsa.queue is simsiam.queue is simsiam.target is simclr.target is None


def test_without_a_target_the_online_network_stands_in():
    networks, (weak, _) = networks_of("simsiam_rsa"), views()
    projection = networks.project_target(weak[:, 0])
    assert not projection.requires_grad
    torch.testing.assert_close(projection, networks.online(weak[:, 0]).detach())
    before = {n: p.clone() for n, p in networks.named_parameters()}
    networks.end_step(0.5)
    assert all(torch.equal(p, before[n]) for n, p in networks.named_parameters())


def test_an_overflow_that_is_skipped_leaves_no_running_statistic_behind():
    """As in float16, the forward pass overflowed and the scaler skipped the step."""
    networks = networks_of("rsa")
    weak, strong = views()
    networks(weak, strong, 0.5)
    with torch.no_grad():
        networks.predict(torch.full_like(weak[:, 0], math.inf))
    broken = [name for name, buffer in networks.named_buffers() if not buffer.isfinite().all()]
    assert broken and all(name.startswith(("online.", "predictor.")) for name in broken)
    kept = {name: buffer.clone() for name, buffer in networks.named_buffers() if name.startswith("target.")}
    networks.end_step(0.5, skipped=True)
    buffers = dict(networks.named_buffers())
    assert all(buffer.isfinite().all() for buffer in buffers.values())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in kept.items())


def test_target_follows_unless_the_step_was_skipped():
    networks = networks_of("moco")
    with torch.no_grad():
        for parameter in networks.online.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in networks.target.parameters()]
    queue = networks.queue.keys.clone()
    networks(*views(), None)
    networks.end_step(0.75, skipped=True)
    assert all(map(torch.equal, networks.target.parameters(), before)) and networks.queue.pending == []
    assert torch.equal(networks.queue.keys, queue)
    networks(*views(), None)
    networks.end_step(0.75)
    for target, online, old in zip(networks.target.parameters(), networks.online.parameters(), before):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * online)
    assert (networks.queue.keys != queue).any(
        1
    ).sum() == 8 and networks.queue.pending == []  # two keys for each image


def test_compiled_backbones_compute_the_same(monkeypatch):
    """Loss, gradients and names of one step agree in float64. The graphs run as they are, without a C++
    compiler.
    """
    compile_, graphs = torch.compile, []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, backend=backend, **options))
    plain, compiled = networks_of("rsa"), networks_of("rsa")
    compiled.compile_backbones()
    losses = [networks(*views(), 0.4)["loss"] for networks in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert graphs and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-10)
    for (name, expected), (found, parameter) in zip(plain.named_parameters(), compiled.named_parameters()):
        assert name == found
        if expected.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-8, atol=1e-12)
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_queue_is_a_list_that_forgets_its_oldest():
    """Compared with a deque in steps of several micro-batches, past the end of the ring, and saved in
    between."""
    torch.manual_seed(0)
    queue = KeyQueue(7, 3)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(7))
    reference = deque(queue.keys.tolist(), maxlen=7)
    for step, sizes in enumerate([(2, 1), (3, 3), (4,), (1, 1), (7,), (5,)]):
        skipped = step == 2
        for size in sizes:
            keys = torch.randn(size, 3)
            queue.pending.append(keys)
            if not skipped:
                reference.extend(keys.tolist())
        before = sorted(queue.keys.tolist())
        queue.end_step(skipped)
        assert sorted(queue.keys.tolist()) == sorted(reference)
        assert not skipped or sorted(queue.keys.tolist()) == before
        reloaded = KeyQueue(7, 3)
        reloaded.load_state_dict(queue.state_dict())
        queue = reloaded
    assert queue.keys.roll(-int(queue.oldest), 0).tolist() == list(reference)  # in their order, oldest first


def half_a_batch(rank, folder):
    """One of two processes: the losses and gradients of its half of the batch, and its queue."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(
        {
            name: step_of(name, [view[2 * rank : 2 * rank + 2] for view in views()], DistributedDataParallel)
            for name in ("simclr", "moco")
        },
        folder / f"{rank}.pth",
    )
    torch.distributed.destroy_process_group()


def step_of(name, batch, wrap=lambda networks: networks):
    networks = networks_of(name).eval()  # without BatchNorm, of which each process has its own
    model = wrap(networks)
    loss = model(*batch, None)["loss"]
    loss.backward()
    networks.end_step(0.9)
    return {
        "loss": loss.detach(),
        "queue": networks.queue.keys if networks.queue else None,
        "gradients": {n: p.grad for n, p in networks.named_parameters() if p.requires_grad},
    }


def test_two_processes_equal_one(tmp_path):
    """Negatives and their gradients come from all processes, so two halves of a batch give the gradient of
    the whole.
    """
    torch.multiprocessing.spawn(half_a_batch, (tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    for name in ("simclr", "moco"):
        whole, first, second = step_of(name, views()), halves[0][name], halves[1][name]
        torch.testing.assert_close((first["loss"] + second["loss"]) / 2, whole["loss"])
        assert whole["gradients"]["online.backbone.conv1.weight"].abs().max() > 1e-6
        for n, gradient in whole["gradients"].items():
            torch.testing.assert_close(first["gradients"][n], gradient, rtol=1e-8, atol=1e-12)
            assert torch.equal(first["gradients"][n], second["gradients"][n])
    assert torch.equal(first["queue"], second["queue"])
    torch.testing.assert_close(first["queue"].sort(0).values, whole["queue"].sort(0).values)


@pytest.mark.parametrize(
    "name, small_stem, message",
    [
        (
            "resnet18d",
            True,
            "SMALL_STEM replaces a single 7x7 convolution, but resnet18d begins with several",
        ),
        (
            "resnet18.a1_in1k",
            False,
            r"names pretrained weights \(a1_in1k\), which pre-training does not load: give 'resnet18'",
        ),
        ("resnet18.", False, "give 'resnet18'"),
        (
            "convnext_tiny",
            False,
            r"a timm model, but no ResNet: the backbone must be a ResNet \(resnet18, 34, 50",
        ),
        ("vit_small_patch16_224", True, "a timm model, but no ResNet"),
        ("resnetv2_50", False, "a timm model, but no ResNet"),
        ("hf-hub:timm/resnet50.a1_in1k", False, "not a model that timm knows: the backbone must be a ResNet"),
        ("", False, "not a model that timm knows"),
    ],
)
def test_other_backbones_are_refused_in_one_line(name, small_stem, message):
    with pytest.raises(config.InputError, match=message) as error:
        check_backbone(name, small_stem)
    assert f"MODEL.BACKBONE {name!r}" in str(error.value) or name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["resnet18d", "resnext50_32x4d", "wide_resnet50_2", "skresnet18", "resnest14d"]
)
def test_the_families_that_messages_name_are_built(name):
    with torch.device("meta"):
        assert build_backbone(name)(torch.empty(2, 3, 64, 64)).shape == (2, build_backbone(name).num_features)
