"""The paper's tables, from ``configs/paper.yaml``, and whether a run is one of their trainings.

A run is recognized by the settings, data set and weights in its record (``common/record.py``), never by the
name of its folder.
"""

import ast
import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from rsa_detectron2.common.config import CONFIGS
from rsa_detectron2.common.record import flatten, is_sound, plain


@functools.cache
def load() -> dict:
    """The content of ``configs/paper.yaml``."""
    return yaml.safe_load((CONFIGS / "paper.yaml").read_text(encoding="utf-8"))


def shows(table: str) -> str:
    """What a table shows: "top1", "ap", "hours" or "pictures"."""
    return load()["tables"][table]["shows"]


def title(table: str) -> str:
    """The title of a table: "Table 1: Multi-stage augmentation ..."."""
    return f"{table[:-1].capitalize()} {table[-1]}: {load()['tables'][table]['title']}"


@functools.cache
def recipe_settings(recipe: str) -> dict:
    """The settings of a file under ``configs/``, with those that it inherits: {"SOLVER.EPOCHS": 200, ...}."""
    tree = CfgNode.load_yaml_with_base(str(CONFIGS / recipe))
    return {key: literal(value) for key, value in flatten(tree).items()}


def literal(value: object) -> object:
    """A value of YAML as yacs reads it, which evaluates strings that hold Python literals."""
    try:
        return plain(ast.literal_eval(value)) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


@dataclass(frozen=True)
class Training:
    """A pre-training or fine-tuning that a table asks for."""

    kind: str  # "pretrain" or "finetune"
    recipe: str  # a file under configs/
    overrides: tuple  # (key, value) pairs that differ from the recipe
    seeds: int  # number of trials
    bn: int  # images that BatchNorm sees at once
    dataset: str = ""  # of pre-training: a key of paper.yaml's data sets
    weights: object = None  # of fine-tuning: "none", "config", a method's name, or a pre-training (Training)

    @property
    def settings(self) -> dict:
        return recipe_settings(self.recipe) | dict(self.overrides)

    @property
    def name(self) -> str:
        """A name that two rows have in common exactly if one run serves both."""
        words = [Path(self.recipe).stem]
        if self.kind == "pretrain":
            words.append(f"{self.settings['SOLVER.EPOCHS']}ep")
        elif isinstance(self.weights, str) and self.weights not in ("none", "config"):
            words.append(self.weights.lower().replace(" ", "_"))
        words += [
            f"{key.split('.')[-1].lower()}_{value}" for key, value in self.overrides if key != "SOLVER.EPOCHS"
        ]
        return "_".join(words)

    @property
    def hours(self) -> float:
        """V100-hours of one seed, over all GPUs, without the linear evaluation."""
        if self.kind == "finetune":
            cost = next(
                table["cost"]
                for table in load()["tables"].values()
                if table["shows"] == "ap" and self.recipe in [row["recipe"] for row in table["rows"].values()]
            )
            return cost["iterations"] * cost["seconds"] * cost["gpus"] / 3600
        datasets, times = load()["datasets"], load()["tables"]["table7"]
        known = datasets[self.dataset]["cost_of"]
        row = "rsa" if self.settings.get("METHOD", "rsa") in load()["four_views"] else "byol"
        column = times["columns"][known]
        hours = times["rows"][row]["published"][list(times["columns"]).index(known)]
        images = datasets[self.dataset]["images"][0] / datasets[known]["images"][0]
        return hours * datasets[known]["gpus"] * images * self.settings["SOLVER.EPOCHS"] / column["epochs"]


@dataclass(frozen=True)
class Cell:
    """A row of a table in one of its columns. In Tables 5 and 6, where a run gives six figures, the whole
    row."""

    table: str
    row: str
    column: str
    title: str
    published: tuple  # of each figure (mean, standard deviation or None), or None where the paper has none
    training: Training | None  # None: a quotation
    extra: bool = False  # not a row of the paper


