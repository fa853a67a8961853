"""Drawn photographs: JPEGs of a camera's size, which take a decoder as long as a camera's own."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

OCTAVES = 12
# Contrast of an octave, as a fraction of the next coarser one's. Photographs have nearly as much in each
# (Field 1987), but lenses blur the finest. With 0.8 a file of 12 megapixels has 3.5 MB at quality 90.
DECAY = 0.8
CHROMA = 0.3  # contrast of the colors, as a fraction of the luma's
CONTRAST = 50  # standard deviation of the pixels


def write_photographs(folder: str | Path, count: int, megapixels: int, quality: int) -> Path:
    """Write ``count`` JPEGs, 4 to 3, to ``folder``; returns it."""
    width = math.ceil(math.sqrt(megapixels * 1e6 * 4 / 3))
    for seed in range(count):
        pixels = draw_photograph(seed, math.ceil(width * 3 / 4), width).permute(1, 2, 0).contiguous()
        Image.fromarray(pixels.numpy()).save(Path(folder, f"{seed}.jpg"), quality=quality)
    return Path(folder)


def draw_photograph(seed: int, height: int, width: int) -> torch.Tensor:
    """Noise with detail of every size: uint8 [3, height, width]."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(1, 3, 1, 1)
    for octave in reversed(range(OCTAVES)):
        size = [max(1, side >> octave) for side in (height, width)]
        luma, chroma = (torch.randn(1, channels, *size, generator=draw) for channels in (1, 3))
        pixels = F.interpolate(pixels, size, mode="bilinear") / DECAY + luma + CHROMA * chroma
    pixels = 128 + CONTRAST * (pixels[0] - pixels.mean()) / pixels.std()
    return pixels.clamp(0, 255).byte()
