"""What leads to the tables of the paper: steps that pre-train, convert, fine-tune and judge, each once."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools._rehearsal import Rehearsal
from rsa_detectron2.tools._steps import Step
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import read_run

OWN_RUN = Path("output/pretrain")  # where tools/pretrain.py leaves the ImageNet-1K recipe's run by itself


@dataclass
class TableStep(Step):
    """A step toward some rows of the paper. Its hours are those of a V100."""

    training: paper.Training | None = None
    rows: list[str] = field(default_factory=list)


class Plan:
    """The steps toward some rows, each once, in an order in which they can run."""

    def __init__(self, args: argparse.Namespace, small: Rehearsal | None = None) -> None:
        self.args, self.small, self.weights = args, small, dict(args.weights)
        self.folder, self.steps, self.left_out = Path(args.output_dir), {}, []

    def add(self, row: str, done: Path, command: Sequence[object], **facts: object) -> Path:
        """Add a step, unless it is there, and the row that needs it; returns ``done``.

        facts: other fields of the TableStep. A rehearsal has no use for the full run's hours.
        """
        if self.small:
            facts["hours"] = 0.0
        step = self.steps.setdefault(done, TableStep(done, [str(word) for word in command], **facts))
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
            args.engine or "detectron2",
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


def words(training: paper.Training, folder: Path) -> list[str]:
    """Words for everything in which the run in a folder is not ``training``; [] if it is exactly that."""
    try:
        read = load_results if training.kind == "finetune" else read_run
        return paper.differences(training, read(folder))
    except InputError as error:
        return [str(error)]


def differences(step: TableStep) -> list[str]:
    """The same of the run of a finished step; [] for a step that does not train."""
    return words(step.training, step.done.parent) if step.training else []


def choose(table: str, args: argparse.Namespace) -> list[paper.Cell]:
    """The cells of a table that were asked for. Raises InputError for a name that it does not have."""
    cells = [cell for cell in paper.cells(table, args.betas) if cell.training]
    if paper.shows(table) == "ap":
        cells += [
            paper.own_cell(table, name) for name, _ in args.weights if name not in [c.row for c in cells]
        ]
    for what, wanted in (("row", args.rows), ("column", args.columns)):
        known = dict.fromkeys(getattr(cell, what) for cell in cells)
        check_names(table, what, wanted or (), known)
        cells = [cell for cell in cells if not wanted or getattr(cell, what) in wanted]
    return cells


def check_names(table: str, what: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raises InputError for names of rows or columns that a table does not have."""
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"{table} has no {what} {', '.join(unknown)}: choose from {', '.join(known)}")