def cells(table: str, betas: list[float] | None = None) -> list[Cell]:
    """The cells of a table, row by row. ``betas``: replaces the grid of Figure 3."""
    content = load()["tables"][table]
    columns, rows, found = content["columns"], content["rows"], []
    if betas:
        rows = {"byol": rows["byol"]} | {
            f"beta_{beta}": rows.get(
                f"beta_{beta}",
                {"title": f"β_base {beta}", "method": "rsa", "overrides": {"MODEL.BETA": beta}},
            )
            for beta in betas
        }
    for key, row in rows.items():
        if content["shows"] == "ap":
            training = fine_tuning(row, content["bn"])
            published = tuple(map(number, row.get("published", (None for _ in columns))))
            found.append(Cell(table, key, "", row["title"], published, training, row.get("extra", False)))
            continue
        for index, (name, column) in enumerate(columns.items()):
            training = pre_training(row, column) if "method" in row else None
            published = (number(row["published"][index] if "published" in row else None),)
            title = f"{row['title']}, {describe(content, row, column)}"
            found.append(Cell(table, key, name, title, published, training))
    return found


def own_cell(table: str, name: str) -> Cell:
    """A row of Table 5 or 6 for weights that the paper does not have."""
    content = load()["tables"][table]
    row = {"recipe": content["own"], "weights": name}
    published = tuple(None for _ in content["columns"])
    return Cell(table, name, "", name, published, fine_tuning(row, content["bn"]), extra=True)


def describe(table: dict, row: dict, column: dict) -> str:
    """The text beside a method's name: its facts where the table has any, else data set and epochs."""
    if "facts" in table:
        return ", ".join(f"{name} {fact}" for name, fact in zip(table["facts"], row["facts"]))
    return f"{load()['datasets'][column['dataset']]['title']}, {column['epochs']} epochs"


def pre_training(row: dict, column: dict) -> Training:
    dataset = load()["datasets"][column["dataset"]]
    recipe = dataset["recipe"].format(method=row["method"])
    given = {"SOLVER.EPOCHS": column["epochs"]} if "epochs" in column else {}
    given |= row.get("overrides", {})
    own = recipe_settings(recipe)
    overrides = tuple((key, value) for key, value in given.items() if own.get(key) != value)
    bn = row.get("bn", dataset["bn"])
    return Training("pretrain", recipe, overrides, column["seeds"], bn, column["dataset"])


def fine_tuning(row: dict, bn: int) -> Training:
    weights = row["weights"]
    if isinstance(weights, dict):
        [(table, key)] = weights.items()
        weights = next(cell.training for cell in cells(table) if cell.row == key)
    return Training("finetune", row["recipe"], (), 1, bn, weights=weights)


def number(text: str | float | None) -> tuple[float, float | None] | None:
    """Text "MEAN ± DEVIATION" or a number -> (mean, standard deviation or None); None -> None."""
    if text is None:
        return None
    mean, _, deviation = str(text).partition(" ± ")
    return float(mean), float(deviation) if deviation else None


# ---- is a run a training of the paper? ----

COUNTS = {
    "images": "{0} images instead of {1}",
    "classes": "{0} classes instead of {1}",
    "bn_batch_size": "BatchNorm over {0} images instead of {1}",
    "val_images": "{0} validation images instead of {1}",
    "protocol": "the {0} linear protocol instead of the {1} one",
    "epochs": "linear evaluation of {0} epochs instead of {1}",
}
AUTHORS = "the authors' RSA or BYOL"  # the layout of their checkpoints, which say no more


def differences(training: Training, record: dict) -> list[str]:
    """Each difference of a run, by its ``record``, from ``training``, as a text; [] if it is exactly that."""
    found = setting_differences(training, record) + numbers_differ(record, {"bn_batch_size": training.bn})
    if training.kind == "pretrain":
        dataset = load()["datasets"][training.dataset]
        found += numbers_differ(
            record["data"], {"images": dataset["images"][0], "classes": dataset["classes"]}
        )
    else:
        if record["engine"] != "detectron2":
            found.append(f"engine {record['engine']} instead of detectron2")
        if record.get("eval_only"):
            found.append("only evaluated with these settings")
        found += weights_differ(training, record["weights"])
    done = record["iterations" if training.kind == "finetune" else "step"]
    if done != record["steps"]:
        found.append(f"step {done} of {record['steps']}")
    return found


