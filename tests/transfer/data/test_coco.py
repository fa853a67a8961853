"""COCO's run-length strings as pycocotools writes and reads them, and the project's drawn data in the
checks."""

import numpy as np
import pytest
from pycocotools import mask as rle

from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.drawn import write_coco
from rsa_detectron2.transfer.data.masks import run_lengths


def masks():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 300), (7, 5), (64, 80), (700, 900)):
        pixel = np.zeros((height, width))
        pixel[rng.integers(height), rng.integers(width)] = 1
        block = np.zeros((height, width))
        block[height // 3 : height // 3 + 40, width // 4 :] = (
            1  # long runs: several characters each, and differences
        )
        yield from (np.zeros((height, width)), np.ones((height, width)), pixel, block)
        yield from (rng.random((height, width)) < share for share in (0.001, 0.1, 0.5, 0.99))


def test_run_lengths_are_those_of_pycocotools():
    for mask in masks():
        mask = np.asfortranarray(mask, dtype=np.uint8)
        code = rle.encode(mask)
        counts = run_lengths(code["counts"].decode())
        assert sum(counts) == mask.size and min(counts) >= 0
        drawn = np.repeat(np.arange(len(counts)) % 2, counts)
        assert np.array_equal(drawn, mask.ravel(order="F"))
        assert (
            rle.frPyObjects({"size": code["size"], "counts": counts}, *code["size"])["counts"]
            == code["counts"]
        )


@pytest.mark.parametrize(
    "text, message",
    [
        ("/", "character '/'"),
        ("0p", "character 'p'"),
        ("0\u00e9", "character"),
        ("0\0", "character"),
        ("o", "ends in the middle of a number"),
        ("0o", "ends in the middle of a number"),
        ("P" * 6 + "0", "more than 30 bits"),
    ],
)
def test_a_broken_run_length_string_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        run_lengths(text)


def test_the_drawn_shapes_are_sound(tmp_path, capsys):
    cfg = torchvision_defaults()
    name = dataset_name(write_coco(tmp_path, "val", 6, 64, 0), tmp_path / "images")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = True, 18
    (dataset,) = check_datasets(cfg)
    assert (len(dataset.images), dataset.annotated(), dataset.has_rle()) == (6, 6, True)
    assert "warning" not in capsys.readouterr().err
