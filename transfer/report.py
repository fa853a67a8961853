"""Results of fine-tuning runs -> one table, beside what is published, and one page.

A run's results are what :func:`transfer.results.load_results` reads.
"""

import base64
import csv
import html
import os
import re
import statistics
from pathlib import Path

import yaml

from transfer.config import InputError, protocol_of, torchvision_defaults
from transfer.results import AP_KEYS, normalised, set_names, settings

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
# Settings in which runs of one row may differ, and which a published row does not fix.
OF_ONE_ROW = re.compile(r"OUTPUT_DIR|VIS_PERIOD|MODEL\.DEVICE|SOLVER\.CHECKPOINT_PERIOD|DATALOADER\.NUM_WORKERS|SEED|"
                        r"MODEL\.WEIGHTS")
FREE = re.compile(OF_ONE_ROW.pattern + r"|SOLVER\.AMP\.ENABLED|INPUT\.MASK_FORMAT")
# Defaults of what the embedded engine has no key for, and no recipe changes.
DETECTRON2_ALONE = {
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR", "SOLVER.WARMUP_METHOD": "linear", "SOLVER.NESTEROV": False,
    "SOLVER.CLIP_GRADIENTS.ENABLED": False, "SOLVER.BIAS_LR_FACTOR": 1.0, "INPUT.CROP.ENABLED": False,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice", "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
    "DATALOADER.ASPECT_RATIO_GROUPING": True, "TEST.AUG.ENABLED": False,
    "MODEL.RESNETS.RES5_DILATION": 1, "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False] * 4, "MODEL.FPN.FUSE_TYPE": "sum",
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1", "MODEL.RPN.SMOOTH_L1_BETA": 0.0, "MODEL.RPN.LOSS_WEIGHT": 1.0,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "smooth_l1", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False, "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": False, "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignV2",
}
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "transfer"
# Which formats of transfer/readers.py a row's weights may come in, for a file of another method does not name itself.
PYCONTRAST, AUTHORS = "InstDis, PIRL, InfoMin (PyContrast)", "the authors' RSA or BYOL"
ROW_FORMATS = {"instdis": (PYCONTRAST,), "pirl": (PYCONTRAST,), "infomin": (PYCONTRAST,),
               "mocov1": ("MoCo v1, v2", PYCONTRAST), "mocov2": ("MoCo v1, v2", PYCONTRAST), "rsa": ("rsa", AUTHORS)}


def row_labels(results):
    """{folder: results} -> {folder: label}: folder name, weights, and the engine where there are two.

    Runs that differ only in the seed share a label. Where runs of one name differ in more, or repeat a seed, theirs have
    the whole path instead of the name.
    """
    mixed = len({result["engine"] for result in results.values()}) > 1
    marks = {folder: f"({weights_label(result)}" + f", {result['engine']}" * mixed + ")"
             for folder, result in results.items()}
    names = {folder: f"{Path(folder).resolve().name} {mark}" for folder, mark in marks.items()}
    kinds, seeds = {}, {}
    for folder, name in names.items():
        result = results[folder]
        kind = [result["engine"], result["iterations"], result["eval_only"], normalised_images(result),
                {key: set_names(value) if key in ("DATASETS.TRAIN", "DATASETS.TEST") else value
                 for key, value in settings(result["config"]).items() if not OF_ONE_ROW.fullmatch(key)},
                *((result["weights"] or {}).get(key) for key in ("format", "branch"))]
        if kind not in kinds.setdefault(name, []):
            kinds[name].append(kind)
        if result["seed"] >= 0:  # -1 is another one each time
            seeds.setdefault(name, []).append(result["seed"])
    apart = {name for name, found in kinds.items() if len(found) > 1}
    apart |= {name for name, found in seeds.items() if len(set(found)) < len(found)}
    return {folder: f"{folder} {marks[folder]}" if name in apart else name for folder, name in names.items()}


def weights_label(results):
    """What a run started from, in words: "rsa, step 500", or "random"."""
    weights = results["weights"]
    if weights is None:
        return "random"
    method, step = weights.get("method", "unknown"), weights.get("step", -1)
    method = weights.get("format", method) if method == "unknown" else method  # then its layout is all that is known
    return f"{method}, step {step}" if step >= 0 else method  # the converter writes -1 where a file names no step


def normalised_images(results):
    """Images that BatchNorm saw at once in a run."""
    return normalised(yaml.safe_load(results["config"]), results.get("processes", 1), results.get("accumulate", 1))


