"""A look at the pixels of a data set before training: does decoding lose bands, frames or gray levels?"""

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.images import (
    Pixels,
    UnreadableImage,
    check_bands,
    read_pixels,
    stated_bits,
    tiff_tags,
)
from rsa_detectron2.pretrain.data.source import Source

SAMPLES = 16  # images that are looked at, evenly spaced
LEAST = 0.25  # of a format's range must be used: below, fewer than 64 of 256 gray levels would be left


def check_pixels(images: Source, option: str = 'DATA.RANGE "({}, {})"') -> list[str]:
    """Look at some images of a source, as they are read with its ``value_range``.

    Returns a line for each thing that is assumed, such as a range, or left out, such as an alpha band. Raises
    InputError for bands that would get lost, and for values so small that few gray levels would be left.
    ``option`` is how the user gives the range, with places for two numbers.
    """
    if not hasattr(images, "encoded"):  # RGB of 8 bits in memory
        return []
    notes, most, brightest = {}, 0, None
    for index in np.linspace(0, len(images) - 1, min(SAMPLES, len(images))).astype(int):
        try:
            data, name = images.encoded(index)
        except UnreadableImage:
            continue
        for kind, note in of_header(data, name):
            notes.setdefault(kind, note)
        if images.value_range or not is_deep(data):
            continue
        try:
            pixels = read_pixels(data, name)
        except UnreadableImage:
            continue
        if pixels.bits > 16:
            notes.setdefault(
                "stretched",
                f"{name} holds signed, float or 32-bit values: each image is stretched from its "
                f"least to its greatest; {option.format('LOW', 'HIGH')} maps all alike",
            )
            continue
        if share_used(pixels) >= most:
            most, brightest = share_used(pixels), (pixels, name)
    if brightest and most < LEAST:
        raise InputError(few_levels(*brightest, option))
    return list(notes.values())


def of_header(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """(kind, line) for each thing that is left out of a file, by its header. Raises UnreadableImage."""
    tiff = tiff_tags(data)
    if tiff:
        check_bands(tiff, name)
        if tiff.alpha:
            yield (
                "alpha",
                f"{name} has {tiff.bands} bands, {tiff.alpha} of them alpha by its tags, which is left out",
            )
    try:
        with Image.open(io.BytesIO(data)) as image:
            frames = count_frames(image)
    except Exception:  # the file is damaged, which training will find
        return
    if frames > 1:
        yield "frames", f"{name} has {frames} frames or pages: the first is read"


def count_frames(image: Image.Image) -> int:
    """Frames or pages of an image. Pages of another size are the first once more, smaller: they do not
    count."""
    size, frames = image.size, getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(1)
    return frames if image.size == size else 1


def is_deep(data: bytes) -> bool:
    """Whether a file has channels of more than 8 bits."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return stated_bits(data, tiff_tags(data), image) > 8
    except Exception:  # damaged
        return False


def share_used(pixels: Pixels) -> float:
    """The greatest value of an image as a part of the greatest that its format has."""
    return float(pixels.values.max()) / (255 if pixels.values.dtype == torch.uint8 else pixels.limits[1])


def few_levels(pixels: Pixels, name: str, option: str) -> str:
    """The message for a data set whose brightest image is this one: what is wrong, and the fix."""
    greatest = int(pixels.values.max())
    if pixels.values.dtype == torch.uint8:
        brightest = 2 ** greatest.bit_length() * 256 - 1
        return (
            f"{name} uses {greatest + 1} of the 256 gray levels, and only the upper 8 of its {pixels.bits} "
            "bits can be read: convert the images to PNG (gdal_translate -of PNG IN.tif OUT.png), then give "
            + option.format(0, brightest)
        )
    full, brightest = int(pixels.limits[1]), 2 ** greatest.bit_length() - 1
    levels = 256 * greatest // (full + 1) + 1
    return (
        f"{name} holds values up to {greatest} of {full}, and no other image that was looked at has greater "
        f"ones: they would become {levels} of 256 gray levels. Give the values that become black and white: "
        f"{option.format(0, brightest)}, or {option.format(0, full)} to keep them dark"
    )
