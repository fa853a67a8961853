"""Detections drawn on images: where pixels change, and by how much."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from rsa_detectron2.transfer.report.detection_pictures import draw_on_copy, tint

RED = np.array([200, 0, 0])


def test_tint_mixes_inside_and_draws_the_outline():
    image = np.full((12, 15, 3), 100, dtype=np.uint8)
    mask = np.zeros((12, 15), dtype=np.uint8, order="F")
    mask[2:9, 4:11] = 1
    mask[0, 0] = mask[11, 14] = 1
    expected = image.copy()
    expected[3:8, 5:10] = 150, 50, 50
    for y, x in np.argwhere(mask):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        if any(not (0 <= a < 12 and 0 <= b < 15 and mask[a, b]) for a, b in around):
            expected[y, x] = RED
    tint(image, rle.encode(mask), RED)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("size", ((301, 203), (480, 44), (333, 100), (33, 1000), (700, 21), (1, 1)))
def test_a_copy_has_the_size_and_the_pixels_of_the_image(tmp_path, size):
    """Up to what JPEG changes. Of the sizes, matplotlib would make some a pixel smaller."""
    ramp = np.linspace(0, 250, size[1])[None, :, None] * np.ones((size[0], 1, 3))
    image = ramp.astype(np.uint8)
    draw_on_copy(image, [], [{"id": 1, "name": "a"}], tmp_path / "a.jpg")
    copy = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert copy.shape == image.shape and abs(copy.astype(int) - image).max() <= 8


def test_a_detection_changes_its_place_alone(tmp_path):
    image = np.full((200, 300, 3), 128, dtype=np.uint8)
    mask = np.zeros((200, 300), dtype=np.uint8, order="F")
    mask[110:150, 120:180] = 1
    detection = {"category_id": 7, "bbox": [120, 110, 60, 40], "score": 0.9, "segmentation": rle.encode(mask)}
    draw_on_copy(image, [detection], [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}], tmp_path / "a.jpg")
    copy = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
    changed = np.argwhere(abs(copy - 128).max(-1) > 20)
    assert changed.min(0).tolist() >= [105, 115] and changed.max(0).tolist() <= [155, 185]
    # the second color of the palette, #D55E00, half and half
    assert abs(copy[140, 170] - [(128 + 0xD5) // 2, (128 + 0x5E) // 2, 64]).max() <= 6
