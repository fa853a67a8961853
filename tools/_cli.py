"""What the command-line tools share: where a config file is looked for, and errors as one line."""

import contextlib
import os
import re
import sys
from pathlib import Path

import yaml

from common.errors import one_line
from common.progress import close_bars
from common.record import Origin, flatten

ROOT = Path(__file__).resolve().parents[1]


def find_config(path, error):
    """``--config-file`` is looked up in the working directory first, then under ``configs/``."""
    for candidate in (Path(path), ROOT / "configs" / path):
        if candidate.is_file():
            return str(candidate)
    raise error(f"no config file {path}: looked in {Path.cwd()} and in {ROOT / 'configs'}")


def origin(path, overrides, defaults):
    """Where a configuration comes from, for the record of its run: files of ``configs/`` by their name there, overrides,
    and the CfgNode of the engine's defaults."""
    path, configs = Path(path).resolve(), ROOT / "configs"
    path = path.relative_to(configs) if path.is_relative_to(configs) else path
    return Origin(str(path), tuple(overrides), flatten(defaults))


def merge_config(cfg, path, overrides, error):
    """Merge a YAML file (or None) and ``KEY VALUE`` overrides into a CfgNode; what is wrong becomes one ``error``."""
    try:
        if path:
            refuse_repeated_keys(path, error)
            cfg.merge_from_file(path, allow_unsafe=False)
        if len(overrides) % 2:
            raise error(f"overrides are KEY VALUE pairs, but {overrides[-1]!r} has no value")
        for key, value in zip(overrides[::2], overrides[1::2]):
            cfg.merge_from_list([key, whole_as_float(cfg, key, value)])
    except error:
        raise
    except Exception as problem:  # yacs raises KeyError, ValueError and AssertionError; PyYAML its own
        reason = " ".join(str(problem.args[0] if isinstance(problem, KeyError) else problem).split())
        raise error(f"config {path or ''} {' '.join(map(str, overrides))}: {reason}".replace("  ", " ")) from None
    return cfg


def whole_as_float(cfg, key, value):
    """``value``, as a float where it is a whole number and the key of ``cfg`` holds floats: yacs wants 0.0 for 0."""
    node = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return float(value) if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", str(value)) else value


def refuse_repeated_keys(path, error):
    """Raise ``error`` for a key that a YAML file, or one that it inherits from, gives twice: PyYAML keeps the last."""
    def check(node, prefix=""):
        lines = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in lines:
                raise error(f"{path}, line {key.start_mark.line + 1}: {prefix}{key.value} is given a second time "
                            f"(first in line {lines[key.value]}): remove one")
            lines[key.value] = key.start_mark.line + 1
            check(value, f"{prefix}{key.value}.")

    text = Path(path).read_text()
    check(yaml.compose(text))
    bases = (yaml.safe_load(text) or {}).get("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        refuse_repeated_keys(Path(path).parent / Path(base).expanduser(), error)


def expand_home(argument):
    """``~`` as the home folder, where a shell leaves it: in quotes, and in --option=~/folder."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def run(main, *errors):
    """``main()``, with the user's mistakes (``errors``) and the system's refusals as one line on stderr, status 2."""
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    # A file's name need not be UTF-8, and the terminal may take less than that.
    sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")  # of the processes that are started
    try:
        sys.exit(main())
    except (*errors, OSError, MemoryError) as error:
        say_last(f"error: {one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        say_last("interrupted")
        sys.exit(130)


def say_last(line):
    """A last line on stderr, below the progress bars. The terminal may have been closed."""
    with contextlib.suppress(OSError):
        close_bars()
        print(line, file=sys.stderr)