def table_row(results):
    """A run's results -> (schedule, row) of :data:`PUBLISHED`, or None where it is no full run of one of its recipes.

    Other methods' rows, and the authors' own RSA, are known by the name of the run's folder and the format of their file,
    which names no method.
    """
    config, weights = yaml.safe_load(results["config"]), results["weights"]
    schedule = SCHEDULES.get(results["iterations"])
    if schedule is None or results["eval_only"] or results["engine"] != "detectron2":
        return None
    if weights is None:
        row = "random"
    elif weights.get("method") == "supervised":
        row = "msra" if weights.get("stride_in_1x1") else "supervised"
    elif weights.get("method") == "rsa":
        row = "rsa" if weights.get("step") == RSA_STEPS else None
    else:
        row = row_of_folder(Path(config["OUTPUT_DIR"]).name)
        row = row if {weights.get("method"), weights.get("format")} & set(ROW_FORMATS.get(row, ())) else None
    if row not in PUBLISHED[schedule] or (weights or {}).get("branch", "online") != "online":
        return None
    suffix = {"rsa": "", "random": "_random", "msra": "_msra"}.get(row, "_ssl")
    recipe = recipe_settings(CONFIGS / f"mask_rcnn_R50_FPN_{schedule}{suffix}.yaml")
    own = settings(results["config"])
    same = all(FREE.fullmatch(key) or own.get(key, value) == value for key, value in recipe.items())
    return (schedule, row) if same else None


def row_of_folder(name):
    """"moco_v2" -> "mocov2"."""
    return re.sub("[^a-z0-9]", "", name.lower())


def recipe_settings(*files):
    """The settings of a fine-tuning with these config files, one on top of the other, as far as a result depends on
    them."""
    cfg = torchvision_defaults()
    for file in files:
        cfg.merge_from_file(str(file))
    return DETECTRON2_ALONE | settings(cfg.dump())


def check_comparable(runs):
    """{name: results} -> their protocol and the name of their test set. Raises InputError where either differs: one table
    holds one."""
    def alike(words, kind_of):
        kinds = {}
        for name, results in runs.items():
            kinds.setdefault(kind_of(yaml.safe_load(results["config"])), name)
        if len(kinds) > 1:
            raise InputError(f"runs of different {words} are not comparable: "
                             + ", ".join(f"{name} is {kind}" for kind, name in kinds.items()) + "; make a report of each")
        return next(iter(kinds))

    return alike("protocols", protocol_of), alike(
        "test sets", lambda config: ", ".join(set_names(config["DATASETS"]["TEST"])))


def ap_table(runs, published=False):
    """{name: results of its seeds} -> rows {"run", "seeds", and for each of COLUMNS (mean, std) or None}.

    AP in percent; std is the sample standard deviation over seeds, None for a single run. A number that any
    seed lacks is None. ``published`` adds, under each run that is a row of :data:`PUBLISHED`, those numbers and the
    differences from them, as rows that also have "kind": "published" or "difference", and "of": the run.
    """
    rows = []
    for name, seeds in runs.items():
        row = {"run": name, "seeds": len(seeds)}
        for column, (task, key) in COLUMNS.items():
            row[column] = mean_std([seed["ap"][task].get(key) for seed in seeds])
        rows.append(row)
        known = table_row(seeds[0]) if published else None
        if known:
            schedule, key = known
            values = dict(zip(("box AP", "mask AP"), PUBLISHED[schedule][key]))
            source = "paper" if key == "rsa" else "InfoMin's authors"
            rows.append({"run": f"published {schedule} ({source})", "seeds": 1, "kind": "published", "of": name,
                         **{column: (values[column], None) if column in values else None for column in COLUMNS}})
            rows.append({"run": "difference", "seeds": len(seeds), "kind": "difference", "of": name, **{
                column: (row[column][0] - values[column], None) if column in values and row[column] else None
                for column in COLUMNS}})
    return rows


def table_cells(rows):
    """Rows of :func:`ap_table` -> header and cells, all strings: the six columns of the paper's Tables 5 and 6.

    A difference of more than :data:`SEED_NOISE` carries a ``*``.
    """
    return [["", *PAPER_COLUMNS]] + [
        [row["run"], *(cell(row[column], row.get("kind")) for column in PAPER_COLUMNS)] for row in rows]


def mean_std(values):
    """Mean and sample standard deviation (None of a single one) over seeds; None where a seed lacks the figure."""
    if None in values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def cell(value, kind=None):
    """(mean, std) of :func:`mean_std` -> "41.1 ± 0.2"; with ``kind`` "difference" -> "+0.4 *"."""
    if value is None:
        return "–"
    mean, std = value
    if kind == "difference":
        return f"{round(mean, 1) + 0:+.1f}" + " *" * beyond_noise(mean)  # + 0: no -0.0
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def beyond_noise(difference):
    return round(abs(difference), 6) > SEED_NOISE


def to_markdown(cells):
    """Header and rows of strings -> a Markdown table, columns padded so that it also reads as plain text."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write_csv(rows, path):
    """Rows of :func:`ap_table` -> CSV: run, the run that a published row or a difference belongs to, seeds, mean and std
    of all twelve APs, empty where unknown, and for a difference the APs by which it exceeds :data:`SEED_NOISE`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "of", "seeds", *(name for column in COLUMNS for name in (column, f"{column} std")),
                         "beyond seed noise"])
        for row in rows:
            marked = [column for column in COLUMNS
                      if row.get("kind") == "difference" and row[column] and beyond_noise(row[column][0])]
            writer.writerow([row["run"], row.get("of"), row["seeds"],
                             *(x for column in COLUMNS for x in row[column] or (None, None)), ", ".join(marked)])


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
