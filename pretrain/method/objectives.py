"""The objectives: RSA (paper, eq. 2, 4-6) and the methods that it is compared with.

Each is a function of the networks, the views and beta, which only rsa and simsiam_rsa use. ``weak`` and
``aggressive`` are float [B, 2, 3, H, W]; ``weak`` is None for methods that do not use it (``Method.weak``).
It returns ``loss``, a scalar to minimize, in float32 at least, and detached metrics: the parts of the loss,
the mean cosines of the pairs, and ``feature_std``. That is the standard deviation over the batch of the
l2-normalized online outputs, times sqrt(dim): about 1 when healthy, 0 when collapsed. A trailing underscore
marks the other one of two views.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx

from rsa_detectron2.common import distributed
from rsa_detectron2.pretrain.method.networks import (
    Networks,
    byol_heads,
    moco_heads,
    simclr_heads,
    simsiam_heads,
)


def cosine(q: Tensor, z: Tensor) -> Tensor:
    """cos(q, z): [B, D] x 2 -> [B], in float32 at least, whatever autocast gave."""
    q, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, z))
    return F.cosine_similarity(q, z, dim=1)


def unit(x: Tensor) -> Tensor:
    """Rows of [B, D] to length 1, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def distance(q: Tensor, z: Tensor) -> Tensor:
    """d(q, z) = 2 - 2 cos(q, z) (eq. 2): [B, D] x 2 -> [B]."""
    return 2 - 2 * cosine(q, z)


