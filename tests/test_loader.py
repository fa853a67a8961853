"""The global batch of a step is a pure function of (seed, step), whoever loads it."""

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import InputError
from pretrain.datasets import ImageFolder, read_image
from pretrain.loader import MultiStageViews, StepBatches, build_loader


def batches(image_folder, num_workers=0, seed=3, **slices):
    dataset = MultiStageViews(ImageFolder(image_folder), 32, seed)
    return list(build_loader(dataset, StepBatches(24, 8, 5, seed, **slices), num_workers))


@pytest.fixture(scope="module")
def whole(image_folder):
    return batches(image_folder)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in ("views", "params", "index"))


def test_shapes(whole):
    assert len(whole) == 5
    assert whole[0]["views"].shape == (8, 2, 3, 32, 32) and whole[0]["views"].dtype == torch.uint8
    assert whole[0]["params"].shape == (8, 2, 10) and whole[0]["params"].dtype == torch.float32
    assert not torch.equal(whole[0]["views"][:, 0], whole[0]["views"][:, 1])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_number_of_workers_changes_nothing(image_folder, whole, num_workers):
    assert all(map(same, batches(image_folder, num_workers), whole))


def test_resumed_batches_are_the_same(image_folder, whole):
    assert all(map(same, batches(image_folder, start=2), whole[2:]))


def test_ranks_share_the_global_batch(image_folder, whole):
    parts = [batches(image_folder, rank=rank, world_size=2) for rank in (0, 1)]
    for one, two, both in zip(*parts, whole):
        assert same({name: torch.cat([one[name], two[name]]) for name in one}, both)


def test_epochs_are_permutations_and_differ(whole):
    first = torch.cat([batch["index"] for batch in whole[:3]])
    assert sorted(first.tolist()) == list(range(24)) and first.tolist() != list(range(24))
    later = {int(i): v for batch in whole[3:] for i, v in zip(batch["index"], batch["views"])}
    again = [i for i in range(24) if i in later]
    views = torch.cat([batch["views"] for batch in whole[:3]])[torch.argsort(first)]
    assert all(not torch.equal(views[i], later[i]) for i in again)


def test_another_seed_is_another_run(image_folder, whole):
    assert not same(batches(image_folder, seed=4)[0], whole[0])


def test_labels_and_unlabelled_images(image_folder, tmp_path):
    images = ImageFolder(image_folder)
    assert images.classes == ["a", "b"] and len(images) == 24 and sorted(np.bincount(images.labels)) == [12, 12]
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    assert ImageFolder(tmp_path).labels.tolist() == [-1]


@pytest.mark.parametrize("mode, suffix", [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"),
                                          ("L", "bmp")])
def test_image_modes_are_read_as_rgb(tmp_path, mode, suffix):
    gradient = np.linspace(0, 255, 40 * 30, dtype=np.uint8).reshape(30, 40)
    Image.fromarray(np.stack([gradient, gradient[::-1], gradient // 2], 2)).convert(mode).save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    expected = torch.from_numpy(np.array(Image.open(tmp_path / f"x.{suffix}").convert("RGB"))).permute(2, 0, 1)
    assert (image.float() - expected.float()).abs().mean() < 3


def test_png_of_16_bits(tmp_path):
    gradient = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    Image.fromarray(gradient).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    assert np.abs(image[0].numpy() - gradient / 257).max() <= 1


def test_what_cannot_be_loaded_is_named(image_folder, tmp_path):
    with pytest.raises(InputError, match="--data"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(InputError, match="no images"):
        ImageFolder(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match="broken.jpg"):
        read_image(tmp_path / "broken.jpg")
    with pytest.raises(InputError, match="--batch-size"):
        StepBatches(24, 25, 5, 0)
    with pytest.raises(InputError, match="use 6"):
        StepBatches(24, 8, 5, 0, world_size=3)
