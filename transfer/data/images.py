"""Image files as both engines read them."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rsa_detectron2.common.errors import InputError


def read_image(path: str | Path) -> np.ndarray:
    """Image file -> uint8 [H, W, 3], RGB, upright. Raises InputError for a file that cannot be decoded."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # PIL raises errors of almost any type for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} cannot be used ({reason}): restore the image, or leave it out") from None
