#!/usr/bin/env python3
"""Write the features of images, by a pre-trained backbone, to a file that other programs read.

    tools/embed.py                                  # output/pretrain/model_final.pth, its own images
    tools/embed.py CHECKPOINT IMAGES --output features.parquet

CHECKPOINT is a file of tools/pretrain.py, or any other that tools/convert_to_d2.py reads. FILE.npy is an
array [N, D], and FILE.npy.csv has the file and label (the class, if any) of each row. FILE.parquet has the
columns file, label and feature. FILE.json beside either says what it was computed from. An image that cannot
be decoded is named and left out. Stopped at any point, the same command goes on.
"""

import argparse
from pathlib import Path

from rsa_detectron2.common.cli import run
from rsa_detectron2.pretrain.evaluate.embed import embed
from rsa_detectron2.pretrain.evaluate.writers import check_format
from rsa_detectron2.tools._feature_options import (
    add_checkpoint_and_images,
    add_reading,
    apply_reading,
    check_at_least,
    warn_of_pixels,
)
from rsa_detectron2.tools._weights import load_features, open_for


def main() -> None:
    args = parse()
    check_at_least(args, limit=0, workers=-1)
    output = Path(args.output)
    check_format(output)
    features, cfg, provenance = load_features(args.checkpoint, args.branch)
    apply_reading(args, cfg)
    images = open_for(cfg, args.images, args.limit)
    warn_of_pixels(images)
    about = embed(features, images, provenance, output)
    (count, dim), left_out = about["shape"], len(about["left_out"])
    note = f"; {left_out} images that cannot be decoded are left out" if left_out else ""
    print(f"{output}: features of {count} images, {dim} numbers each{note}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_and_images(parser)
    parser.add_argument(
        "--output",
        default="output/features.npy",
        metavar="FILE",
        help="to write, .npy or .parquet (default %(default)s)",
    )
    add_reading(parser)
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="at most N images, evenly spaced (default: all)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
