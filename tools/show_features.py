#!/usr/bin/env python3
"""Show which images a pre-trained backbone finds similar. No labels are needed.

    tools/show_features.py                          # output/pretrain/model_final.pth, its own images
    tools/show_features.py CHECKPOINT IMAGES

neighbors.png shows twelve images, each with the eight that are nearest to it by the cosine of their
features: with the weights that pre-training started from, and after it. map.png shows the images, at most
10,000, by the first two principal components of their features. Classes, where they are known, are frames
in the one and colors in the other. CHECKPOINT is a file of tools/pretrain.py, or any other that
tools/convert_to_d2.py reads, of which only the features after pre-training are known.
"""

import argparse
from pathlib import Path

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.evaluate.drift import choose
from rsa_detectron2.pretrain.evaluate.feature_pictures import draw_map, draw_neighbors
from rsa_detectron2.tools._feature_options import (
    add_checkpoint_and_images,
    add_reading,
    apply_reading,
    check_at_least,
    warn_of_pixels,
)
from rsa_detectron2.tools._weights import before_and_after, load_features, open_for

QUERIES = 12  # rows of neighbors.png


def main() -> None:
    args = parse()
    check_at_least(args, limit=2, workers=-1)
    features, cfg, provenance = load_features(args.checkpoint, args.branch)
    apply_reading(args, cfg)
    images = open_for(cfg, args.images, args.limit)
    if len(images) < 2:
        raise InputError(f"{printable(images.root)} holds one image: neighbors need two or more")
    warn_of_pixels(images)
    found = before_and_after(features, cfg, provenance, images)
    vectors = {title: labeled.features for title, labeled in found.items()}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    queries = choose(len(images), QUERIES).tolist()
    print(draw_neighbors(images, vectors, queries, folder / "neighbors.png"), flush=True)
    *_, after = found.values()
    print(draw_map(after.features, after.labels, images.classes, folder / "map.png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_and_images(parser)
    add_reading(parser)
    parser.add_argument(
        "--limit",
        type=int,
        default=2000,
        metavar="N",
        help="at most N images, evenly spaced (default %(default)s)",
    )
    parser.add_argument(
        "--output-dir", default="output/features", metavar="DIR", help="where to write (default %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
