#!/usr/bin/env python3
"""A table or figure of the paper in one command: runs what is missing, then writes a report.

    tools/reproduce.py all --dry-run                      # every run once, what it serves, and what it costs
    tools/reproduce.py table1 --rehearse                  # all of its commands at a small size, in minutes
    tools/reproduce.py table2 --rows rsa byol --columns cifar10
    tools/reproduce.py table5 --weights infomin=infomin.pth --weights mine=my.pth --num-gpus 8

Stopped at any point, the same command goes on. A run that several rows need is made once. It is
recognized by its run.json, not by its folder's name. Rows of other methods in Tables 5 and 6 need their
authors' checkpoints (--weights ROW=FILE); any other name makes a row of its own. configs/paper.yaml has the
rows, what each is compared with, and the costs.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import _rehearsal, report, report_top1
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import read_run

OWN_RUN = Path("output/pretrain")  # where tools/pretrain.py leaves the ImageNet-1K recipe's run by itself


@dataclass
class Step:
    """A command, and the file that is there once it has run."""

    done: Path
    command: list[str]  # a tool and its arguments
    needs: Path | None = None  # the file of an earlier step
    hours: float = 0.0  # of a V100
    training: paper.Training | None = None
    rows: list[str] = field(default_factory=list)  # of the paper, that need it


class Plan:
    """The steps toward some rows, each once, in an order in which they can run."""

    def __init__(self, args: argparse.Namespace, small: _rehearsal.Rehearsal | None = None) -> None:
        self.args, self.small, self.weights = args, small, dict(args.weights)
        self.folder, self.steps, self.left_out = Path(args.output_dir), {}, []

    def add(self, row: str, done: Path, command: Sequence[object], **facts: object) -> Path:
        """Add a step, unless it is there, and the row that needs it; returns ``done``.

        facts: other fields of the Step.
        """
        step = self.steps.setdefault(done, Step(done, [str(word) for word in command], **facts))
        if row not in step.rows:
            step.rows.append(row)
        return done

    def cell(self, cell: paper.Cell, seed: int) -> Path | None:
        """Add what leads to a cell; returns its result's folder, or None where its weights are missing."""
        row = " ".join(filter(None, (cell.table, cell.row, cell.column)))
        if cell.training.kind == "finetune":
            return self.fine_tuning(row, cell, seed)
        checkpoint = self.pre_training(row, cell.training, seed)
        if paper.shows(cell.table) == "hours":
            return checkpoint.parent
        protocol = paper.load()["datasets"][cell.training.dataset]["linear"]
        done = self.place(seed, cell.training) / "linear.json"
        command = ["tools/evaluate.py", "linear", checkpoint, "--seed", seed, "--output", done]
        command += ["--train-bn"] * protocol["train_bn"] + (self.small.linear() if self.small else [])
        return self.add(row, done, command, needs=checkpoint, hours=protocol["hours"]).parent

    def place(self, seed: int, training: paper.Training) -> Path:
        return self.folder / f"seed{seed}" / training.name

    def pre_training(self, row: str, training: paper.Training, seed: int) -> Path:
        """Add a pre-training; returns its checkpoint."""
        if (
            seed == 0
            and not self.small
            and (OWN_RUN / "model_final.pth").is_file()
            and not words(training, OWN_RUN)
        ):
            return OWN_RUN / "model_final.pth"
        folder = self.place(seed, training)
        command = [
            "tools/pretrain.py",
            "--config-file",
            training.recipe,
            "--output-dir",
            folder,
            "--seed",
            seed,
            *(word for pair in training.overrides for word in pair),
        ]
        command += self.small.pretrain(training) if self.small else []
        return self.add(row, folder / "model_final.pth", command, hours=training.hours, training=training)

    def fine_tuning(self, row: str, cell: paper.Cell, seed: int) -> Path | None:
        """Add a fine-tuning; returns its folder, or None where its weights are missing."""
        training, args, weights = cell.training, self.args, None
        folder = self.place(seed, training)
        command = [
            "tools/train_net.py",
            "--config-file",
            training.recipe,
            "--resume",
            "--engine",
            args.engine,
            "--num-gpus",
            args.num_gpus,
            *(["--accumulate", args.accumulate] if args.accumulate else []),
            "SEED",
            seed,
            "OUTPUT_DIR",
            folder,
        ]
        if training.weights not in ("none", "config"):
            weights = self.converted(row, cell)
            if weights is None:
                return None
            command += ["MODEL.WEIGHTS", weights]
        command += self.small.finetune(training) if self.small else []
        return self.add(
            row,
            folder / "results.json",
            [*command, *args.overrides],
            needs=weights,
            hours=training.hours,
            training=training,
        ).parent

    def converted(self, row: str, cell: paper.Cell) -> Path | None:
        """Add what makes the weights of a row; returns their file, or None where no checkpoint is known."""
        training, source, needs = cell.training.weights, self.weights.get(cell.row), None
        named = [] if isinstance(training, paper.Training) else ["--method", training]
        if source is None and named and self.small:
            source = self.small.weights(training)
        elif source is None and named:
            self.left_out.append(f"{row} needs --weights {cell.row}=FILE, its authors' checkpoint")
            return None
        elif source is None:
            source = needs = self.pre_training(row, training, 0)
        elif not named:
            named = ["--method", "RSA"]
        done = self.folder / "weights" / f"{cell.row}_r50.pkl"
        return self.add(row, done, ["tools/convert_to_d2.py", source, done, *named], needs=needs)

    def pictures(self, table: str) -> Path:
        """Add Figure 1; returns its picture."""
        datasets, panels = paper.load()["datasets"], paper.load()["tables"][table]["panels"]
        folder = self.folder / table
        places = [self.small.data(name) if self.small else datasets[name]["path"] for name in panels.values()]
        return self.add(
            table,
            folder / "noisy.png",
            ["tools/show_views.py", *places, "--noisy", "--titles", *panels, "--output-dir", folder],
        )

    def short(self, table: str) -> dict[str, Path]:
        """Add Table 7's short form: seconds of an epoch with the loader; returns the files by column."""
        found = {}
        for name, column in paper.load()["tables"][table]["columns"].items():
            dataset = paper.load()["datasets"][column["dataset"]]
            recipe = dataset["recipe"].format(method="rsa")
            data = self.small.data(column["dataset"]) if self.small else dataset["path"]
            done = self.folder / table / f"{name}.json"
            command = ["tools/benchmark.py", "step", "--methods", "byol", "rsa", "--config-file", recipe]
            command += ["--data", data, "--epoch-images", dataset["images"][0], "--output", done]
            command += self.small.benchmark(column["dataset"]) if self.small else []
            found[name] = self.add(f"{table} {name}", done, command, hours=0.2)
        return found

    def missing(self) -> list[Step]:
        """The steps to run: neither what is done nor what only led to it."""
        needed = {step.done for step in self.steps.values()} - {step.needs for step in self.steps.values()}
        missing = []
        for step in reversed(self.steps.values()):
            if step.done in needed and not step.done.is_file():
                missing.insert(0, step)
                needed.add(step.needs)
        return missing


