#!/usr/bin/env python3
"""Judge a pre-trained backbone by kNN or by linear evaluation on labelled images.

    tools/evaluate.py knn                                   # output/pretrain/model_final.pth, its own data set
    tools/evaluate.py linear CHECKPOINT --train DIR --val DIR

The protocol of linear evaluation follows from the image size: up to 64 pixels the small data sets', else ImageNet's.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

sys.path[0] = str(Path(__file__).resolve().parents[1])

from fvcore.common.config import CfgNode  # noqa: E402

from pretrain import checkpoint, evaluate, networks  # noqa: E402
from pretrain.config import InputError, get_cfg  # noqa: E402
from pretrain.datasets import open_images  # noqa: E402
from pretrain.distributed import amp_dtype, device  # noqa: E402
from tools._cli import run  # noqa: E402

BRANCH = "online.backbone."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("knn", "linear"))
    parser.add_argument("checkpoint", nargs="?", default="output/pretrain/model_final.pth")
    parser.add_argument("--train", metavar="DIR", help="labelled training images (default: what it was pre-trained on)")
    parser.add_argument("--classes", metavar="FILE",
                        help="class folders to keep (default: all of --train, or those of pre-training)")
    parser.add_argument("--val", metavar="DIR", help="labelled validation images (default: val/ or test/ beside them)")
    parser.add_argument("--epochs", type=int, help="of linear evaluation, with milestones in proportion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if not Path(args.checkpoint).is_file():
        raise InputError(f"no checkpoint {args.checkpoint}: give the file, or pre-train first (tools/pretrain.py)")
    saved = checkpoint.load(args.checkpoint)
    if not isinstance(saved, dict) or saved.get("format") != "rsa-pretraining":
        raise InputError(f"{args.checkpoint} is not a checkpoint of tools/pretrain.py")
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(saved["config"])))
    cfg.DATA.PATH, cfg.DATA.VAL = args.train or cfg.DATA.PATH, args.val or ("" if args.train else cfg.DATA.VAL)
    cfg.DATA.CLASSES = args.classes or ("" if args.train else cfg.DATA.CLASSES)
    train, val = evaluate.find_labelled(cfg, open_images(cfg.DATA.PATH, "train", cfg.DATA.CLASSES))
    if val is None:
        raise InputError(f"no validation images with the same classes in or beside {cfg.DATA.PATH}: give --val DIR")
    backbone = networks.build_backbone(cfg.MODEL.BACKBONE, cfg.MODEL.SMALL_STEM)
    backbone.load_state_dict({name.removeprefix(BRANCH): tensor for name, tensor in saved["model"].items()
                              if name.startswith(BRANCH)})
    features = evaluate.Features(backbone.to(device()), cfg.DATA, amp_dtype(cfg.SOLVER.AMP))

    result = {"checkpoint": args.checkpoint, "method": saved["method"], "step": saved["step"]}
    if args.protocol == "knn":
        result["knn_top1"] = evaluate.evaluate_knn(features, train, val, cfg.KNN.BANK)
    else:
        name = "small" if cfg.DATA.IMAGE_SIZE <= 64 else "large"
        protocol = evaluate.shorten(evaluate.LINEAR[name], args.epochs)
        top1 = evaluate.evaluate_linear(features, train, val, protocol, args.seed)
        result |= {"protocol": name, "epochs": len(top1), "linear_top1_last": top1[-1], "linear_top1_best": max(top1)}
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, InputError)
