"""Fine-tuning runs -> one table, one page and pictures: what a run leaves, and what a reader wants to see of it.

A *run* is a fine-tuning output folder: ``results.json`` (:func:`write_results`, from either engine), ``metrics.json``
(JSON lines in Detectron2's format) and ``inference/coco_instances_results.json`` (COCO-format detections). A
*pre-training run* is a folder with ``metrics.jsonl``. Only ``results.json`` is needed for the table.
"""

import base64
import csv
import html
import json
import math
import os
import platform
import re
import statistics
from importlib import metadata
from pathlib import Path

import yaml

from transfer.config import InputError, protocol_of

AP_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# Box AP and mask AP on COCO val2017 under the InfoMin protocol, by schedule and row. RSA's are the paper's (Tables 5
# and 6). The others are what InfoMin's authors published with their code (github.com/HobbitLong/PyContrast, detection),
# whose protocol it is. The paper's AP50 and AP75 are not known here.
PUBLISHED = {
    "1x": {"random": (32.8, 29.9), "msra": (39.7, 35.9), "instdis": (38.8, 35.2), "pirl": (38.6, 35.1),
           "mocov1": (39.4, 35.6), "infomin": (40.6, 36.7), "rsa": (41.1, 37.3)},
    "2x": {"random": (38.4, 34.7), "msra": (41.6, 37.6), "instdis": (41.3, 37.3), "pirl": (41.2, 37.4),
           "mocov1": (41.7, 37.5), "mocov2": (41.7, 37.6), "infomin": (42.5, 38.4), "rsa": (42.7, 38.5)},
}
SCHEDULES = {90000: "1x", 180000: "2x"}  # iterations of 16 images
RSA_STEPS = 200 * (1281167 // 2048)  # of the paper's 200 epochs of ImageNet-1K
SEED_NOISE = 0.3  # AP by which two runs that differ in nothing but the seed may well differ
COLUMNS = {f"{word} {key}": (task, key) for word, task in (("box", "bbox"), ("mask", "segm")) for key in AP_KEYS}
PAPER_COLUMNS = ("box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75")


def write_results(cfg, engine, ap, weights, iterations, seconds, eval_only=False, processes=1, accumulate=1):
    """Write ``cfg.OUTPUT_DIR/results.json``, whole or not at all, and return its content.

    engine: "detectron2" or "torchvision"; ap: ``{"bbox": {"AP": percent, ...}, "segm": {...}}``, where a missing
    or non-finite number becomes null; weights: provenance of the converted file, None for random initialisation;
    iterations: that the model which was judged has been trained for; eval_only: it may have been trained with another
    config; seconds: wall time of the command that ended the run; processes, accumulate: GPUs (or CPU processes), and passes
    that each split its images of an iteration into.
    """
    def percent(task, key):
        value = ap.get(task, {}).get(key)
        return float(value) if value is not None and math.isfinite(value) else None

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    results = {
        "engine": engine,
        "ap": {task: {key: percent(task, key) for key in AP_KEYS} for task in ("bbox", "segm")},
        "iterations": iterations,
        "eval_only": eval_only,
        "seed": cfg.SEED,
        "weights": weights,
        "config": cfg.dump(),
        "processes": processes,
        "accumulate": accumulate,
        "versions": {"python": platform.python_version(),
                     **{package: version(package) for package in ("torch", "torchvision", "detectron2")}},
        "seconds": float(seconds),
    }
    _write_json(Path(cfg.OUTPUT_DIR, "results.json"), results)
    return results


def _write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def load_results(folder):
    """Run folder -> what :func:`write_results` wrote there. Raises InputError."""
    path = Path(folder, "results.json")
    try:
        results = json.loads(path.read_text())
        missing = {"engine", "ap", "iterations", "eval_only", "seed", "weights", "config", "seconds"} - set(results)
        if missing or not {"bbox", "segm"} <= set(results["ap"]):
            raise ValueError(f"lacks {', '.join(sorted(missing)) or 'bbox or segm APs'}")
        protocol_of(yaml.safe_load(results["config"]))
        return results
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise InputError(f"{path} does not hold a run's results ({reason}): tools/train_net.py writes it "
                         "when a run ends") from None


TRAINING = "training.json"  # in OUTPUT_DIR, from the first iteration on: the weights' provenance, and the config
# Settings that may change when a run goes on, or when what it has trained is evaluated again.
EVALUATION = re.compile(r"OUTPUT_DIR|MODEL\.WEIGHTS|VIS_PERIOD|MODEL\.DEVICE|SOLVER\.CHECKPOINT_PERIOD|DATALOADER\..*|"
                        r"DATASETS\.TEST|TEST\.(?!PRECISE_BN).*|.*_TEST")
# And those in which runs of one row may differ.
OF_ONE_ROW = re.compile(r"OUTPUT_DIR|VIS_PERIOD|MODEL\.DEVICE|SOLVER\.CHECKPOINT_PERIOD|DATALOADER\.NUM_WORKERS|SEED|"
                        r"MODEL\.WEIGHTS")


def begin_training(cfg, weights):
    """Leave the provenance of a run's ``weights`` (None: random) and its config beside the checkpoints to come; those of
    a run before it are no longer what it could go on from. Its results stay until this run has its own."""
    Path(cfg.OUTPUT_DIR, "last_checkpoint").unlink(missing_ok=True)
    _write_json(Path(cfg.OUTPUT_DIR, TRAINING), {"weights": weights, "config": cfg.dump()})


def read_training(folder):
    """What :func:`begin_training` left in ``folder``, or None. Raises InputError."""
    path = Path(folder, TRAINING)
    if not path.is_file():
        return None
    try:
        training = json.loads(path.read_text())
        settings(training["config"], EVALUATION)
        return {"weights": training["weights"], "config": training["config"]}
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        raise InputError(f"{path} is not what tools/train_net.py writes when a run begins: restore it, or give another "
                         "OUTPUT_DIR") from None


def difference(cfg):
    """Words for the first setting on which ``cfg`` and the training in ``cfg.OUTPUT_DIR`` disagree, None where there is
    none. The training set is known by its files' names, for it may lie elsewhere on another machine."""
    def plain(key, value):
        return [name.split("::")[0].split("/")[-1] for name in value] if key == "DATASETS.TRAIN" else value

    training = read_training(cfg.OUTPUT_DIR)
    before = settings(training["config"], EVALUATION) if training else {}
    return next((f"{key} {before[key]} and not {value}" for key, value in settings(cfg.dump(), EVALUATION).items()
                 if key in before and plain(key, before[key]) != plain(key, value)), None)


def check_unchanged(cfg):
    """Raises InputError where the training in ``cfg.OUTPUT_DIR`` began with other settings: what goes on from its
    checkpoints keeps some of them, such as the learning rate, and would be given others that it never had."""
    if found := difference(cfg):
        raise InputError(f"the run in {cfg.OUTPUT_DIR} began with {found}: give another OUTPUT_DIR, or leave the key as "
                         "it was")


def trained_with(cfg):
    """Whether the training in ``cfg.OUTPUT_DIR`` is known to have had the settings of ``cfg``."""
    return read_training(cfg.OUTPUT_DIR) is not None and difference(cfg) is None


def settings(config, without):
    """A dumped config -> {"SOLVER.BASE_LR": 0.02, ...} but for keys that match ``without``."""
    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else ((prefix + key, value),)

    return {key: value for key, value in leaves(yaml.safe_load(config)) if not without.fullmatch(key)}


def row_labels(results):
    """{folder: results} -> {folder: label}: folder name and weights; the same for runs that differ in the seed alone,
    with the whole path instead of the name where runs of one name differ in more, or have a seed in common."""
    names = {folder: f"{Path(folder).resolve().name} ({weights_label(result)})" for folder, result in results.items()}
    kinds, seeds = {}, {}
    for folder, name in names.items():
        result = results[folder]
        kind = [result["engine"], result["iterations"], result["eval_only"], settings(result["config"], OF_ONE_ROW),
                *((result["weights"] or {}).get(key) for key in ("format", "branch"))]
        if kind not in kinds.setdefault(name, []):
            kinds[name].append(kind)
        if result["seed"] >= 0:  # -1 is another one each time
            seeds.setdefault(name, []).append(result["seed"])
    apart = {name for name, found in kinds.items() if len(found) > 1}
    apart |= {name for name, found in seeds.items() if len(set(found)) < len(found)}
    return {folder: f"{folder} ({weights_label(results[folder])})" if name in apart else name
            for folder, name in names.items()}


def weights_label(results):
    """What a run started from, in words: "rsa, step 500", or "random"."""
    weights = results["weights"]
    if weights is None:
        return "random"
    method, step = weights.get("method", "unknown"), weights.get("step", -1)
    return f"{method}, step {step}" if step >= 0 else method  # the converter writes -1 where a file names no step


def table_row(results):
    """A run's results -> (schedule, row) of :data:`PUBLISHED`, or None where it is no full run of one of its rows.

    Other methods' rows are known by the name of the run's folder, for their files do not name them.
    """
    config, weights = yaml.safe_load(results["config"]), results["weights"]
    solver, sets = config["SOLVER"], [tuple(config["DATASETS"][part]) for part in ("TRAIN", "TEST")]
    schedule = SCHEDULES.get(results["iterations"])
    if (schedule is None or results["eval_only"] or results["engine"] != "detectron2"
            or sets != [("coco_2017_train",), ("coco_2017_val",)] or solver["MAX_ITER"] != results["iterations"]
            or solver["IMS_PER_BATCH"] != 16 or config["MODEL"]["BACKBONE"]["FREEZE_AT"] != 0
            or protocol_of(config) != "infomin"):
        return None
    if weights is None:
        row = "random"
    elif weights.get("method") == "supervised":
        row = "msra" if weights.get("stride_in_1x1") else "supervised"
    elif weights.get("method") == "the authors' RSA" or weights.get("method") == "rsa" and weights["step"] == RSA_STEPS:
        row = "rsa"
    else:
        row = re.sub("[^a-z0-9]", "", Path(config["OUTPUT_DIR"]).name.lower())
        row = None if row in ("random", "msra", "rsa") else row
    if solver["BASE_LR"] != (0.03 if (schedule, row) == ("2x", "rsa") else 0.02):
        return None
    return (schedule, row) if row in PUBLISHED[schedule] else None


def check_one_protocol(runs):
    """{name: results} -> the protocol of all of them. Raises InputError where they differ: one table holds one."""
    names = {}
    for name, results in runs.items():
        names.setdefault(protocol_of(yaml.safe_load(results["config"])), name)
    if len(names) > 1:
        raise InputError("runs of different protocols are not comparable: "
                         + ", ".join(f"{name} is {protocol}" for protocol, name in names.items())
                         + "; make a report of each")
    return next(iter(names))


def ap_table(runs, published=False):
    """{name: results, or a list of them (seeds)} -> rows {"run", "seeds", and for each of COLUMNS (mean, std) or None}.

    AP in percent; std is the sample standard deviation over seeds, None for a single run. A number that any
    seed lacks is None. ``published`` adds, under each run that is a row of :data:`PUBLISHED`, those numbers and the
    differences from them, as rows that also have "kind": "published" or "difference".
    """
    rows = []
    for name, seeds in runs.items():
        seeds = seeds if isinstance(seeds, list) else [seeds]
        row = {"run": name, "seeds": len(seeds)}
        for column, (task, key) in COLUMNS.items():
            values = [seed["ap"][task].get(key) for seed in seeds]
            row[column] = None if None in values else (
                statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
        rows.append(row)
        known = table_row(seeds[0]) if published else None
        if known:
            schedule, key = known
            values = dict(zip(("box AP", "mask AP"), PUBLISHED[schedule][key]))
            source = "paper" if key == "rsa" else "InfoMin's authors"
            rows.append({"run": f"published {schedule} ({source})", "seeds": 1, "kind": "published",
                         **{column: (values[column], None) if column in values else None for column in COLUMNS}})
            rows.append({"run": "difference", "seeds": len(seeds), "kind": "difference", **{
                column: (row[column][0] - values[column], None) if column in values and row[column] else None
                for column in COLUMNS}})
    return rows


def table_cells(rows):
    """Rows of :func:`ap_table` -> header and cells, all strings: the six columns of the paper's Tables 5 and 6.

    A difference of more than :data:`SEED_NOISE` carries a ``*``.
    """
    def cell(value, kind):
        if value is None:
            return "–"
        mean, std = value
        if kind == "difference":
            return f"{mean:+.1f}" + " *" * (round(abs(mean), 6) > SEED_NOISE)
        return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"

    return [["", *PAPER_COLUMNS]] + [
        [row["run"], *(cell(row[column], row.get("kind")) for column in PAPER_COLUMNS)] for row in rows]


def to_markdown(cells):
    """Header and rows of strings -> a Markdown table, columns padded so that it also reads as plain text."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write_csv(rows, path):
    """Rows of :func:`ap_table` -> CSV: run, seeds, then mean and std of all twelve APs; empty where unknown."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seeds", *(name for column in COLUMNS for name in (column, f"{column} std"))])
        for row in rows:
            writer.writerow([row["run"], row["seeds"], *(x for column in COLUMNS for x in row[column] or (None, None))])


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } th, td { padding: .3em .9em; text-align: right } td:first-child { text-align: left }
thead { border-block: 1px solid } tbody { border-bottom: 1px solid } img { max-width: 100% }"""


def write_report(folder, title, sections):
    """Write ``report.md`` and ``report.html`` (one file that can be mailed: pictures are embedded) into ``folder``.

    sections: (heading, body) pairs; a body is text, a table as header and rows of strings, or the Path of a PNG.
    """
    folder = Path(folder)
    md, page = [f"# {title}\n"], [f"<h1>{html.escape(title)}</h1>"]
    for heading, body in sections:
        if isinstance(body, Path):
            md_body = f"![{heading}]({os.path.relpath(body, folder).replace(os.sep, '/')})\n"
            data = base64.b64encode(body.read_bytes()).decode()
            html_body = f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
        elif isinstance(body, str):
            md_body, html_body = f"{body}\n", f"<p>{html.escape(body)}</p>"
        else:
            md_body = to_markdown(body)
            head, *rows = [[html.escape(cell) for cell in row] for row in body]
            html_body = f"<table><thead><tr><th>{'<th>'.join(head)}</tr></thead><tbody>" + "".join(
                f"<tr><td>{'<td>'.join(row)}</tr>" for row in rows) + "</tbody></table>"
        md += [f"## {heading}\n", md_body]
        page += [f"<h2>{html.escape(heading)}</h2>", html_body]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(md), encoding="utf-8")
    (folder / "report.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>\n" + "\n".join(page) + "\n</html>\n", encoding="utf-8")
