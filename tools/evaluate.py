#!/usr/bin/env python3
"""Judge a pre-trained backbone by kNN or by linear evaluation on labeled images.

    tools/evaluate.py knn                     # output/pretrain/model_final.pth, its own data set
    tools/evaluate.py linear CHECKPOINT --train DIR --val DIR
    tools/evaluate.py parts CHECKPOINT        # both, of classes such as "star-blue": pair, form, color

CHECKPOINT is a file of tools/pretrain.py, or any other that tools/convert_to_d2.py reads. Given a
recipe (.yaml), its untrained network is judged, drawn by --seed. The protocol of linear evaluation
follows from the image size: up to 64 pixels that of the small data sets, else that of ImageNet. What
can be used again is kept in CHECKPOINT.features: the same command goes on where it was stopped.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rsa_detectron2.common import record
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.pixels import check_pixels
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate import linear
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.pretrain.evaluate.knn import NoValidation, evaluate_knn, find_labeled
from rsa_detectron2.pretrain.evaluate.parts import evaluate_parts
from rsa_detectron2.tools._weights import load_features, untrained_features


def main() -> None:
    args = parse()
    for name, value, least in (
        ("epochs", args.epochs, 1),
        ("bank", args.bank, 0),
        ("workers", args.workers, -1),
    ):
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}: it must be at least {least}")

    if args.checkpoint.endswith(".yaml"):
        features, cfg, provenance = untrained_features(args.checkpoint, args.seed)
    else:
        features, cfg, provenance = load_features(args.checkpoint, args.branch)
    cfg.DATA.PATH = args.train or cfg.DATA.PATH
    cfg.DATA.VAL = args.val or ("" if args.train else cfg.DATA.VAL)
    cfg.DATA.CLASSES = args.classes or ("" if args.train else cfg.DATA.CLASSES)
    if args.workers is not None:
        cfg.DATA.NUM_WORKERS = args.workers
    images = open_images(cfg.DATA.PATH, "train", cfg.DATA.CLASSES, cfg.DATA.LIMIT)
    images.value_range = tuple(args.range or cfg.DATA.RANGE)
    try:
        train, val = find_labeled(cfg, images)
    except NoValidation as reason:
        raise InputError(f"{reason}; kNN and linear evaluation take --train DIR and --val DIR") from None

    for source in (train, val):
        for note in check_pixels(source, "--range {} {}"):
            print(f"warning: {note}", file=sys.stderr)
    result = {
        "kind": args.protocol,
        "checkpoint": args.checkpoint,
        **provenance,
        "versions": record.versions(),
        "train": identity.summary(train),
        "val": identity.summary(val),
    }
    if args.protocol == "knn":
        result["bank"] = min(args.bank or len(train), len(train))
        result["knn_top1"] = evaluate_knn(features, train, val, args.bank)
    else:
        features.amp = None  # float32 features, whatever it was trained with
        judge = run_linear if args.protocol == "linear" else run_parts
        result |= judge(args, features, train, val)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, lambda file: file.write(json.dumps(result).encode()))
    print(json.dumps(result))


def run_linear(args: argparse.Namespace, features: Features, train: Source, val: Source) -> dict[str, Any]:
    """Linear evaluation, once more with BatchNorm in train mode for --train-bn."""
    name = "small" if features.data.IMAGE_SIZE <= 64 else "large"
    protocol = linear.shorten(linear.LINEAR[name], args.epochs)
    top1 = linear.evaluate_linear(features, train, val, protocol, linear.Trial(args.seed))
    result = {
        "protocol": name,
        "settings": asdict(protocol),
        "seed": args.seed,
        "epochs": protocol.epochs,
        "linear_top1_last": top1[-1],
        "linear_top1_best": max(top1),
        "best_epoch": 1 + top1.index(max(top1)),
    }
    if args.train_bn:
        top1 = linear.evaluate_linear(features, train, val, protocol, linear.Trial(args.seed, train_bn=True))
        result |= {
            "train_bn_top1_last": top1[-1],
            "train_bn_top1_best": max(top1),
            "train_bn_best_epoch": 1 + top1.index(max(top1)),
        }
    return result


def run_parts(args: argparse.Namespace, features: Features, train: Source, val: Source) -> dict[str, Any]:
    """kNN and linear top-1 of each part of the label."""
    if device().type == "cpu":
        torch.set_num_threads(1)  # these are few images, and figures must not depend on the number of cores
    return {"seed": args.seed, **evaluate_parts(features, train, val, args.seed)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", choices=("knn", "linear", "parts"))
    parser.add_argument("checkpoint", nargs="?", default="output/pretrain/model_final.pth")
    parser.add_argument(
        "--train", metavar="DIR", help="labeled training images (default: what it was pre-trained on)"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="class folders to keep (default: all of --train, or those of pre-training)",
    )
    parser.add_argument(
        "--val", metavar="DIR", help="labeled validation images (default: val/ or test/ beside them)"
    )
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of channels with more than 8 bits that become black and white (default: as in "
        "pre-training)",
    )
    parser.add_argument(
        "--branch",
        choices=("online", "target"),
        help="of the checkpoint (default: online, or the one that a converted file holds)",
    )
    parser.add_argument("--epochs", type=int, help="of linear evaluation, with milestones in proportion")
    parser.add_argument(
        "--train-bn",
        action="store_true",
        help="linear evaluation once more, with the frozen backbone's "
        "BatchNorm in train mode, as in the authors' code on small data sets",
    )
    parser.add_argument(
        "--bank",
        type=int,
        default=0,
        metavar="N",
        help="of kNN: at most N training images, evenly spaced (default: all)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that load images (default: the pre-training's number)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="write the result there, too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
