"""Milliseconds per view of the aggressive stage, and bytes moved: this project, torchvision, kornia."""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF

from rsa_detectron2.common.distributed import device
from rsa_detectron2.pretrain.method.augment import (
    BLUR_RADIUS,
    FACTORS,
    GRAY,
    MAX_SIGMA,
    ORDER,
    SIGMA,
    aggressive,
    draw_params,
    to_float,
)
from rsa_detectron2.tools.benchmarks.options import add_recipe
from rsa_detectron2.tools.benchmarks.timing import device_clock, take_turns
from rsa_detectron2.tools.benchmarks.traffic import measure_traffic


def add_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "size", "batch_size")


def measure(args: argparse.Namespace) -> list[dict]:
    """Time the stage from uint8 views on the device to float views, and count what its operators move."""
    size, batch_size = args.cfg.DATA.IMAGE_SIZE, args.cfg.SOLVER.BATCH_SIZE
    views, params = synthetic_views(batch_size, size)
    views = views.to(device())
    variants = {
        "this project": lambda _: aggressive(views, params),
        "torchvision, one by one": lambda _: one_by_one(views, params),
    }
    try:
        variants["kornia"] = in_kornia(views)
    except ImportError:
        print("kornia is not installed: skipped (pip install kornia)")
    with torch.no_grad():
        traffic = {name: measure_traffic(work, device().type) for name, work in variants.items()}
        seconds = take_turns(variants, [None], args.repeats, device_clock)
    num_views = 2 * batch_size
    return [
        {
            "variant": name,
            "size": size,
            "views": num_views,
            "ms per view": 1000 * value / num_views,
            "ms": 1000 * value,
            "x this project": value / seconds["this project"],
            "GB": traffic[name].bytes / 1e9,
            "operators": traffic[name].operators,
        }
        for name, value in seconds.items()
    ]


def synthetic_views(batch_size: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of noise, uint8 [B, 2, 3, S, S], and params float32 [B, 2, P] as the loader draws them."""
    rng = np.random.default_rng(0)
    params = torch.stack([draw_params(rng) for _ in range(2 * batch_size)]).view(batch_size, 2, -1)
    return torch.from_numpy(rng.integers(0, 256, (batch_size, 2, 3, size, size), dtype=np.uint8)), params


def one_by_one(views: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """The aggressive stage by torchvision's functions, view by view; arguments as for ``aggressive``."""
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    result = []
    for image, row in zip(to_float(views.flatten(0, 1)), params.flatten(0, 1)):
        factors = row[FACTORS].tolist()
        for operation in row[ORDER].int().tolist():
            if operation >= 0:
                image = adjust[operation](image, factors[operation])
        if row[GRAY]:
            image = TF.rgb_to_grayscale(image, 3)
        if row[SIGMA]:
            image = TF.gaussian_blur(image, 2 * BLUR_RADIUS + 1, row[SIGMA].item())
        result.append(image)
    return torch.stack(result).view(views.shape)


def in_kornia(views: torch.Tensor) -> Callable:
    """The same operations in kornia, which draws one order of the jitter per batch. Raises ImportError."""
    from kornia import augmentation

    kernel = 2 * BLUR_RADIUS + 1
    stage = torch.nn.Sequential(
        augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur((kernel, kernel), (0.1, MAX_SIGMA), p=0.5),
    )
    return lambda _: stage(to_float(views.flatten(0, 1)))
