"""Online and target networks: backbone f, and each method's projector g and predictor q (paper, 4.1)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import timm
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rsa_detectron2.common.errors import InputError

if TYPE_CHECKING:  # objectives.py imports this file
    from rsa_detectron2.pretrain.method.objectives import Method

RESNET_MODULES = ("resnet", "resnest", "sknet")  # of timm.models; their networks share one class
FAMILIES = (
    "resnet18, 34, 50, 101 and 152, resnext50_32x4d, wide_resnet50_2, and timm's other variants of these"
)


def build_backbone(name: str, small_stem: bool = False) -> nn.Module:
    """A timm ResNet without classifier: [B, 3, H, W] -> [B, D].

    The state dict of a plain ResNet has torchvision's names. ``small_stem``: a 3x3 stride-1 convolution and
    no max-pool, for images of 32 or 64 pixels. Raises InputError for a name that is no ResNet of timm's,
    that asks for pretrained weights, or whose stem cannot be replaced.
    """
    plain, dot, tag = name.partition(".")
    if not timm.models.is_model_in_modules(plain, RESNET_MODULES):
        what = "a timm model, but no ResNet" if timm.is_model(plain) else "not a model that timm knows"
        raise InputError(f"MODEL.BACKBONE {name!r} is {what}: the backbone must be a ResNet ({FAMILIES})")
    if dot:
        raise InputError(
            f"MODEL.BACKBONE {name!r} names pretrained weights ({tag}), which pre-training does not load: "
            f"give {plain!r}"
        )
    backbone = timm.create_model(name, num_classes=0, zero_init_last=True)
    if small_stem:
        if not isinstance(backbone.conv1, nn.Conv2d):
            raise InputError(
                f"MODEL.SMALL_STEM replaces a single 7x7 convolution, but {name} begins with several: give "
                "MODEL.BACKBONE without a deep stem, such as resnet18, or MODEL.SMALL_STEM False"
            )
        # Initialized as PyTorch does, unlike timm's other convolutions: the authors' code does so.
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone


def check_backbone(name: str, small_stem: bool = False) -> None:
    """Raise the InputError of :func:`build_backbone` without building it."""
    with torch.device("meta"):
        build_backbone(name, small_stem)


def load_backbone(backbone: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load tensors into a network of :func:`build_backbone`.

    ``num_batches_tracked`` may be missing. Raises InputError that names their ``source`` where any other
    tensor is missing, left over, or of another shape.
    """
    needed, given = (
        {name: tensor.shape for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
        for tensors in (backbone.state_dict(), state)
    )
    if wrong := [name for name in needed | given if needed.get(name) != given.get(name)]:
        raise InputError(
            f"{source} holds another network: {len(wrong)} tensors are missing, left over or of another "
            f"shape, {wrong[0]} for one"
        )
    backbone.load_state_dict(state, strict=False)


def mlp(in_dim: int, hidden_dim: int, out_dim: int, bias: bool = False) -> nn.Sequential:
    """[B, in_dim] -> [B, out_dim]; ``bias`` is the last layer's."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=bias),
    )


# Heads: (in_dim, hidden_dim, out_dim) -> (projector [B, in_dim] -> [B, out_dim],
# predictor [B, out_dim] -> [B, out_dim]).


def byol_heads(in_dim: int, hidden_dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
    """RSA's and BYOL's."""
    return mlp(in_dim, hidden_dim, out_dim), mlp(out_dim, hidden_dim, out_dim)


def simsiam_heads(in_dim: int, hidden_dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
    """SimSiam's (Chen and He 2021, section 3): a projector of three layers, each with BatchNorm; a
    predictor with a bottleneck."""
    projector = nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        *mlp(hidden_dim, hidden_dim, out_dim),
        nn.BatchNorm1d(out_dim, affine=False),
    )
    return projector, mlp(out_dim, out_dim // 4, out_dim, bias=True)


def simclr_heads(in_dim: int, hidden_dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
    """A projector like BYOL's; nothing predicts."""
    return mlp(in_dim, hidden_dim, out_dim), nn.Identity()


def moco_heads(in_dim: int, hidden_dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
    """MoCo v2's projector, without BatchNorm; nothing predicts."""
    projector = nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )
    return projector, nn.Identity()


class Branch(nn.Module):
    """Backbone and projector: images [B, 3, H, W] -> projection z [B, out_dim]."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images.contiguous(memory_format=torch.channels_last)))


class KeyQueue(nn.Module):
    """MoCo's queue: ``keys``, float32 [size, dim], unit vectors in a ring, random at first.

    ``pending`` gathers the keys of a step, [B, dim] of each micro-batch. They enter the queue at the end of
    the step, so that every negative comes from an earlier step, and checkpoints need not hold ``pending``.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.pending = []

    def end_step(self, skipped: bool) -> None:
        """Replace the oldest keys by the pending ones, or drop these after a skipped step."""
        if not skipped:
            keys = torch.cat(self.pending)
            slots = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.keys)
            self.keys[slots] = keys
            self.oldest.copy_((self.oldest + len(keys)) % len(self.keys))
        self.pending.clear()


