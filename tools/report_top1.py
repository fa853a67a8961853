#!/usr/bin/env python3
"""Top-1 of kNN and linear evaluation beside the paper's: a table of runs, mean and deviation over their seeds.

    tools/report_top1.py output/reproduce/table1/seed*/* --output output/reproduce/table1/report

A run is a folder named after its recipe, with what tools/evaluate.py wrote there: linear.json, knn.json or both. Runs
of one name are seeds of one row. Leaves report.md, report.html and table.csv.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools._cli import run  # noqa: E402
from transfer.config import InputError  # noqa: E402
from transfer.report import cell, mean_std, to_markdown, write_report  # noqa: E402

# Linear evaluation: what is known here of the paper's Tables 1-4, by recipe. Its authors' code reports the best epoch,
# so that this stands beside ours. BYOL's on ImageNet is the abstract's "2.5 % improvement over BYOL" taken from RSA's.
PAPER = {"cifar10_rsa_R18": "92.3 ± 0.1", "cifar10_byol_R18": "90.2 ± 0.0", "imagenet_rsa_R50_200ep": "73.1",
         "imagenet_byol_R50_200ep": "70.6"}
COLUMNS = {"linear_top1_last": "linear, last epoch", "linear_top1_best": "linear, best epoch", "knn_top1": "kNN"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--output", default="output/report", metavar="DIR", help="default %(default)s")
    args = parser.parse_args()
    rows = {}
    for folder in map(Path, args.runs):
        rows.setdefault(folder.resolve().name, []).append(read_run(folder))
    table = [["top-1 (%)", "seeds", *COLUMNS.values(), "paper, best epoch"]]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seeds", *(word for name in COLUMNS for word in (name, f"{name} std")), "paper"])
        for name, seeds in rows.items():
            figures = [mean_std([seed.get(column) for seed in seeds]) for column in COLUMNS]
            writer.writerow([name, len(seeds), *(x for pair in figures for x in pair or (None, None)), PAPER.get(name)])
            table.append([name, str(len(seeds)), *map(cell, figures), PAPER.get(name, "–")])
    write_report(folder, "Linear evaluation", [("Top-1", table)])
    print(to_markdown(table) + f"\n{folder / 'report.html'}")


def read_run(folder):
    """The figures in a run's folder. Raises InputError where there are none."""
    figures = {}
    for path in (folder / "linear.json", folder / "knn.json"):
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                figures |= {name: float(value) for name, value in found.items() if name in COLUMNS}
            except (ValueError, AttributeError, TypeError):
                raise InputError(f"{path} is not what tools/evaluate.py --output writes: run it again") from None
    if not figures:
        raise InputError(f"{folder} holds no linear.json or knn.json: write them with tools/evaluate.py --output FILE")
    return figures


if __name__ == "__main__":
    run(main, InputError)
