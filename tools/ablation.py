#!/usr/bin/env python3
"""The controlled test of the claim.

Which method keeps a part of the label that aggressive augmentation destroys?

    tools/ablation.py --dry-run                 # what would run
    tools/ablation.py                           # all methods, three seeds; run again, it goes on
    tools/ablation.py --seeds 5 --jobs 2

The classes of the drawn images are pairs of a form and a color (transfer/data/shapes.py); 31 % of
the aggressive views have lost their color or show that of another class. Each method pre-trains a
small ResNet-18 by its recipe configs/pretrain/shapes_colour_<method>_R18.yaml. Then kNN and a linear
classifier read the pair, the form alone and the color alone from its features of center crops.
Leaves report.md, table.csv and ablation.png.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.config import CONFIGS
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.common.tables import cell, mean_std, to_markdown, write_rows
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.engine.checkpoint import FINAL
from rsa_detectron2.pretrain.evaluate import linear
from rsa_detectron2.pretrain.evaluate.features import Features, Labeled
from rsa_detectron2.pretrain.evaluate.knn import knn_top1
from rsa_detectron2.pretrain.method import networks
from rsa_detectron2.tools._weights import load_features
from rsa_detectron2.transfer.data import shapes

METHODS = {
    "rsa": "RSA, β fades out",
    "rsa_fixed_beta": "RSA, β fixed",
    "rsa_beta_0": "RSA, β = 0",
    "byol": "BYOL AA",
    "byol_aw": "BYOL AW",
    "simsiam": "SimSiam",
    "simsiam_rsa": "SimSiam with RSA",
}
UNTRAINED = "untrained"
IMAGES = {"train": (80, 0), "val": (40, 1)}  # per class, and the seed that they are drawn with
SIZE = 48  # pixels; the recipes' crops are scaled to 32
PARTS = {"pair": "form and colour", "form": "form", "colour": "colour"}
CHANCE = {
    "pair": 100 / len(shapes.COLOUR_CLASSES),
    "form": 100 / len(shapes.COLOUR_FORMS),
    "colour": 100 / len(shapes.HUES),
}
FIGURES = {
    f"{judge}_{part}": f"{name}, {words}"
    for judge, name in (("linear", "linear"), ("knn", "kNN"))
    for part, words in PARTS.items()
}
RESULT = "top1.json"


def main() -> None:
    args = parse()
    folder = Path(args.output_dir)
    runs = {
        folder / f"seed{seed}" / method: (method, seed)
        for seed in range(args.seeds)
        for method in (UNTRAINED, *args.methods)
    }
    missing = [path for path in runs if not (path / RESULT).is_file()]
    for path in runs:
        print(f"[{'to run' if path in missing else 'done'}] {path}")
    if args.dry_run:
        return
    for split, (count, seed) in IMAGES.items():
        shapes.write_image_folder(folder / "images" / split, count, SIZE, seed, colours=True)
    run_all({path: runs[path] for path in missing}, folder / "images", args.jobs, args.overrides)
    results = {}
    for path, (method, _) in runs.items():
        results.setdefault(method, []).append(json.loads((path / RESULT).read_text()))
    print(write_report(folder, results))


def run_all(runs: dict[Path, tuple[str, int]], images: Path, jobs: int, overrides: list[str]) -> None:
    """Pre-train and judge {folder: (method, seed)}, ``jobs`` at a time.

    When one fails, the others save and stop.
    """
    processes, judging, stopping = [], threading.Lock(), threading.Event()

    def one(path: Path, method: str, seed: int) -> None:
        if stopping.is_set():
            return
        path.mkdir(parents=True, exist_ok=True)
        if method != UNTRAINED:
            command = pretraining(path, method, seed, images, overrides)
            with open(path / "log.txt", "ab") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
            processes.append(process)
            if stopping.is_set():
                process.terminate()
            if process.wait() and not stopping.is_set():
                raise InputError(
                    f"{path} ended with status {process.returncode}: see {path / 'log.txt'}; "
                    "the same command goes on"
                )
        if not stopping.is_set():
            with judging:  # one at a time: the classifiers share torch's generator
                result = judge(path, method, seed, images)
                write_atomically(
                    path / RESULT, lambda file: file.write(json.dumps(result, indent=2).encode())
                )

    # The exit passes through the except below, which stops the runs.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(1 if device().type == "cpu" else torch.get_num_threads())
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc="runs", dynamic_ncols=True) as progress:
        try:
            futures = [pool.submit(one, path, *run) for path, run in runs.items()]
            for future in as_completed(futures):
                future.result()
                progress.update()
        except BaseException:
            stopping.set()
            for process in processes:
                process.terminate()  # it saves, and the same command goes on
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)


def pretraining(path: Path, method: str, seed: int, images: Path, overrides: list[str]) -> list[str]:
    """The command of one run."""
    workers = [] if device().type == "cuda" else ["DATA.NUM_WORKERS", "0"]
    return [
        sys.executable,
        str(Path(__file__).with_name("pretrain.py")),
        "--config-file",
        recipe(method),
        "--data",
        str(images / "train"),
        "--output-dir",
        str(path),
        "--seed",
        str(seed),
        "--num-processes",
        "1",  # so that BatchNorm sees the same images on any machine
        *workers,
        *overrides,
    ]


def recipe(method: str) -> str:
    return str(CONFIGS / "pretrain" / f"shapes_colour_{method}_R18.yaml")


def environment() -> dict[str, str]:
    """The environment of the runs. Those that share a CPU have one thread each."""
    return {
        **os.environ,
        **({} if device().type == "cuda" else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
    }


def judge(path: Path, method: str, seed: int, images: Path) -> dict[str, str | float]:
    """The result of a run: its "method" and "seed", and top-1 in percent for each of FIGURES."""
    if method == UNTRAINED:
        cfg = get_cfg()
        cfg.merge_from_file(recipe("rsa"))
        torch.manual_seed(seed)
        features = Features(
            networks.build_backbone(cfg.MODEL.BACKBONE, cfg.MODEL.SMALL_STEM).to(device()), cfg.DATA, None
        )
    else:
        features, cfg, _ = load_features(path / FINAL)
        features.amp = None  # exact features: these are few
    cfg.DATA.NUM_WORKERS = 0
    sources = [open_images(images / split) for split in IMAGES]
    found = [features.of(source, "features") for source in sources]
    result = {"method": method, "seed": seed}
    for part in PARTS:
        index = torch.tensor(part_of(sources[0].classes, part), device=found[0].labels.device)
        bank, queries = (Labeled(values, index[labels]) for values, labels in found)
        result[f"knn_{part}"] = knn_top1(bank, queries, k=20)
        result[f"linear_{part}"] = linear.evaluate_linear_on(
            bank, queries, linear.LINEAR["small"], linear.Trial(seed)
        )[-1]
    return result


def part_of(classes: Sequence[str], part: str) -> list[int]:
    """Class names "form-color" -> the index of each one's pair, form or color, in alphabetical order."""
    words = [name if part == "pair" else name.split("-")[part == "colour"] for name in classes]
    return [sorted(set(words)).index(word) for word in words]


