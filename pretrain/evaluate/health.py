"""Is pre-training working, without labels? Four figures of the features of two weak views of each image.

- **Effective rank** (RankMe, Garrido et al. 2023): how many dimensions the features fill.
- **Alignment** (Wang and Isola 2020): how far the two views of an image lie apart.
- **Uniformity** (the same): how evenly different images are spread.
- **Consistency**: for how many views the nearest of all others is the other view of the same image.

The rank is that of the backbone's features and, where there is a projector, of the projections, for which
RankMe was proposed. The other three are of the backbone, because it is what is transferred and every
checkpoint has one. They compare directions, as kNN does.

The views are those of a training's first epoch with seed 0, whatever the run's own seed. So they are the same
in each row of a run, and in runs of any method.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.drift import choose, load_views
from rsa_detectron2.pretrain.evaluate.features import Features

IMAGES = {"cuda": 10_000, "cpu": 1_000}  # by default, where HEALTH.IMAGES is -1
COSINES = 2**24  # numbers in memory at once: 64 MB


@torch.no_grad()
def measure_health(features: Features, images: Source, limit: int = -1) -> dict[str, float]:
    """The figures of at most ``limit`` images, evenly spaced; -1: the number of IMAGES for the device.

    Returns {"rank_backbone", "rank_projection", "alignment", "uniformity", "consistency"}, without
    "rank_projection" where there is no projector. Features are taken in eval mode. Raises InputError where
    there are fewer than two images.
    """
    count = min(len(images), IMAGES[device().type] if limit < 0 else limit)
    if count < 2:
        raise InputError(f"{printable(images.root)} has one image: health compares different images")
    views = {"health": count, "reduced": images.reduced_decode}
    key = {**views, **features.describe(images)} if features.cache else None
    if cached := features.cache and features.cache.get(key):
        return {name: float(value) for name, value in cached.items()}
    first, second = features_of_views(features, images, count)
    figures = {"rank_backbone": effective_rank(first)}
    if features.projector is not None:
        figures["rank_projection"] = effective_rank(features.project(first))
    figures |= {
        "alignment": alignment(first, second),
        "uniformity": uniformity(first),
        "consistency": neighbor_consistency(first, second),
    }
    if features.cache:
        features.cache.put(key, **{name: np.array(value) for name, value in figures.items()})
    return figures


def features_of_views(features: Features, images: Source, count: int) -> tuple[Tensor, Tensor]:
    """Backbone features of both weak views of ``count`` images, float32 [count, D] each."""
    parts, size, workers = [], features.data.IMAGE_SIZE, features.data.NUM_WORKERS
    with tqdm(total=count, desc="health", unit="image", leave=False, dynamic_ncols=True, disable=None) as bar:
        for batch in load_views(images, size, 0, choose(len(images), count), workers):
            views = batch["views"]
            parts.append(features(views.flatten(0, 1)).unflatten(0, views.shape[:2]))
            bar.update(len(views))
    first, second = torch.cat(parts).unbind(1)
    return first.contiguous(), second.contiguous()


def effective_rank(features: Tensor) -> float:
    """RankMe of features [N, D]: exp of the entropy of p_k = s_k / sum(s), with the singular values s.

    It lies between 1, where all features are alike, and min(N, D), so only ranks of equally many images can
    be compared. As in the paper, features are neither centered nor normalized: their mean counts as a
    dimension, and those that all have the same direction give 1. The paper adds 1e-7 to each p_k to avoid
    log(0); here 0 log 0 is 0. Zero where all features are zero, NaN where one is not finite.

    The singular values are roots of the Gram matrix's eigenvalues in float64: it is many times faster than
    an SVD, and what it loses, below 1e-8 of the largest, is less than float32 features resolve.
    """
    if not features.isfinite().all():
        return math.nan
    features = features.double()
    gram = features.T @ features if len(features) > features.shape[1] else features @ features.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    return torch.special.entr(singular / total).sum().exp().item() if total else 0.0


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the l2-normalized features [N, D] of two views (Wang and Isola's, alpha 2).

    0 where they are equal, 2 where they are orthogonal.
    """
    difference = F.normalize(first, dim=1) - F.normalize(second, dim=1)
    return difference.square().sum(1).mean().item()


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Log of the mean of exp(-t |x - y|^2) over all pairs of different images; x, y are their l2-normalized
    features, of [N, D] (Wang and Isola's, t 2).

    0 where all are equal. -2t where all are orthogonal, which is about the least that many images can have.
    """
    if not features.any():
        return 0.0  # zeros have no direction, but are all equal
    total = sum(cosine.sub_(1).mul_(2 * t).exp_().sum(dtype=torch.float64) for _, cosine in cosines(features))
    return math.log(total / (len(features) * (len(features) - 1)))


def neighbor_consistency(first: Tensor, second: Tensor) -> float:
    """For how many of the 2N views, in percent, the nearest by cosine of all others is the other view of the
    same image; features [N, D] of two views. The more images there are, the harder it is."""
    count, found = len(first), 0
    for start, cosine in cosines(torch.cat([first, second])):
        rows = torch.arange(start, start + len(cosine), device=cosine.device)
        found += (cosine.argmax(1) == (rows + count) % (2 * count)).sum()
    return 100 * int(found) / (2 * count)


def cosines(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cosines of features [N, D] with one another, some rows at a time: (number of the first row, [n, N]).

    Minus infinity takes the place of each one's cosine with itself.
    """
    directions = F.normalize(features, dim=1)
    size = max(1, COSINES // len(directions))
    for start in range(0, len(directions), size):
        cosine = directions[start : start + size] @ directions.T
        cosine.diagonal(start).fill_(-torch.inf)
        yield start, cosine