def setting_differences(training: Training, record: dict) -> list[str]:
    # What the recipe leaves open must have its default. ``changed`` holds it where the run has another value.
    expected, found = record["changed"] | training.settings, []
    for key, value in fixed(record).items():
        wanted = comparable(key, expected.get(key, value))
        if value != wanted:
            words = load()["words"].get(key, key + " {0} instead of {1}")
            found.append(words[value] if isinstance(words, dict) else words.format(value, wanted))
    return found


def fixed(record: dict) -> dict:
    """The settings of a run without those that are free, in which runs of one row may differ."""
    free = load()["free"][record["kind"]]
    return {
        key: comparable(key, value)
        for key, value in record["settings"].items()
        if not any(fnmatchcase(key, pattern) for pattern in free)
    }


def comparable(key: str, value: object) -> object:
    """A setting without what may differ between machines: of data sets only the names of their files, and no
    difference between SyncBN and BatchNorm, because ``bn_batch_size`` is compared separately."""
    if key.startswith("DATASETS.") and isinstance(value, list):
        return [str(name).split("::")[0].split("/")[-1] for name in value]
    return value.replace("SyncBN", "BN") if key.endswith(".NORM") and isinstance(value, str) else value


def numbers_differ(found: dict, wanted: dict) -> list[str]:
    return [COUNTS[name].format(found[name], value) for name, value in wanted.items() if found[name] != value]


def weights_fit(training: Training, provenance: dict | None) -> bool:
    """Whether weights, by their ``provenance`` (None: random), are of the kind that ``training`` starts
    from."""
    wanted = training.weights
    if wanted == "none" or provenance is None:
        return wanted == "none" and provenance is None
    if wanted == "config":
        return provenance.get("source") == training.settings["MODEL.WEIGHTS"]
    return word(provenance.get("method")) == ("rsa" if isinstance(wanted, Training) else word(wanted))


def word(name: object) -> str:
    """A name without case and signs: "MoCo v2" -> "mocov2"."""
    return re.sub("[^a-z0-9]", "", str(name).lower())


def weights_differ(training: Training, provenance: dict | None) -> list[str]:
    if not weights_fit(training, provenance):
        return ["other weights"]
    if not isinstance(training.weights, Training):
        return []
    found = []
    if provenance.get("branch", "online") != "online":
        found.append("the target network's weights")
    if provenance.get("run"):
        about = json.loads(provenance["run"])
        if not is_sound(about):
            return [*found, "weights whose record cannot be read"]
        return found + [f"pre-training: {words}" for words in differences(training.weights, about)]
    if provenance.get("format") != AUTHORS:
        found.append("weights that do not say how they were pre-trained")
    return found


def evaluation_differences(training: Training, result: dict) -> list[str]:
    """Each difference of a linear evaluation from that of ``training``, as a text."""
    dataset = load()["datasets"][training.dataset]
    protocol = dataset["linear"]
    if "linear_top1_last" not in result:
        return ["no linear evaluation"]
    found = numbers_differ(result, {"protocol": protocol["protocol"], "epochs": protocol["epochs"]})
    found += numbers_differ({"val_images": result["val"]["images"]}, {"val_images": dataset["images"][1]})
    if result["branch"] != "online":
        found.append("the target network")
    if protocol["train_bn"] and "train_bn_top1_best" not in result:
        found.append("linear evaluation without --train-bn")
    return found


def hardware_differences(training: Training, record: dict) -> list[str]:
    """Each difference of the machine from the paper's, as a text, for a run whose time counts."""
    gpus = load()["datasets"][training.dataset]["gpus"]
    if "V100" in record["device"] and record["processes"] == gpus:
        return []
    return [f"{record['processes']} x {record['device']} instead of {gpus} x V100"]


def nearest(
    candidates: Iterable[Cell], words_of: Callable[[Training], list[str] | None]
) -> tuple[Cell | None, list[str]]:
    """(cell, differences) of the cell that a run differs least from; (None, []) where there is none.

    ``words_of(training)``: the differences of the run, or None where it is another training altogether. Of
    several cells, the one that changes its recipe least is taken.
    """
    found = [(cell, words_of(cell.training)) for cell in candidates if cell.training]
    found = [(cell, words) for cell, words in found if words is not None]
    return min(found, key=lambda pair: (len(pair[1]), len(pair[0].training.overrides)), default=(None, []))
