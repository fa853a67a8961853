"""LARS for ImageNet-1K, SGD for the rest (paper, 4.1)."""

import torch
from timm.optim import Lars


def build_optimizer(networks, name, momentum, weight_decay, trust_coefficient):
    """Optimizer over the online network and the predictor; the learning rate is set before each step.

    LARS: 1-D parameters (biases, BatchNorm) get neither weight decay nor layer-wise scaling; timm's Lars leaves a
    group unscaled when its weight decay is 0. SGD: weight decay on everything, as in the authors' small recipes.
    """
    parameters = [p for p in networks.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=trust_coefficient)