def write_report(folder: Path, results: dict[str, list[dict]]) -> str:
    """Write table.csv, ablation.png and report.md; returns the table in Markdown.

    results: {method: results of its seeds}.
    """
    names = {UNTRAINED: "untrained network", **METHODS}
    table = [["top-1 (%)", *FIGURES.values()]]
    lines = []
    for method, seeds in results.items():
        figures = [mean_std([seed[name] for seed in seeds]) for name in FIGURES]
        lines.append([method, len(seeds), *(value for pair in figures for value in pair)])
        table.append([names[method], *map(cell, figures)])
    columns = [column for name in FIGURES for column in (name, f"{name} std")]
    write_rows(folder / "table.csv", ["method", "seeds", *columns], lines)
    plot(results, names, folder / "ablation.png")
    count = len(next(iter(results.values())))
    markdown = to_markdown(table)
    chance = "{:.1f}, {:.1f} and {:.1f} %".format(*CHANCE.values())
    (folder / "report.md").write_text(
        f"# The controlled test\n\n{count} seed{'s' * (count > 1)}, mean ± sample standard deviation. "
        f"{len(shapes.COLOUR_FORMS)} forms, {len(shapes.HUES)} colours: chance is {chance}.\n\n{markdown}\n"
        "![top-1 by method](ablation.png)\n",
        encoding="utf-8",
    )
    return markdown


def plot(results: dict[str, list[dict]], names: dict[str, str], path: Path) -> None:
    """A panel for each part of the label.

    Every seed is a point, their mean a bar, chance a dashed line.
    """
    figure = Figure(figsize=(11, 0.42 * len(results) + 1.3), dpi=150, layout="constrained")
    for ax, (part, words) in zip(figure.subplots(1, len(PARTS), sharey=True), PARTS.items()):
        for offset, judge_name, color, label in (
            (-0.13, "linear", "#0072b2", "linear"),
            (0.13, "knn", "#d55e00", "kNN"),
        ):
            for row, seeds in enumerate(results.values()):
                values = [seed[f"{judge_name}_{part}"] for seed in seeds]
                ax.plot(
                    values,
                    [row + offset] * len(values),
                    "o",
                    ms=4,
                    color=color,
                    alpha=0.5,
                    mec="none",
                    label=label if not row else None,
                )
                ax.plot(
                    [statistics.fmean(values)] * 2,
                    [row + offset - 0.1, row + offset + 0.1],
                    color=color,
                    lw=2,
                )
        ax.axvline(CHANCE[part], color="0.5", lw=1, ls="--", label="chance")
        ax.set(
            title=words,
            xlabel="top-1 (%)",
            yticks=range(len(results)),
            yticklabels=[names[m] for m in results],
        )
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.axes[-1].legend(fontsize=8, loc="best")
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each (default %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        default=min(4, len(os.sched_getaffinity(0))),
        help="runs at a time (default: the number of cores, 4 at most)",
    )
    parser.add_argument("--output-dir", default="output/ablation", metavar="DIR", help="default %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument(
        "--set",
        nargs="+",
        dest="overrides",
        default=[],
        metavar="KEY VALUE",
        help="for every run, e.g. SOLVER.EPOCHS 2; give another --output-dir with it",
    )
    args = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    return args


if __name__ == "__main__":
    run(main)