def words(training: paper.Training, folder: Path) -> list[str]:
    """Words for everything in which the run in a folder is not ``training``; [] if it is exactly that."""
    try:
        read = load_results if training.kind == "finetune" else read_run
        return paper.differences(training, read(folder))
    except InputError as error:
        return [str(error)]


def check_what_is_done(plan: Plan) -> None:
    """Raises InputError for a finished run that is not of its command."""
    for step in plan.steps.values():
        checked = step.training and step.done.is_file() and not plan.args.overrides
        if checked and (found := words(step.training, step.done.parent)):
            raise InputError(
                f"{step.done.parent} holds another run ({'; '.join(found)}): "
                "move it away, or give another --output-dir"
            )


def choose(table: str, args: argparse.Namespace) -> list[paper.Cell]:
    """The cells of a table that were asked for. Raises InputError for a name that it does not have."""
    cells = [cell for cell in paper.cells(table, args.betas) if cell.training]
    if paper.shows(table) == "ap":
        cells += [
            paper.own_cell(table, name) for name, _ in args.weights if name not in [c.row for c in cells]
        ]
    for what, wanted in (("row", args.rows), ("column", args.columns)):
        known = dict.fromkeys(getattr(cell, what) for cell in cells)
        unknown = [name for name in wanted or () if name not in known]
        if unknown:
            raise InputError(f"{table} has no {what} {', '.join(unknown)}: choose from {', '.join(known)}")
        cells = [cell for cell in cells if not wanted or getattr(cell, what) in wanted]
    return cells


def main() -> int:
    args = parse()
    tables = list(paper.load()["tables"]) if args.table == "all" else [args.table]
    small = _rehearsal.Rehearsal(args) if args.rehearse else None
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
    if not small:
        check_what_is_done(plan)
    missing = plan.missing()
    show(plan, missing)
    if args.dry_run:
        return 0
    for number, step in enumerate(missing, start=1):
        print(f"\n[{number} of {len(missing)}] $ {shlex.join(step.command)}", flush=True)
        status = execute(step, small)
        if status or not step.done.is_file():
            print(
                f"stopped with status {status}, without {step.done}: the same command goes on",
                file=sys.stderr,
            )
            return status or 1
    for table, found in results.items():
        write(table, found, args, small)
    return 0


