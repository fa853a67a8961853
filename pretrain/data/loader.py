"""Global batches as a pure function of (seed, step).

The batch of step s is a slice of its epoch's permutation. The crops, flips and ``params`` of a sample are
drawn from (seed, epoch, index). So a run can stop anywhere and go on bit for bit, and the numbers of workers,
ranks and accumulation steps do not change which pixels are seen.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from rsa_detectron2.common import distributed, workers
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.bad_images import read_or_next
from rsa_detectron2.pretrain.data.images import decode
from rsa_detectron2.pretrain.data.reduced import reduced_views
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.method.augment import Crop, draw_crop, draw_params, weak_view

# First words of seeds: the order of an epoch and the samples in it are drawn independently.
ORDER_STREAM, SAMPLE_STREAM = 0, 1


class MultiStageViews(Dataset):
    """The weak views of an image: (epoch, index) -> {"views", "params", "index", "skipped"}.

    ``views`` is uint8 [2, 3, S, S]; ``params``, float32 [2, P], is what their aggressive stage applies.
    ``skipped`` counts the images from ``index`` on that cannot be decoded; the next one stands in for them.
    """

    def __init__(self, images: Source, size: int, seed: int):
        self.images, self.size, self.seed = images, size, seed
        images.share_bad()  # or each worker would try a bad image anew

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, SAMPLE_STREAM, epoch, index))
        crops = [draw_crop(rng) for _ in range(2)]
        views, skipped = read_or_next(self.images, index, lambda at: self.weak_views(at, crops))
        return {
            "views": torch.stack([view.movedim(0, -1) for view in views]).movedim(-1, 1),
            "params": torch.stack([draw_params(rng) for _ in range(2)]),
            "index": index,
            "skipped": skipped,
        }

    def weak_views(self, index: int, crops: Sequence[Crop]) -> list[torch.Tensor]:
        """A view of an image for each of ``crops``, uint8 [3, S, S]. Raises UnreadableImage."""
        if self.images.reduced_decode and hasattr(self.images, "encoded"):
            data, name = self.images.encoded(index)
            if views := reduced_views(data, crops, self.size):
                return views
            image = decode(data, name, self.images.value_range)
        else:
            image = self.images.read(index)
        return [weak_view(image, crop, self.size) for crop in crops]

    @staticmethod
    def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
        """A batch whose views have the channels last in memory, as the samples have. The device, which is
        faster at it, moves them to the front."""
        batch = default_collate([{**sample, "views": sample["views"].movedim(-3, -1)} for sample in samples])
        return {**batch, "views": batch["views"].movedim(-1, -3)}


@dataclass(frozen=True)
class LocalBatch:
    """Which slice of each global batch a process takes, and in how many micro-batches. By default, all of it
    at once."""

    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None  # None: the whole local batch

    def slices(self, batch_size: int) -> list[slice]:
        """Of a global batch of ``batch_size`` images, one slice for each micro-batch."""
        local = batch_size // self.world_size
        size = self.micro_batch_size or local
        begin = self.rank * local
        return [slice(first, first + size) for first in range(begin, begin + local, size)]


class StepBatches(Sampler):
    """The micro-batches of one process, as lists of (epoch, index), for each step of ``steps``.

    Steps count from 0. An epoch is a permutation of the data set drawn from (seed, epoch), cut to
    whole global batches. Raises InputError where there are fewer images than ``batch_size``.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        steps: range,
        seed: int,
        local: LocalBatch = LocalBatch(),
    ):
        if num_images < batch_size:
            fits = 1 << num_images.bit_length() - 1  # the largest power of two
            raise InputError(
                f"the data set has {num_images} images, fewer than the global batch of {batch_size}: "
                f"lower it with --batch-size {fits}"
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps, self.slices = steps, local.slices(batch_size)

    def __len__(self) -> int:
        return len(self.steps) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        epoch, order = None, None
        for step in self.steps:
            if epoch != step // steps_per_epoch:
                epoch = step // steps_per_epoch
                order = np.random.default_rng((self.seed, ORDER_STREAM, epoch)).permutation(self.num_images)
            first = step % steps_per_epoch * self.batch_size
            batch = [(epoch, int(index)) for index in order[first : first + self.batch_size]]
            for part in self.slices:
                yield batch[part]


def build_loader(dataset: Dataset, batches: Iterable[list], num_workers: int) -> workers.Loader:
    """A loader of ``batches``, lists of keys of a map-style ``dataset``; it collates each into tensors."""
    return workers.load(
        dataset, batches, resolve_workers(num_workers), "--workers", getattr(dataset, "collate", None)
    )


def resolve_workers(num_workers: int) -> int:
    """The number of workers: for -1, the cores of this process, 16 at most."""
    if num_workers >= 0:
        return num_workers
    return min(16, distributed.cores())
