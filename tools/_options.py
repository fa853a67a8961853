"""Options of tools/reproduce.py that serve some of its tables, and which these are."""

import argparse
from collections.abc import Sequence

from rsa_detectron2.common.errors import InputError

# What an option serves: kinds of table, or tables by their names. It is refused for any other.
SERVES = {
    "rows": ("top1", "hours", "ap", "test"),
    "columns": ("top1", "hours"),
    "betas": ("figure3",),
    "short": ("hours",),
    "weights": ("ap",),
    "num_gpus": ("ap",),
    "accumulate": ("ap",),
    "engine": ("ap", "miniature"),
    "rehearse": ("top1", "hours", "ap", "pictures"),
    "overrides": ("ap", "test"),
}


def add_paper_options(parser: argparse.ArgumentParser) -> None:
    """Options of the paper's tables alone."""
    parser.add_argument(
        "--rehearse", action="store_true", help="each run once, with a few steps on a few images"
    )
    parser.add_argument(
        "--columns", nargs="+", metavar="COLUMN", help="data sets (and lengths) of Tables 1-4, 7, 8"
    )
    parser.add_argument("--betas", nargs="+", type=float, metavar="BETA", help="Figure 3's grid")
    parser.add_argument(
        "--short", action="store_true", help="of Table 7: the seconds of an epoch, times the epochs"
    )
    parser.add_argument(
        "--weights",
        action="append",
        type=weights_of,
        default=[],
        metavar="NAME=FILE",
        help="of Tables 5 and 6: the checkpoint of a row, or of a row of its own",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="for fine-tuning; pre-training takes all")
    parser.add_argument("--accumulate", type=int, metavar="N", help="as in tools/train_net.py")
    parser.add_argument(
        "--engine",
        choices=("detectron2", "torchvision"),
        help="for fine-tuning (default detectron2, in miniature torchvision)",
    )


def weights_of(text: str) -> tuple[str, str]:
    """An argparse type: NAME=FILE -> (name, file)."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FILE")
    return name, path


def check_options(args: argparse.Namespace, kind: str, given: Sequence[str]) -> None:
    """Raises InputError for an option that has no effect or no meaning.

    kind: of the table, "all" for several; given: the options of SERVES that are not left at their defaults.
    """
    for name in ("seeds", "jobs", "num_gpus"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"{flag(name)} is {getattr(args, name)}: it must be at least 1")
    if len(args.overrides) % 2:
        raise InputError(f"--set takes KEY VALUE pairs, but {args.overrides[-1]!r} has no value")
    useless = [flag(name) for name in given if not {kind, args.table} & {*SERVES[name]}]
    if useless and kind != "all":
        raise InputError(f"{', '.join(useless)}: of no use for {args.table}; leave it out")


def flag(name: str) -> str:
    return "--set" if name == "overrides" else f"--{name.replace('_', '-')}"
