"""How the code is written: ruff's rules (pyproject.toml), with no exception in a line; American spelling."""

import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest

from tests.conftest import ROOT

pytest.importorskip("ruff", reason="ruff is not installed")
FOLDERS = ("common", "pretrain", "transfer", "tools", "rsa_detectron2", "tests")
BRITISH = (
    "colour centre centring behaviour favour neighbour honour grey artefact catalogue labelled labelling "
    "modelled signalled cancelled analyse normalis synchronis initialis optimis recognis serialis generalis "
    "summaris randomis minimis maximis visualis quantis standardis regularis utilis"
).split()
# The recipes of the controlled test are files that users have.
BRITISH_NAMES = re.compile(r"shapes_colour_[\w<>]+")


@pytest.mark.parametrize("command", (("check",), ("format", "--check")))
def test_ruff(command):
    words = [sys.executable, "-m", "ruff", *command, "--no-cache", *FOLDERS, "setup.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("text", ("# noqa", "sys.path[0]", "sys.path.insert"))
def test_no_line_has_an_exception(text):
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in files if text in path.read_text() and path.name != "test_style.py"]


def written(path):
    """(line, text) of a file's prose: Python comments, docstrings and names, YAML comments, or all lines."""
    if path.suffix == ".md":
        return list(enumerate(path.read_text().splitlines(), start=1))
    if path.suffix == ".yaml":
        lines = enumerate(path.read_text().splitlines(), start=1)
        return [(number, line.partition("#")[2]) for number, line in lines]
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    names = [(t.start[0], t.string) for t in tokens if t.type in (tokenize.COMMENT, tokenize.NAME)]
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [node for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
    return names + [(getattr(node, "lineno", 1), ast.get_docstring(node) or "") for node in documented]


def test_spelling_is_american():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files += [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    british = re.compile("|".join(BRITISH), re.IGNORECASE)
    wrong = []
    for path in files:
        if path.match("shapes_colour_*"):
            continue
        for line, text in written(path):
            if word := british.search(BRITISH_NAMES.sub("", text)):
                wrong.append(f"{path.relative_to(ROOT)}, line {line}: {word.group()}")
    assert not wrong


def functions():
    """(path, node) of each function of the package."""
    for folder in FOLDERS[:-1]:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    yield path.relative_to(ROOT), node


def parameters(node):
    """The named parameters of a function, without self."""
    named = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [a for a in named if a.arg not in ("self", "cls")]


def test_functions_are_short():
    """At most 60 lines, except where code is a table."""
    tables = {"build_model", "torchvision_defaults"}  # each key of a configuration, once
    too_long = []
    for path, node in functions():
        lines = node.end_lineno - node.lineno + 1
        if lines > 60 and node.name not in {*tables, "parse"}:
            too_long.append(f"{path}: {node.name} has {lines} lines")
    assert not too_long


def test_functions_take_at_most_five_parameters():
    """More become a dataclass, except for a few functions that draw what the parameters describe."""
    exceptions = {"signed_distance", "draw_detections"}
    too_many = []
    for path, node in functions():
        count = len(parameters(node))
        if count > 5 and node.name not in exceptions:
            too_many.append(f"{path}: {node.name} takes {count} parameters")
    assert not too_many


def test_public_functions_have_type_hints():
    without = []
    for path, node in functions():
        if node.name.startswith("_"):
            continue
        if node.returns is None or any(a.annotation is None for a in parameters(node)):
            without.append(f"{path}: {node.name}")
    assert not without
