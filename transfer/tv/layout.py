"""A detector of Detectron2 in the layout of this engine: its names, and the place of the background.

Detectron2 has the background as the last class, torchvision as the first. Only torchvision has a box and a
mask of it, which are never used.
"""

import re
from collections.abc import Iterable

import torch

from rsa_detectron2.transfer.convert.writers import detectron2_name

# This engine's name of a layer, Detectron2's, and what its number N is higher by there.
LAYERS = (
    ("backbone.fpn.inner_blocks.N.0", "backbone.fpn_lateralN", 2),
    ("backbone.fpn.inner_blocks.N.1", "backbone.fpn_lateralN.norm", 2),
    ("backbone.fpn.layer_blocks.N.0", "backbone.fpn_outputN", 2),
    ("backbone.fpn.layer_blocks.N.1", "backbone.fpn_outputN.norm", 2),
    ("rpn.head.conv.0.0", "proposal_generator.rpn_head.conv", 0),
    ("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits", 0),
    ("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas", 0),
    ("roi_heads.box_head.N.0", "roi_heads.box_head.convN", 1),
    ("roi_heads.box_head.N.1", "roi_heads.box_head.convN.norm", 1),
    ("roi_heads.mask_head.N.0", "roi_heads.mask_head.mask_fcnN", 1),
    ("roi_heads.mask_head.N.1", "roi_heads.mask_head.mask_fcnN.norm", 1),
    ("roi_heads.mask_predictor.conv5_mask", "roi_heads.mask_head.deconv", 0),
    ("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.mask_head.predictor", 0),
)
BODY = "backbone.body."
FC = re.compile(r"roi_heads\.box_head\.(\d+)")


def to_ours(state: dict[str, torch.Tensor], needed: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of a detector of either engine -> those of the ``needed`` names, which are this engine's,
    that it has."""
    if not any(name.startswith("proposal_generator.") for name in state):
        return state
    needed = list(needed)
    layers = {name.rpartition(".")[0] for name in needed}
    fully_connected = sorted(int(match[1]) for match in map(FC.fullmatch, layers) if match)
    found = {}
    for name in needed:
        layer, _, kind = name.rpartition(".")
        theirs = detectron2_layer(layer, fully_connected) + f".{kind}"
        if name.startswith(BODY):
            theirs = "backbone.bottom_up." + detectron2_name(name.removeprefix(BODY))
        if theirs in state:
            found[name] = background_first(layer, state[theirs])
    return found


def detectron2_layer(layer: str, fully_connected: list[int]) -> str:
    """This engine's name of a layer -> Detectron2's. fully_connected: the numbers of such layers in the box
    head."""
    if match := FC.fullmatch(layer):
        return f"roi_heads.box_head.fc{fully_connected.index(int(match[1])) + 1}"
    for ours, theirs, higher in LAYERS:
        if match := re.fullmatch(re.escape(ours).replace("N", r"(\d+)"), layer):
            return theirs.replace("N", str(int(match[1]) + higher)) if "N" in ours else theirs
    return layer


def background_first(layer: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of Detectron2's predictors with the background as the first class; others as they are."""
    if layer.endswith("box_predictor.cls_score"):
        return tensor.roll(1, 0)
    rows = {"box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
    for end, count in rows.items():
        if layer.endswith(end):
            return torch.cat([tensor.new_zeros(count, *tensor.shape[1:]), tensor])
    return tensor
