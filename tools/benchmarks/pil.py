"""The weak and aggressive views in PIL, image by image, as the authors' public code makes them."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from rsa_detectron2.pretrain.config import IMAGENET_MEAN, IMAGENET_STD
from rsa_detectron2.pretrain.method.augment import MAX_SIGMA


def rsa_views(size: int) -> Callable[[str], list[torch.Tensor]]:
    """File name -> four normalized views, float32 [3, size, size]: two weak, two aggressive."""
    weak, aggressive, finish = weak_stage(size), aggressive_stage(), to_normalized()

    def views(name: str) -> list[torch.Tensor]:
        image = read(name)
        pair = [weak(image) for _ in range(2)]
        return [finish(view) for view in pair + [aggressive(view) for view in pair]]

    return views


def byol_views(size: int) -> Callable[[str], list[torch.Tensor]]:
    """File name -> two normalized aggressive views, float32 [3, size, size]."""
    view = transforms.Compose([weak_stage(size), aggressive_stage(), to_normalized()])

    def views(name: str) -> list[torch.Tensor]:
        image = read(name)
        return [view(image) for _ in range(2)]

    return views


def read(name: str | Path) -> Image.Image:
    with Image.open(name) as image:
        return image.convert("RGB")


def weak_stage(size: int) -> Callable:
    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip()])


def aggressive_stage() -> Callable:
    return transforms.Compose(
        [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
        ]
    )


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, MAX_SIGMA)))


def to_normalized() -> Callable:
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
