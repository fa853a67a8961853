"""Runs become the rows of a table, each beside what the paper published.

A run is a dict: what fine-tuning leaves as results.json, tools/evaluate.py as
linear.json, or pre-training as run.json. Each is, or holds, a record
(common/record.py); paper.py tells by it whether it is a training of the paper.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml

from rsa_detectron2.common import record
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import cell, mean_std, write_rows
from rsa_detectron2.transfer.config import protocol_of
from rsa_detectron2.transfer.data.average_precision import AP_KEYS
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.runs import set_names

AP = {f"{word} {key}": (task, key) for word, task in (("box", "bbox"), ("mask", "segm")) for key in AP_KEYS}
TOP1 = {
    "last epoch": "linear_top1_last",
    "best epoch": "linear_top1_best",
    "train BN, last": "train_bn_top1_last",
    "train BN, best": "train_bn_top1_best",
    "kNN": "knn_top1",
}
COLUMNS = {
    "ap": ("box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75"),
    "top1": tuple(TOP1),
    "hours": ("hours",),
}


@dataclass
class Row:
    """Runs that differ in nothing but the seed, a row of the paper, or both."""

    title: str
    table: str = ""  # of the paper
    place: tuple = ()  # its row and column there
    runs: list = field(default_factory=list)  # none: not run, or a quotation
    figures: dict = field(default_factory=dict)  # name: (mean, standard deviation or None), or None
    published: dict = field(default_factory=dict)  # the same, of the figures that the paper has
    words: list = field(default_factory=list)  # what makes the runs other ones than the paper's
    missing: list = field(default_factory=list)  # seeds of the paper's trials
    extra: bool = True  # not a row of the paper

    def difference(self, name: str) -> float | None:
        """Of a figure from the published one; None where either is missing, or where the runs are other
        ones."""
        if self.words or not self.figures.get(name) or not self.published.get(name):
            return None
        return self.figures[name][0] - self.published[name][0]

    def beyond_noise(self, name: str) -> bool:
        """Whether it differs by more than another seed may change."""
        noise = max(paper.load()["seed_noise"][paper.shows(self.table)], 2 * (self.published[name][1] or 0))
        return round(abs(self.difference(name)), 6) > noise


def read_json(path: str | Path) -> dict:
    """A JSON object of a run's folder -> dict. Raises InputError."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}): it says what the run was") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: run its command again")
    return content


def read_run(folder: str | Path) -> dict:
    """The record of the pre-training in a folder. Raises InputError."""
    path = Path(folder, record.FILE)
    about = read_json(path)
    if not record.is_sound(about) or about["kind"] != "pretrain":
        raise InputError(f"{path} is not what tools/pretrain.py writes: run it again")
    return about


def make_rows(
    kind: str, runs: dict, tables: list[str] | None = None, betas: list[float] | None = None
) -> list[Row]:
    """The rows of a table of ``kind`` ("ap", "top1" or "hours") for ``runs``, {name: run}, such as name
    their folders.

    tables: of the paper, all of whose rows are wanted; without, only those that the runs belong to. Rows
    that the paper does not have come last.
    """
    known = [
        cell
        for table in tables or paper.load()["tables"]
        if paper.shows(table) == kind
        for cell in paper.cells(table, betas if table == "figure3" else None)
    ]
    groups = {}  # (training, words): {name: run}; without a training, (None, what the runs have in common)
    for name, run in runs.items():
        cell, words = paper.nearest(known, partial(words_of, kind, run))
        key = (cell.training, tuple(words)) if cell else (None, signature(kind, run))
        groups.setdefault(key, {})[name] = run
    rows, shown = [], set()
    for cell in known:
        keys = [key for key in groups if key[0] and key[0] == cell.training and (tables or key not in shown)]
        shown.update(keys)
        for key in keys:
            rows += [filled(cell, kind, part, list(key[1])) for part in apart(kind, groups[key])]
        if tables and not keys and not cell.extra:
            rows.append(filled(cell, kind, {}, []))
    rows.sort(key=lambda row: row.extra)
    for (training, _), group in groups.items():
        if not training:
            rows += [own_row(kind, title_of(kind, part), part) for part in apart(kind, group)]
    return rows


