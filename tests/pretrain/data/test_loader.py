"""The global batch of a step is a pure function of (seed, step), whichever processes load it."""

import pytest
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import ImageFolder
from rsa_detectron2.pretrain.data.loader import LocalBatch, MultiStageViews, StepBatches, build_loader
from rsa_detectron2.pretrain.engine.step import prefetch

WHOLE = LocalBatch()


def batches(image_folder, num_workers=0, seed=3, start=0, local=WHOLE):
    dataset = MultiStageViews(ImageFolder(image_folder), 32, seed)
    return list(build_loader(dataset, StepBatches(24, 8, range(start, 5), seed, local), num_workers))


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


def test_batch_holds_its_samples_with_a_pixels_channels_together(image_folder):
    dataset = MultiStageViews(ImageFolder(image_folder), 32, 3)
    samples = [dataset[0, index] for index in (5, 2, 9)]
    batch = dataset.collate(samples)
    assert batch["index"].tolist() == [5, 2, 9]
    for name in ("views", "params"):
        assert torch.equal(batch[name], torch.stack([sample[name] for sample in samples]))
    assert batch["views"].movedim(2, -1).is_contiguous()
    assert next(prefetch([batch], torch.device("cpu")))["views"].is_contiguous()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_number_of_workers_changes_nothing(image_folder, whole, num_workers):
    assert all(map(same, batches(image_folder, num_workers), whole))


def test_resumed_batches_are_the_same(image_folder, whole):
    assert all(map(same, batches(image_folder, start=2), whole[2:]))


def test_ranks_share_the_global_batch(image_folder, whole):
    parts = [batches(image_folder, local=LocalBatch(rank, 2)) for rank in (0, 1)]
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


def test_batches_that_do_not_fit():
    with pytest.raises(InputError, match="--batch-size"):
        StepBatches(24, 25, range(5), 0)
