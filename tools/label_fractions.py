#!/usr/bin/env python3
"""Is pre-training worth it on my data? AP by the number of labeled images, from several weights.

    tools/label_fractions.py --data export --dry-run      # every fine-tuning, and what it costs
    tools/label_fractions.py --data export --num-gpus 8 --weights mine=output/weights/mine_r50.pkl
    tools/label_fractions.py --data export --engine torchvision --fractions 10 100 --set SOLVER.MAX_ITER 500

Fine-tunes on fractions of the labeled images, from each row's weights, several seeds each. A seed puts the
images in an order, and a fraction is the first of them: so a smaller fraction's images are among a larger
one's, and all rows have the same. Each fine-tuning is one of tools/train_net.py, which scales the schedule by
the number of labeled images, but not below a thirtieth (3,000 iterations of 16 images at 1x). A schedule that
--set or the config file gives is that of every fraction. Stopped at any point, the same command goes on.
"""

import argparse
from pathlib import Path

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools._fractions import RANDOM, LabelFractions
from rsa_detectron2.tools._options import flag, weights_of
from rsa_detectron2.tools._steps import run_job

# Keys that differ between the fine-tunings, and the option that gives them.
OPTIONS = {
    "SEED": "--seeds",
    "OUTPUT_DIR": "--output-dir",
    "MODEL.WEIGHTS": "--weights NAME=FILE",
    "DATASETS.TRAIN": "--train",
    "DATASETS.TEST": "--val",
}


def main() -> int:
    args = parse()
    return run_job(
        LabelFractions(args),
        args.jobs,
        args.dry_run,
        lambda hours: f"about {hours:.3g} V100-hours for Mask R-CNN R50-FPN at full size",
    )


def parse() -> argparse.Namespace:
    """The options. Raises InputError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        default="transfer/mask_rcnn_R50_FPN_1x.yaml",
        metavar="FILE",
        help="default %(default)s",
    )
    parser.add_argument(
        "--data", nargs=1, metavar="FOLDER", help="data set in COCO's format, as in tools/train_net.py"
    )
    parser.add_argument("--train", nargs=2, metavar=("JSON", "IMAGES"), help="instead of --data, with --val")
    parser.add_argument("--val", nargs=2, metavar=("JSON", "IMAGES"), help="the same for every fraction")
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=[1, 5, 10, 100],
        metavar="PERCENT",
        help="of the labeled images (default 1 5 10 100)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="random, supervised, rsa, or a NAME of --weights (default: all whose weights are there)",
    )
    parser.add_argument(
        "--weights",
        action="append",
        type=weights_of,
        default=[],
        metavar="NAME=FILE",
        help="converted weights of a row: of supervised, of rsa, or of a row of its own",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each row (default 3)")
    parser.add_argument("--engine", choices=("detectron2", "torchvision"), default="detectron2")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="of each fine-tuning")
    parser.add_argument("--accumulate", type=int, metavar="N", help="as in tools/train_net.py")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="fine-tunings at a time (default 1)")
    parser.add_argument(
        "--output-dir", default="output/label_fractions", metavar="DIR", help="default %(default)s"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their cost, and stop")
    parser.add_argument(
        "--set",
        nargs="+",
        dest="overrides",
        default=[],
        metavar="KEY VALUE",
        help="for every fine-tuning, e.g. SOLVER.MAX_ITER 500",
    )
    args = parser.parse_args()
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that cannot be meant."""
    for name in ("seeds", "jobs", "num_gpus"):
        if getattr(args, name) < 1:
            raise InputError(f"{flag(name)} is {getattr(args, name)}: it must be at least 1")
    for fraction in args.fractions:
        if not 0 < fraction <= 100:
            raise InputError(f"--fractions {fraction:g}: it must be above 0, and 100 percent at most")
    for name, _ in args.weights:
        if name in (RANDOM, "..") or Path(name).name != name:
            raise InputError(f"--weights {name}=FILE: {name} cannot be the name of a row with weights")
    for key in args.overrides[::2]:
        if key in OPTIONS:
            raise InputError(f"--set {key}: give {OPTIONS[key]} instead")


if __name__ == "__main__":
    run(main)
