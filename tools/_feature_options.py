"""Options that the tools which look at features share."""

import argparse
import sys

from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import black_and_white
from rsa_detectron2.pretrain.data.pixels import check_pixels
from rsa_detectron2.pretrain.data.source import Source


def add_checkpoint_and_images(parser: argparse.ArgumentParser) -> None:
    """Whose features, and of what."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default="output/pretrain/model_final.pth",
        metavar="CHECKPOINT",
        help="file of tools/pretrain.py, or any that tools/convert_to_d2.py reads (default: %(default)s)",
    )
    parser.add_argument(
        "images",
        nargs="?",
        default="",
        metavar="IMAGES",
        help="folder of images, or a data set that tools/pretrain.py takes (default: what it was pre-trained "
        "on)",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint and images are read; see :func:`apply_reading`."""
    parser.add_argument(
        "--branch",
        choices=("online", "target"),
        help="network of the checkpoint (default: online, or the one that a converted file holds)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images (default: as in pre-training)"
    )
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of channels with more than 8 bits that become black and white (default: as in "
        "pre-training)",
    )


def apply_reading(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Set in a configuration what the options say of how images are read. Raises InputError."""
    if args.workers is not None:
        cfg.DATA.NUM_WORKERS = args.workers
    if args.range:
        if problem := black_and_white(args.range):
            raise InputError(f"--range: {problem}")
        cfg.DATA.RANGE = tuple(args.range)


def warn_of_pixels(images: Source) -> None:
    """Warn of pixels that may be read otherwise than meant."""
    for note in check_pixels(images, "--range {} {}"):
        print(f"warning: {note}", file=sys.stderr)


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raises InputError for an option below its least value; one that was not given is None."""
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise InputError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {value}"
            )
