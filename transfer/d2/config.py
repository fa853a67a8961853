"""Detectron2's configuration for weights of tools/convert_to_d2.py."""

from detectron2 import config
from detectron2.config import CfgNode

from rsa_detectron2.transfer.config import RGB_IMAGENET, add_own_keys


def get_cfg() -> CfgNode:
    """Detectron2's defaults, and the keys of tools/train_net.py."""
    cfg = config.get_cfg()
    add_own_keys(cfg)
    return cfg


def add_rsa_config(cfg: CfgNode) -> None:
    """Set what a stock Detectron2 model needs to use converted weights as they were trained.

    Pixels: RGB with ImageNet's mean and std, where Detectron2's own weights take BGR without a std.
    Network: torchvision's ResNet, with the stride in the 3x3 convolution. Training: no stage is frozen, and
    BatchNorm is trained too, over the images of all GPUs (the InfoMin protocol). Files of other methods may
    need other pixels: tools/convert_to_d2.py prints them.
    """
    cfg.INPUT.FORMAT = RGB_IMAGENET["input_format"]
    cfg.MODEL.PIXEL_MEAN = list(RGB_IMAGENET["pixel_mean"])
    cfg.MODEL.PIXEL_STD = list(RGB_IMAGENET["pixel_std"])
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = RGB_IMAGENET["stride_in_1x1"]
    cfg.MODEL.RESNETS.NORM = "SyncBN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
