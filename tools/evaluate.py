#!/usr/bin/env python3
"""Judge a pre-trained backbone: kNN or linear evaluation on labeled images, health without labels.

    tools/evaluate.py knn                     # output/pretrain/model_final.pth, its own data set
    tools/evaluate.py linear CHECKPOINT --train DIR --val DIR
    tools/evaluate.py parts CHECKPOINT        # both, of classes such as "star-blue": pair, form, color
    tools/evaluate.py health CHECKPOINT --train DIR    # effective rank, alignment, uniformity, consistency
    tools/evaluate.py trust RUN --output DIR  # how well these, and the loss, rank a run's checkpoints

CHECKPOINT is a file of tools/pretrain.py, or any other that tools/convert_to_d2.py reads. Given a
recipe (.yaml), its untrained network is judged, drawn by --seed. The protocol of linear evaluation
follows from the image size: up to 64 pixels that of the small data sets, else that of ImageNet. What
can be used again is kept in CHECKPOINT.features: the same command goes on where it was stopped.

RUN is the folder of a pre-training that has kept several checkpoints (CHECKPOINT.KEEP_PERIOD). Of each,
trust takes the health, kNN top-1, and top-1 of a linear classifier on the features of center crops. It
writes the rank correlations to trust.md and ranks.csv, the figures to table.csv, and draws trust.png.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common import record
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.datasets import images_of
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate import linear
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.pretrain.evaluate.health import measure_health
from rsa_detectron2.pretrain.evaluate.knn import NoValidation, evaluate_knn, find_labeled, knn_top1
from rsa_detectron2.pretrain.evaluate.linear import evaluate_linear_on
from rsa_detectron2.pretrain.evaluate.parts import evaluate_parts
from rsa_detectron2.tools import _trust
from rsa_detectron2.tools._feature_options import add_reading, apply_reading, check_at_least, warn_of_pixels
from rsa_detectron2.tools._weights import load_features, untrained_features


def main() -> None:
    args = parse()
    check_at_least(args, epochs=1, bank=0, images=2, workers=-1, seed=0)
    if args.protocol == "trust":
        return run_trust(args)

    features, cfg, provenance = load(args, args.checkpoint)
    result = {
        "kind": args.protocol,
        "checkpoint": args.checkpoint,
        **provenance,
        "versions": record.versions(),
    }
    if args.protocol == "health":
        images = open_source(cfg, "pretrain")
        result |= {"train": identity.summary(images), **health(args, features, cfg, images)}
    else:
        train, val = labeled_images(args, cfg)
        result |= {"train": identity.summary(train), "val": identity.summary(val)}
        result |= JUDGES[args.protocol](args, features, train, val)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, lambda file: file.write(json.dumps(result).encode()))
    print(json.dumps(result))


def load(args: argparse.Namespace, checkpoint: str) -> tuple[Features, CfgNode, dict]:
    """The Features of a checkpoint, or of a recipe's untrained network; its configuration, with the data of
    the options; and its provenance."""
    if checkpoint.endswith(".yaml"):
        features, cfg, provenance = untrained_features(checkpoint, args.seed)
    else:
        features, cfg, provenance = load_features(checkpoint, args.branch)
    data = cfg.DATA
    if args.train:
        data.PATH, data.VAL, data.CLASSES, data.LIMIT = args.train, "", "", 0
    data.VAL, data.CLASSES = args.val or data.VAL, args.classes or data.CLASSES
    apply_reading(args, cfg)
    return features, cfg, provenance


def open_source(cfg: CfgNode, split: str) -> Source:
    """The images of DATA.PATH; warns of unusual pixels."""
    images = images_of(cfg.DATA, split)
    warn_of_pixels(images)
    return images


def labeled_images(args: argparse.Namespace, cfg: CfgNode) -> tuple[Source, Source]:
    """The labeled training and validation images. Raises InputError where there are none."""
    try:
        train, val = find_labeled(cfg, open_source(cfg, "train"))
    except NoValidation as reason:
        raise InputError(
            f"{reason}; {args.protocol} needs labels: give --train DIR and --val DIR (health needs none)"
        ) from None
    warn_of_pixels(val)
    return train, val


def health(args: argparse.Namespace, features: Features, cfg: CfgNode, images: Source) -> dict[str, float]:
    return measure_health(features, images, args.images or cfg.HEALTH.IMAGES or -1)


def run_trust(args: argparse.Namespace) -> None:
    """Compare health with top-1 over the checkpoints of a run; print the table."""
    rows = {}
    for path in _trust.kept_checkpoints(args.checkpoint):
        features, cfg, provenance = load(args, str(path))
        if (step := provenance["step"]) in rows:
            continue  # model_final.pth is the last of those that were kept
        features.amp = None  # float32 features for all
        train, val = labeled_images(args, cfg)
        limit = _trust.IMAGES if args.bank is None else args.bank
        bank = features.of(train, f"step {step}, training images", limit, replace=True)
        queries = features.of(val, f"step {step}, validation images", limit)
        _, protocol = linear_protocol(args, features)
        rows[step] = {
            **health(args, features, cfg, open_source(cfg, "pretrain")),
            "knn_top1": knn_top1(bank, queries),
            "linear_top1": evaluate_linear_on(bank, queries, protocol, linear.Trial(args.seed))[-1],
        }
        print(json.dumps({"step": step, **rows[step]}), file=sys.stderr, flush=True)
    if len(rows) < _trust.FEWEST:
        raise _trust.too_few(args.checkpoint, len(rows))
    print(_trust.report(args.checkpoint, rows, args.output or Path(args.checkpoint, "trust")))


def run_knn(args: argparse.Namespace, features: Features, train: Source, val: Source) -> dict[str, Any]:
    bank = args.bank or 0
    top1 = evaluate_knn(features, train, val, bank)
    return {"bank": min(bank or len(train), len(train)), "knn_top1": top1}


def linear_protocol(args: argparse.Namespace, features: Features) -> tuple[str, linear.LinearProtocol]:
    """The protocol of linear evaluation for the image size: its name, and its settings with --epochs."""
    name = "small" if features.data.IMAGE_SIZE <= 64 else "large"
    return name, linear.shorten(linear.LINEAR[name], args.epochs)


def run_linear(args: argparse.Namespace, features: Features, train: Source, val: Source) -> dict[str, Any]:
    """Linear evaluation, once more with BatchNorm in train mode for --train-bn."""
    name, protocol = linear_protocol(args, features)
    features.amp = None  # float32 features, whatever it was trained with
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
    features.amp = None
    if device().type == "cpu":
        torch.set_num_threads(1)  # these are few images, and figures must not depend on the number of cores
    return {"seed": args.seed, **evaluate_parts(features, train, val, args.seed)}


JUDGES = {"knn": run_knn, "linear": run_linear, "parts": run_parts}
SERVES = {  # option: what it is for
    "epochs": ("linear", "trust"),
    "train_bn": ("linear",),
    "bank": ("knn", "trust"),
    "images": ("health", "trust"),
    "val": (*JUDGES, "trust"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", choices=(*JUDGES, "health", "trust"))
    parser.add_argument(
        "checkpoint", nargs="?", help="default: output/pretrain/model_final.pth, of trust output/pretrain"
    )
    parser.add_argument(
        "--train",
        metavar="DIR",
        help="training images, labeled but for health (default: what it was pre-trained on)",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="class folders to keep (default: all of --train, or those of pre-training)",
    )
    parser.add_argument(
        "--val", metavar="DIR", help="labeled validation images (default: val/ or test/ beside them)"
    )
    add_reading(parser)
    parser.add_argument(
        "--epochs",
        type=int,
        help="of linear evaluation (default: 100 up to 64 pixels, else 40); milestones move in proportion",
    )
    parser.add_argument(
        "--train-bn",
        action="store_true",
        help="linear evaluation once more, with the frozen backbone's "
        "BatchNorm in train mode, as in the authors' code on small data sets",
    )
    parser.add_argument(
        "--bank",
        type=int,
        metavar="N",
        help="knn: at most N training images, evenly spaced (default: all); trust: of training and of "
        f"validation each (default: {_trust.IMAGES}); 0: all",
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="health and trust: at most N images, evenly spaced (default: as in pre-training, else 10,000 "
        "on a GPU, 1,000 on a CPU)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", metavar="FILE", help="write the result there, too; of trust a folder (default: RUN/trust)"
    )
    args = parser.parse_args()
    for name, served in SERVES.items():
        if getattr(args, name) != parser.get_default(name) and args.protocol not in served:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for {', '.join(served)}, not for {args.protocol}: leave it out")
    args.checkpoint = args.checkpoint or (
        "output/pretrain" if args.protocol == "trust" else "output/pretrain/model_final.pth"
    )
    return args


if __name__ == "__main__":
    run(main)
