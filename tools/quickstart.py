#!/usr/bin/env python3
"""The whole chain on a machine with nothing but a CPU: pre-train, convert, fine-tune, compare, in minutes.

    tools/quickstart.py           # about 8 minutes on 2 cores
    tools/quickstart.py --fast    # the same in little

Draws a data set of shapes, pre-trains a ResNet-50 on its images with RSA, converts it, fine-tunes Mask R-CNN FPN from
random and from the RSA weights under one config, and writes report.html. Run again it goes on where it stopped.
"""

import argparse
import contextlib
import importlib
import json
import logging
import sys
import time
from pathlib import Path

import rsa_detectron2.pretrain.config
import rsa_detectron2.transfer.config
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.config import CONFIGS, merge_config, origin
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.evaluate.pictures import draw_views
from rsa_detectron2.transfer.convert.writers import convert
from rsa_detectron2.transfer.data import shapes
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.report.pictures import draw_detections, plot_curves
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import own_row, table_cells, to_markdown, write_csv, write_report

PRETRAIN_CONFIG = CONFIGS / "pretrain" / "quickstart_rsa_R50.yaml"
TRANSFER_CONFIG = CONFIGS / "transfer" / "quickstart_mask_rcnn_R50_FPN.yaml"

# What --fast makes smaller: images per class and of the COCO-format set, and overrides of the two configs.
SIZES = {"train": 192, "val": 48, "coco_train": 200, "coco_val": 50}
FAST_SIZES = {"train": 16, "val": 8, "coco_train": 12, "coco_val": 4}
FAST_PRETRAIN = "SOLVER.EPOCHS 2 SOLVER.WARMUP_EPOCHS 0 DATA.IMAGE_SIZE 32 DATA.EVAL_RESIZE 32".split()
FAST_TRANSFER = (
    "SOLVER.MAX_ITER 6 SOLVER.STEPS (4,) SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (96,) "
    "INPUT.MIN_SIZE_TEST 96 TEST.PRECISE_BN.NUM_ITER 2"
).split()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", help="one folder for everything (default output/quickstart[-fast])")
    parser.add_argument("--fast", action="store_true", help="less of everything: shows that the chain holds")
    parser.add_argument(
        "--engine", choices=("detectron2", "torchvision"), help="default: detectron2 if it works"
    )
    args = parser.parse_args()
    engine = args.engine or ("detectron2" if detectron2_works() else "torchvision")
    if args.engine == "detectron2" and not detectron2_works():
        raise InputError(
            "Detectron2 is not installed, or not for this torch: see the README, or leave --engine out"
        )
    folder = Path(args.output_dir or "output/quickstart" + ("-fast" if args.fast else ""))
    start = time.perf_counter()
    logging.getLogger("torch").setLevel(logging.ERROR)

    say(f"everything goes to {folder}; detection engine: {engine}")
    say("1/5 drawing the shapes")
    sizes = FAST_SIZES if args.fast else SIZES
    for seed, split in enumerate(("train", "val")):
        shapes.write_image_folder(folder / "images" / split, sizes[split], 64, seed)
        shapes.write_coco(folder / "coco", split, sizes["coco_" + split], 160, seed + 2)

    say("2/5 pre-training a ResNet-50 with RSA")
    options = ["DATA.PATH", str(folder / "images" / "train"), "OUTPUT_DIR", str(folder / "pretrain")]
    cfg = merge_config(
        rsa_detectron2.pretrain.config.get_cfg(),
        str(PRETRAIN_CONFIG),
        options + FAST_PRETRAIN * args.fast,
    )
    try:
        final = train_loop.train(
            cfg, origin(PRETRAIN_CONFIG, options, rsa_detectron2.pretrain.config.get_cfg())
        )
    except rsa_detectron2.pretrain.config.Interrupted as interruption:
        say(str(interruption))
        return train_loop.REQUEUE

    say("3/5 converting it")
    weights, _ = convert(final, folder / "rsa_r50.pkl")

    say("4/5 fine-tuning Mask R-CNN FPN, from random and from RSA weights")
    runs = {"random": "", "RSA": str(weights)}
    folders = {name: folder / engine / name.lower() for name in runs}
    with (
        open(folder / "log.txt", "a") as log,
        contextlib.redirect_stdout(log),
    ):  # Detectron2 prints a page an iteration
        results = {
            name: fine_tune(engine, path, folder, folders[name], args.fast) for name, path in runs.items()
        }

    say("5/5 writing the report")
    rows = [own_row("ap", name, {name: result}) for name, result in results.items()]
    cells = table_cells("ap", rows)
    write_csv("ap", rows, folder / "table.csv")
    knn = [
        row["knn_top1"]
        for row in map(json.loads, open(folder / "pretrain" / "metrics.jsonl"))
        if "knn_top1" in row
    ]
    minutes = (time.perf_counter() - start) / 60
    summary = (
        f"kNN top-1 {knn[0]:.1f} % before and {knn[-1]:.1f} % after pre-training "
        f"({len(shapes.CLASSES)} classes). {compare(results)}"
    )
    note = (
        "These are small networks' figures on drawn shapes from one short run: they show that the chain holds, "
        "and say nothing about COCO."
    )
    coco = folder / "coco"
    write_report(
        folder,
        "Quick start",
        [
            ("What came out", f"{summary} {note} Engine: {engine}; {minutes:.1f} minutes in this call."),
            ("AP (%)", cells),
            (
                "Weak views beside their aggressive views",
                draw_views(
                    open_images(cfg.DATA.PATH), cfg.DATA.IMAGE_SIZE, cfg.SEED, 4, folder / "views.png"
                ),
            ),
            ("Curves", plot_curves(folder / "pretrain", folders, folder / "curves.png")),
            (
                "Detections",
                draw_detections(coco / "val.json", coco / "images", folders, folder / "detections.png"),
            ),
        ],
    )
    print(f"\n{to_markdown(cells)}\n{summary}\n{note}\n{folder / 'report.html'}, after {minutes:.1f} minutes")


