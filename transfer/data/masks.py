"""COCO's two kinds of masks, polygons and run lengths (RLE): whether they are sound, and what they cover."""

import math

import numpy as np
from pycocotools import mask as rle

Segmentation = list[list[float]] | dict  # polygons, or RLE


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_polygon(polygon: list[float]) -> bool:
    """Whether a list of x, y, x, y, ... has at least three points."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def has_mask(segmentation: Segmentation) -> bool:
    """Whether sound COCO polygons or RLE cover anything."""
    if not isinstance(segmentation, dict):
        return any(map(is_polygon, segmentation or ()))
    counts = segmentation["counts"]
    return any(counts[1::2]) if isinstance(counts, list) else rle.area(segmentation) > 0


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict:
    """Sound COCO polygons or RLE, compressed or not -> pycocotools' compressed RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return (
        rle.frPyObjects(segmentation, height, width)
        if isinstance(segmentation["counts"], list)
        else segmentation
    )


def crop_to_rle(crop: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict:
    """A mask, bool [h, w], in an image of ``size`` (H, W) that has nothing outside of it: compressed RLE with
    counts as str.

    COCO counts column by column. The work grows with the crop, not with the image.
    """
    (h, w), (height, width) = crop.shape, size
    framed = np.zeros((h + 2, w), dtype=bool)
    framed[1:-1] = crop
    row, column = np.divmod((framed[1:] != framed[:-1]).ravel().nonzero()[0], w)
    # Where each run begins and ends, in turn, as places in the image.
    places = (left + column) * height + (top + row)
    places.sort()
    if h == height:
        # A run that ends at the bottom goes on if another one begins at the top of the next column.
        places, times = np.unique(places, return_counts=True)
        places = places[times == 1]
    places = np.concatenate(((0,), places, (height * width,)))
    counts = places[1:] - places[:-1]
    if counts[-1] == 0:
        counts = counts[:-1]
    code = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


def mask_area(segmentation: Segmentation, height: int, width: int) -> float:
    """Pixels that sound COCO polygons or RLE cover; 0 for no mask."""
    return float(rle.area(to_rle(segmentation, height, width))) if segmentation else 0.0


def mask_box(segmentation: Segmentation) -> tuple[float, float, float, float]:
    """Sound COCO polygons or RLE -> the box (x0, y0, x1, y1) around them in pixels."""
    if isinstance(segmentation, list):
        x, y = ([v for polygon in segmentation for v in polygon[start::2]] for start in (0, 1))
        return min(x), min(y), max(x), max(y)
    x, y, w, h = rle.toBbox(to_rle(segmentation, *segmentation["size"])).tolist()
    return x, y, x + w, y + h


def mask_problem(segmentation: object, height: int, width: int) -> str | None:
    """What is wrong with a segmentation, in words, or None. Short polygons can be left out."""
    if isinstance(segmentation, list):
        if all(map(are_numbers, segmentation)):
            return None
        return "has a polygon that is not a list of x, y, x, y, ...: write each as one flat list of numbers"
    if not (isinstance(segmentation, dict) and segmentation.keys() >= {"size", "counts"}):
        return "has a segmentation that is neither polygons nor RLE with size and counts: write one of these"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width] or not all(map(is_integer, size)):
        return (
            f"has an RLE of size {size}, but its image is {[height, width]} (height, width): encode its mask"
            " again"
        )
    if isinstance(counts, str):
        try:
            counts = run_lengths(counts)
        except ValueError as error:
            return f"has an RLE string that {error}: encode its mask again"
    if not isinstance(counts, list):
        return "has RLE counts that are neither a list nor a string: encode its mask again"
    if not all(is_integer(count) and count >= 0 for count in counts):
        return "has RLE counts that are not integers of at least 0: encode its mask again"
    if sum(counts) != height * width:
        return (
            f"has RLE counts that do not add up to its image's {height} x {width} pixels: encode its mask"
            " again"
        )
    return None


def run_lengths(text: str) -> list[int]:
    """COCO's run-length string -> its counts.

    Raises ValueError if pycocotools would read past the end of the string. A number is written as characters
    of five bits each, lowest bits first, added to the code of "0". All characters of a number but the last
    have 32 added; the bit 16 of the last one is the sign. From the fourth on, a number is the difference from
    the count two places before.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64) - ord("0")
    strange = (codes < 0) | (codes >= 64)
    if strange.any():
        raise ValueError(f"has the character {text[strange.argmax()]!r}")
    if not len(codes):
        return []
    if codes[-1] >= 32:
        raise ValueError("ends in the middle of a number")
    ends = np.flatnonzero(codes < 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 6:  # more than any image has, and more than pycocotools reads
        raise ValueError("has a number of more than 30 bits")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes & 31) << 5 * place, starts) - ((codes[ends] >> 4) << 5 * lengths)
    for first in (1, 2):
        counts[first::2] = counts[first::2].cumsum()
    return counts.tolist()
