#!/usr/bin/env python3
"""Fine-tune Mask R-CNN FPN from converted weights and evaluate it, with Detectron2 or the embedded engine.

    tools/train_net.py --config-file transfer/mask_rcnn_R50_FPN_1x.yaml --num-gpus 8
    tools/train_net.py --config-file transfer/mask_rcnn_R50_FPN_1x.yaml --train train.json images --val val.json images
    tools/train_net.py --config-file transfer/mask_rcnn_R50_FPN_1x.yaml --eval-only MODEL.WEIGHTS model_final.pth

KEY VALUE pairs at the end override the config, as in Detectron2.
"""

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools._cli import find_config, merge_config, run  # noqa: E402
from transfer.config import InputError, dataset_name, read_categories, torchvision_defaults  # noqa: E402

INSTALL_DETECTRON2 = (
    "Detectron2 is not installed: take a prebuilt wheel (torch 2.4-2.10: pip install detectron2 --extra-index-url "
    "https://wheels.astral.sh/simple/cu128/) or follow its install guide, or run with --engine torchvision")


def main():
    args = parse()
    given = list(args.overrides)
    for key, files in (("TRAIN", args.train), ("TEST", args.val)):
        if files:
            given += [f"DATASETS.{key}", repr((dataset_name(*files),))]
    if args.train:
        given += ["MODEL.ROI_HEADS.NUM_CLASSES", len(read_categories(args.train[0]))]
    if args.engine == "detectron2":
        if importlib.util.find_spec("detectron2") is None:
            raise InputError(INSTALL_DETECTRON2)
        try:
            from transfer import d2_trainer as engine
        except ImportError as error:  # most often built for another torch
            raise InputError(f"Detectron2 is installed but cannot be imported ({error}): reinstall it for this torch, "
                             "or run with --engine torchvision") from None
        cfg = engine.get_cfg()
    else:
        from transfer import torchvision_engine as engine
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        cfg = torchvision_defaults()
        if args.num_gpus > 1:
            raise InputError(f"--num-gpus {args.num_gpus}: the torchvision engine trains on one device, "
                             "several need --engine detectron2")
    cfg = merge_config(cfg, find_config(args.config_file, InputError), given, InputError)
    options = {"num_gpus": args.num_gpus} if args.engine == "detectron2" else {}
    engine.train(cfg, resume=args.resume, eval_only=args.eval_only, **options)
    print(f"done: {cfg.OUTPUT_DIR}/results.json; next: tools/report.py {cfg.OUTPUT_DIR}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="looked up here and under configs/")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--engine", choices=("detectron2", "torchvision"), default="detectron2")
    parser.add_argument("--train", nargs=2, metavar=("JSON", "IMAGES"), help="train on this COCO-format data set")
    parser.add_argument("--val", nargs=2, metavar=("JSON", "IMAGES"), help="evaluate on this one")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, InputError)
