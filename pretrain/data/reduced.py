"""Large JPEGs, decoded at 1/2, 1/4 or 1/8 of their height and width.

libjpeg computes the smaller image itself, faster than all pixels can be computed and a crop of them resized.
:func:`choose_scale` is the rule. The crops are those of the whole image, to a fraction of a pixel.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import ExifTags, Image

from rsa_detectron2.pretrain.data.images import forget_xmp, jpeg_segments, upright
from rsa_detectron2.pretrain.method.augment import Box, Crop

SCALES = (8, 4, 2)  # libjpeg's, the strongest first
LEAST_PIXELS = 4_000_000  # JPEGs with fewer are decoded whole
FRAMES = (0xC0, 0xC1, 0xC2)  # markers of baseline, extended and progressive JPEGs
# EXIF orientations by what they do: height and width change places; the left edge of the upright image, or
# its top edge, is the right or the bottom edge of the file's.
TURNED, LEFT_WAS_LAST, TOP_WAS_LAST = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


def choose_scale(boxes: Sequence[Box], size: int) -> int:
    """By how much an image is reduced whose ``boxes`` become views of ``size`` pixels; 1: not at all.

    It is the most that leaves each side of each box ``size`` pixels.
    """
    shortest = min(side for box in boxes for side in box[2:])
    return next((scale for scale in SCALES if shortest >= scale * size), 1)


def reduced_views(data: bytes, crops: Sequence[Crop], size: int) -> list[torch.Tensor] | None:
    """The views of a large JPEG, uint8 [3, size, size] each, with channels last in memory.

    None for what must be decoded whole: other images, CMYK, crops too small for any scale, and damaged
    files, of which ``decode`` says what is wrong.
    """
    if num_pixels(data) < LEAST_PIXELS:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return take_views(image, crops, size) if image.mode in ("RGB", "L") else None
    except Exception:  # Pillow raises errors of almost any type for a damaged file
        return None


def num_pixels(data: bytes) -> int:
    """Pixels of a JPEG by its header; 0 for other files, and for JPEGs that are lossless or arithmetic."""
    if not data.startswith(b"\xff\xd8\xff"):
        return 0
    start = next((position for marker, position in jpeg_segments(data) if marker in FRAMES), len(data))
    height, width = data[start + 5 : start + 7], data[start + 7 : start + 9]
    return int.from_bytes(height, "big") * int.from_bytes(width, "big")


def take_views(image: Image.Image, crops: Sequence[Crop], size: int) -> list[torch.Tensor] | None:
    """As :func:`reduced_views`, of a JPEG that is open but not decoded."""
    forget_xmp(image)
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    width, height = image.size[::-1] if orientation in TURNED else image.size
    boxes = [crop.box(height, width) for crop in crops]
    scale = choose_scale(boxes, size)
    if scale == 1:
        return None
    image.draft(image.mode, (image.width // scale, image.height // scale))
    image.load()
    image = upright(image)
    # libjpeg rounds sides up: of the file's last column and row, only a part belongs to the image.
    left = image.width - width / scale if orientation in LEFT_WAS_LAST else 0
    top = image.height - height / scale if orientation in TOP_WAS_LAST else 0
    views = []
    for crop, (y, x, h, w) in zip(crops, boxes):
        corners = left + x / scale, top + y / scale, left + (x + w) / scale, top + (y + h) / scale
        view = image.resize((size, size), Image.Resampling.BILINEAR, corners).convert("RGB")
        pixels = torch.from_numpy(np.array(view)).movedim(-1, 0)
        views.append(pixels.flip(-1) if crop.flip else pixels)
    return views