class Networks(nn.Module):
    """The networks of ``method``: online (backbone, projector, predictor), target and queue.

    The target (backbone, projector) follows the online network slowly; the queue holds keys of earlier
    steps. Either is None where the method has none. ``model``: the MODEL section of a configuration.

    The method's ``objective(networks, weak, aggressive, beta)`` runs inside ``forward``, so that
    DistributedDataParallel sees one forward for each backward. Each view goes through on its own, so
    BatchNorm statistics are per view. The target stays in train mode; the EMA copies parameters, not buffers.
    """

    def __init__(self, backbone: nn.Module, method: Method, model: CfgNode):
        super().__init__()
        projector, predictor = method.heads(backbone.num_features, model.HIDDEN_DIM, model.OUT_DIM)
        self.online = Branch(backbone, projector)
        self.predictor = predictor
        self.target = copy.deepcopy(self.online).requires_grad_(False) if method.target else None
        self.queue = KeyQueue(model.QUEUE, model.OUT_DIM) if method.queue else None
        self.objective = method.objective
        self.temperature = model.TEMPERATURE

    def forward(self, weak: Tensor, aggressive: Tensor, beta: float) -> dict[str, Tensor]:
        return self.objective(self, weak, aggressive, beta)

    def predict(self, view: Tensor) -> Tensor:
        """Online prediction q(g(f(view))): [B, 3, H, W] -> [B, out_dim]."""
        return self.predictor(self.online(view))

    @torch.no_grad()
    def project_target(self, view: Tensor) -> Tensor:
        """Projection under stop-gradient: [B, 3, H, W] -> [B, out_dim].

        The target network gives it, or the online network where a method has no target.
        """
        return (self.target or self.online)(view)

    def load_backbones(self, state: dict[str, Tensor], source: str) -> None:
        """:func:`load_backbone` of the online and the target network."""
        for branch in filter(None, (self.online, self.target)):
            load_backbone(branch.backbone, state, source)

    def compile_backbones(self) -> None:
        """torch.compile the backbones in place, which keeps the names of the tensors in checkpoints."""
        for branch in filter(None, (self.online, self.target)):
            branch.backbone.compile()

    def end_step(self, tau: float, skipped: bool = False) -> None:
        """Call it after each optimizer step: the target follows, and the queue takes the step's keys.

        A skipped step changes neither. If its overflow has reached the running statistics of a BatchNorm,
        they are reset, because they would never recover.
        """
        if skipped:
            for layer in self.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not (
                    layer.running_mean.isfinite().all() and layer.running_var.isfinite().all()
                ):
                    layer.reset_running_stats()
        elif self.target is not None:
            self.update_target(tau)
        if self.queue is not None:
            self.queue.end_step(skipped)

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """EMA: target <- tau * target + (1 - tau) * online, over all parameters at once."""
        get_ema_multi_avg_fn(tau)(list(self.target.parameters()), list(self.online.parameters()), None)


def build_networks(cfg: CfgNode, method: Method) -> Networks:
    """The networks of a configuration for one of ``objectives.METHODS``, in channels_last.

    They are initialized from torch's random state. Raises InputError as :func:`build_backbone` does.
    """
    backbone = build_backbone(cfg.MODEL.BACKBONE, cfg.MODEL.SMALL_STEM)
    return Networks(backbone, method, cfg.MODEL).to(memory_format=torch.channels_last)
