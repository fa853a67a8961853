#!/usr/bin/env python3
"""Fine-tune Mask R-CNN FPN from converted weights and evaluate it, with Detectron2 or the embedded engine.

    tools/train_net.py --config-file transfer/mask_rcnn_R50_FPN_1x.yaml --num-gpus 8
    tools/train_net.py --config-file transfer/mask_rcnn_R50_FPN_1x.yaml --data export
    tools/train_net.py --config-file transfer/mask_rcnn_R50_FPN_1x.yaml \\
        --eval-only MODEL.WEIGHTS model_final.pth

An iteration has SOLVER.IMS_PER_BATCH images on any number of GPUs. Gradients are accumulated over images
that do not fit at once (--accumulate), or the schedule is adapted (--scale-schedule). KEY VALUE pairs at
the end override the config, as in Detectron2.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.config import NoSuchKey, find_config, merge_config, origin
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import locked
from rsa_detectron2.transfer.config import (
    DEFAULT_WEIGHTS,
    RECIPE_LENGTHS,
    classes_key,
    fitting_rate,
    scale_schedule,
    torchvision_defaults,
)
from rsa_detectron2.transfer.data.annotations import dataset_name, load_dataset, locate_dataset
from rsa_detectron2.transfer.data.parts import locate_parts

if TYPE_CHECKING:
    from rsa_detectron2.common.launch import Processes

INSTALL_DETECTRON2 = (
    "Detectron2 is not installed: install a prebuilt wheel "
    "(torch 2.4-2.10: pip install detectron2 --extra-index-url "
    "https://wheels.astral.sh/simple/cu128/), follow its install guide, or run with --engine torchvision"
)
FEWER_KEYS = (
    "the embedded engine trains Mask and Faster R-CNN FPN and has only their keys; "
    "leave the key out, or use --engine detectron2"
)


def main() -> None:
    args = parse()
    find_config(args.config_file)  # before torch and Detectron2, which are slow to import
    from rsa_detectron2.common.distributed import is_first_process
    from rsa_detectron2.common.launch import adopt_slurm

    adopt_slurm(os.environ)
    engine, cfg, options = setup(args)
    defaults = cfg.clone()
    cfg.MODEL.WEIGHTS = DEFAULT_WEIGHTS  # random weights need MODEL.WEIGHTS ""
    try:
        configure(cfg, args)
    except NoSuchKey as error:
        if args.engine == "torchvision":
            raise InputError(f"{error}; {FEWER_KEYS}") from None
        raise
    came_from = origin(find_config(args.config_file), args.overrides, defaults)
    first = is_first_process() and args.machine_rank == 0
    with locked(cfg.OUTPUT_DIR, "OUTPUT_DIR") if first else contextlib.nullcontext():
        engine.train(cfg, resume=args.resume, eval_only=args.eval_only, origin=came_from, **options)
    if first:
        print(f"done: {cfg.OUTPUT_DIR}/results.json; next: tools/report.py {cfg.OUTPUT_DIR}")


def setup(args: argparse.Namespace) -> tuple[ModuleType, CfgNode, dict]:
    """The engine that ``args`` name, its default configuration, and the options of its ``train``.

    Raises InputError if the engine cannot be imported or lacks an option.
    """
    if args.engine == "detectron2":
        engine, get_cfg = import_detectron2()
        return engine, get_cfg(), {"passes": engine.Passes(processes(args), args.accumulate)}
    from rsa_detectron2.common.distributed import launched
    from rsa_detectron2.transfer.tv import engine

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    several = max(args.num_gpus, args.num_processes or 1, args.num_machines, args.accumulate or 1) > 1
    if several or args.scale_schedule or launched():
        raise InputError(
            "several processes or machines, --accumulate and --scale-schedule need --engine detectron2: "
            "the embedded engine trains on one device, all images at once"
        )
    return engine, torchvision_defaults(), {}


def import_detectron2() -> tuple[ModuleType, Callable[[], CfgNode]]:
    """The engine of Detectron2, and Detectron2's ``get_cfg``. Raises InputError if it is not usable."""
    if importlib.util.find_spec("detectron2") is None:
        raise InputError(INSTALL_DETECTRON2)
    try:
        from rsa_detectron2.transfer.d2 import engine
        from rsa_detectron2.transfer.d2.config import get_cfg
    except Exception as error:  # most often it was built for another torch, or is too old for this Pillow
        raise InputError(
            f"Detectron2 is installed but cannot be imported ({type(error).__name__}: {error}): "
            "reinstall it for this torch, or run with --engine torchvision"
        ) from None
    return engine, get_cfg


