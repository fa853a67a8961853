"""Drawn data sets are read by the readers of the real ones, with the labels that their files hold."""

import pickle

import numpy as np
import pytest
from PIL import Image

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.pixels import check_pixels
from rsa_detectron2.pretrain.data.source import STANDIN
from rsa_detectron2.pretrain.data.standins import IMAGENET100, KINDS, draw

CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "stl10": 10,
    "tinyimagenet": 10,
    "imagenet100": 100,
    "imagenet": 100,
}
SIDE = {"cifar10": 32, "cifar100": 32, "stl10": 96, "tinyimagenet": 64, "imagenet100": 256, "imagenet": 256}


@pytest.mark.parametrize("kind", KINDS)
def test_read_as_the_real_one(tmp_path, kind):
    place = draw(kind, tmp_path / "x", 24, seed=3)
    classes = str(IMAGENET100) if kind == "imagenet100" else ""
    images = open_images(place, "pretrain", classes)
    val = open_images(place.parent / "val" if kind.startswith("imagenet") else place, "val", classes)
    folders = kind.startswith("imagenet")
    assert (len(images), len(val)) == ((100, 100) if folders else (24, 6))
    assert len(images.classes) == CLASSES[kind] and images.classes == val.classes
    for source in (images, val):
        pixels = source.read(len(source) - 1)
        assert pixels.shape == (3, SIDE[kind], SIDE[kind]) and pixels.float().std() > 10
    if kind == "stl10":  # a quarter is labeled
        assert (
            sorted(images.labels.tolist())[:19] == [-1] * 18 + [0] and len(open_images(place, "train")) == 6
        )
    assert identity.summary(images)["name"].startswith("stand-in for ")
    assert check_pixels(images) == check_pixels(open_images(place, "pretrain", classes, 5)) == []
    again = draw(kind, tmp_path / "y", 24, seed=3)
    assert (open_images(again, "pretrain", classes).read(7) == images.read(7)).all()


def test_pixels_of_a_label_are_alike(tmp_path):
    """This shows that the formats' order and planes are right: one color, and noise of at most 40."""
    for kind in ("cifar10", "stl10"):
        images = open_images(draw(kind, tmp_path / kind, 40), "train")
        for label in set(images.labels.tolist()):
            means = np.array(
                [images.read(i).float().mean((1, 2)).numpy() for i in np.flatnonzero(images.labels == label)]
            )
            assert np.ptp(means, axis=0).max() < 10 and images.read(0).float().std((1, 2)).max() < 40


def test_without_its_mark_a_drawn_file_is_refused(tmp_path):
    place = draw("cifar10", tmp_path, 10)
    (place / STANDIN).unlink()
    with pytest.raises(InputError, match="incomplete or damaged"):
        open_images(place)
    batch = pickle.loads((place / "cifar-10-batches-py/data_batch_1").read_bytes())
    assert batch["data"].shape == (2, 3072)


@pytest.mark.parametrize("limit, count", [(0, 24), (10, 10), (24, 24), (99, 24)])
def test_a_limit_takes_evenly_spaced_images(tmp_path, limit, count):
    place = draw("cifar10", tmp_path, 24)
    whole, images = open_images(place), open_images(place, limit=limit)
    places = [i * 24 // count for i in range(count)]
    assert len(images) == count and images.labels.tolist() == whole.labels[places].tolist()
    assert (
        images.name(count - 1) == whole.name(places[-1]) and (images.read(1) == whole.read(places[1])).all()
    )
    images.value_range = (0, 9)
    assert images.value_range == (0, 9) and images.classes == whole.classes and len(images.known_bad()) == 0


def test_limit_of_files(tmp_path):
    for i in range(6):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / "train" / "ab"[i % 2] / f"{i}.png")
    images = open_images(tmp_path / "train", limit=3)
    assert [images.name(i)[-7:] for i in range(3)] == ["a/0.png", "a/4.png", "b/3.png"]
    assert images.encoded(1) and images.id(1) == "a/4.png" and images.classes == ["a", "b"]
