"""One encoded image -> uint8 RGB; and what becomes of those that cannot be decoded."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image, read_file

from pretrain.config import InputError

TRIES = 100  # images in a row that may be unreadable ...
MAX_BAD = 0.001  # ... and share of all


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


def read_or_next(images, index):
    """(image, skipped): image ``index``, or the first after it that can be decoded (round the end), and how many could
    not be. Raises InputError after 100."""
    for skipped in range(min(TRIES, len(images))):
        try:
            return images.read((index + skipped) % len(images)), skipped
        except UnreadableImage as error:
            last = error
    raise InputError(f"{skipped + 1} images in a row cannot be decoded, the last: {last}")


class BadImages:
    """``path``, a list of the images of a source that could not be decoded, one name a line; any process may add."""

    def __init__(self, path, images):
        self.path, self.images = Path(path), images

    def __len__(self):
        return len(self.listed())

    def listed(self):
        return set(os.fsdecode(self.path.read_bytes()).splitlines()) if self.path.is_file() else set()

    def add(self, indices):
        """List those that are not yet. Raises InputError when too large a share of the data set is listed."""
        listed = self.listed()
        new = sorted({self.images.name(index) for index in indices} - listed)
        if not new:
            return
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(file, os.fsencode("".join(f"{name}\n" for name in new)))
        os.close(file)
        count = len(listed) + len(new)
        if count > MAX_BAD * len(self.images):
            first = os.fsdecode(self.path.read_bytes()).splitlines()[0]
            raise InputError(f"{self.path} lists {count} of {len(self.images)} images as unreadable, over "
                             f"{MAX_BAD:.1%}, {first} first: replace them, delete the list, and start again")
