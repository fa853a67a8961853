#!/usr/bin/env python3
"""Show what the aggressive augmentation does to images and, given a backbone, where it shifts their meaning.

    tools/show_views.py IMAGES                      # views.png: originals, weak and aggressive views
    tools/show_views.py IMAGENET CIFAR --noisy      # noisy.png: those that changed most (Figure 1)
    tools/show_views.py IMAGES --checkpoint FILE    # also pairs, ranked by how far they drift

The checkpoint is one of tools/pretrain.py, or any other that tools/convert_to_d2.py reads. With it,
pairs.csv and pairs.png rank the pairs of a weak view and its aggressive view by the cosine of their
backbone features, the noisiest first. operations.csv and operations.png show how far each operation alone
moves the features.
"""

import argparse
from pathlib import Path

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data.loader import MultiStageViews
from rsa_detectron2.pretrain.evaluate import drift, pictures
from rsa_detectron2.tools._feature_options import add_reading, apply_reading, check_at_least
from rsa_detectron2.tools._weights import load_features, open_for


def main() -> None:
    args = parse()
    # The blur reflects 6 pixels, so an image needs at least 7.
    check_at_least(args, rows=1, pairs=1, limit=1, workers=-1, image_size=7)
    if len(args.images) > 1 and not args.noisy:
        raise InputError("several IMAGES need --noisy: add it, or give one of them")
    if args.noisy and args.checkpoint:
        raise InputError("--noisy draws without a network: leave --checkpoint out")
    if args.noisy:
        return draw_noisy(args)
    cfg, features = get_cfg(), None
    if args.checkpoint:
        features, cfg, _ = load_features(args.checkpoint, args.branch)
    apply_reading(args, cfg)
    images = open_for(cfg, args.images[0])
    cfg.DATA.IMAGE_SIZE = size = args.image_size or cfg.DATA.IMAGE_SIZE
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(pictures.draw_views(images, size, args.seed, args.rows, folder / "views.png"), flush=True)
    if features is None:
        return
    pairs = drift.measure_pairs(features, images, args.seed, args.limit)
    drift.write_pairs(folder / "pairs.csv", pairs, images, args.seed)
    print(folder / "pairs.csv")
    views = MultiStageViews(images, size, args.seed)
    print(pictures.draw_pairs(pairs, views, args.pairs, folder / "pairs.png"), flush=True)
    quarter = -(-args.limit // 4)  # each image takes nine views instead of two
    drifts = drift.measure_operations(features, images, args.seed, quarter)
    drift.write_operations(folder / "operations.csv", drifts)
    print(folder / "operations.csv")
    print(pictures.plot_operations(drifts, folder / "operations.png"))


def draw_noisy(args: argparse.Namespace) -> None:
    """Figure 1, with a panel for each of the IMAGES.

    Small images are shown at their own size, as in pre-training.
    """
    panels, folder, cfg = {}, Path(args.output_dir), get_cfg()
    apply_reading(args, cfg)
    if args.titles and len(args.titles) != len(args.images):
        raise InputError(
            f"--titles has {len(args.titles)} titles: give one for each of the {len(args.images)} IMAGES"
        )
    for title, path in zip(args.titles or args.images, args.images):
        images = open_for(cfg, path)
        panels[title] = images, args.image_size or min(224, *images.read(0).shape[-2:])
    folder.mkdir(parents=True, exist_ok=True)
    print(pictures.draw_noisy(panels, args.seed, folder / "noisy.png", args.limit))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folder of images, or a data set that tools/pretrain.py takes",
    )
    parser.add_argument("--noisy", action="store_true", help="draw the aggressive views that changed most")
    parser.add_argument(
        "--titles", nargs="+", metavar="TITLE", help="titles of the panels of --noisy (default: IMAGES)"
    )
    parser.add_argument("--checkpoint", metavar="FILE")
    add_reading(parser)
    parser.add_argument(
        "--rows", type=int, default=8, metavar="N", help="rows of views.png (default %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=int, default=24, metavar="N", help="pairs in pairs.png (default %(default)s)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=1000,
        metavar="N",
        help="images to rank, evenly spaced, two pairs of each (default %(default)s); "
        "the operations are tried on a quarter of them",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="size of the views (default: the checkpoint's, or 224)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output-dir", default="output/views", metavar="DIR", help="where to write (default %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
