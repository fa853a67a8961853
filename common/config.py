"""Config files: where they are looked up, and how one is merged with overrides."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.record import Origin, flatten

# Beside the packages, in a checkout and in an installed wheel.
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def find_config(path: str) -> str:
    """The file that ``--config-file`` names, in the working directory or else under ``configs/``.

    Raises InputError.
    """
    for candidate in (Path(path), CONFIGS / path):
        if candidate.is_file():
            return str(candidate)
    raise InputError(f"no config file {path}: looked in {Path.cwd()} and in {CONFIGS}")


def origin(path: str | Path, overrides: Sequence, defaults: CfgNode) -> Origin:
    """Where a configuration comes from, for the record of its run.

    A file of ``configs/`` is named by its path below that. ``defaults`` is the engine's own configuration.
    """
    path, configs = Path(path).resolve(), CONFIGS
    path = path.relative_to(configs) if path.is_relative_to(configs) else path
    return Origin(str(path), tuple(overrides), flatten(defaults))


def merge_config(cfg: CfgNode, path: str | None, overrides: Sequence) -> CfgNode:
    """Merge a YAML file (or None) and ``[KEY, VALUE, ...]`` into ``cfg``. Raises InputError."""
    try:
        if path:
            refuse_repeated_keys(path)
            cfg.merge_from_file(path, allow_unsafe=False)
        if len(overrides) % 2:
            raise InputError(f"overrides are KEY VALUE pairs, but {overrides[-1]!r} has no value")
        for key, value in zip(overrides[::2], overrides[1::2]):
            cfg.merge_from_list([key, whole_as_float(cfg, key, value)])
    except InputError:
        raise
    except Exception as problem:  # yacs raises KeyError, ValueError and AssertionError; PyYAML its own
        reason = " ".join(str(problem.args[0] if isinstance(problem, KeyError) else problem).split())
        raise InputError(
            f"config {path or ''} {' '.join(map(str, overrides))}: {reason}".replace("  ", " ")
        ) from None
    return cfg


def whole_as_float(cfg: CfgNode, key: str, value: object) -> object:
    """``value``, as a float where the key holds floats: yacs refuses 0 for 0.0."""
    node = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return float(value) if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", str(value)) else value


def refuse_repeated_keys(path: str | Path) -> None:
    """Raise InputError for a key that the file, or one that it inherits from, gives twice.

    PyYAML would silently keep the last.
    """

    def check(node: yaml.Node | None, prefix: str = "") -> None:
        lines = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in lines:
                raise InputError(
                    f"{path}, line {key.start_mark.line + 1}: {prefix}{key.value} is given a second time "
                    f"(first in line {lines[key.value]}): remove one"
                )
            lines[key.value] = key.start_mark.line + 1
            check(value, f"{prefix}{key.value}.")

    check(yaml.compose(Path(path).read_text()))
    for base in bases(path):
        refuse_repeated_keys(base)


def bases(path: str | Path) -> list[Path]:
    """The files that a config file names as ``_BASE_``."""
    names = (yaml.safe_load(Path(path).read_text()) or {}).get("_BASE_", [])
    return [
        Path(path).parent / Path(name).expanduser()
        for name in (names if isinstance(names, list) else [names])
    ]


def with_bases(path: str | Path) -> Iterator[tuple[Path, dict]]:
    """A config file and all that it inherits from: the resolved path of each, and what it sets itself."""
    yield Path(path).resolve(), yaml.safe_load(Path(path).read_text()) or {}
    for base in bases(path):
        yield from with_bases(base)
