"""Pasted masks against torchvision's pasting and pycocotools' encoding of the whole image."""

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torchvision.models.detection import roi_heads

from rsa_detectron2.transfer.data.masks import crop_to_rle
from rsa_detectron2.transfer.tv.paste import paste_rles


def encode(pixels):
    code = rle.encode(np.asfortranarray(pixels, dtype=np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


def reference(masks, boxes, size):
    """Each mask in an image of its own, as the engine pasted them before."""
    pixels = roi_heads.paste_masks_in_image(masks, boxes, size)[:, 0] >= 0.5
    return [encode(image.numpy()) for image in pixels]


def blobs(generator, count):
    """Smooth masks, float32 [count, 1, 28, 28] from 0 to 1, as a network draws them."""
    coarse = torch.randn(count, 1, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (28, 28), mode="bicubic").mul(6).sigmoid()


@pytest.mark.parametrize("size", [(48, 64), (101, 37), (1, 1), (3, 200), (240, 320)])
@pytest.mark.parametrize("kind", ["inside", "beyond the borders", "tiny"])
def test_equal_to_pasting_into_the_image(size, kind):
    """Boxes of all sizes; masks that are smooth, noise, full, or empty."""
    generator = torch.Generator().manual_seed(size[0])
    masks = torch.cat([blobs(generator, 40), torch.rand(20, 1, 28, 28, generator=generator)])
    masks = torch.cat([masks, torch.ones(20, 1, 28, 28), torch.full((2, 1, 28, 28), 0.5), masks[:2] * 0])
    height_width = torch.tensor(size).flip(0)
    center = torch.rand(len(masks), 2, generator=generator) * height_width
    side = torch.rand(len(masks), 2, generator=generator) * (2 if kind == "tiny" else height_width)
    boxes = torch.cat([center - side / 2, center + side / 2], 1)
    if kind == "inside":
        boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
    assert paste_rles(masks, boxes, size) == reference(masks, boxes, size)


def test_boxes_at_the_borders_and_of_no_area():
    size, masks = (30, 40), torch.ones(6, 1, 28, 28)
    boxes = torch.tensor(
        [[0, 0, 40, 30], [0, 0, 1, 30], [39, 0, 40, 30], [0, 29, 40, 30], [5, 5, 5, 5], [-9, -9, 60, 50.0]]
    )
    codes = paste_rles(masks, boxes, size)
    assert codes == reference(masks, boxes, size)
    assert rle.area(codes[-1]) == 30 * 40 and codes[-1] == encode(np.ones(size))
    assert paste_rles(masks[:0], boxes[:0], size) == []


@pytest.mark.parametrize("density", [0, 0.1, 0.5, 0.9, 1])
def test_crop_of_noise(density):
    """Crops that touch none, some or all of the borders; runs that go on from column to column."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = tuple(rng.integers(1, 12, 2).tolist())
        top, left = (int(rng.integers(0, side)) for side in size)
        bottom, right = (int(rng.integers(low, side + 1)) for low, side in zip((top, left), size))
        pixels = np.zeros(size, dtype=bool)
        pixels[top:bottom, left:right] = rng.random((bottom - top, right - left)) < density
        assert crop_to_rle(pixels[top:bottom, left:right], top, left, size) == encode(pixels)
