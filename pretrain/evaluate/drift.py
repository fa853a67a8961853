"""The semantic shift: how far an aggressive view moves from its weak view in a backbone's features.

Features are the backbone's in eval mode, because every checkpoint has a backbone and it is what is
transferred. The drift of a pair is 1 - cos of its two feature vectors. The pairs are those of a training's
first epoch: the views and ``params`` that MultiStageViews draws from (seed, 0, index).
"""

import csv
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from rsa_detectron2.common.distributed import device
from rsa_detectron2.pretrain.data.loader import MultiStageViews, build_loader
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.pretrain.method.augment import (
    FACTORS,
    GRAY,
    MAX_SIGMA,
    ORDER,
    SIGMA,
    aggressive,
    draw_params,
)

JITTER = ("brightness", "contrast", "saturation", "hue")
# Each is measured alone and always applied: (operations of the jitter, grayscale, blur).
OPERATIONS = {
    **{name: ((i,), 0, 0) for i, name in enumerate(JITTER)},
    "jitter": (range(4), 0, 0),
    "grayscale": ((), 1, 0),
    "blur": ((), 0, 1),
}
STRENGTH_STREAM = 2  # first word of a seed; 0 and 1 are the loader's
BATCH_SIZE = 32


def choose(count: int, limit: int) -> np.ndarray:
    """At most ``limit`` indices of ``count``, evenly spaced."""
    return np.arange(min(count, limit)) * count // min(count, limit)


