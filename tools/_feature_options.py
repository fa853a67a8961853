"""Options that the tools which look at features share."""

import argparse

from rsa_detectron2.common.errors import InputError


def add_checkpoint_and_images(parser: argparse.ArgumentParser) -> None:
    """Whose features, and of what."""
    parser.add_argument("checkpoint", nargs="?", default="output/pretrain/model_final.pth")
    parser.add_argument(
        "images",
        nargs="?",
        default="",
        metavar="IMAGES",
        help="folder of images, or a data set that tools/pretrain.py takes (default: what it was pre-trained "
        "on)",
    )


def add_branch_and_workers(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint and images are read."""
    parser.add_argument(
        "--branch",
        choices=("online", "target"),
        help="network of the checkpoint (default: online, or the one that a converted file holds)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images (default: as in pre-training)"
    )


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raises InputError for an option below its least value; one that was not given is None."""
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise InputError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {value}"
            )
