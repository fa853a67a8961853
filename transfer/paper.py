"""The paper's tables, as ``configs/paper.yaml`` has them, and whether a run is one of their trainings.

A run is known by its record (``common/record.py``): by its settings, data set and weights, never by the name of its
folder.
"""

import ast
import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@functools.cache
def load():
    """The content of ``configs/paper.yaml``."""
    return yaml.safe_load((CONFIGS / "paper.yaml").read_text(encoding="utf-8"))


@functools.cache
def recipe_settings(recipe):
    """{"SOLVER.EPOCHS": 200, ...}: what a file under ``configs/`` and the files that it inherits set."""
    return flatten(CfgNode.load_yaml_with_base(str(CONFIGS / recipe)))


def flatten(tree, prefix=""):
    """Nested dicts of YAML -> {"A.B": value}, with Python's literals in strings read as yacs reads them."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: literal(value)}
    return flat


def literal(value):
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


@dataclass(frozen=True)
class Training:
    """A pre-training or fine-tuning that a table asks for."""

    kind: str  # "pretrain" or "finetune"
    recipe: str  # a file under configs/
    overrides: tuple  # pairs of a key and a value which the recipe does not have already
    seeds: int
    bn: int  # images that BatchNorm normalizes together
    dataset: str = ""  # a key of paper.yaml's data sets; pre-training
    weights: object = None  # fine-tuning starts from: "none", "config", a method's name, or a Training

    @property
    def settings(self):
        return recipe_settings(self.recipe) | dict(self.overrides)

    @property
    def name(self):
        """The same for two rows exactly if one run serves both."""
        words = [Path(self.recipe).stem]
        if self.kind == "pretrain":
            words.append(f"{self.settings['SOLVER.EPOCHS']}ep")
        elif isinstance(self.weights, str) and self.weights not in ("none", "config"):
            words.append(self.weights.lower().replace(" ", "_"))
        words += [f"{key.split('.')[-1].lower()}_{value}" for key, value in self.overrides if key != "SOLVER.EPOCHS"]
        return "_".join(words)

    @property
    def hours(self):
        """V100-hours of one seed, over all GPUs, without the linear evaluation."""
        if self.kind == "finetune":
            cost = next(table["cost"] for table in load()["tables"].values()
                        if table["shows"] == "ap" and self.recipe in [row["recipe"] for row in table["rows"].values()])
            return cost["iterations"] * cost["seconds"] * cost["gpus"] / 3600
        datasets, times = load()["datasets"], load()["tables"]["table7"]
        known = datasets[self.dataset]["cost_of"]
        row = "rsa" if self.settings.get("METHOD", "rsa") in load()["four_views"] else "byol"
        column = times["columns"][known]
        hours = times["rows"][row]["published"][list(times["columns"]).index(known)]
        images = datasets[self.dataset]["images"][0] / datasets[known]["images"][0]
        return hours * column["gpus"] * images * self.settings["SOLVER.EPOCHS"] / column["epochs"]


@dataclass(frozen=True)
class Cell:
    """A row of a table in one of its columns; of Tables 5 and 6, which judge one run by six figures, the whole row."""

    table: str
    row: str
    column: str
    title: str
    published: tuple  # (mean, standard deviation or None) of each figure, or None where the paper has none
    training: Training | None  # None: a quotation

    @property
    def quoted(self):
        return self.training is None


def cells(table):
    """The cells of a table, row by row."""
    content = load()["tables"][table]
    columns, found = content["columns"], []
    for key, row in content["rows"].items():
        if content["shows"] == "ap":
            training = fine_tuning(row, content["bn"])
            published = tuple(map(number, row.get("published", [None] * len(columns))))
            found.append(Cell(table, key, "", row["title"], published, training))
            continue
        for index, (name, column) in enumerate(columns.items()):
            training = pre_training(row, column) if "method" in row else None
            published = (number(row["published"][index] if "published" in row else None),)
            title = f"{row['title']}, {describe(content, row, column)}"
            found.append(Cell(table, key, name, title, published, training))
    return found


def describe(table, row, column):
    """What stands beside a method's name: its facts where a table has some, else data set and length."""
    if "facts" in table:
        return ", ".join(f"{name} {fact}" for name, fact in zip(table["facts"], row["facts"]))
    return f"{load()['datasets'][column['dataset']]['title']}, {column['epochs']} epochs"


def pre_training(row, column):
    dataset = load()["datasets"][column["dataset"]]
    recipe = dataset["recipe"].format(method=row["method"])
    given = {"SOLVER.EPOCHS": column["epochs"]} if "epochs" in column else {}
    given |= row.get("overrides", {})
    own = recipe_settings(recipe)
    overrides = tuple((key, value) for key, value in given.items() if own.get(key) != value)
    bn = row.get("bn", dataset["bn"])
    return Training("pretrain", recipe, overrides, column["seeds"], bn, column["dataset"])


def fine_tuning(row, bn):
    weights = row["weights"]
    if isinstance(weights, dict):
        [(table, key)] = weights.items()
        weights = next(cell.training for cell in cells(table) if cell.row == key)
    return Training("finetune", row["recipe"], (), 1, bn, weights=weights)


def number(text):
    """Text "MEAN ± DEVIATION" or a number -> (mean, standard deviation or None); None -> None."""
    if text is None:
        return None
    mean, _, deviation = str(text).partition(" ± ")
    return float(mean), float(deviation) if deviation else None


# ---- is a run a training of the paper? ----

def differences(training, record):
    """Words for everything in which a run, by its ``record``, is not ``training``; [] if it is exactly that."""
    found = [] if record["kind"] == training.kind else [f"a {record['kind']} run"]
    found += setting_differences(training, record)
    if training.kind == "pretrain":
        dataset = load()["datasets"][training.dataset]
        found += numbers_differ(record["data"], {"images": dataset["images"][0], "classes": dataset["classes"]})
    else:
        found += [f"engine {record['engine']} instead of detectron2"] * (record["engine"] != "detectron2")
        found += weights_differ(training, record["weights"])
        found += ["a model that was only evaluated"] * bool(record.get("eval_only"))
    if record["step"] != record["steps"]:
        found.append(f"stopped at step {record['step']} of {record['steps']}")
    return found + numbers_differ(record, {"bn_batch_size": training.bn})


def setting_differences(training, record):
    free, expected = load()["free"][training.kind], training.settings
    found = []
    for key in (*expected, *(key for key in record["changed"] if key not in expected)):
        if key not in record["settings"] or any(fnmatchcase(key, pattern) for pattern in free):
            continue
        value, wanted = record["settings"][key], expected.get(key, record["changed"].get(key))
        if plain(key, value) != plain(key, wanted):
            found.append(phrase(key, value, wanted))
    return found


def plain(key, value):
    """A setting as two machines can compare it: data sets by their files' names, SyncBN as BatchNorm."""
    if key.startswith("DATASETS.") and isinstance(value, (tuple, list)):
        return [str(name).split("::")[0].split("/")[-1] for name in value]
    if key.endswith(".NORM"):
        return value.replace("SyncBN", "BN")  # over how many images is compared by itself
    return list(value) if isinstance(value, tuple) else value


def phrase(key, value, wanted):
    words = load()["words"].get(key, key + " {0} instead of {1}")
    return words[value] if isinstance(words, dict) else words.format(value, wanted)


COUNTS = {"images": "{0} images instead of {1}", "classes": "{0} classes instead of {1}",
          "bn_batch_size": "BatchNorm over {0} images instead of {1}"}


def numbers_differ(found, wanted):
    return [COUNTS[name].format(found[name], value) for name, value in wanted.items() if found[name] != value]
