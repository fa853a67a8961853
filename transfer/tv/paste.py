"""Masks of detections, pasted into their image and encoded; the image is never filled with pixels."""

import torch
import torch.nn.functional as F
from torchvision.models.detection import roi_heads

from rsa_detectron2.transfer.data.masks import crop_to_rle


def paste_rles(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> list[dict]:
    """Masks [N, 1, 28, 28] at their boxes [N, 4] in an image of ``size`` (H, W): each as compressed RLE.

    The result is that of torchvision's paste_masks_in_image at a threshold of 0.5, pixel by pixel. Each box
    must overlap the image.
    """
    masks, scale = roi_heads.expand_masks(masks, padding=1)
    boxes = roi_heads.expand_boxes(boxes, scale).long().tolist()
    return [_paste(mask, box, size) for mask, box in zip(masks.split(1), boxes)]


def _paste(mask: torch.Tensor, box: list[int], size: tuple[int, int]) -> dict:
    """One mask [1, 1, 30, 30] at its box, whose last row and column are inside."""
    x0, y0, x1, y1 = box
    resized = F.interpolate(mask, (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)), mode="bilinear")
    top, left = max(y0, 0), max(x0, 0)
    inside = resized[0, 0].numpy()[top - y0 : size[0] - y0, left - x0 : size[1] - x0]
    return crop_to_rle(inside >= 0.5, top, left, size)
