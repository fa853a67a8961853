"""The model of a configuration, as Detectron2 builds it."""

import logging
import traceback

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_stock_model
from torch import nn

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.sync_batch_norm import without_waiting

# What Detectron2 raises for MODEL settings that do not fit each other.
MISFITS = (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError)


def build_model(cfg: CfgNode) -> nn.Module:
    """The model on MODEL.DEVICE. Raises InputError where its settings do not fit each other."""
    # Detectron2 calls a deprecated function.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        model = build_stock_model(with_empty_passes(cfg))
    except MISFITS as error:
        # Of an assertion without a message, show the asserted line.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise InputError(
            f"Detectron2 cannot build the network of these MODEL settings ({type(error).__name__}: {reason})"
        ) from error
    without_waiting(model.backbone)  # each rank has an image in each pass; the heads may have no region
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":  # evaluation profits too, which is slow on a CPU
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def with_empty_passes(cfg: CfgNode) -> CfgNode:
    """``cfg`` whose heads have a synchronized norm that takes a pass without any object.

    Detectron2 refuses such a pass with torch's SyncBatchNorm, and where no rank has an object, the running
    statistics of that layer would decay. Detectron2's naiveSyncBN_N takes part in the collective even
    without a region, and weights the ranks by the number of their regions.
    """
    cfg = cfg.clone()
    cfg.defrost()
    for head in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        if head.NORM == "SyncBN":
            head.NORM = "naiveSyncBN_N"
    return cfg
