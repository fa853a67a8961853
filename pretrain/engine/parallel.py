"""The networks of a run with several processes: gradients are exchanged, BatchNorm may be synchronized."""

import timm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rsa_detectron2.common import distributed
from rsa_detectron2.common.distributed import OWN_BUFFERS
from rsa_detectron2.common.sync_batch_norm import SyncBatchNorm, without_waiting
from rsa_detectron2.pretrain.method.networks import Networks


def wrap(networks: Networks) -> nn.Module:
    """The DistributedDataParallel of ``networks``; in a single process, the networks themselves."""
    if distributed.world_size() == 1:
        return networks
    device = distributed.device()
    # Checkpoints and evaluations use rank 0's running statistics of BatchNorm.
    model = DistributedDataParallel(
        networks,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **OWN_BUFFERS,
    )
    settle_buckets(model)
    return model


def settle_buckets(model: DistributedDataParallel) -> None:
    """Give the gradient buckets their final layout before the first step.

    DistributedDataParallel lays its buckets out anew after the first backward pass, in the order in which
    gradients arrived. A gradient's place in a bucket decides in which order all-reduce adds the processes'
    parts. From three processes on, the first step of a resumed run would therefore round differently from
    that step of an uninterrupted run.

    So this is the first backward pass. Every parameter gets a gradient of zero, the last parameter first,
    much as in a real pass. It uses neither the network nor the random state.
    ``find_unused_parameters=True`` would keep the first layout, but it walks the graph in each step.
    """
    networks = model.module
    networks.forward = lambda _: sum(p.sum() * 0 for p in networks.parameters() if p.requires_grad)
    model(None).backward()
    del networks.forward
    networks.zero_grad(set_to_none=True)


def convert_batch_norm(networks: Networks, wanted: bool) -> tuple[Networks, int]:
    """Replace BatchNorm by SyncBatchNorm, if it is ``wanted`` and possible.

    Returns the networks, and how many processes share BatchNorm's statistics.
    """
    ranks = distributed.world_size()
    if not wanted or ranks == 1:
        return networks, 1
    if distributed.device().type == "cuda":
        return synchronize(networks), ranks
    if distributed.rank() == 0:
        print("warning: SyncBatchNorm needs GPUs; each process normalizes over its own micro-batch")
    return networks, 1


def synchronize(networks: nn.Module) -> nn.Module:
    """``networks`` with SyncBatchNorm in place of BatchNorm; the tensors and their names stay."""
    networks = without_waiting(timm.layers.convert_sync_batchnorm(networks))
    for layer in networks.modules():
        if type(layer) is timm.layers.SyncBatchNormAct:
            layer.__class__ = SyncBatchNormAct
    return networks


class SyncBatchNormAct(timm.layers.SyncBatchNormAct, SyncBatchNorm):
    """timm's BatchNorm with an activation after it, of SKNet and ResNeSt."""
