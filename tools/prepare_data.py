#!/usr/bin/env python3
"""Rewrite a folder of images with their short side at 288 pixels, so that pre-training's loader decodes less.

    tools/prepare_data.py datasets/imagenet/train datasets/imagenet288/train
    tools/pretrain.py --data datasets/imagenet288/train

This step is optional, because pre-training reads the original files as well. docs/benchmarks.md says
how much faster the loader becomes, and what changes in the crops. Folders keep their names. An image that
is small enough is copied as it is; an unreadable one is named and left out. The same command, run again,
goes on where it stopped.
"""

import argparse
import io
import json
import os
import sys
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import BatchSampler, Dataset, SequentialSampler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from rsa_detectron2.common import workers
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import ImageFolder
from rsa_detectron2.pretrain.data.images import UnreadableImage
from rsa_detectron2.pretrain.data.pixels import check_pixels

WRITTEN, COPIED, THERE, UNREADABLE = range(4)
MARKER = "prepared.json"


def main() -> None:
    args = parse()
    for name, value, least, most in (
        ("--size", args.size, 1, 65500),
        ("--quality", args.quality, 1, 100),
        ("--workers", args.workers, 0, 4096),
    ):
        if not least <= value <= most:
            raise InputError(f"{name} {value}: it must lie between {least} and {most}")
    images, destination = open_source(args), Path(args.destination)
    how = {"size": args.size, "quality": args.quality}
    if args.range:
        how["range"] = args.range
    claim(destination, how)
    counts = prepare(Preparation(images, destination, args.size, args.quality), args.workers)
    left_out = f"; {counts[UNREADABLE]} unreadable ones left out, named above" if counts[UNREADABLE] else ""
    print(
        f"{destination}: {counts[WRITTEN]} images written, {counts[COPIED]} copied, "
        f"{counts[THERE]} were there already{left_out}"
    )
    if sum(counts[:3]) == 0:
        raise InputError(f"no image of {args.source} can be read: give a folder of images")


def open_source(args: argparse.Namespace) -> ImageFolder:
    """The images to prepare. Raises InputError if the destination lies among them."""
    source, destination = Path(args.source), Path(args.destination)
    if not source.is_dir():
        raise InputError(f"no image folder {source}: give the one to rewrite")
    if source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise InputError(
            f"{destination} lies in {source}: give a folder outside, so that the originals stay as they are"
        )
    images = ImageFolder(source)
    images.value_range = tuple(args.range)
    for note in check_pixels(images, "--range {} {}"):
        print(f"warning: {note}", file=sys.stderr)
    return images


def prepare(preparation: "Preparation", num_workers: int) -> list[int]:
    """Prepare all images and show the progress. Returns how many images had each outcome."""
    counts = [0, 0, 0, 0]
    one_by_one = BatchSampler(SequentialSampler(preparation.images), 1, False)
    outcomes = workers.load(preparation, one_by_one, num_workers, "--workers", itemgetter(0))
    interval = 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(
        outcomes, "preparing", len(preparation), unit="image", dynamic_ncols=True, mininterval=interval
    )
    for outcome, message in bar:
        counts[outcome] += 1
        if message:
            tqdm.write(message, file=sys.stderr)
    return counts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of images, with or without folders in it")
    parser.add_argument("destination", help="new folder")
    parser.add_argument("--size", type=int, default=288, help="short side in pixels (default 288)")
    parser.add_argument(
        "--quality", type=int, default=92, help="quality of the JPEG files, 1-100 (default 92)"
    )
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        default=[],
        metavar=("LOW", "HIGH"),
        help="values that become black and white, in channels of more than 8 bits (default: the range "
        "of their format)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that prepare images (default: one per core)",
    )
    return parser.parse_args()


def claim(folder: Path, how: dict[str, int | list[float]]) -> None:
    """Record in ``folder`` how its images are made.

    Raises InputError if it holds images that were made differently, or something else.
    """
    marker, text = folder / MARKER, json.dumps(how)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): give another folder") from None
    if marker.is_file():
        if (found := marker.read_text()) != text:
            raise InputError(f"{folder} was made with {found}, not with {text}: give another folder")
    elif not empty:
        raise InputError(f"{folder} is not empty and not of this tool: give a new folder")
    else:
        write(marker, text.encode())


class Preparation(Dataset):
    """Item ``index`` writes that image of a folder to ``destination`` and is (outcome, message).

    The image keeps its name; if another format becomes JPEG, .jpg is appended.
    """

    def __init__(self, images: ImageFolder, destination: Path, size: int, quality: int) -> None:
        self.images, self.destination, self.size, self.quality = images, destination, size, quality

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, str]:
        source = Path(self.images.name(index))
        same = self.destination / source.relative_to(self.images.root)
        jpeg = same if same.suffix.lower() in (".jpg", ".jpeg") else same.with_name(same.name + ".jpg")
        if is_whole(same) or is_whole(jpeg):
            return THERE, ""
        try:
            image = self.images.read(index)
        except UnreadableImage as error:
            return UNREADABLE, str(error)
        if min(image.shape[1:]) <= self.size:
            write(same, source.read_bytes())
            return COPIED, ""
        image = TF.resize(image, self.size, InterpolationMode.BICUBIC, antialias=True)
        write(jpeg, encode_jpeg(image, self.quality))
        return WRITTEN, ""


def encode_jpeg(image: torch.Tensor, quality: int) -> bytes:
    """uint8 RGB [3, H, W] -> the bytes of a JPEG file, the same as torchvision's and torchcodec's."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    """Write a file that gets its name only when it is whole.

    Raises InputError, and leaves nothing, when the disk is full.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room, then run the same command again, "
            "which goes on from there"
        ) from None


def is_whole(path: Path) -> bool:
    """Whether a file exists and is not empty: a power cut may leave an empty one under its final name."""
    return path.is_file() and path.stat().st_size > 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the workers take a core each
    run(main)
