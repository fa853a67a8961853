"""Mask and Faster R-CNN with a ResNet and FPN from torchvision's parts, with the layers and the
initialization that Detectron2's YAML asks for."""

from typing import Any

import torch
import torchvision
from fvcore.common.config import CfgNode
from fvcore.nn.weight_init import c2_xavier_fill
from torch import nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import anchor_utils, backbone_utils, faster_rcnn, mask_rcnn
from torchvision.ops import FrozenBatchNorm2d, poolers

from rsa_detectron2.transfer.config import check_possible
from rsa_detectron2.transfer.convert import architectures
from rsa_detectron2.transfer.data.average_precision import METRICS

NORMS = {"": None, "BN": nn.BatchNorm2d, "SyncBN": nn.BatchNorm2d}
# The lowest FREEZE_AT that freezes a part of the backbone.
FREEZE_FROM = {"conv1": 1, "bn1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5}
STAGES, LEVELS = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
POSSIBLE = {  # key: the supported values, or (test of a value, which values pass it)
    "MODEL.META_ARCHITECTURE": ["GeneralizedRCNN"],
    "MODEL.DEVICE": ["cuda", "cpu"],
    "MODEL.MASK_ON": [True, False],
    "MODEL.BACKBONE.NAME": ["build_resnet_fpn_backbone"],
    "MODEL.BACKBONE.FREEZE_AT": list(range(6)),
    "MODEL.RESNETS.DEPTH": [18, 34, 50, 101, 152],
    "MODEL.RESNETS.NORM": ["BN", "SyncBN"],
    "MODEL.RESNETS.STRIDE_IN_1X1": [False],
    "MODEL.RESNETS.OUT_FEATURES": [STAGES],
    "MODEL.FPN.IN_FEATURES": [STAGES],
    "MODEL.FPN.NORM": list(NORMS),
    "MODEL.RPN.IN_FEATURES": [[*LEVELS, "p6"]],
    "MODEL.ROI_HEADS.IN_FEATURES": [LEVELS],
    "MODEL.ROI_HEADS.NAME": ["StandardROIHeads"],
    "MODEL.ROI_BOX_HEAD.NAME": ["FastRCNNConvFCHead"],
    "MODEL.ROI_MASK_HEAD.NAME": ["MaskRCNNConvUpsampleHead"],
    "MODEL.ROI_BOX_HEAD.NORM": list(NORMS),
    "MODEL.ROI_MASK_HEAD.NORM": list(NORMS),
    "MODEL.ROI_BOX_HEAD.NUM_FC": (lambda v: v > 0, "positive"),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": (lambda v: v > 0, "positive"),
    "MODEL.ANCHOR_GENERATOR.SIZES": (
        lambda v: [len(level) for level in v] == [1] * 5,
        "one size for each of p2 to p6",
    ),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (lambda v: len(v) == 1, "one list for all levels"),
    "INPUT.FORMAT": ["RGB"],
    "INPUT.RANDOM_FLIP": ["horizontal", "none"],
    "INPUT.MASK_FORMAT": ["polygon", "bitmask"],
    "INPUT.MIN_SIZE_TEST": (lambda v: v > 0, "positive"),
    "TEST.BEST_METRIC": METRICS,
    "DATASETS.TRAIN": (lambda v: len(v) == 1, "one data set"),
    "DATASETS.TEST": (lambda v: len(v) == 1, "one data set"),
}


def check(cfg: CfgNode) -> None:
    """Raises InputError for the first key whose value this engine does not support."""
    check_possible(cfg, POSSIBLE, "the embedded engine")


def build_model(cfg: CfgNode) -> faster_rcnn.FasterRCNN:
    """Config -> torchvision MaskRCNN, or FasterRCNN without MASK_ON, randomly initialized as Detectron2's is.

    Class 0 is the background. It has its own box and mask outputs, which are unused and which Detectron2
    does not have. Raises InputError.
    """
    check(cfg)
    net, classes, channels = cfg.MODEL, cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1, cfg.MODEL.FPN.OUT_CHANNELS
    resnet = getattr(torchvision.models, architectures.of_config(net.RESNETS))(weights=None)
    anchors, rpn, roi, box, mask = (
        net.ANCHOR_GENERATOR,
        net.RPN,
        net.ROI_HEADS,
        net.ROI_BOX_HEAD,
        net.ROI_MASK_HEAD,
    )

    def pooler(head: CfgNode) -> poolers.MultiScaleRoIAlign:
        pool = poolers.MultiScaleRoIAlign(LEVELS, head.POOLER_RESOLUTION, sampling_ratio=0)
        # By default it derives these from the first images that it sees, and gets them wrong for
        # sides under 80 pixels.
        pool.scales, pool.map_levels = [1 / 4, 1 / 8, 1 / 16, 1 / 32], poolers.LevelMapper(2, 5)
        return pool

    masks = (
        dict(
            mask_roi_pool=pooler(mask),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(mask.CONV_DIM, mask.CONV_DIM, classes),
            mask_head=mask_rcnn.MaskRCNNHeads(channels, [mask.CONV_DIM] * mask.NUM_CONV, 1, NORMS[mask.NORM]),
        )
        if net.MASK_ON
        else {}
    )
    model = (mask_rcnn.MaskRCNN if masks else faster_rcnn.FasterRCNN)(
        backbone_utils.BackboneWithFPN(
            resnet,
            {f"layer{i + 1}": LEVELS[i] for i in range(4)},
            [net.RESNETS.RES2_OUT_CHANNELS << i for i in range(4)],
            channels,
            norm_layer=NORMS[net.FPN.NORM],
        ),
        min_size=cfg.INPUT.MIN_SIZE_TRAIN,
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        image_mean=[mean / 255 for mean in net.PIXEL_MEAN],
        image_std=[std / 255 for std in net.PIXEL_STD],
        rpn_anchor_generator=anchor_utils.AnchorGenerator(
            anchors.SIZES, anchors.ASPECT_RATIOS * len(anchors.SIZES)
        ),
        rpn_bg_iou_thresh=rpn.IOU_THRESHOLDS[0],
        rpn_fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
        rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        rpn_positive_fraction=rpn.POSITIVE_FRACTION,
        rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOPK_TRAIN,
        rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOPK_TEST,
        rpn_post_nms_top_n_train=rpn.POST_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_test=rpn.POST_NMS_TOPK_TEST,
        rpn_nms_thresh=rpn.NMS_THRESH,
        box_roi_pool=pooler(box),
        box_predictor=faster_rcnn.FastRCNNPredictor(box.FC_DIM, classes),
        box_head=faster_rcnn.FastRCNNConvFCHead(
            (channels, box.POOLER_RESOLUTION, box.POOLER_RESOLUTION),
            [box.CONV_DIM] * box.NUM_CONV,
            [box.FC_DIM] * box.NUM_FC,
            NORMS[box.NORM],
        ),
        box_bg_iou_thresh=roi.IOU_THRESHOLDS[0],
        box_fg_iou_thresh=roi.IOU_THRESHOLDS[0],
        box_batch_size_per_image=roi.BATCH_SIZE_PER_IMAGE,
        box_positive_fraction=roi.POSITIVE_FRACTION,
        box_score_thresh=roi.SCORE_THRESH_TEST,
        box_nms_thresh=roi.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        **masks,
    )

    # The layers that torchvision initializes differently from Detectron2.
    heads = model.roi_heads
    for layer in heads.box_head:
        if isinstance(layer, nn.Linear):
            c2_xavier_fill(layer)
    outputs = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
    if masks:
        outputs.append((heads.mask_predictor.mask_fcn_logits, 0.001))
        nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)
    for layer, std in outputs:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    freeze(model.backbone.body, net.BACKBONE.FREEZE_AT)
    return model


def freeze(body: nn.Module, freeze_at: int) -> None:
    """Freeze the first stages of a ResNet, as Detectron2 does: 0 none, 1 the stem, ..., 5 all of them.

    Their parameters get no gradient, and their BatchNorm becomes an affine map with fixed statistics.
    """
    for name, part in list(body.named_children()):
        if FREEZE_FROM.get(name, 6) <= freeze_at:
            part.requires_grad_(False)
            setattr(body, name, fixed_statistics(part))


def fixed_statistics(module: nn.Module) -> nn.Module:
    """``module`` with FrozenBatchNorm2d in place of every BatchNorm2d."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, part in list(module.named_children()):
        setattr(module, name, fixed_statistics(part))
    return module


def bfloat16_inside(module: nn.Module, device: torch.device) -> None:
    """Let ``module`` compute in bfloat16 but return float32, which boxes, RoIAlign and the losses need."""
    forward = module.forward

    def cast_forward(*inputs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            outputs = forward(*inputs)
        return tree_map(torch.Tensor.float, outputs)

    module.forward = cast_forward
