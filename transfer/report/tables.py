"""Runs become the rows of a table, each beside what the paper published.

A run is a dict: the results.json of fine-tuning, the linear.json of tools/evaluate.py, or the run.json of
pre-training. It is or holds a record (common/record.py), by which paper.py tells whether it is a training
of the paper.
"""

import json
from collections.abc import Iterable, Iterator
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
    runs: list = field(default_factory=list)  # empty: not run, or a quotation
    figures: dict = field(default_factory=dict)  # name: (mean, standard deviation or None), or None
    published: dict = field(default_factory=dict)  # the same, from the paper
    words: list = field(default_factory=list)  # how the runs differ from the paper's
    missing: list = field(default_factory=list)  # seeds of the paper's trials that were not run
    extra: bool = True  # not a row of the paper

    def difference(self, name: str) -> float | None:
        """A figure less the published one; None where either is missing, or the runs differ from the
        paper's."""
        if self.words or not self.figures.get(name) or not self.published.get(name):
            return None
        return self.figures[name][0] - self.published[name][0]

    def beyond_noise(self, name: str) -> bool:
        """Whether the difference is more than another seed may change."""
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
    """The rows of a table of ``kind`` ("ap", "top1" or "hours") for ``runs``, {folder: run}.

    tables: show all rows of these tables of the paper; None: only the rows that the runs belong to. betas:
    the grid of Figure 3. Rows that the paper does not have come last.
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
    """A Row of runs that belong to no row of the paper."""
    return Row(title, runs=list(runs.values()), figures=average(kind, runs))


def words_of(kind: str, run: dict, training: paper.Training) -> list[str] | None:
    """How a run differs from ``training``, as texts; None where it is another training altogether: neither
    exactly that, nor of the same recipe."""
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
    """The record of a run's training; None where the run has none."""
    return run.get("pretrain") if kind == "top1" else run


def signature(kind: str, run: dict) -> str:
    """A text that is equal for runs which differ only in the seed and in settings that are free."""
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
        seed = seed if seed >= 0 else name  # -1 is drawn anew each time
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
    """The column of linear evaluation that the published figure is compared with.

    The authors' code reports the best epoch, and on the small data sets it trains with BatchNorm in train
    mode.
    """
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
    """The title of runs that are no row of the paper: the folder of the first, and what its record says."""
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
    # The converter writes -1 where a file names no step.
    return f"{method}, step {step}" if step >= 0 else method


def check_comparable(runs: dict) -> tuple[str, str]:
    """(protocol, test set) of ``runs``, {name: results}. Raises InputError where they differ: a table holds
    only one of each."""
    protocol = _only_one(runs, "protocols", protocol_of)
    test_set = _only_one(runs, "test sets", lambda config: ", ".join(set_names(config["DATASETS"]["TEST"])))
    return protocol, test_set


def _only_one(runs, kinds, kind_of):
    """The one ``kind_of(config)`` of all runs. Raises InputError where there are several ``kinds``."""
    names = {}
    for name, results in runs.items():
        names.setdefault(kind_of(yaml.safe_load(results["config"])), name)
    if len(names) > 1:
        found = ", ".join(f"{name} is {kind}" for kind, name in names.items())
        raise InputError(f"runs of different {kinds} are not comparable: {found}; make a report of each")
    return next(iter(names))


def table_cells(kind: str, rows: list[Row]) -> list[list[str]]:
    """Rows -> a header and lines of strings.

    Below a row that was run stand the published numbers, then the difference, with a ``*`` where it is more
    than another seed may change. Where the runs are not quite the paper's, a line says how they differ
    instead.
    """
    columns = [
        name
        for name in COLUMNS[kind]
        if any(row.figures.get(name) or row.published.get(name) for row in rows)
    ]
    lines, empty = [["", "seeds", *columns]], ["", *("" for _ in columns)]
    first_extra = next((row for row in rows if row.extra), None)
    for row in rows:
        if row is first_extra and row is not rows[0]:
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


def class_table(results: dict) -> list[list[str]] | None:
    """Header and lines of strings: the APs of each class, best box AP first, those without objects last.

    None for the results of versions before 0.3, which have none.
    """
    if not results.get("per_class"):
        return None
    classes = {
        name: {column: found[task][key] for column, (task, key) in AP.items()}
        for name, found in results["per_class"].items()
    }
    columns = [c for c in COLUMNS["ap"] if any(values[c] is not None for values in classes.values())]
    ranked = sorted(
        classes, key=lambda name: (classes[name]["box AP"] is None, -(classes[name]["box AP"] or 0))
    )
    lines = [["class", "objects", *columns]]
    for name in ranked:
        texts = [cell(mean_std([classes[name][column]])) for column in columns]
        lines.append([name, str(results["per_class"][name]["objects"]), *texts])
    return lines


def difference_cell(row: Row, name: str) -> str:
    """ "+0.4 *"."""
    difference = row.difference(name)
    if difference is None:
        return "–"
    text = f"{round(difference, 1) + 0:+.1f}"  # + 0: no -0.0
    return f"{text} *" if row.beyond_noise(name) else text


def write_csv(kind: str, rows: list[Row], path: str | Path) -> None:
    """Write rows as CSV: for each figure the mean and the deviation, measured and published, and the
    difference.

    Unknown cells are empty.
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