def execute(step: Step, small: _rehearsal.Rehearsal | None) -> int:
    """Run a step; returns its exit status.

    What a rehearsal's commands print goes to a file; after a failure its last lines are shown, too.
    """
    command = [sys.executable, str(Path(__file__).with_name(Path(step.command[0]).name)), *step.command[1:]]
    if not small:
        return subprocess.run(command, check=False).returncode
    with open(small.log, "a") as log:
        log.write(f"$ {shlex.join(step.command)}\n")
        log.flush()
        status = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        print(
            "\n".join(small.log.read_text().splitlines()[-5:]) + f"\nall of it: {small.log}", file=sys.stderr
        )
    return status


def show(plan: Plan, missing: list[Step]) -> None:
    """Print what would run, for which rows, and what it costs."""
    for row in plan.left_out:
        print(f"left out: {row}")
    for step in plan.steps.values():
        cost = "to run" if plan.small else f"{step.hours:.3g} V100-hours"
        state = cost if step in missing else "done" if step.done.is_file() else "not needed"
        print(f"[{state}] {shlex.join(step.command) if step in missing else step.done}")
        print(f"    for {', '.join(step.rows)}")
    hours = sum(step.hours for step in missing)
    total = "in a rehearsal" if plan.small else f"about {hours:.0f} V100-hours by configs/paper.yaml"
    print(f"{len(missing)} of {len(plan.steps)} to run, {total}", flush=True)


def write(
    table: str,
    found: Path | dict[str, Path] | list[Path],
    args: argparse.Namespace,
    small: _rehearsal.Rehearsal | None,
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


def weights_of(text: str) -> tuple[str, str]:
    """An argparse type: NAME=FILE -> (name, file)."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FILE")
    return name, path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("all", *paper.load()["tables"]))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all whose weights can be had")
    parser.add_argument(
        "--columns", nargs="+", metavar="COLUMN", help="data sets (and lengths) of Tables 1-4, 7, 8"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="runs of each row (default: the paper's trials)"
    )
    parser.add_argument("--betas", nargs="+", type=float, metavar="BETA", help="Figure 3's grid")
    parser.add_argument(
        "--short", action="store_true", help="of Table 7: the seconds of an epoch, times the epochs"
    )
    parser.add_argument(
        "--weights",
        action="append",
        type=weights_of,
        default=[],
        metavar="NAME=FILE",
        help="of Tables 5 and 6: the checkpoint of a row, or of a row of its own",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="for fine-tuning; pre-training takes all")
    parser.add_argument("--accumulate", type=int, metavar="N", help="as in tools/train_net.py")
    parser.add_argument(
        "--engine", choices=("detectron2", "torchvision"), default="detectron2", help="for fine-tuning"
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", help="default output/reproduce, of a rehearsal output/rehearsal"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their cost, and stop")
    parser.add_argument(
        "--rehearse", action="store_true", help="each run once, with a few steps on a few images"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        dest="overrides",
        default=[],
        metavar="KEY VALUE",
        help="for every fine-tuning, e.g. SOLVER.AMP.ENABLED True",
    )
    args = parser.parse_args()
    args.output_dir = args.output_dir or ("output/rehearsal" if args.rehearse else "output/reproduce")
    check_options(args)
    return args


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError for an option that has no effect or no meaning."""
    for name in ("seeds", "num_gpus"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if len(args.overrides) % 2:
        raise InputError(f"--set takes KEY VALUE pairs, but {args.overrides[-1]!r} has no value")
    given = {
        "ap": {
            "--num-gpus": args.num_gpus != 1,
            "--accumulate": args.accumulate,
            "--set": args.overrides,
            "--weights": args.weights,
            "--engine torchvision": args.engine != "detectron2",
        },
        "hours": {"--short": args.short},
    }
    for kind, options in given.items():
        names = ", ".join(name for name, value in options.items() if value)
        if names and args.table != "all" and paper.shows(args.table) != kind:
            raise InputError(f"{names}: of no use for {args.table}; leave it out")
    if args.betas and args.table not in ("all", "figure3"):
        raise InputError(f"--betas: of no use for {args.table}; leave it out")


if __name__ == "__main__":
    run(main)