def own_row(kind: str, title: str, runs: dict) -> Row:
    """A Row of runs that are nothing of the paper's."""
    return Row(title, runs=list(runs.values()), figures=average(kind, runs))


def words_of(kind: str, run: dict, training: paper.Training) -> list[str] | None:
    """Words for what makes a run another than ``training``; None where it has nothing to do with it: it
    is neither exactly that nor of its recipe."""
    about = record_of(kind, run)
    if (
        about is None
        or about["kind"] != training.kind
        or kind == "ap"
        and not paper.weights_fit(training, run["weights"])
    ):
        return None
    words = paper.differences(training, about)
    if kind == "top1":
        words += paper.evaluation_differences(training, run)
    elif kind == "hours":
        words += paper.hardware_differences(training, run)
    return words if not words or about["recipe"] == training.recipe else None


def record_of(kind: str, run: dict) -> dict | None:
    """The record of a run's training; None where it does not say."""
    return run.get("pretrain") if kind == "top1" else run


def signature(kind: str, run: dict) -> str:
    """Text that is the same for runs which differ in nothing but the seed and what is free."""
    about = record_of(kind, run)
    if about is None:
        return json.dumps(run)
    weights = {key: (run.get("weights") or {}).get(key) for key in ("method", "format", "branch", "step")}
    facts = {
        key: about.get(key)
        for key in ("method", "engine", "step", "iterations", "bn_batch_size", "eval_only")
    }
    return json.dumps([paper.fixed(about), weights, facts, about.get("data")])


def apart(kind: str, runs: dict) -> list[dict]:
    """{name: run} split so that no part holds a seed twice."""
    parts = []
    for name, run in runs.items():
        seed = (record_of(kind, run) or {}).get("seed", -1)
        seed = seed if seed >= 0 else name  # -1 is another one each time
        part = next((part for part in parts if seed not in part), None)
        if part is None:
            parts.append(part := {})
        part[seed] = (name, run)
    return [dict(part.values()) for part in parts]


def filled(cell: paper.Cell, kind: str, runs: dict, words: list[str]) -> Row:
    """The Row of a cell and the runs in it."""
    names = [compared(cell)] if kind == "top1" else COLUMNS[kind]
    published = {name: figure for name, figure in zip(names, cell.published) if figure}
    row = Row(
        cell.title,
        cell.table,
        (cell.row, cell.column),
        list(runs.values()),
        average(kind, runs) if runs else {},
        published,
        words,
        extra=cell.extra,
    )
    if runs and not words and len(runs) < cell.training.seeds:
        seeds = {record_of(kind, run)["seed"] for run in runs.values()}
        row.missing = sorted(set(range(cell.training.seeds)) - seeds)
    return row


def compared(cell: paper.Cell) -> str:
    """The figure of linear evaluation that the published one is compared with: of the best epoch, as its
    authors' code reports, and on the small data sets with BatchNorm in train mode, as it trains."""
    linear = (
        paper.load()["datasets"][cell.training.dataset]["linear"] if cell.training else {"train_bn": False}
    )
    return "train BN, best" if linear["train_bn"] else "best epoch"


def average(kind: str, runs: dict) -> dict:
    return {
        name: mean_std([figure(kind, name, run) for run in runs.values()])
        for name in (AP if kind == "ap" else COLUMNS[kind])
    }


def figure(kind: str, name: str, run: dict) -> float | None:
    if kind == "ap":
        task, key = AP[name]
        return run["ap"][task].get(key)
    return run["seconds"] / 3600 if kind == "hours" else run.get(TOP1[name])


def title_of(kind: str, runs: dict) -> str:
    """What stands for runs that are no row of the paper: the first one's folder, and what it says of
    itself."""
    name, run = next(iter(runs.items()))
    about = record_of(kind, run)
    if kind == "ap":
        return f"{Path(name).resolve().name if len(runs) > 1 else name} ({weights_label(run)})"
    if about is None:
        return f"{run.get('source', name)} (no record of its pre-training)"
    return f"{about['method']}, {about['data']['name']}, {about['settings']['SOLVER.EPOCHS']} epochs ({name})"