def detectron2_works():
    """Whether Detectron2 is installed and loads: one built for another torch does not, nor one too old for Pillow."""
    try:
        importlib.import_module("rsa_detectron2.transfer.d2.trainer")
    except Exception:
        return False
    return True


def fine_tune(engine, weights, folder, output, fast):
    """Fine-tune with ``engine`` into ``output``, unless that is done."""
    if (output / "results.json").is_file():
        return load_results(output)
    if engine == "detectron2":
        from rsa_detectron2.transfer.d2 import trainer as module

        cfg = module.get_cfg()
    else:
        from rsa_detectron2.transfer.tv import engine as module

        cfg = rsa_detectron2.transfer.config.torchvision_defaults()
    defaults, coco = cfg.clone(), folder / "coco"
    train, val = ((dataset_name(coco / f"{name}.json", coco / "images"),) for name in ("train", "val"))
    options = [
        "DATASETS.TRAIN",
        train,
        "DATASETS.TEST",
        val,
        "MODEL.WEIGHTS",
        weights,
        "OUTPUT_DIR",
        str(output),
    ]
    options += FAST_TRANSFER * fast
    merge_config(cfg, str(TRANSFER_CONFIG), options)
    return module.train(cfg, resume=True, origin=origin(TRANSFER_CONFIG, options, defaults))


def compare(results):
    """One sentence on what the RSA weights gave, better or not."""
    parts = []
    for task, word in (("bbox", "box"), ("segm", "mask")):
        random, rsa = (results[name]["ap"][task]["AP"] or 0.0 for name in ("random", "RSA"))
        parts.append(
            f"{word} AP {random:.1f} from random and {rsa:.1f} from RSA weights ({rsa - random:+.1f})"
        )
    return "; ".join(parts) + "."


def say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
