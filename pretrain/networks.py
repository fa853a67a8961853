"""Online and target networks: backbone f, projector g, predictor q (paper, 4.1)."""

import copy

import timm
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pretrain.config import InputError


def build_backbone(name, small_stem=False):
    """A timm ResNet without classifier, [B, 3, H, W] -> [B, D]; its state dict has torchvision's names.

    ``small_stem``: a 3x3 stride-1 convolution and no max-pool, for images of 32 or 64 pixels.
    """
    try:
        backbone = timm.create_model(name, num_classes=0, zero_init_last=True)
    except Exception as error:  # an unknown name, or an architecture without residual branches
        raise InputError(f"MODEL.BACKBONE {name!r} is not a ResNet that timm can build: {error}") from None
    if small_stem:
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does
        backbone.maxpool = nn.Identity()
    return backbone


def mlp(in_dim, hidden_dim, out_dim):
    """Projector and predictor: [B, in_dim] -> [B, out_dim]."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
                         nn.Linear(hidden_dim, out_dim, bias=False))


class Branch(nn.Module):
    """Backbone and projector: images [B, 3, H, W] -> projection z [B, out_dim]."""

    def __init__(self, backbone, projector):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images):
        return self.projector(self.backbone(images.contiguous(memory_format=torch.channels_last)))


class Networks(nn.Module):
    """The online network (backbone, projector, predictor) and its slowly following target (backbone, projector).

    ``objective(networks, weak, aggressive, beta)`` is one of ``objectives.METHODS``; it runs inside ``forward`` so
    that DistributedDataParallel sees one forward for each backward. Each view goes through on its own, so BatchNorm
    statistics are per view. The target stays in train mode; the EMA copies parameters, not buffers.
    """

    def __init__(self, backbone, hidden_dim, out_dim, objective):
        super().__init__()
        self.online = Branch(backbone, mlp(backbone.num_features, hidden_dim, out_dim))
        self.predictor = mlp(out_dim, hidden_dim, out_dim)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.objective = objective

    def forward(self, weak, aggressive, beta):
        return self.objective(self, weak, aggressive, beta)

    def predict(self, view):
        """Online prediction q(g(f(view))): [B, 3, H, W] -> [B, out_dim]."""
        return self.predictor(self.online(view))

    @torch.no_grad()
    def project_target(self, view):
        """Target projection g'(f'(view)): [B, 3, H, W] -> [B, out_dim], without gradient."""
        return self.target(view)

    @torch.no_grad()
    def update_target(self, tau):
        """EMA: target <- tau * target + (1 - tau) * online, over all parameters at once."""
        get_ema_multi_avg_fn(tau)(list(self.target.parameters()), list(self.online.parameters()), None)


def build_networks(cfg, objective):
    """Networks of a configuration, initialised from torch's current seed, in channels_last."""
    backbone = build_backbone(cfg.MODEL.BACKBONE, cfg.MODEL.SMALL_STEM)
    networks = Networks(backbone, cfg.MODEL.HIDDEN_DIM, cfg.MODEL.OUT_DIM, objective)
    return networks.to(memory_format=torch.channels_last)
