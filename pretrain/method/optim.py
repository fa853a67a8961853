"""LARS for ImageNet-1K, SGD for the rest (paper, 4.1)."""

import torch
from fvcore.common.config import CfgNode
from timm.optim import Lars

from rsa_detectron2.pretrain.method.networks import Networks


def build_optimizer(
    networks: Networks, solver: CfgNode, fix_predictor_lr: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of a configuration's SOLVER over the online network and the predictor.

    :func:`set_lr` sets the learning rate of each step.

    LARS: 1-D parameters (biases, BatchNorm) get neither weight decay nor layer-wise scaling. timm's Lars does
    not scale a group whose weight decay is 0, unless ``always_adapt`` is set.
    SGD: weight decay on everything, as in the authors' small recipes.
    """
    groups, decay = [], {"weight_decay": solver.WEIGHT_DECAY}
    for fixed, module in ((False, networks.online), (fix_predictor_lr, networks.predictor)):
        parameters = list(module.parameters())
        parts = [(parameters, decay)]
        if solver.OPTIMIZER == "lars":
            matrices = [p for p in parameters if p.ndim > 1]
            vectors = [p for p in parameters if p.ndim <= 1]
            parts = [(matrices, decay | {"always_adapt": True}), (vectors, {"weight_decay": 0.0})]
        # Not every method has a predictor.
        groups += [{"params": part, "fixed": fixed, **settings} for part, settings in parts if part]
    if solver.OPTIMIZER == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=solver.MOMENTUM)
    return Lars(groups, lr=0.0, momentum=solver.MOMENTUM, trust_coeff=solver.TRUST_COEFFICIENT)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, peak: float) -> None:
    """Set the learning rate of a step: ``lr``, or ``peak`` for parameters whose rate is fixed."""
    for group in optimizer.param_groups:
        group["lr"] = peak if group["fixed"] else lr
