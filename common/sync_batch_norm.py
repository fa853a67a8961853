"""SyncBatchNorm that never waits for the GPU.

torch's layer leaves out the ranks without a value, by a mask. To know how many remain, the CPU waits for the
GPU three times in each forward pass. Where every rank has images there is nothing to leave out: the layers
here call torch's kernels in the same order on the same numbers, so the results have the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from rsa_detectron2.common import distributed


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm where each rank has at least one value per channel, and the layer keeps running
    statistics by a fixed ``momentum``. Its state dict is that of BatchNorm."""

    @torch.compiler.disable  # as torch.compile does with torch's layer: the graph ends here
    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, normalized over the ranks in train mode."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        self.num_batches_tracked.add_(1)
        return NormalizeOverRanks.apply(input, self.weight, self.bias, self)


class NormalizeOverRanks(torch.autograd.Function):
    """BatchNorm over the values of all ranks; it updates the running statistics of ``layer``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: SyncBatchNorm
    ) -> Tensor:
        x, eps = dense(x), layer.eps
        mean, invstd = torch.batch_norm_stats(x, eps)
        # The ranks may have images of different sizes, as in detection.
        count = mean.new_full((1,), x.numel() // x.shape[1])
        mine = torch.cat([mean, invstd, count])
        everyone = mine.new_empty(distributed.world_size(), len(mine))
        dist.all_gather_into_tensor(everyone, mine[None])
        means, invstds, counts = everyone.split([len(mean), len(mean), 1], dim=1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, layer.running_mean, layer.running_var, layer.momentum, eps, counts.flatten()
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        gradient, needed = dense(gradient), ctx.needs_input_grad[:3]
        total, total_x, for_weight, for_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, *needed
        )
        for_x = None
        if needed[0]:
            totals = torch.cat([total, total_x])
            dist.all_reduce(totals)
            for_x = torch.batch_norm_backward_elemt(
                gradient, x, mean, invstd, weight, *totals.chunk(2), counts
            )
        # DistributedDataParallel takes the mean of the ranks' gradients of weight and bias.
        return for_x, for_weight if needed[1] else None, for_bias if needed[2] else None, None


def dense(x: Tensor) -> Tensor:
    """``x`` in a layout of torch's kernels: channels_last, or else contiguous."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def without_waiting(module: nn.Module) -> nn.Module:
    """``module``, each nn.SyncBatchNorm of which has become a :class:`SyncBatchNorm`, in place.

    Every rank must have images in each of its passes.
    """
    for layer in module.modules():
        if type(layer) is nn.SyncBatchNorm:
            layer.__class__ = SyncBatchNorm
    return module
