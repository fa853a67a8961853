"""Shapes with exact masks: forms, the markings that they bear, and a canvas to paint them on.

A form is a function of the plane that approximates the signed distance to its outline, negative
inside. That one number gives both drawings of it: the mask holds the pixels whose center is inside
(distance < 0), and the image blends the shape in over the one pixel about the outline (opacity 1/2
- distance), so the mask is exactly where the shape is more than half opaque.
"""

import numpy as np
from PIL import Image


def _star(u, v, inner=0.45):
    """Five tips at radius 1, with notches at ``inner``.

    The plane is folded into half a tip, in which the outline is a single line.
    """
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(v, u) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    # normal of the line from tip to notch
    nx, ny = (inner * np.sin(sector / 2), 1 - inner * np.cos(sector / 2))
    return ((radius * np.cos(angle) - 1) * nx + radius * np.sin(angle) * ny) / np.hypot(nx, ny)


# (u, v) float32 grids in units of the shape's radius -> signed distance; every form lies within radius 1.1.
FORMS = {
    "circle": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(abs(u) * 0.75**0.5 + v / 2, -v) - 0.5,
    "star": _star,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.68) - 0.2,
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.3, np.maximum(abs(u), abs(v)) - 0.95),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.75 - np.hypot(u - 0.5, v)),
    "heart": lambda u, v: (
        np.minimum(
            np.maximum(abs(u), abs(v)),  # a square, and a disc on each of two sides
            np.minimum(np.hypot(u - 0.5, v), np.hypot(u, v - 0.5)),
        )
        - 0.5
    ),
}
# The marking that a form bears, from -1 to 1 of brightness on the same grids: a class shows in its
# texture, too, as that of an animal does. Coarse enough to be seen at 40 pixels.
MARKINGS = {
    "circle": lambda u, v: np.sin(8 * u),
    "square": lambda u, v: np.sin(6 * u) * np.sin(6 * v),
    "star": lambda u, v: np.sin(5 * np.arctan2(v, u)),
}
# Those of the controlled test.
FINE_MARKINGS = {
    "circle": lambda u, v: np.sin(14 * u),
    "square": lambda u, v: np.sin(9 * u) * np.sin(9 * v),
    "triangle": lambda u, v: np.sin(20 * np.hypot(u, v)),
    "star": lambda u, v: 0 * u,
    "ring": lambda u, v: np.sin(26 * v),
    "cross": lambda u, v: np.sin(6 * u),
    "crescent": lambda u, v: np.sin(18 * u) * np.sin(18 * v),
    "heart": lambda u, v: np.sin(9 * np.arctan2(v, u)),
}

MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE = 16, 0.05


def local_grid(size: int, x: float, y: float, radius: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) of every pixel's center in a shape's own frame: two float32 [size, size],
    in units of radius.

    ``x``, ``y`` (the middle) and ``radius`` are in pixels, where pixel column 0 spans 0 to 1;
    ``angle`` in radians.
    """
    centers = np.arange(size, dtype=np.float32) + 0.5
    dx, dy = (centers[None, :] - x) / radius, (centers[:, None] - y) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    return (dx * cos + dy * sin).astype(np.float32), (dy * cos - dx * sin).astype(np.float32)


def signed_distance(form: str, size: int, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    """Distance to the outline in pixels, float32 [size, size], negative inside.

    The arguments are those of :func:`local_grid`.
    """
    return FORMS[form](*local_grid(size, x, y, radius, angle)) * radius


def blotches(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth colored blotches, about ``cells`` on a side: float32 [size, size, 3], about -1 to 1."""
    small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1


def texture(rng: np.random.Generator, size: int, color: np.ndarray, contrast: float) -> np.ndarray:
    """``color`` (RGB) with blotches and a grating over it: float32 [size, size, 3], about 0 to 255."""
    smooth = blotches(rng, size, rng.integers(3, 9))
    direction, cycles, phase = rng.uniform(0, np.pi), rng.uniform(2, size / 6), rng.uniform(0, 2 * np.pi)
    along = np.linspace(0, 2 * np.pi * cycles, size, dtype=np.float32)
    wave = np.sin(
        (along[None, :] * np.cos(direction) + along[:, None] * np.sin(direction) + phase).astype(np.float32)
    )
    tint = rng.uniform(-0.6, 0.6, 3).astype(np.float32)
    return color.astype(np.float32) + contrast * (smooth + wave[..., None] * tint)


class Canvas:
    """An image that shapes are painted on, each on top of those before it, and their masks.

    Masks are modal: what a later shape covers is taken out of the earlier masks, so no pixel belongs to two.
    """

    def __init__(self, background: np.ndarray):
        """background: float32 [size, size, 3], about 0 to 255."""
        self.image, self.size = background, len(background)
        self.masks, self.alone = [], []

    def paint(self, form: str, placement: tuple[float, float, float, float], fill: np.ndarray) -> None:
        """Paint a form; placement: x, y and radius in sides of the image, angle in radians.

        fill: float [size, size, 3], what the shape shows.
        """
        x, y, radius, angle = placement
        distance = signed_distance(form, self.size, x * self.size, y * self.size, radius * self.size, angle)
        self.image += np.clip(0.5 - distance, 0, 1)[..., None] * (fill - self.image)
        inside = distance < 0
        for mask in self.masks:
            mask &= ~inside
        self.masks.append(inside)
        self.alone.append(inside.sum())

    def finish(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image uint8 [size, size, 3] with a sensor's grain, masks bool [N, size, size], and which of the
        painted shapes they are of, int64 [N].

        A shape that is almost hidden (fewer than 16 pixels visible, or under 5 % of what it would show alone)
        stays in the picture, but has no mask.
        """
        grain = 6 * rng.standard_normal((self.size, self.size, 1), dtype=np.float32)
        masks = np.stack(self.masks)
        visible = masks.sum((1, 2))
        keep = (visible >= MIN_VISIBLE_PIXELS) & (visible >= MIN_VISIBLE_SHARE * np.array(self.alone))
        return (self.image + grain).clip(0, 255).astype(np.uint8), masks[keep], np.flatnonzero(keep)
