"""Config files: where they are looked up, and how one is merged with overrides."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.record import Origin, flatten

# Beside the packages, in a checkout and in an installed wheel.
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class NoSuchKey(InputError):
    """The configuration has no such key."""


def find_config(path: str) -> str:
    """``--config-file`` is looked up in the working directory first, then under ``configs/``."""
    for candidate in (Path(path), CONFIGS / path):
        if candidate.is_file():
            return str(candidate)
    recipes = {file.stem: str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml")}
    close = get_close_matches(Path(path).stem, recipes)
    advice = f"; did you mean {' or '.join(recipes[name] for name in close)}?" if close else ""
    raise InputError(f"no config file {path}: looked in {Path.cwd()} and in {CONFIGS}{advice}")


def origin(path: str | Path, overrides: Sequence, defaults: CfgNode) -> Origin:
    """Where a configuration comes from, for the record of its run.

    A file of ``configs/`` is named by its path below that. ``defaults`` is the engine's own configuration.
    """
    path, configs = Path(path).resolve(), CONFIGS
    path = path.relative_to(configs) if path.is_relative_to(configs) else path
    return Origin(str(path), tuple(overrides), flatten(defaults))


def merge_config(cfg: CfgNode, path: str | None, overrides: Sequence) -> CfgNode:
    """Merge a YAML file (or None) and ``[KEY, VALUE, ...]`` into ``cfg``. Raises InputError."""
    refuse_stray_words(cfg, overrides[::2])
    try:
        if path:
            refuse_repeated_keys(path)
            refuse_other_stage(cfg, path)
            cfg.merge_from_file(path, allow_unsafe=False)
        if len(overrides) % 2:
            raise InputError(f"overrides are KEY VALUE pairs, but {overrides[-1]!r} has no value")
        for key, value in zip(overrides[::2], overrides[1::2]):
            cfg.merge_from_list([key, whole_as_float(cfg, key, value)])
    except InputError:
        raise
    except Exception as problem:  # yacs raises KeyError, ValueError and AssertionError; PyYAML its own
        reason = " ".join(str(problem.args[0] if isinstance(problem, KeyError) else problem).split())
        where = f"config {path or ''} {' '.join(map(str, overrides))}: ".replace("  ", " ").replace(" :", ":")
        if key := re.match(r"Non-existent (?:config )?key: (\S+)", reason):
            raise NoSuchKey(where + no_such_key(cfg, key[1])) from None
        if wrong := re.match(r"Type mismatch .* with values \(.* vs\. (.*)\) for config key: (\S+)", reason):
            reason = f"{wrong[2]} takes {kind_of(value_at(cfg, wrong[2]))}, not {wrong[1]!r}"
        raise InputError(where + reason) from None
    return cfg


# What a key takes, by the type of its value.
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: 'a list such as "(1, 2)"',
    list: 'a list such as "[1, 2]"',
}


def kind_of(value: object) -> str:
    return KINDS.get(type(value), type(value).__name__)


def no_such_key(cfg: CfgNode, key: str) -> str:
    """A line that names the nearest key of ``cfg``, if one is near."""
    known = [*flatten(cfg)]
    same = [name for name in known if "." not in key and name.endswith(f".{key.upper()}")]
    near = same or get_close_matches(key.upper(), known, 1, 0.75)
    return f"there is no key {key}" + (f": did you mean {' or '.join(near)}?" if near else "")


def refuse_stray_words(cfg: CfgNode, words: Sequence) -> None:
    """Raise InputError for a word in a key's place that is KEY=VALUE or a path."""
    for word in map(str, words):
        key, equals, value = word.partition("=")
        if equals:
            raise InputError(f"{word}: write {key} {value}")
        path = Path(word)
        if path.suffix in (".yaml", ".yml"):
            raise InputError(f"{word} is no KEY: give a config file as --config-file {word}")
        if "/" in word or path.exists():
            pretrain = "--data PATH for images"
            transfer = "--data FOLDER for data, or MODEL.WEIGHTS FILE for weights"
            raise InputError(f"{word} is no KEY: give {pretrain if is_pretraining(cfg) else transfer}")


def is_pretraining(cfg: CfgNode) -> bool:
    """Whether it is the configuration of a pre-training, not of a fine-tuning."""
    return "METHOD" in cfg


def refuse_other_stage(cfg: CfgNode, path: str) -> None:
    """Raise InputError for a fine-tuning recipe in a pre-training, or the reverse."""
    other, sections, advice = (
        ("transfer", {"DATASETS", "INPUT"}, "fine-tuning recipe: tools/train_net.py takes it")
        if is_pretraining(cfg)
        else ("pretrain", {"METHOD", "DATA"}, "pre-training recipe: tools/pretrain.py takes it")
    )
    for file, content in with_bases(path):
        if file.is_relative_to(CONFIGS / other) or sections & content.keys():
            raise InputError(f"{path} is a {advice}")


def value_at(cfg: CfgNode, key: str) -> object:
    """The value of a key such as "SOLVER.BASE_LR"; None where there is none."""
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, dict) else None
    return cfg


def whole_as_float(cfg: CfgNode, key: str, value: object) -> object:
    """``value``, as a float where the key holds floats: yacs refuses 0 for 0.0."""
    node = value_at(cfg, key)
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
