"""What a training of the embedded engine starts from: weights, or one of its checkpoints."""

import logging
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert import detectors
from rsa_detectron2.transfer.convert.needs import check_weights
from rsa_detectron2.transfer.convert.writers import load_weights
from rsa_detectron2.transfer.report.runs import check_network
from rsa_detectron2.transfer.tv import layout

log = logging.getLogger(__name__)


def load_start(cfg: CfgNode, model: nn.Module) -> dict | None:
    """Copy MODEL.WEIGHTS, a backbone or a detector, into ``model``; returns their provenance. Raises
    InputError."""
    if not cfg.MODEL.WEIGHTS:
        log.info("MODEL.WEIGHTS is empty: training starts from random weights")
        return None
    if detectors.is_detector(cfg.MODEL.WEIGHTS):
        check_network(cfg, Path(cfg.MODEL.WEIGHTS).parent)
        log.info(detectors.load_detector(cfg.MODEL.WEIGHTS, model, layout.to_ours))
        return detectors.describe_detector(cfg.MODEL.WEIGHTS)
    state, provenance = load_weights(cfg.MODEL.WEIGHTS)
    check_weights(cfg, provenance)
    body = model.backbone.body.state_dict()
    if differ := sorted({name for name in body if not name.endswith("num_batches_tracked")} ^ set(state)):
        raise InputError(
            f"{cfg.MODEL.WEIGHTS} is not the network of MODEL.RESNETS (it lacks or adds {differ[:4]}): "
            "set MODEL.RESNETS to the network of these weights"
        )
    model.backbone.body.load_state_dict(state, strict=False)
    log.info("%s: all %d backbone tensors loaded", cfg.MODEL.WEIGHTS, len(state))
    return provenance


def load_checkpoint(path: Path, model: nn.Module) -> dict:
    """Load one of this run's checkpoints into ``model``; returns its content. Raises InputError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        return saved
    except Exception as error:  # a broken file can fail in any way
        raise InputError(
            f"{path} does not hold a model of the embedded engine with this config's MODEL settings "
            f"({type(error).__name__}): restore it, or give the config of its training"
        ) from None