def configure(cfg: CfgNode, args: argparse.Namespace, images: int | None = None) -> None:
    """Merge into ``cfg`` the config file, the protocol, then the options and KEY VALUE pairs.

    Adapts the schedule to the size of --train and the learning rate to the batch, unless they are given.
    images: the size, if it is to be another than that of --train. Raises InputError.
    """
    merge_config(cfg, find_config(args.config_file), [])
    if args.protocol != "infomin":
        given = ["OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_{args.protocol}"]
        merge_config(cfg, find_config(f"transfer/protocol_{args.protocol}.yaml"), given)
    given = ["SOLVER.REFERENCE_WORLD_SIZE", 8] if args.scale_schedule else []
    if args.eval_only and not args.resume:  # keeps the results of the recipe's own run
        given += ["OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_eval"]
    for key, files in (("TRAIN", args.train), ("TEST", args.val)):
        if files:
            given += [f"DATASETS.{key}", repr((dataset_name(*files),))]
    recipe_images = cfg.SOLVER.IMS_PER_BATCH
    merge_config(cfg, None, [*given, *args.overrides])
    cfg.MODEL.WEIGHTS = os.path.expanduser(cfg.MODEL.WEIGHTS)
    if args.train and not args.val:
        refuse_absent_val(cfg)
    if args.train and classes_key(cfg) not in args.overrides[::2]:
        classes = load_dataset(dataset_name(*args.train)).categories
        merge_config(cfg, None, [classes_key(cfg), len(classes)])
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise InputError(f"SOLVER.{key} is {cfg.SOLVER[key]}: it must be at least 1")
    keys, trains = set(args.overrides[::2]), not args.eval_only
    told = {"SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS"} & keys
    # A schedule that the config file itself gives is kept.
    scaled = args.train and trains and not told and cfg.SOLVER.MAX_ITER in RECIPE_LENGTHS
    if scaled:
        images = images or load_dataset(dataset_name(*args.train)).annotated(cfg.MODEL.MASK_ON)
        say(scale_schedule(cfg.SOLVER, max(1, images)))
    if trains and cfg.SOLVER.IMS_PER_BATCH != recipe_images and "SOLVER.BASE_LR" not in keys:
        say(fitting_rate(cfg.SOLVER, recipe_images, not (scaled or told)))


def say(line: str) -> None:
    """Print a line in the first process."""
    from rsa_detectron2.common.distributed import is_first_process

    if is_first_process():
        print(line, flush=True)


def refuse_absent_val(cfg: CfgNode) -> None:
    """Raise InputError if a data set that the config evaluates on is not on this machine."""
    for name in cfg.DATASETS.TEST:
        try:
            locate_dataset(name)
        except InputError:
            raise InputError(
                f"the config evaluates on {name}, which is not here: with --train give --val too"
            ) from None


def processes(args: argparse.Namespace) -> "Processes":
    """The processes that a launcher has started or the options ask for: one per GPU, or several on the CPU
    where there is none.

    Raises InputError.
    """
    import torch

    from rsa_detectron2.common.distributed import launched, local_world_size
    from rsa_detectron2.common.launch import Processes

    if launched():
        here = local_world_size()
        return Processes(here, int(os.environ["WORLD_SIZE"]) // here)
    if args.num_processes and torch.cuda.is_available():
        raise InputError("--num-processes is for a machine without a GPU: use --num-gpus")
    if args.num_gpus > max(1, torch.cuda.device_count()):
        advice = "" if torch.cuda.is_available() else " (--num-processes N runs several on the CPU)"
        raise InputError(
            f"--num-gpus {args.num_gpus}, but this machine shows {torch.cuda.device_count()}{advice}"
        )
    here, several = max(1, args.num_processes or args.num_gpus), args.num_machines > 1
    if not 0 <= args.machine_rank < args.num_machines:
        raise InputError(
            f"--machine-rank {args.machine_rank}: the machines are 0 to --num-machines - 1, which is "
            f"{args.num_machines - 1}"
        )
    if several and not re.fullmatch(r"tcp://[^/:]+:\d+", args.dist_url):
        raise InputError(
            f"--dist-url {args.dist_url!r}: give tcp://HOST:PORT, the first machine's address and a free port"
        )
    address = args.dist_url.removeprefix("tcp://")
    return Processes(here, args.num_machines, args.machine_rank, address) if several else Processes(here)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with --data as the --train and --val that it stands for. Raises InputError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="looked up here and under configs/")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="GPUs of this machine to use (default 1)"
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="number of processes on the CPU, to try distributed training without GPUs",
    )
    parser.add_argument(
        "--num-machines", type=int, default=1, metavar="N", help="each with --num-gpus and one command"
    )
    parser.add_argument("--machine-rank", type=int, default=0, metavar="N", help="number of this machine")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0, the same on all"
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="number of passes into which each GPU splits its images of an iteration; "
        "BatchNorm sees the images of one pass (default: by memory)",
    )
    share.add_argument(
        "--scale-schedule",
        action="store_true",
        help="train on two images per GPU, with the learning rate and schedule "
        "scaled from 8 GPUs (Detectron2's SOLVER.REFERENCE_WORLD_SIZE)",
    )
    parser.add_argument(
        "--protocol",
        choices=("infomin", "moco"),
        default="infomin",
        help="which layers have SyncBN, and the box head (default %(default)s)",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate MODEL.WEIGHTS, do not train; writes to the config's OUTPUT_DIR with _eval appended",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in "
        "OUTPUT_DIR, or start if there is none; required in a folder that holds a run",
    )
    parser.add_argument("--engine", choices=("detectron2", "torchvision"), default="detectron2")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="train and evaluate on the COCO-format data sets in FOLDER: train/ and valid/ or val/, each "
        "with its JSON, or COCO's own layout",
    )
    parser.add_argument(
        "--train",
        nargs=2,
        metavar=("JSON", "IMAGES"),
        help="train on this COCO-format data set, with "
        "the 1x or 2x schedule scaled by its size unless KEY VALUE or the config file give one",
    )
    parser.add_argument(
        "--val", nargs=2, metavar=("JSON", "IMAGES"), help="evaluate on this COCO-format data set"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    args = parser.parse_intermixed_args(arguments)  # KEY VALUE pairs may stand between options
    if args.data:
        if args.train or args.val:
            raise InputError("--data takes the place of --train and --val: leave these out")
        args.train, args.val = locate_parts(args.data)
    return args


if __name__ == "__main__":
    run(main)
