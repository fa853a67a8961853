#!/usr/bin/env python3
"""Report fine-tuning runs: an AP table, and a page with curves, errors, classes and detections. Or compare
pre-training runs.

    tools/report.py output/transfer                                       # one run
    tools/report.py output/rsa output/scratch --pretrain output/pretrain  # two, with pre-training curves
    tools/report.py seed0/rsa seed1/rsa seed2/rsa                         # differ only in seed: mean ± std
    tools/report.py --pretrain output/pretrain output/second              # pre-training runs, side by side

Prints the table as Markdown, and writes report.md, report.html, table.csv, ap.png, curves.png,
precision_recall.png, errors.png and detections.png. A run needs only results.json; what its other files
would show is left out if they are missing. Below a row of Tables 5 and 6 stand the published numbers and
the difference, marked if it is more than another seed may change. Below a run that is almost such a row, a
line says how it differs. Runs of different protocols or test sets are refused.

Of pre-training runs alone it prints what they are, the settings that differ, and the first and last figures,
and writes pretrain.md, pretrain.html, pretrain.csv and pretrain.png. A run need not have ended.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rsa_detectron2.common import record
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.transfer.data.annotations import locate_dataset
from rsa_detectron2.transfer.data.detection_errors import KINDS
from rsa_detectron2.transfer.report import paper, pretraining
from rsa_detectron2.transfer.report.detection_pictures import draw_detections
from rsa_detectron2.transfer.report.page import body_markdown, write_report
from rsa_detectron2.transfer.report.pictures import plot_ap, plot_curves
from rsa_detectron2.transfer.report.quality_pictures import plot_errors, plot_precision_recall
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import (
    check_comparable,
    class_table,
    make_rows,
    table_cells,
    write_csv,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="fine-tuning output folder, which holds results.json"
    )
    parser.add_argument(
        "--table",
        choices=[name for name in paper.load()["tables"] if paper.shows(name) == "ap"],
        help="show all rows of this table, also those that were not run",
    )
    parser.add_argument(
        "--pretrain",
        nargs="+",
        metavar="DIR",
        help="pre-training output folders to compare; beside RUN one of them, whose curves are drawn too",
    )
    parser.add_argument(
        "--output", metavar="DIR", default="output/report", help="where to write (default %(default)s)"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=4,
        metavar="N",
        help="validation images to draw detections on (default %(default)s)",
    )
    args = parser.parse_args()
    check(args)
    if not args.runs:
        compare(args.pretrain, Path(args.output))
        return
    tables = [args.table] if args.table else None
    curves = args.pretrain[0] if args.pretrain else None
    write(args.runs, args.output, tables, pictures=Pictures(curves, args.images))


def check(args: argparse.Namespace) -> None:
    """Raises InputError for folders of the wrong kind or number."""
    if not args.runs and not args.pretrain:
        raise InputError("give the folders of fine-tuning runs, or of pre-training runs after --pretrain")
    if not args.runs and args.table:
        raise InputError(f"--table {args.table} shows fine-tuning runs: give their folders")
    if args.runs and len(args.pretrain or ()) > 1:
        raise InputError("--pretrain takes one folder beside fine-tuning runs: compare several without those")
    for folder in args.runs:
        if Path(folder, record.FILE).is_file():
            raise InputError(f"{folder} holds a pre-training run: give it after --pretrain")
    if args.runs and args.pretrain and not Path(args.pretrain[0], "metrics.jsonl").is_file():
        raise InputError(f"{args.pretrain[0]} has no metrics.jsonl: give the folder of a pre-training run")


def compare(folders: list[str], output: Path) -> None:
    """Write the comparison of the pre-training runs in ``folders``, and print its tables."""
    for heading, body in pretraining.write(folders, output):
        if not isinstance(body, Path):
            print(f"{heading}\n\n{body_markdown(heading, body, output)}")
    print(f"{output}/pretrain.html")


@dataclass(frozen=True)
class Pictures:
    """What the pictures of a report show besides the runs."""

    pretrain: str | Path | None = None  # folder of a pre-training, whose curves to draw too
    num_images: int = 4  # validation images to draw detections on


def write(
    runs: Iterable[str | Path],
    output: str | Path,
    tables: list[str] | None = None,
    note: str | None = None,
    pictures: Pictures = Pictures(),
) -> None:
    """Write the report of the folders ``runs`` into a folder, and print its table. Raises InputError.

    tables: show all rows of these tables of the paper. note: a text to put first.
    """
    results = {str(folder): load_results(folder) for folder in runs}
    protocol, test_set = check_comparable(results) if results else ("", "")
    rows = make_rows("ap", results, tables)
    title = paper.title(tables[0]) if tables else "Transfer to detection and segmentation"
    cells, output = table_cells("ap", rows), Path(output)
    sections = [("Note", note)] if note else []
    sections.append(("AP (%)", cells))
    if any(cell.endswith("*") for row in cells for cell in row):
        noise = (
            "* differs from the published number by more than "
            f"{paper.load()['seed_noise']['ap']} AP, about what another seed may change."
        )
        sections.append(("Seeds", noise))
    output.mkdir(parents=True, exist_ok=True)
    write_csv("ap", rows, output / "table.csv")
    print(to_markdown(cells), *(f"{body}\n" for heading, body in sections if heading != "AP (%)"), sep="\n")
    if results:
        folders = {
            row.title if len(row.runs) == 1 else folder: folder
            for row in rows
            for folder in results
            if any(results[folder] is run for run in row.runs)
        }
        sections += [
            ("AP", plot_ap(rows, output / "ap.png")),
            ("Settings", settings_table(folders, results, protocol, test_set)),
        ]
        if plot_curves(pictures.pretrain, folders, output / "curves.png"):
            sections.append(("Curves", output / "curves.png"))
        if plot_precision_recall(folders, output / "precision_recall.png"):
            sections.append(("Precision and recall, mean over classes", output / "precision_recall.png"))
        if plot_errors({name: results[folder] for name, folder in folders.items()}, output / "errors.png"):
            sections += [("Errors by kind", output / "errors.png"), ("Kinds of errors", kinds_of_errors())]
        try:
            name = next(iter(results.values()))["settings"]["DATASETS.TEST"][0]
            draw_detections(*locate_dataset(name), folders, output / "detections.png", pictures.num_images)
            sections.append(("Detections", output / "detections.png"))
        except InputError as error:
            print(f"no picture of detections: {error}", file=sys.stderr)
        for name, folder in folders.items():
            if lines := class_table(results[folder]):
                sections.append((f"Classes of {name}, AP (%)", lines))
    write_report(output, title, sections)
    print(f"{output}/report.html")


def kinds_of_errors() -> str:
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
    return (
        "False detections at IoU 0.5 and missed objects. Each counts once; a bar is the AP50 that mending "
        f"this kind alone would gain. {kinds[0].upper()}{kinds[1:]}."
    )


def settings_table(
    folders: dict[str, str], results: dict[str, dict], protocol: str, test_set: str
) -> list[list[str]]:
    """The settings of each run: header and rows of strings."""
    lines = [
        [
            "run",
            "weights",
            "engine",
            "protocol",
            "test set",
            "iterations",
            "best model",
            "images/batch",
            "GPUs x passes",
            "images/BatchNorm",
            "base lr",
            "seed",
            "hours (last start)",
        ]
    ]
    for name, folder in folders.items():
        run = results[folder]
        lines.append(
            [
                str(x)
                for x in (
                    name,
                    (run["weights"] or {}).get("source", "–"),
                    run["engine"],
                    protocol,
                    test_set,
                    run["iterations"],
                    best_model(run),
                    run["settings"]["SOLVER.IMS_PER_BATCH"],
                    f"{run['processes']} x {run['accumulate']}",
                    run["bn_batch_size"],
                    run["settings"]["SOLVER.BASE_LR"],
                    run["seed"],
                    f"{run['seconds'] / 3600:.2f}",
                )
            ]
        )
    return lines


def best_model(run: dict) -> str:
    """When the best of the evaluated models was reached, and its AP; "–" without evaluations on the way."""
    best = run.get("best")  # a run of an early version has none
    if not best:
        return "–"
    task, key = best["metric"].split("/")
    value = best["ap"].get(task, {}).get(key)
    shown = "–" if value is None else f"{value:.1f}"
    return f"{best['metric']} {shown} after {best['iterations']}"


if __name__ == "__main__":
    run(main)
