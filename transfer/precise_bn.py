"""Precise BatchNorm statistics: those of many batches together, with fixed weights, instead of a
moving average.

The definition is the population estimate of "Rethinking Batch in BatchNorm" (Wu and Johnson, 2021),
as in fvcore.nn.precise_bn. But fvcore divides by zero when a layer gets an empty batch, as a mask
head does from images without objects, and it does not handle several processes, which see
different numbers of objects.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of ``model`` that are in training mode."""
    return [layer for layer in model.modules() if layer.training and isinstance(layer, _BatchNorm)]


@torch.no_grad()
def update_statistics(model: nn.Module, batches: Iterable) -> None:
    """Replace the running statistics of :func:`norm_layers` by those of all ``batches``, each run
    as ``model(batch)``.

    In a process group the statistics are those of all ranks' batches, the same on each rank. A layer
    that saw no values keeps its own, and so does each one when ``batches`` raises.
    """
    layers = norm_layers(model)
    # For each channel: the number of values, their sum, and the sum of their squares.
    moments = {
        layer: layer.running_mean.new_zeros(3, layer.num_features, dtype=torch.float64) for layer in layers
    }

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].float().transpose(0, 1).flatten(1)
        count = values.shape[1]
        if count:
            var, mean = (moment.double() for moment in torch.var_mean(values, 1, correction=0))
            moments[layer] += count * torch.stack([torch.ones_like(mean), mean, var + mean.square()])

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    kept = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    try:
        for batch in batches:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, buffers in zip(layers, kept):
            for buffer, before in zip(layer.buffers(), buffers):
                buffer.copy_(before)

    for layer in layers:
        if dist.is_initialized():
            dist.all_reduce(moments[layer])
        count, total, squares = moments[layer]
        if count[0]:
            mean = total / count
            layer.running_mean.copy_(mean)
            layer.running_var.copy_((squares / count - mean.square()).clamp(min=0))
