"""One encoded image -> uint8 RGB.

:func:`decode` gives the same pixels whichever library reads the file: the first frame or page, turned as EXIF
says, without alpha. Channels of more than 8 bits are mapped to 0-255 by a range that the user may state.
"""

import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from rsa_detectron2.common.errors import InputError

MAX_PIXELS = 500_000_000  # decoding takes seven bytes for each
# Pillow's limit of 179 megapixels protects servers from uploads. Slides and satellite scenes exceed it.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of oddities in files that it reads nevertheless, without saying which file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# The bands that a TIFF of each PhotometricInterpretation has.
EXPECTED_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}
ALPHA = (1, 2)  # values of a TIFF's ExtraSamples


class UnreadableImage(InputError):
    """One image cannot be decoded; the message names it."""


@dataclasses.dataclass
class Pixels:
    """The pixels of a file."""

    # A tensor: uint8 RGB [3, H, W]; an array: other values, [H, W] or [3, H, W].
    values: torch.Tensor | np.ndarray
    bits: int = 8  # of a channel, in the file
    # Least and greatest value of the format; None where it has none.
    limits: tuple[float, float] | None = None


def read_image(path: str | Path, value_range: tuple = ()) -> torch.Tensor:
    """Any image file -> uint8 RGB [3, H, W], see :func:`decode`; raises UnreadableImage."""
    return decode(read_file(path), printable(path), value_range)


def read_file(path: str | Path) -> bytes:
    """The bytes of a file; raises UnreadableImage."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(
            f"{printable(path)} cannot be read ({error.strerror}): restore or replace it"
        ) from None


def utf8(name: str | bytes | os.PathLike) -> str:
    """The name of a file, for a file of text: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def printable(name: str | bytes | os.PathLike) -> str:
    """The name of a file, for a message: bytes that are not UTF-8 and line breaks are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in utf8(name))


def decode(data: bytes, name: str, value_range: tuple = ()) -> torch.Tensor:
    """An encoded image -> uint8 RGB [3, H, W]. Raises UnreadableImage with ``name``.

    ``value_range``, (low, high): which values of channels with more than 8 bits become 0 and 255. Without
    it, 16 bits are scaled by the range of their format, and others (float, 32 bits) from the least to the
    greatest value of the image.
    """
    pixels = read_pixels(data, name)
    if pixels.bits <= 8:
        return pixels.values
    if pixels.values.dtype == torch.uint8:  # Pillow has cut the lower bits
        if value_range:
            raise UnreadableImage(
                f"{name} has {pixels.bits} bits a channel, of which only the upper 8 can be read; "
                f"DATA.RANGE needs all: convert it to PNG (gdal_translate -of PNG IN.tif OUT.png)"
            )
        return pixels.values
    values = np.nan_to_num(pixels.values)
    low, high = value_range or pixels.limits or (values.min(), values.max())
    scaled = to_uint8(values, float(low), float(high))
    return torch.from_numpy(
        scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, 2).transpose(2, 0, 1)
    )


def to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values of any type to uint8, such that ``low`` becomes 0 and ``high`` 255."""
    if values.dtype == np.uint16:  # a table is faster and takes less memory
        return to_uint8(np.arange(65536.0), low, high)[values]
    return np.clip((values - low) * 255.0 / max(high - low, 1e-12), 0, 255).astype(np.uint8)


def read_pixels(data: bytes, name: str) -> Pixels:
    """An encoded image -> its pixels as the file holds them. Raises UnreadableImage with ``name``."""
    if not data:
        raise UnreadableImage(f"{name} is empty: restore or replace it")
    if native and suits_native(data):
        try:
            image = native(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            return Pixels(image) if image.dtype == torch.uint8 else Pixels(image.numpy(), 16, (0, 65535))
        except RuntimeError:
            pass  # a damaged file: Pillow says how
    try:
        return by_pillow(data, name)
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises errors of almost any type for a damaged file
        # A variable that holds the error would keep this frame, and the image with it, alive.
        raise UnreadableImage(f"{name} {why_unreadable(error, data)}") from None


def why_unreadable(error: Exception, data: bytes) -> str:
    """What Pillow's error means for the user, to go after the name of the file."""
    tiff = tiff_tags(data)
    if tiff and isinstance(error, UnidentifiedImageError):
        return (
            f"is a TIFF of {tiff.bands} x {max(tiff.bits)} bits, which cannot be read: convert it to 8 or 16 "
            "bits (gdal_translate -ot UInt16 -scale LOW HIGH 0 65535 IN.tif OUT.tif)"
        )
    reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
    return f"cannot be decoded as an image ({reason}): remove or replace it"


# ---- torchcodec and torchvision ----

Decoder = Callable[[torch.Tensor], torch.Tensor]


def by_torchcodec() -> Decoder:
    """torchcodec's decoder, from 0.16 on: uint8 [bytes] -> uint8 or uint16 RGB [3, H, W], turned by EXIF."""
    from torchcodec.decoders import decode_image

    return lambda data: decode_image(data, mode="RGB", output_dtype="auto")


def by_torchvision() -> Decoder:
    """torchvision's decoder, deprecated from 0.29 on: as :func:`by_torchcodec`."""
    from torchvision.io import ImageReadMode, decode_image

    _ = torch.ops.image.decode_image  # torchvision may have been built without it
    return lambda data: decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)


