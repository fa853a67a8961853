#!/usr/bin/env python3
"""The whole chain on a CPU, in minutes: pre-train, convert, fine-tune, compare.

    tools/quickstart.py           # about 7 minutes on 2 cores
    tools/quickstart.py --fast    # much less of everything

Draws images of toys, many without labels and a few with them. Pre-trains on the former with RSA: a
ResNet-18, which learns in minutes on a CPU, or a ResNet-50 on a GPU. Converts it, fine-tunes Mask R-CNN FPN
on the latter from random and from the RSA weights under one config, and writes report.html. Run again, it
goes on where it stopped.
"""

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fvcore.common.config import CfgNode

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.config import CONFIGS, merge_config, origin
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import locked
from rsa_detectron2.common.record import Origin
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.engine import trainer
from rsa_detectron2.pretrain.engine.checkpoint import FINAL
from rsa_detectron2.pretrain.evaluate.drift import choose
from rsa_detectron2.pretrain.evaluate.feature_pictures import draw_neighbors
from rsa_detectron2.pretrain.evaluate.pictures import draw_views
from rsa_detectron2.tools._recipe import load_recipe
from rsa_detectron2.tools._weights import before_and_after, load_features
from rsa_detectron2.tools.train_net import import_detectron2
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.convert.writers import convert
from rsa_detectron2.transfer.data import drawn
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.report.detection_pictures import draw_detections
from rsa_detectron2.transfer.report.page import write_report
from rsa_detectron2.transfer.report.pictures import plot_curves
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import own_row, table_cells, write_csv

NETWORK = "R50" if device().type == "cuda" else "R18"
PRETRAIN_CONFIG = CONFIGS / "pretrain" / f"quickstart_rsa_{NETWORK}.yaml"
TRANSFER_CONFIG = CONFIGS / "transfer" / f"quickstart_mask_rcnn_{NETWORK}_FPN.yaml"

# Images per class, and images of the COCO-format set: few have labels.
SIZES = {"train": 134, "val": 20, "coco_train": 60, "coco_val": 60}
# What --fast reduces: these numbers, and settings of the two configs.
FAST_SIZES = {"train": 8, "val": 2, "coco_train": 12, "coco_val": 4}
FAST_PRETRAIN = "SOLVER.EPOCHS 2 SOLVER.WARMUP_EPOCHS 0 DATA.IMAGE_SIZE 32 DATA.EVAL_RESIZE 32".split()
FAST_TRANSFER = (
    "SOLVER.MAX_ITER 6 SOLVER.STEPS (4,) SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (96,) "
    "INPUT.MIN_SIZE_TEST 96 TEST.PRECISE_BN.NUM_ITER 2"
).split()
NOTE = (
    "These figures are of a small network, drawn toys and one short run: they show that the chain works, "
    "and say nothing about COCO."
)
FAST_NOTE = (
    "With --fast both trainings are a few steps long, which teach nothing: only that the chain works counts."
)


