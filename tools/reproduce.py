#!/usr/bin/env python3
"""A table or figure of the paper in one command: runs what is missing, then writes a report.

    tools/reproduce.py all --dry-run                      # every run once, what it serves, and what it costs
    tools/reproduce.py table1 --rehearse                  # all of its commands at a small size, in minutes
    tools/reproduce.py table2 --rows rsa byol --columns cifar10
    tools/reproduce.py table5 --weights infomin=infomin.pth --weights mine=my.pth --num-gpus 8
    tools/reproduce.py controlled                         # the controlled test, which is none of the paper's
    tools/reproduce.py miniature                          # Table 5 in miniature, on drawn images

Stopped at any point, the same command goes on. A run that several rows need is made once. It is
recognized by its run.json, not by its folder's name. Rows of other methods in Tables 5 and 6 need their
authors' checkpoints (--weights ROW=FILE); any other name makes a row of its own. configs/paper.yaml has the
rows, what each is compared with, and the costs. The two tests draw their own images.
"""

import argparse
import os
from pathlib import Path

from rsa_detectron2.common.cli import run
from rsa_detectron2.tools import report, report_top1
from rsa_detectron2.tools._controlled import ControlledTest
from rsa_detectron2.tools._miniature import MiniatureTest
from rsa_detectron2.tools._options import SERVES, add_paper_options, check_options
from rsa_detectron2.tools._plan import Plan, check_names, choose, differences
from rsa_detectron2.tools._rehearsal import Rehearsal
from rsa_detectron2.tools._steps import Runner, Step, missing_steps, refuse_other_runs, run_job
from rsa_detectron2.transfer.report import paper

# Of this project, without a number of the paper.
TESTS = {"controlled": ControlledTest, "miniature": MiniatureTest}


def main() -> int:
    args = parse()
    return run_test(args) if args.table in TESTS else run_tables(args)


def run_test(args: argparse.Namespace) -> int:
    test_class = TESTS[args.table]
    rows = args.rows or list(test_class.ROWS)
    check_names(args.table, "row", rows, test_class.ROWS)
    folder = Path(args.output_dir, args.table)
    engine = {"engine": args.engine} if args.engine else {}  # refused for a test that has none
    test = test_class(folder, rows, args.seeds or test_class.SEEDS, args.overrides, **engine)
    jobs = args.jobs or min(4, len(os.sched_getaffinity(0)))
    return run_job(test, jobs, args.dry_run, lambda hours: f"about {60 * hours:.0f} minutes of a CPU core")


def run_tables(args: argparse.Namespace) -> int:
    tables = list(paper.load()["tables"]) if args.table == "all" else [args.table]
    small = Rehearsal(args) if args.rehearse else None
    plan, results = Plan(args, small), {}
    for table in tables:
        if paper.shows(table) == "pictures":
            results[table] = plan.pictures(table)
        elif args.short and paper.shows(table) == "hours":
            results[table] = plan.short(table)
        else:
            results[table] = [
                folder
                for cell in choose(table, args)
                for seed in range(1 if small else args.seeds or cell.training.seeds)
                if (folder := plan.cell(cell, seed))
            ]
    steps = list(plan.steps.values())
    if not (small or args.overrides):
        refuse_other_runs(steps, differences)
    missing = missing_steps(steps)
    show(plan, missing)
    if args.dry_run:
        return 0
    status = Runner(missing, args.jobs or 1, logged=args.rehearse).run()
    if status == 0:
        for table, found in results.items():
            write(table, found, args, small)
    return status


def show(plan: Plan, missing: list[Step]) -> None:
    """Print what would run, for which rows, and what it costs."""
    for row in plan.left_out:
        print(f"left out: {row}")
    for step in plan.steps.values():
        print(step.line(missing, "to run" if plan.small else f"{step.hours:.3g} V100-hours"))
        print(f"    for {', '.join(step.rows)}")
    hours = sum(step.hours for step in missing)
    total = "in a rehearsal" if plan.small else f"about {hours:.0f} V100-hours by configs/paper.yaml"
    print(f"{len(missing)} of {len(plan.steps)} to run, {total}", flush=True)


def write(
    table: str,
    found: Path | dict[str, Path] | list[Path],
    args: argparse.Namespace,
    small: Rehearsal | None,
) -> None:
    """Write and print the report of a table.

    found: the folders of its results, its picture, or the files of Table 7's short form by column.
    """
    folder = Path(args.output_dir, table)
    if paper.shows(table) == "pictures":
        print(found)
    elif isinstance(found, dict):
        report_top1.write_short(table, found, folder)
    elif paper.shows(table) == "ap":
        report.write(found, folder, tables=[table], note=small and small.note())
    elif found:
        report_top1.write(found, folder, tables=[table], note=small and small.note(), betas=args.betas)
    if small and isinstance(found, list):
        print(small.estimates(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("all", *paper.load()["tables"], *TESTS))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all whose weights can be had")
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="runs of each row (default: as many as the paper's; 3 in the two tests)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="steps at a time (default 1; in the two tests one per core, at most 4)",
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", help="default output/reproduce, or output/rehearsal with --rehearse"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their cost, and stop")
    parser.add_argument(
        "--set",
        nargs="+",
        dest="overrides",
        default=[],
        metavar="KEY VALUE",
        help="for every fine-tuning, e.g. SOLVER.AMP.ENABLED True; of the two tests for every pre-training",
    )
    add_paper_options(parser)
    args = parser.parse_args()
    args.output_dir = args.output_dir or ("output/rehearsal" if args.rehearse else "output/reproduce")
    given = [name for name in SERVES if getattr(args, name) != parser.get_default(name)]
    check_options(args, kind(args.table), given)
    return args


def kind(table: str) -> str:
    if table in ("all", *TESTS):
        return "all" if table == "all" else "test"
    return paper.shows(table)


if __name__ == "__main__":
    run(main)
