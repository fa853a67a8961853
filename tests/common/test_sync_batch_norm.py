"""SyncBatchNorm in two processes against BatchNorm over the joined batch, in float64.

torch's kernels for it exist on GPUs only. Here stand-ins, written from their definitions, take their place.
"""

from contextlib import ExitStack
from unittest import mock

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rsa_detectron2.common.sync_batch_norm import SyncBatchNorm, without_waiting
from rsa_detectron2.pretrain.engine.parallel import synchronize

COUNTS = 3, 5  # images of each rank


def along_channels(values, x):
    return values.view(1, -1, *[1] * (x.ndim - 2))


def sums(x):
    return x.transpose(0, 1).flatten(1).sum(1)


def stats(x, eps):
    var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
    return mean, (var + eps).rsqrt()


def gather_stats(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    count = counts.sum()
    mean = counts @ means / count
    var = counts @ (invstds**-2 - eps + (means - mean) ** 2) / count
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * var * count / (count - 1))
    return mean, (var + eps).rsqrt()


def normalize(x, weight, bias, mean, invstd, eps):
    x = (x - along_channels(mean, x)) * along_channels(invstd, x)
    return x if weight is None else x * along_channels(weight, x) + along_channels(bias, x)


def backward_sums(gradient, x, mean, invstd, weight, for_x, for_weight, for_bias):
    total, total_x = sums(gradient), sums(gradient * (x - along_channels(mean, x)))
    return total, total_x, total_x * invstd, total


def backward(gradient, x, mean, invstd, weight, total, total_x, counts):
    assert counts.dtype == torch.int32 and counts.is_contiguous()  # the kernel reads it as an array
    count = counts.sum()
    slope = along_channels(invstd**2 * total_x / count, x) * (x - along_channels(mean, x))
    result = (gradient - along_channels(total / count, x) - slope) * along_channels(invstd, x)
    return result if weight is None else result * along_channels(weight, x)


KERNELS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": normalize,
    "batch_norm_backward_reduce": backward_sums,
    "batch_norm_backward_elemt": backward,
}


class Calls(TorchDispatchMode):
    """Notes the names of torch's operators."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.add(operator.name())
        return operator(*arguments, **(options or {}))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(54, affine=False),
        nn.Linear(54, 2),
    ).double()


def step(model, x, gradient):
    """Output, running statistics and gradients of two steps."""
    x.requires_grad_()
    for _ in range(2):
        output = model(x)
        output.backward(gradient)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "x": x.grad, "gradients": gradients, "state": model.state_dict()}


def batch():
    torch.manual_seed(1)
    return torch.randn(sum(COUNTS), 4, 5, 5).double(), torch.randn(sum(COUNTS), 2).double()


def part_of_the_batch(rank, folder, layout):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=len(COUNTS)
    )
    x, gradient = (part.split(COUNTS)[rank] for part in batch())
    model, calls = synchronize(network()), Calls()
    assert sum(type(layer) is SyncBatchNorm for layer in model.modules()) == 3
    with ExitStack() as stack:
        for name, kernel in KERNELS.items():
            stack.enter_context(mock.patch.object(torch, name, kernel))
        with calls:
            result = step(model, x.to(memory_format=layout, copy=True), gradient)
        # Each of these makes the CPU wait for the GPU: the size of the result depends on values.
        assert calls.names and not calls.names & {
            "aten::index.Tensor",
            "aten::nonzero",
            "aten::_local_scalar_dense",
        }
        model.eval()
        result["evaluated"] = model(x)
    torch.save(result, folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "layout", [pytest.param(torch.contiguous_format, marks=pytest.mark.slow), torch.channels_last]
)
def test_two_processes_equal_one_with_the_joined_batch(tmp_path, layout):
    torch.multiprocessing.spawn(part_of_the_batch, (tmp_path, layout), nprocs=len(COUNTS))
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in (0, 1))
    model = network()
    whole = step(model, *batch())
    whole["evaluated"] = model.eval()(batch()[0])
    for name in ("output", "x", "evaluated"):
        joined = torch.cat([first[name], second[name]])
        torch.testing.assert_close(joined, whole[name], rtol=1e-10, atol=1e-12)
    for name, gradient in whole["gradients"].items():
        total = first["gradients"][name] + second["gradients"][name]
        torch.testing.assert_close(total, gradient, rtol=1e-10, atol=1e-12)
    for part in (first, second):
        assert list(part["state"]) == list(whole["state"])
        for name, tensor in whole["state"].items():
            torch.testing.assert_close(part["state"][name], tensor, rtol=1e-10, atol=1e-12)


def test_one_process_is_left_to_batch_norm():
    """Without a process group, as where a trained network is used."""
    x, gradient = batch()
    whole, same = step(network(), x.clone(), gradient), step(synchronize(network()), x.clone(), gradient)
    torch.testing.assert_close(same, whole, rtol=0, atol=0)


def test_activations_of_timms_layers_stay():
    """SKNet's and ResNeSt's layers hold an activation, which torch's own conversion drops."""
    torch.manual_seed(0)
    model = timm.create_model("skresnet18", num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    before, names = model(images), list(model.state_dict())
    model = synchronize(model)
    assert torch.equal(model(images), before) and list(model.state_dict()) == names
    assert all(
        isinstance(layer, SyncBatchNorm)
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    )


def test_only_torchs_own_layers_are_replaced():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3))
    assert without_waiting(model) is model
    assert [type(layer) for layer in model] == [SyncBatchNorm, nn.BatchNorm2d]