def weights_label(run: dict) -> str:
    """What a fine-tuning started from, in words: "rsa, step 500", or "random"."""
    weights = run["weights"]
    if weights is None:
        return "random"
    method, step = weights.get("method", "unknown"), weights.get("step", -1)
    if method == "unknown":
        method = weights.get("format", method)  # its layout is all that is known
    # the converter writes -1 where a file names no step
    return f"{method}, step {step}" if step >= 0 else method


def check_comparable(runs: dict) -> tuple[str, str]:
    """{name: results} -> their protocol and the name of their test set. Raises InputError where either
    differs: one table holds one."""

    def alike(words: str, kind_of: Callable[[dict], str]) -> str:
        kinds = {}
        for name, results in runs.items():
            kinds.setdefault(kind_of(yaml.safe_load(results["config"])), name)
        if len(kinds) > 1:
            raise InputError(
                f"runs of different {words} are not comparable: "
                + ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
                + "; make a report of each"
            )
        return next(iter(kinds))

    return alike("protocols", protocol_of), alike(
        "test sets", lambda config: ", ".join(set_names(config["DATASETS"]["TEST"]))
    )


def table_cells(kind: str, rows: list[Row]) -> list[list[str]]:
    """Rows -> header and cells, all strings. Below each that was run stand the published numbers and the
    difference, with a ``*`` beyond what another seed may change, or else a line that says in what the
    runs are other ones."""
    columns = [
        name
        for name in COLUMNS[kind]
        if any(row.figures.get(name) or row.published.get(name) for row in rows)
    ]
    lines, empty, line = [["", "seeds", *columns]], [""] * (1 + len(columns)), False
    for row in rows:
        if row.extra and not line and not rows[0].extra:
            line = True
            lines.append(["not in the paper:", *empty])
        if row.runs:
            lines.append([row.title, str(len(row.runs)), *(cell(row.figures.get(name)) for name in columns)])
        if row.published:
            title = "  paper" if row.runs else f"{row.title} (paper)"
            lines.append([title, "", *(cell(row.published.get(name)) for name in columns)])
        elif not row.runs:
            lines.append([f"{row.title} (not run)", *empty])
        if row.runs and row.published and not row.words:
            lines.append(["  difference", "", *(difference_cell(row, name) for name in columns)])
        if row.words:
            lines.append([f"  {'; '.join(row.words)}", *empty])
        if row.missing:
            lines.append([f"  seed {', '.join(map(str, row.missing))} is missing", *empty])
    return lines


def difference_cell(row: Row, name: str) -> str:
    """ "+0.4 *"."""
    difference = row.difference(name)
    if difference is None:
        return "–"
    text = f"{round(difference, 1) + 0:+.1f}"  # + 0: no -0.0
    return f"{text} *" if row.beyond_noise(name) else text


def write_csv(kind: str, rows: list[Row], path: str | Path) -> None:
    """Write rows as CSV: of each figure the mean, the deviation, both as published, and the difference.

    What is unknown is left empty.
    """
    names = AP if kind == "ap" else COLUMNS[kind]
    parts = ("", " std", " published", " published std", " difference")
    header = ["row", "table", "seeds", "differs in", "beyond seed noise"]
    write_rows(path, [*header, *(name + part for name in names for part in parts)], csv_lines(rows, names))


def csv_lines(rows: list[Row], names: Iterable[str]) -> Iterator[list]:
    for row in rows:
        differences = {name: row.difference(name) for name in names}
        marked = [name for name, gap in differences.items() if gap is not None and row.beyond_noise(name)]
        line = [row.title, row.table, len(row.runs), "; ".join(row.words), ", ".join(marked)]
        for name in names:
            line += row.figures.get(name) or (None, None)
            line += row.published.get(name) or (None, None)
            line.append(differences[name])
        yield line
