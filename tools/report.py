#!/usr/bin/env python3
"""Fine-tuning runs -> an AP table, and a page with curves and detections.

    tools/report.py output/transfer                                       # one run
    tools/report.py output/rsa output/scratch --pretrain output/pretrain  # two, and how pre-training went
    tools/report.py seed0/rsa seed1/rsa seed2/rsa                         # of one name, but for the seed: mean ± std

Prints the table as Markdown; writes report.md, report.html, table.csv, ap.png, curves.png and detections.png. Only
results.json is needed of a run; what the other files would have shown is left out. Under a full run of a row of Tables
5 and 6 stand the published numbers and the difference, marked where it exceeds what another seed may change. Runs of
different protocols or test sets are refused.
"""

import argparse
import sys
from pathlib import Path

import yaml

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools._cli import run  # noqa: E402
from transfer.annotations import locate_dataset  # noqa: E402
from transfer.config import InputError  # noqa: E402
from transfer.pictures import draw_detections, plot_ap, plot_curves  # noqa: E402
from transfer.report import (SEED_NOISE, ap_table, check_comparable, normalised_images, row_labels,  # noqa: E402
                             table_cells, to_markdown, write_csv, write_report)
from transfer.results import load_results  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="fine-tuning output folder, which holds results.json")
    parser.add_argument("--pretrain", metavar="DIR", help="pre-training output folder, whose curves to draw too")
    parser.add_argument("--output", metavar="DIR", default="output/report", help="where to write (default %(default)s)")
    parser.add_argument("--images", type=int, default=4, metavar="N",
                        help="validation images to draw detections on (default %(default)s)")
    args = parser.parse_args()

    results = {folder: load_results(folder) for folder in args.runs}
    protocol, test_set = check_comparable(results)
    configs = {folder: yaml.safe_load(result["config"]) for folder, result in results.items()}
    labels = row_labels(results)
    seeds = {}
    for folder, label in labels.items():
        seeds.setdefault(label, []).append(results[folder])
    # in pictures every run stands for itself
    folders = {label if len(seeds[label]) == 1 else folder: folder for folder, label in labels.items()}
    rows = ap_table(seeds, published=True)
    cells = table_cells(rows)
    print(to_markdown(cells))
    sections = [("AP (%)", cells)]
    if any(cell.endswith("*") for row in cells for cell in row):
        note = f"* differs from the published number by more than {SEED_NOISE} AP, about what another seed may change."
        print(note + "\n")
        sections.append(("Note", note))

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(rows, output / "table.csv")
    settings = [["run", "weights", "engine", "protocol", "test set", "iterations", "images/batch", "GPUs x passes",
                 "images/BatchNorm", "base lr", "seed", "hours (last start)"]]
    for name, folder in folders.items():
        result, solver = results[folder], configs[folder]["SOLVER"]
        settings.append([str(x) for x in (
            name, (result["weights"] or {}).get("source", "–"), result["engine"], protocol, test_set,
            result["iterations"], solver["IMS_PER_BATCH"],
            f"{result.get('processes', 1)} x {result.get('accumulate', 1)}", normalised_images(result),
            solver["BASE_LR"], result["seed"],
            f"{result['seconds'] / 3600:.2f}")])
    sections += [("AP", plot_ap(rows, output / "ap.png")), ("Settings", settings)]
    if plot_curves(args.pretrain, folders, output / "curves.png"):
        sections.append(("Curves", output / "curves.png"))
    try:
        annotations, images = locate_dataset(next(iter(configs[args.runs[0]]["DATASETS"]["TEST"])))
        draw_detections(annotations, images, folders, output / "detections.png", args.images)
        sections.append(("Detections", output / "detections.png"))
    except InputError as error:
        print(f"no picture of detections: {error}", file=sys.stderr)
    write_report(output, "Transfer to detection and segmentation", sections)
    print(f"{output}/report.html")


if __name__ == "__main__":
    run(main, InputError)
