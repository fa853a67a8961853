#!/usr/bin/env python3
"""Top-1 of linear evaluation and kNN beside the paper's: the mean and deviation over the seeds of runs.

    tools/report_top1.py RUN...                                  # rows of any table of the paper
    tools/report_top1.py output/reproduce/seed*/* --table table1   # all rows of one, also those not run

RUN is a folder with what tools/evaluate.py --output wrote there: linear.json, knn.json or both. For Table 7
(--table table7) it is the folder of a pre-training run. Writes report.md, report.html and table.csv, and
for Figure 3 a picture, too.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from rsa_detectron2.common import record
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.page import write_report
from rsa_detectron2.transfer.report.pictures import plot_sweep
from rsa_detectron2.transfer.report.tables import (
    TOP1,
    Row,
    make_rows,
    read_json,
    read_run,
    table_cells,
    write_csv,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--table", choices=[name for name in paper.load()["tables"] if paper.shows(name) in ("top1", "hours")]
    )
    parser.add_argument(
        "--output", default="output/report", metavar="DIR", help="where to write (default %(default)s)"
    )
    args = parser.parse_args()
    write(args.runs, args.output, [args.table] if args.table else None)


def write(
    runs: Iterable[str | Path],
    output: str | Path,
    tables: list[str] | None = None,
    note: str | None = None,
    betas: list[float] | None = None,
) -> None:
    """Write the report of the folders ``runs`` into a folder, and print its table. Raises InputError.

    tables: show all rows of these tables of the paper. note: a text to put first. betas: the grid of Figure
    3.
    """
    kind, output = paper.shows(tables[0]) if tables else "top1", Path(output)
    read = read_run if kind == "hours" else read_top1
    rows = make_rows(kind, {str(folder): read(folder) for folder in runs}, tables, betas)
    title = paper.title(tables[0]) if tables else "Linear evaluation"
    cells = table_cells(kind, rows)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(kind, rows, output / "table.csv")
    sections = [("Note", note)] if note else []
    sections.append(("Table", cells))
    if kind == "hours":
        sections.append(("RSA's time over BYOL's", ratios(tables[0], rows)))
    if tables == ["figure3"]:
        columns = {
            name: f"{paper.load()['datasets'][column['dataset']]['title']}, {column['epochs']} epochs"
            for name, column in paper.load()["tables"]["figure3"]["columns"].items()
        }
        sections.append(("Figure", plot_sweep(rows, columns, output / "figure3.png")))
    write_report(output, title, sections)
    print(f"{title}\n{note or ''}\n{to_markdown(cells)}\n{output / 'report.html'}")


def read_top1(folder: str | Path) -> dict:
    """What tools/evaluate.py wrote into a run's folder. Raises InputError where it is missing or damaged."""
    found = [name for name in ("knn.json", "linear.json") if Path(folder, name).is_file()]
    if not found:
        raise InputError(
            f"{folder} holds no linear.json or knn.json: write one with "
            f"tools/evaluate.py linear --output {folder}/linear.json"
        )
    result = {key: value for name in found for key, value in read_json(Path(folder, name)).items()}
    about = result.get("pretrain")
    figures = [result[key] for key in TOP1.values() if key in result]
    if (
        not figures
        or not all(isinstance(value, (int, float)) for value in figures)
        or (about is not None and not record.is_sound(about))
    ):
        raise InputError(f"{Path(folder, found[-1])} is not what tools/evaluate.py writes: run it again")
    return result


def ratios(table: str, rows: list[Row]) -> list[list[str]]:
    """RSA's hours over BYOL's, published and measured, for each column."""
    hours = {row.place: row for row in rows}
    lines = [["", "paper", "here"]]
    for name in paper.load()["tables"][table]["columns"]:
        rsa, byol = hours["rsa", name], hours["byol", name]
        lines.append(
            [
                name,
                *(
                    f"{a['hours'][0] / b['hours'][0]:.3f}" if a.get("hours") and b.get("hours") else "–"
                    for a, b in ((rsa.published, byol.published), (rsa.figures, byol.figures))
                ),
            ]
        )
    return lines


def write_short(table: str, files: dict[str, Path], output: str | Path) -> None:
    """Write a short form of Table 7: hours that follow from the seconds of an epoch with the loader.

    files: {column of the table: the file that tools/benchmark.py wrote}.
    """
    lines = [
        [
            "hours",
            "BYOL",
            "RSA",
            "RSA / BYOL",
            "BYOL (paper)",
            "RSA (paper)",
            "RSA / BYOL (paper)",
            "measured on",
        ]
    ]
    content = paper.load()["tables"][table]
    for index, (name, column) in enumerate(content["columns"].items()):
        measured = [json.loads(line) for line in Path(files[name]).read_text().splitlines()]
        seconds = {row["method"]: row["s per epoch"] for row in measured if row["data"] != "synthetic"}
        hours = [seconds[method] * column["epochs"] / 3600 for method in ("byol", "rsa")]
        published = [content["rows"][method]["published"][index] for method in ("byol", "rsa")]
        lines.append(
            [
                f"{paper.load()['datasets'][column['dataset']]['title']}, {column['epochs']} epochs",
                *(text for a, b in (hours, published) for text in (f"{a:.1f}", f"{b:.1f}", f"{b / a:.3f}")),
                measured[0]["machine"],
            ]
        )
    write_report(Path(output), paper.title(table), [("From seconds of an epoch with the loader", lines)])
    print(to_markdown(lines))


if __name__ == "__main__":
    run(main)
