"""One encoded image -> uint8 RGB."""

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image, read_file

from pretrain.config import InputError


class UnreadableImage(InputError):
    """One image cannot be decoded; the message names it."""


def read_image(path):
    """Any image file -> uint8 RGB [3, H, W]; raises UnreadableImage."""
    try:
        data = read_file(str(path))
    except RuntimeError as error:  # absent or empty
        raise UnreadableImage(f"{path} cannot be read ({error}): restore or replace it") from None
    return decode(data, path)


def decode(data, name):
    """An encoded image, uint8 [bytes] -> uint8 RGB [3, H, W], without its EXIF rotation (PIL applies that of a TIFF).
    Raises UnreadableImage with ``name``."""
    try:
        image = decode_image(data, ImageReadMode.RGB)
        image = image[0] if image.dim() == 4 else image  # the first of an animation
        return image if image.dtype == torch.uint8 else (image.int() // 257).byte()  # a PNG of 16 bits
    except RuntimeError:
        pass  # a format that torchvision does not decode; PIL knows more of them, slower
    try:
        with Image.open(io.BytesIO(data.numpy())) as image:
            return torch.from_numpy(_rgb(image)).permute(2, 0, 1)
    except Exception as error:  # PIL raises errors of almost any type for a damaged file
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImage(f"{name} cannot be decoded as an image ({reason}): remove or replace it") from None


def _rgb(image):
    """uint8 [H, W, 3] of a PIL image. PIL clips what has more than 8 bits: here 16 bits are scaled, and other ranges
    stretched."""
    if image.mode[0] not in "IF":
        return np.array(image.convert("RGB"))
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = values.min(), values.max()
    if image.mode[0] == "I" and 0 <= low and high <= 65535:
        low, high = 0, 65535
    gray = (values - low) * 255 / max(high - low, 1e-12)
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
