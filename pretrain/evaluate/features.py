"""Features of a frozen backbone. knn.py and linear.py classify them, health.py needs no labels."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch.utils.data import BatchSampler, Dataset, SequentialSampler
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from rsa_detectron2.common.distributed import device
from rsa_detectron2.pretrain.data.bad_images import read_or_next
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.loader import build_loader
from rsa_detectron2.pretrain.data.source import Source, say
from rsa_detectron2.pretrain.evaluate.cache import FeatureCache, fingerprint
from rsa_detectron2.pretrain.method.augment import normalize, to_float

BATCH = 128  # images that go through the backbone at once
LONGEST = 4  # in short sides: pixels farther out matter neither to the center crop nor to its filter


class CenterCrops(Dataset):
    """The validation transform: index -> (uint8 [3, size, size], label).

    The short side becomes ``resize`` pixels, then the center is cropped. With ``replace``, the next image
    stands in for one that cannot be decoded. Without, UnreadableImage is raised, because a published figure
    must be of all images.
    """

    def __init__(self, images: Source, indices: Sequence[int], resize: int, size: int, replace: bool = False):
        self.images, self.indices = images, indices
        self.resize, self.size, self.replace = resize, size, replace
        images.share_bad()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        index = self.indices[i]
        image, skipped = read_or_next(self.images, index) if self.replace else (self.images.read(index), 0)
        return center_crop(image, self.resize, self.size), label_of(self.images, index + skipped)


def center_crop(image: torch.Tensor, resize: int, size: int) -> torch.Tensor:
    """uint8 [3, H, W] -> [3, size, size]: short side to ``resize``, then the center."""
    height, width = image.shape[-2:]
    short = min(height, width)
    if max(height, width) > LONGEST * short:  # one line of 20000 pixels would become 5 million columns
        # Cut the same number of pixels on either side, to keep the center where it is.
        sides = [side - 2 * max(0, (side - LONGEST * short) // 2) for side in (height, width)]
        image = TF.center_crop(image, sides)
    if short != resize:
        image = TF.resize(image, [resize], antialias=True)
    return TF.center_crop(image, [size, size])


def label_of(images: Source, index: int) -> int:
    """The label of an image; after the last index comes the first."""
    return int(images.labels[index % len(images)])


class Labeled(NamedTuple):
    """Features of images, and their labels."""

    features: torch.Tensor  # float32 [N, D]
    labels: torch.Tensor  # int64 [N]


class Features:
    """A frozen backbone: uint8 images [B, 3, S, S] -> float32 features [B, D].

    It runs in eval mode unless asked otherwise. ``data`` is the DATA of a configuration, ``amp`` a dtype or
    None. ``cache`` is that of the checkpoint which holds the backbone: features of center crops are kept
    there. ``projector`` follows the backbone in pre-training; None for a checkpoint without one.
    """

    def __init__(
        self,
        backbone: torch.nn.Module,
        data: CfgNode,
        amp: torch.dtype | None,
        cache: FeatureCache | None = None,
        projector: torch.nn.Module | None = None,
    ):
        self.backbone, self.data, self.amp, self.cache = backbone, data, amp, cache
        self.projector = projector
        self.mean, self.std = (torch.tensor(values, device=device()) for values in (data.MEAN, data.STD))

    def __call__(self, images: torch.Tensor, train: bool = False) -> torch.Tensor:
        return self.of_floats(to_float(images.to(device(), non_blocking=True)), train)

    @torch.no_grad()
    def of_floats(self, images: torch.Tensor, train: bool = False) -> torch.Tensor:
        """Features of float32 images [B, 3, S, S] in [0, 1].

        With ``train``, BatchNorm uses the statistics of the batch and updates its running ones.
        """
        self.backbone.train(train)  # on every call: the training loop that shares it changes the mode
        images = normalize(images, self.mean, self.std)
        with torch.autocast(device().type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            return self.backbone(images.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Projections [N, out_dim] of features [N, D], float32 both, by the projector in eval mode."""
        self.projector.eval()
        return torch.cat([self.projector(part) for part in features.split(1024)])

    def of(
        self, images: Source, description: str, limit: int | None = None, replace: bool = False
    ) -> Labeled:
        """Center-crop features and labels of a source.

        At most ``limit`` images, evenly spaced; None or 0: all. ``replace`` as in CenterCrops;
        ``description`` is the title of the progress bar.
        """
        count = min(len(images), limit or len(images))
        key = {"features": count, "replace": replace, **self.describe(images)} if self.cache else None
        if cached := self.cache and self.cache.get(key):
            return Labeled(*(torch.from_numpy(cached[name]).to(device()) for name in Labeled._fields))
        features, labels, done = None, torch.empty(count, dtype=torch.long, device=device()), 0
        indices = np.arange(count) * len(images) // count
        for batch, batch_labels in self.batches(images, indices, description, replace):
            # Allocate once: ImageNet's features take 10 GB, and concatenating them would take 20.
            if features is None:
                features = batch.new_empty(count, batch.shape[1])
            part = slice(done, done + len(batch))
            features[part], labels[part], done = batch, batch_labels, part.stop
        if replace and (bad := images.known_bad()):
            say(
                f"{len(bad)} of the {len(images)} images of {printable(images.root)} cannot be decoded, "
                f"{printable(images.name(bad[0]))} first: the next ones stand in for them"
            )
        if self.cache:
            self.cache.put(key, features=features.cpu().numpy(), labels=labels.cpu().numpy())
        return Labeled(features, labels)

    def statistics(self, images: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, float32 [D] each, of the l2-normalized center-crop features.

        Summed up batch by batch, because the features of ImageNet would fill 10 GB.
        """
        key = {"statistics": len(images), **self.describe(images)} if self.cache else None
        if cached := self.cache and self.cache.get(key):
            return tuple(torch.from_numpy(cached[name]).to(device()) for name in ("mean", "var"))
        total = squares = 0
        for features, _ in self.batches(images, np.arange(len(images)), "feature statistics", replace=True):
            features = F.normalize(features, dim=1).double()
            total, squares = total + features.sum(0), squares + features.square().sum(0)
        mean = total / len(images)
        var = (squares - len(images) * mean.square()) / (len(images) - 1)
        mean, var = mean.float(), var.clamp_(min=0).float()
        if self.cache:
            self.cache.put(key, mean=mean.cpu().numpy(), var=var.cpu().numpy())
        return mean, var

    def batches(
        self, images: Source, indices: Sequence[int], description: str, replace: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Center-crop features [B, D] and labels [B], batch by batch."""
        crops = CenterCrops(images, indices, self.data.EVAL_RESIZE, self.data.IMAGE_SIZE, replace)
        sampler = BatchSampler(SequentialSampler(crops), BATCH, False)
        loader = build_loader(crops, sampler, self.data.NUM_WORKERS)
        for batch, labels in tqdm(loader, description, leave=False, dynamic_ncols=True, disable=None):
            yield self(batch), labels

    def describe(self, images: Source) -> dict[str, Any]:
        """What the center-crop features of a source depend on, besides the checkpoint."""
        return {
            "images": fingerprint(images),
            "range": list(images.value_range),
            "resize": self.data.EVAL_RESIZE,
            "size": self.data.IMAGE_SIZE,
            "mean": list(self.data.MEAN),
            "std": list(self.data.STD),
            "dtype": str(self.amp),
        }
