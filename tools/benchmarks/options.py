"""Options that several benchmarks share. Their defaults are a recipe's; without one, the machine's."""

import argparse

from rsa_detectron2.common.config import find_config, merge_config
from rsa_detectron2.common.distributed import device
from rsa_detectron2.pretrain.config import check, get_cfg

# Option -> the config key that holds it.
KEYS = {
    "backbone": "MODEL.BACKBONE",
    "size": "DATA.IMAGE_SIZE",
    "batch_size": "SOLVER.BATCH_SIZE",
    "amp": "SOLVER.AMP",
}
# Defaults where no recipe is given.
GPU = {"backbone": "resnet50", "size": 224, "batch_size": 256, "amp": "fp16"}
CPU = {"backbone": "resnet18", "size": 64, "batch_size": 32, "amp": "off"}


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark."""
    parser.add_argument("--repeats", type=positive, default=5, help="turns of each variant (default 5)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON lines to a file too")


def add_recipe(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add ``--config-file`` and the options ``names`` of KEYS."""
    parser.add_argument(
        "--config-file", help="a recipe of configs/pretrain, whose settings replace the defaults below"
    )
    options = {
        "backbone": {},
        "size": {"type": positive, "help": "side of a view, in pixels"},
        "batch_size": {"type": positive},
        "amp": {"choices": ("fp16", "bf16", "off")},
    }
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **options[name])


def resolve(args: argparse.Namespace) -> None:
    """Set ``args.cfg`` to the recipe's CfgNode, with the options that were given.

    Without a recipe, options that were not given have the machine's defaults. Raises InputError.
    """
    path = args.config_file and find_config(args.config_file)
    args.cfg = merge_config(get_cfg(), path, [])
    check(args.cfg)
    defaults = GPU if device().type == "cuda" else CPU
    for name, key in KEYS.items():
        value = getattr(args, name, None)
        if value is None and not args.config_file:
            value = defaults[name]
        if value is not None:
            args.cfg.merge_from_list([key, value])
