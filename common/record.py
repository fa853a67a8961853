"""The record of a run, which says what the run is. Its folder (``run.json``) and its checkpoints hold it.

It is written when the run starts. Reports identify a run by this record alone: not by the name of a folder,
and not by a number of steps.
"""

import json
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rsa_detectron2.common.files import write_atomically

FILE = "run.json"
PACKAGES = ("rsa-detectron2", "torch", "torchvision", "timm", "detectron2")


KEYS = {  # kind of record: the keys of it that reports need
    "pretrain": ("recipe", "settings", "changed", "method", "seed", "data", "step", "steps", "bn_batch_size"),
    "finetune": ("recipe", "settings", "changed", "seed", "weights", "engine", "steps", "bn_batch_size"),
}


@dataclass(frozen=True)
class Origin:
    """Where a configuration came from."""

    recipe: str = ""  # a file below configs/, else the path that was given
    overrides: tuple = ()  # KEY, VALUE, ... on top of it
    defaults: dict = field(default_factory=dict)  # {KEY: value} of the engine, without recipe and overrides


def describe(kind: str, cfg: dict, origin: Origin, **facts: object) -> dict[str, Any]:
    """The record of a run, made of values that JSON can hold.

    kind: "pretrain" or "finetune"; cfg: the resolved configuration, which came from ``origin``; facts:
    what ``cfg`` does not say (data set, method, steps, weights, processes, ...). In the record, ``changed``
    has the default of each setting that differs from it.
    """
    settings, before = flatten(cfg), origin.defaults
    changed = {key: before.get(key) for key, value in settings.items() if before.get(key) != value}
    return {
        "kind": kind,
        "recipe": origin.recipe,
        "overrides": list(map(str, origin.overrides)),
        "settings": settings,
        "changed": changed,
        "versions": versions(),
        **facts,
    }


def is_sound(about: object) -> bool:
    """Whether a value that was read from a file is a record with all keys that reports need."""
    return (
        isinstance(about, dict)
        and all(key in about for key in KEYS.get(about.get("kind"), ("kind of its own",)))
        and isinstance(about["settings"], dict)
        and isinstance(about["changed"], dict)
    )


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"SOLVER.EPOCHS": 200, ...}. Tuples become lists."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = plain(value)
    return flat


def plain(value: object) -> object:
    return [plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def versions() -> dict[str, str | None]:
    """{package: version}; the version is None for a package that is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def write(folder: str | Path, content: dict, name: str = FILE) -> None:
    """Write a dict as JSON to a file of ``folder``, whole or not at all. Raises OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(Path(folder, name), lambda file: file.write(text.encode()))