def load_views(
    images: Source, size: int, seed: int, indices: Iterable[int], num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The MultiStageViews of epoch 0 at ``indices``, in batches.

    ``index`` is that of the image that was read, which differs where an image cannot be decoded.
    """
    keys = [(0, int(index)) for index in indices]
    batches = [keys[first : first + BATCH_SIZE] for first in range(0, len(keys), BATCH_SIZE)]
    for batch in build_loader(MultiStageViews(images, size, seed), batches, num_workers):
        batch["index"] = (batch["index"] + batch["skipped"]) % len(images)
        yield batch


@torch.no_grad()
def measure_pairs(features: Features, images: Source, seed: int, limit: int) -> dict[str, np.ndarray]:
    """The agreement of both pairs of at most ``limit`` images, most drifted first.

    Returns {"index", "view" int64 [N], "params" float32 [N, P], "cosine" float32 [N]}. ``cosine`` is that of
    an aggressive view and its weak view.
    """
    found = {"index": [], "view": [], "params": [], "cosine": []}
    indices = choose(len(images), limit)
    with tqdm(total=len(indices), desc="pairs", unit="image", dynamic_ncols=True) as progress:
        for batch in load_views(images, features.data.IMAGE_SIZE, seed, indices, features.data.NUM_WORKERS):
            views = batch["views"].to(device())
            weak = features(views.flatten(0, 1))
            shifted = features.of_floats(aggressive(views, batch["params"]).flatten(0, 1))
            found["index"].append(batch["index"].repeat_interleave(2))
            found["view"].append(torch.tensor([0, 1]).repeat(len(views)))
            found["params"].append(batch["params"].flatten(0, 1))
            found["cosine"].append(F.cosine_similarity(weak, shifted, dim=1).cpu())
            progress.update(len(views))
    found = {name: torch.cat(parts) for name, parts in found.items()}
    order = found["cosine"].argsort(stable=True)
    return {name: values[order].numpy() for name, values in found.items()}


@torch.no_grad()
def measure_operations(features: Features, images: Source, seed: int, limit: int) -> dict[str, np.ndarray]:
    """Drifts of the first weak view of at most ``limit`` images: {name: float32 [N]}.

    Each of OPERATIONS is applied alone and always, at the strengths of the training. "as drawn" is the
    training's own aggressive view. Two more set the scale: "another crop" is the other weak view, "another
    image" the weak view of the next image.
    """
    drifts, weaks = {name: [] for name in (*OPERATIONS, "as drawn", "another crop")}, []
    indices = choose(len(images), limit)
    with tqdm(total=len(indices), desc="operations", unit="image", dynamic_ncols=True) as progress:
        for batch in load_views(images, features.data.IMAGE_SIZE, seed, indices, features.data.NUM_WORKERS):
            views = batch["views"][:, :1].to(device())
            strengths = torch.stack(
                [
                    draw_strengths(np.random.default_rng((seed, STRENGTH_STREAM, index)))
                    for index in batch["index"].tolist()
                ]
            )[:, None]
            weak = features(views[:, 0])
            weaks.append(weak)

            others = {
                name: features.of_floats(aggressive(views, only(name, strengths))[:, 0])
                for name in OPERATIONS
            }
            others["as drawn"] = features.of_floats(aggressive(views, batch["params"][:, :1])[:, 0])
            others["another crop"] = features(batch["views"][:, 1])
            for name, other in others.items():
                drifts[name].append(1 - F.cosine_similarity(weak, other, dim=1).cpu())
            progress.update(len(views))
    drifts = {name: torch.cat(parts).numpy() for name, parts in drifts.items()}
    weaks = torch.cat(weaks)
    drifts["another image"] = 1 - F.cosine_similarity(weaks, weaks.roll(-1, 0), dim=1).cpu().numpy()
    return drifts


def draw_strengths(rng: np.random.Generator) -> torch.Tensor:
    """``params`` float32 [P] that apply every operation; strengths and order are drawn as in the training."""
    params = draw_params(rng)
    params[ORDER] = torch.from_numpy(rng.permutation(4)).to(params.dtype)
    params[GRAY] = 1
    params[SIGMA] = rng.uniform(0.1, MAX_SIGMA)
    return params


def only(operation: str, params: torch.Tensor) -> torch.Tensor:
    """``params`` [..., P] that apply ``operation`` only, a key of OPERATIONS."""
    jitter, gray, blur = OPERATIONS[operation]
    params = params.clone()
    kept = torch.isin(params[..., ORDER], torch.tensor(list(jitter), dtype=params.dtype))
    order = torch.where(kept, params[..., ORDER], -1)
    # The operations come first: aggressive() takes an order that ends in -1, not one with gaps.
    front = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)
    params[..., ORDER] = order.gather(-1, front)
    params[..., GRAY] *= gray
    params[..., SIGMA] *= blur
    return params


def describe(params: torch.Tensor | np.ndarray) -> dict[str, str | float]:
    """``params`` [P] -> {"order": "hue contrast ...", "brightness": factor, ..., "hue": degrees,
    "grayscale": 0 or 1, "blur": sigma in pixels}. What the jitter did not apply is absent."""
    params = np.asarray(params)
    words = {}
    order = [JITTER[int(i)] for i in params[ORDER] if i >= 0]
    if order:
        words["order"] = " ".join(order)
        words |= {
            name: float(params[FACTORS][i]) * (360 if name == "hue" else 1)
            for i, name in enumerate(JITTER)
            if name in order
        }
    return words | {"grayscale": int(params[GRAY]), "blur": float(params[SIGMA])}


def caption(params: torch.Tensor | np.ndarray) -> str:
    """:func:`describe` on one short line, without what was not applied."""
    words = describe(params)
    signs = {"brightness": "b×{:.1f}", "contrast": "c×{:.1f}", "saturation": "s×{:.1f}", "hue": "h{:+.0f}°"}
    parts = [sign.format(words[name]) for name, sign in signs.items() if name in words]
    if words["grayscale"]:
        parts.append("gray")
    if words["blur"]:
        parts.append(f"blur {words['blur']:.1f}")
    return " ".join(parts).replace("-", "−") or "nothing drawn"


def write_pairs(path: str | Path, pairs: dict[str, np.ndarray], images: Source, seed: int) -> None:
    """Write the pairs of :func:`measure_pairs` as CSV, a row each, in their order.

    Columns: rank, index, file, seed, view (0 or 1), cosine, and those of :func:`describe`.
    """
    drawn = ("order", *JITTER, "grayscale", "blur")
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "index", "file", "seed", "view", "cosine", *drawn])
        for rank, (index, view, params, cosine) in enumerate(
            zip(*(pairs[name] for name in ("index", "view", "params", "cosine"))), start=1
        ):
            words = describe(params)
            writer.writerow(
                [
                    rank,
                    index,
                    images.name(index),
                    seed,
                    view,
                    f"{cosine:.6f}",
                    *(
                        f"{words[name]:.4g}" if isinstance(words.get(name), float) else words.get(name, "")
                        for name in drawn
                    ),
                ]
            )


def write_operations(path: str | Path, drifts: dict[str, np.ndarray]) -> None:
    """Write the drifts of :func:`measure_operations` as CSV, a row for each operation.

    Columns: operation, images, mean, standard error, median, 90th percentile.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["operation", "images", "mean", "standard error", "median", "90th percentile"])
        for name, values in drifts.items():
            error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            writer.writerow(
                [
                    name,
                    len(values),
                    *(
                        f"{x:.6f}"
                        for x in (values.mean(), error, np.median(values), np.percentile(values, 90))
                    ),
                ]
            )
