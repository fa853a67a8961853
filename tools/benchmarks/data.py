"""Images per second of a loader's worker: this project, PIL pipelines, decoding alone."""

import argparse
import copy
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import ImageFolder, open_images
from rsa_detectron2.pretrain.data.loader import MultiStageViews
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.tools.benchmarks import pil
from rsa_detectron2.tools.benchmarks.options import positive
from rsa_detectron2.tools.benchmarks.photographs import write_photographs
from rsa_detectron2.tools.benchmarks.timing import take_turns
from rsa_detectron2.transfer.data import drawn

FOLDERS = ("datasets/imagenet/train", "output/quickstart/images/train")  # tried without --data
DRAWN = 4  # photographs of --megapixels


def add_options(parser: argparse.ArgumentParser) -> None:
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--data", metavar="PATH", help="a folder of images (default: found or drawn)")
    images.add_argument(
        "--megapixels", type=positive, metavar="N", help=f"draw {DRAWN} photographs of so many megapixels"
    )
    parser.add_argument(
        "--quality", type=positive, default=90, help="JPEG quality of drawn photographs (default 90)"
    )
    parser.add_argument(
        "--prepared", metavar="PATH", help="what tools/prepare_data.py made of the images: measured too"
    )
    parser.add_argument("--images", type=positive, default=64, help="how many, evenly spaced (default 64)")
    parser.add_argument("--size", type=positive, default=224, help="side of a view, in pixels (default 224)")


def measure(args: argparse.Namespace) -> list[dict]:
    """Images per second of one core, by process time, which other jobs on the machine disturb less."""
    torch.set_num_threads(1)  # as in a loader's worker
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.megapixels:
            write_photographs(folder, DRAWN, args.megapixels, args.quality)
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / DRAWN
            print(f"drawn photographs of {args.megapixels} megapixels, {size / 1e6:.1f} MB on average")
        source = find_images(folder if args.megapixels else args.data, folder)
        indices = np.unique(np.linspace(0, len(source) - 1, args.images).astype(int)).tolist()
        parts = [indices[i : i + 4] for i in range(0, len(indices), 4)]
        seconds = take_turns(make_variants(source, args), parts, args.repeats, time.process_time)
    rates = {name: len(indices) / value for name, value in seconds.items()}
    first, decoding = next(iter(rates.values())), rates["decoding alone"]
    return [
        {
            "variant": name,
            "images/s per core": rate,
            "x RSA in PIL": rate / first,
            "x decoding": rate / decoding,
        }
        for name, rate in rates.items()
    ]


def make_variants(source: ImageFolder, args: argparse.Namespace) -> dict[str, Callable]:
    """{name: function of a list of indices}. Raises InputError if the prepared images are not as many."""
    whole = copy.copy(source)
    whole.reduced_decode = False
    variants = {
        "RSA in PIL, four float views": in_pil(source, pil.rsa_views(args.size)),
        "BYOL in PIL, two float views": in_pil(source, pil.byol_views(args.size)),
        "this project": in_this_project(source, args.size),
        "this project, REDUCED_DECODE False": in_this_project(whole, args.size),
        "decoding alone": lambda part: [source.read(i) for i in part],
    }
    if args.prepared:
        prepared = open_images(args.prepared)
        if len(prepared) != len(source):
            raise InputError(
                f"--prepared {args.prepared} has {len(prepared)} images, not the {len(source)} of "
                f"{source.root}: write it with tools/prepare_data.py"
            )
        variants["this project, prepared images"] = in_this_project(prepared, args.size)
    return variants


def in_pil(source: ImageFolder, views: Callable) -> Callable:
    return lambda part: default_collate([views(source.name(i)) for i in part])


def in_this_project(source: Source, size: int) -> Callable:
    """The loader's batches; each call is an epoch of its own, so that crops differ."""
    views, epochs = MultiStageViews(source, size, seed=0), itertools.count()

    def load(part: list[int]) -> dict[str, torch.Tensor]:
        epoch = next(epochs)
        return views.collate([views[epoch, index] for index in part])

    return load


def find_images(path: str | None, scratch: str) -> ImageFolder:
    """The images at ``path``; without it those in one of FOLDERS, or drawn ones, written to ``scratch``.

    Raises InputError.
    """
    path = path or next((folder for folder in FOLDERS if Path(folder).is_dir()), None)
    if path is None:
        print("no images found: drawing some of 400 px; photographs (--data PATH) take longer to decode")
        path = drawn.write_image_folder(scratch, 3, 400, 0)
    source = open_images(path)
    if not isinstance(source, ImageFolder):
        raise InputError(
            f"--data {path} is not a folder of image files, which the PIL pipelines need: give one"
        )
    print(f"{len(source)} images of {source.root}")
    return source