def choose_native() -> tuple[str, Decoder | None]:
    """(name, decoder) of the first library that works here; ("Pillow", None) without one."""
    for name, load in (("torchcodec", by_torchcodec), ("torchvision", by_torchvision)):
        try:
            return name, load()
        except (ImportError, OSError, RuntimeError, AttributeError):  # absent, or built for another torch
            continue
    return "Pillow", None


native_name, native = choose_native()


def suits_native(data: bytes) -> bool:
    """Whether torchcodec and torchvision give the same pixels of such a file as Pillow does."""
    if data.startswith(b"\xff\xd8\xff"):
        return has_end(data)  # torchvision before 0.29 leaks the memory of an image that ends too early
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return data[12:16] != b"VP8X" or not data[20] & 0b1010  # animated, or with an EXIF rotation
    return data.startswith(b"\x89PNG\r\n\x1a\n")


def has_end(data: bytes) -> bool:
    """Whether a JPEG has an end marker after the start of its first scan; a thumbnail has one before."""
    start = next((position for marker, position in jpeg_segments(data) if marker == 0xDA), None)
    return start is not None and data.rfind(b"\xff\xd9", start) >= 0


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, position) of each segment of a JPEG, which begins with its second marker."""
    position = 2
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        yield data[position + 1], position
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


# ---- Pillow ----


def by_pillow(data: bytes, name: str) -> Pixels:
    """The pixels of any format that Pillow knows. Raises UnreadableImage, and whatever Pillow raises."""
    tiff = tiff_tags(data)
    if tiff:
        check_bands(tiff, name)
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(
                f"{name} has {image.width} x {image.height} pixels, over the limit of "
                f"{MAX_PIXELS // 10**6} megapixels: cut it into tiles, or make it smaller"
            )
        image.load()
        bits = stated_bits(data, tiff, image)
        image = upright(image)
        if image.mode[0] not in "IF":
            return Pixels(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), bits)
        values = np.asarray(image)
        if image.mode.startswith("I;16"):
            return Pixels(values.astype(np.uint16, copy=False), max(9, bits), (0, 2**bits - 1))
        if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
            return Pixels(values.astype(np.uint16), 16, (0, 65535))
        return Pixels(values.astype(np.float64), 32)


def stated_bits(data: bytes, tiff: "Tiff | None", image: Image.Image) -> int:
    """Bits of a channel in the file. Pillow may have cut the lower ones."""
    if tiff:
        return max(tiff.bits)
    if image.format == "PNG":
        return data[24]
    return 16 if image.mode[0] in "IF" else 8


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says."""
    forget_xmp(image)
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is no reason to leave out the image
        return image


def forget_xmp(image: Image.Image) -> None:
    """Where EXIF says nothing, Pillow would turn the image as XMP says; the other decoders do not."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)


@dataclasses.dataclass
class Tiff:
    """What a TIFF says of its bands."""

    bands: int
    bits: tuple[int, ...]
    photometric: int
    alpha: int


def tiff_tags(data: bytes) -> Tiff | None:
    """The tags of the first page; None for another format, or a file that is too damaged."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        tags = ImageFileDirectory_v2(data[:16] if b"+" in data[2:4] else data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return Tiff(
            tags.get(277, 1),
            tags.get(258, (1,)),
            tags.get(262, 1),
            sum(kind in ALPHA for kind in tags.get(338, ())),
        )
    except Exception:
        return None


def check_bands(tiff: Tiff, name: str) -> None:
    """Raises UnreadableImage for a TIFF with bands that would get lost."""
    if tiff.bands - tiff.alpha != EXPECTED_BANDS.get(tiff.photometric, tiff.bands):
        raise UnreadableImage(
            f"{name} has {tiff.bands} bands, which are not gray, RGB or CMYK by its tags: choose the "
            "three to train on (gdal_translate -b 3 -b 2 -b 1 -co PHOTOMETRIC=RGB IN.tif OUT.tif)"
        )