def rsa(networks: Networks, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
    """RSA (eq. 4-5), both directions: the mean over the batch of

    L = (1-β)·[d(z_a, z_w') + d(z_a', z_w)] + β·[d(z_a, sg z_a') + d(z_a', sg z_a)].

    The aggressive view predicts the target projection of the other weak view and, with weight
    beta, the online prediction of the other aggressive view under stop-gradient.
    """
    q, q_ = networks.predict(aggressive[:, 0]), networks.predict(aggressive[:, 1])
    z, z_ = networks.project_target(weak[:, 0]), networks.project_target(weak[:, 1])
    loss_aw = (distance(q, z_) + distance(q_, z)).mean()
    loss_aa = (distance(q, q_.detach()) + distance(q_, q.detach())).mean()
    return {
        "loss": (1 - beta) * loss_aw + beta * loss_aa,
        **watch(q, q_, loss_aw=loss_aw, loss_aa=loss_aa, cos_aw=1 - loss_aw / 4, cos_aa=1 - loss_aa / 4),
    }


def byol(networks: Networks, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
    """BYOL on two aggressive views (AA), symmetrized."""
    loss, q, q_ = symmetric_byol(networks, aggressive[:, 0], aggressive[:, 1])
    return {"loss": loss, **watch(q, q_, loss_aa=loss, cos_aa=1 - loss / 4)}


def byol_aw(networks: Networks, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
    """BYOL on an aggressive and a weak view (AW), symmetrized."""
    loss, q, q_ = symmetric_byol(networks, aggressive[:, 0], weak[:, 1])
    return {"loss": loss, **watch(q, q_, loss_aw=loss, cos_aw=1 - loss / 4)}


def symmetric_byol(networks: Networks, view: Tensor, view_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BYOL's symmetric loss (Grill et al. 2020, eq. 2) of two views [B, 3, H, W], and both predictions
    [B, D]."""
    q, q_ = networks.predict(view), networks.predict(view_)
    z, z_ = networks.project_target(view), networks.project_target(view_)
    return (distance(q, z_) + distance(q_, z)).mean(), q, q_


def simsiam(networks: Networks, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
    """SimSiam (Chen and He 2021, eq. 2) on two aggressive views.

    Each prediction is compared with the projection of the other view under stop-gradient, from
    the same forward pass.
    """
    z, z_ = networks.online(aggressive[:, 0]), networks.online(aggressive[:, 1])
    p, p_ = networks.predictor(z), networks.predictor(z_)
    loss = -0.5 * (cosine(p, z_.detach()) + cosine(p_, z.detach())).mean()
    return {"loss": loss, **watch(p, p_, loss_aa=loss, cos_aa=-loss)}


def simsiam_rsa(networks: Networks, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
    """SimSiam with RSA (paper, 4.7): eq. 5 in negative cosines.

    SimSiam has no target network: the online network under stop-gradient takes its place.
    """
    # Predict first: autocast caches its casts of the weights, and those made under stop-gradient would have
    # no gradient.
    p, p_ = networks.predict(aggressive[:, 0]), networks.predict(aggressive[:, 1])
    z, z_ = networks.project_target(weak[:, 0]), networks.project_target(weak[:, 1])
    loss_aw = -0.5 * (cosine(p, z_) + cosine(p_, z)).mean()
    loss_aa = -0.5 * (cosine(p, p_.detach()) + cosine(p_, p.detach())).mean()
    return {
        "loss": (1 - beta) * loss_aw + beta * loss_aa,
        **watch(p, p_, loss_aw=loss_aw, loss_aa=loss_aa, cos_aw=-loss_aw, cos_aa=-loss_aa),
    }


def simclr(networks: Networks, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
    """SimCLR's NT-Xent (Chen et al. 2020, eq. 1) on two aggressive views.

    Each view picks the other one of its image out of all views of a micro-batch on all ranks.
    """
    z, z_ = (unit(networks.predict(aggressive[:, i])) for i in (0, 1))
    views = torch.stack([z, z_], 1).flatten(0, 1)  # rows 2i and 2i + 1 are the views of image i
    everyone = gather(views)
    own = distributed.rank() * len(views) + torch.arange(len(views), device=views.device)
    logits = similarities(views, everyone) / networks.temperature
    loss = F.cross_entropy(logits.scatter(1, own[:, None], -torch.inf), own ^ 1)
    return {"loss": loss, **watch(z, z_, cos_aa=cosine(z, z_).mean())}


def moco(networks: Networks, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
    """MoCo v2 (Chen et al. 2020), symmetrized.

    Each aggressive view picks the key of the other, its target projection, out of the keys of
    earlier steps. The keys of both views will be negatives of later steps.
    """
    q, q_ = (unit(networks.predict(aggressive[:, i])) for i in (0, 1))
    k, k_ = (unit(networks.project_target(aggressive[:, i])) for i in (0, 1))
    loss = info_nce(q, k_, networks) + info_nce(q_, k, networks)
    networks.queue.pending.append(gather(torch.cat([k, k_])))
    return {"loss": loss, **watch(q, q_, cos_aa=0.5 * (cosine(q, k_) + cosine(q_, k)).mean())}


def info_nce(q: Tensor, k: Tensor, networks: Networks) -> Tensor:
    """InfoNCE (He et al. 2020, eq. 1) of unit queries and their keys, [B, D] each, against the queue."""
    logits = (
        torch.cat([cosine(q, k)[:, None], similarities(q, networks.queue.keys)], 1) / networks.temperature
    )
    return -logits.log_softmax(1)[:, 0].mean()


@dataclass(frozen=True)
class Method:
    """What makes a method: its objective, and the networks that it needs."""

    objective: Callable
    heads: Callable  # one of networks.py
    target: bool = False  # a target network that follows the online one
    queue: bool = False  # a queue of earlier steps' keys
    weak: bool = True  # its objective uses the weak views, too
    fix_predictor_lr: bool = False  # the predictor's learning rate does not decay (Chen and He 2021, 4.2)


# The keys are those of config.METHODS.
METHODS = {
    "rsa": Method(rsa, byol_heads, target=True),
    "byol": Method(byol, byol_heads, target=True, weak=False),
    "byol_aw": Method(byol_aw, byol_heads, target=True),
    "simsiam": Method(simsiam, simsiam_heads, weak=False, fix_predictor_lr=True),
    "simsiam_rsa": Method(simsiam_rsa, simsiam_heads, fix_predictor_lr=True),
    "simclr": Method(simclr, simclr_heads, weak=False),
    "moco": Method(moco, moco_heads, target=True, queue=True, weak=False),
}


def similarities(q: Tensor, keys: Tensor) -> Tensor:
    """Cosines of unit rows, [B, D] and [N, D] -> [B, N], in the precision of the rows under autocast too."""
    with torch.autocast(q.device.type, enabled=False):
        return q @ keys.T


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks one after the other, with gradient: [B, D] -> [world size * B, D]."""
    return Gather.apply(x) if distributed.world_size() > 1 else x


class Gather(torch.autograd.Function):
    """[B, D] of each rank -> [world size * B, D] on every rank.

    Backward sums a row's gradient over the ranks. DistributedDataParallel then takes the mean over the
    ranks, and the result is the gradient of the mean of their losses.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(distributed.world_size())]
        if not isinstance(x, FakeTensor):  # memory.py counts bytes of tensors without values
            dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(distributed.world_size())[distributed.rank()]


def watch(q: Tensor, q_: Tensor, **figures: Tensor) -> dict[str, Tensor]:
    """``figures`` detached, and the feature_std of two views' outputs [B, D]."""
    features = unit(torch.cat([q, q_]).detach())
    return {
        **{name: figure.detach() for name, figure in figures.items()},
        "feature_std": features.std(0).mean() * features.shape[1] ** 0.5,
    }