def main() -> None:
    args = parse()
    engine = choose_engine(args.engine)
    folder = Path(args.output_dir or ("output/quickstart-fast" if args.fast else "output/quickstart"))
    start = time.perf_counter()
    logging.getLogger("torch").setLevel(logging.ERROR)
    say(f"everything goes to {folder}; detection engine: {engine}")

    say("1/5 drawing the toys")
    draw_toys(folder, FAST_SIZES if args.fast else SIZES)

    say(f"2/5 pre-training a ResNet-{NETWORK[1:]} with RSA")
    cfg, came_from = pretrain_settings(folder, args.fast, args.seed)
    checkpoint = trainer.train(cfg, came_from)

    say("3/5 converting it")
    weights, _ = convert(checkpoint, folder / f"rsa_{NETWORK.lower()}.pkl")

    say("4/5 fine-tuning Mask R-CNN FPN, from random and from RSA weights")
    starts = {"random": "", "RSA": str(weights)}
    folders = {name: folder / engine / name.lower() for name in starts}
    settings = ["SEED", str(args.seed + 1), *(FAST_TRANSFER if args.fast else [])]
    with locked(folder, "--output-dir"), log_to(folder / "log.txt"):
        results = {
            name: fine_tune(engine, path, folder / "coco", folders[name], settings)
            for name, path in starts.items()
        }

    say("5/5 writing the report")
    rows = [own_row("ap", name, {name: result}) for name, result in results.items()]
    write_csv("ap", rows, folder / "table.csv")
    cells = table_cells("ap", rows)
    summary = summarize(folder / "pretrain", results)
    minutes = (time.perf_counter() - start) / 60
    note = FAST_NOTE if args.fast else NOTE
    came_out = f"{summary} {note} Engine: {engine}; {minutes:.1f} minutes in this call."
    sections = [("What came out", came_out), ("AP (%)", cells), *pictures(cfg, folder, folders)]
    write_report(folder, "Quick start", sections)
    print(f"\n{to_markdown(cells)}\n{summary}\n{note}\n{folder / 'report.html'}, after {minutes:.1f} minutes")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", help="one folder for everything (default output/quickstart[-fast])")
    parser.add_argument(
        "--fast", action="store_true", help="much less of everything, to see that the chain works"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of both trainings (default 0)")
    parser.add_argument(
        "--engine", choices=("detectron2", "torchvision"), help="default: detectron2 if it works"
    )
    return parser.parse_args()


def choose_engine(wanted: str | None) -> str:
    """The name of the engine to use. Raises InputError if Detectron2 is asked for and does not work."""
    if wanted == "torchvision":
        return wanted
    try:
        import_detectron2()
    except InputError:
        if wanted:
            raise
        return "torchvision"
    return "detectron2"


def draw_toys(folder: Path, sizes: dict[str, int]) -> None:
    """Images in class folders for pre-training, and a data set in COCO's format for fine-tuning."""
    for seed, split in enumerate(("train", "val")):
        drawn.write_image_folder(folder / "images" / split, sizes[split], 64, seed)
        drawn.write_coco(folder / "coco", split, sizes[f"coco_{split}"], 128, seed + 2)


def pretrain_settings(folder: Path, fast: bool, seed: int) -> tuple[CfgNode, Origin]:
    """The config of the pre-training, and where it came from. Raises InputError."""
    overrides = ["DATA.PATH", str(folder / "images" / "train"), "OUTPUT_DIR", str(folder / "pretrain")]
    overrides += ["SEED", str(seed)]
    if fast:
        overrides += FAST_PRETRAIN
    return load_recipe(str(PRETRAIN_CONFIG), overrides)[:2]


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send to a file what Detectron2 prints: its environment, the config and the model."""
    with open(path, "a") as log, contextlib.redirect_stdout(log):
        yield


def fine_tune(engine: str, weights: str, coco: Path, output: Path, overrides: list[str]) -> dict:
    """Fine-tune from ``weights`` ("": random) in ``output``, or go on there. Returns the results."""
    if (output / "results.json").is_file():
        return load_results(output)
    if engine == "detectron2":
        detector, get_defaults = import_detectron2()
        defaults = get_defaults()
    else:
        from rsa_detectron2.transfer.tv import engine as detector

        defaults = torchvision_defaults()
    train, val = (dataset_name(coco / f"{split}.json", coco / "images") for split in ("train", "val"))
    overrides = [
        *("DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,)),
        *("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(output)),
        *overrides,
    ]
    cfg = merge_config(defaults.clone(), str(TRANSFER_CONFIG), overrides)
    return detector.train(cfg, resume=True, origin=origin(TRANSFER_CONFIG, overrides, defaults))


def summarize(pretrain_folder: Path, results: dict[str, dict]) -> str:
    """kNN before and after pre-training, and the APs, whether they rose or not."""
    with open(pretrain_folder / "metrics.jsonl") as lines:
        knn = [row["knn_top1"] for row in map(json.loads, lines) if "knn_top1" in row]
    before_and_after = f"kNN top-1 {knn[0]:.1f} % before and {knn[-1]:.1f} % after pre-training"
    return f"{before_and_after} ({len(drawn.TOYS.classes)} classes). {compare(results)}"


def compare(results: dict[str, dict]) -> str:
    """One sentence on AP from random and from RSA weights, whether RSA's is higher or not."""
    parts = []
    for task, word in (("bbox", "box"), ("segm", "mask")):
        random, rsa = (results[name]["ap"][task]["AP"] or 0.0 for name in ("random", "RSA"))
        parts.append(
            f"{word} AP {random:.1f} from random and {rsa:.1f} from RSA weights ({rsa - random:+.1f})"
        )
    return "; ".join(parts) + "."


def pictures(cfg: CfgNode, folder: Path, folders: dict[str, Path]) -> list[tuple]:
    """(heading, picture) of the report: views, curves, and detections of the runs in ``folders``."""
    source, coco = open_images(cfg.DATA.PATH), folder / "coco"
    views = draw_views(source, cfg.DATA.IMAGE_SIZE, cfg.SEED, 4, folder / "views.png")
    pretrained, val = load_features(folder / "pretrain" / FINAL), open_images(str(folder / "images" / "val"))
    queries = choose(len(val), 8).tolist()
    found = before_and_after(*pretrained, val)
    features = {title: labeled.features for title, labeled in found.items()}
    neighbors = draw_neighbors(val, features, queries, folder / "neighbors.png")
    curves = plot_curves(folder / "pretrain", folders, folder / "curves.png")
    detections = draw_detections(coco / "val.json", coco / "images", folders, folder / "detections.png")
    return [
        ("Weak views beside their aggressive views", views),
        ("Nearest neighbors before and after pre-training: green frames are of the same class", neighbors),
        ("Curves", curves),
        ("Detections", detections),
    ]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
