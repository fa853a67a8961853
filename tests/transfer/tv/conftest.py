"""A small data set for the embedded engine."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from rsa_detectron2.transfer.data.annotations import dataset_name

CATEGORIES = [3, 7, 90]  # with gaps, as COCO's


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Name of a data set of five 80 x 64 images, each with a bright box of each category on noise. In the
    last image all are crowds."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(5):
        pixels = rng.integers(0, 90, (64, 80, 3), dtype=np.uint8)
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 64, "width": 80})
        for n, category in enumerate(CATEGORIES):
            x, y, w, h = 4 + 24 * n, 6 + 3 * i, 20, 30
            pixels[y : y + h, x : x + w, n] = 250
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            mask = np.zeros((64, 80), dtype=np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            code = rle.encode(mask)
            segmentation = [polygon] if n else {"size": code["size"], "counts": code["counts"].decode()}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + i,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        Image.fromarray(pixels).save(root / f"{i}.png")
    for annotation in annotations[12:]:
        annotation.update(iscrowd=1, segmentation={"size": [64, 80], "counts": [64 * 80]})
    (root / "a.json").write_text(
        json.dumps(
            {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": i, "name": str(i)} for i in reversed(CATEGORIES)],
            }
        )
    )
    return dataset_name(root / "a.json", root)
