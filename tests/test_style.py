"""How the code is written: ruff's rules (pyproject.toml), with no exception in a line."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("ruff", reason="ruff is not installed")
FOLDERS = ("common", "pretrain", "transfer", "tools", "rsa_detectron2", "tests")


@pytest.mark.parametrize("command", (("check",), ("format", "--check")))
def test_ruff(command):
    words = [sys.executable, "-m", "ruff", *command, "--no-cache", *FOLDERS, "setup.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("text", ("# noqa", "sys.path[0]", "sys.path.insert"))
def test_no_line_has_an_exception(text):
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in files if text in path.read_text() and path.name != "test_style.py"]


def test_functions_are_short():
    """At most 60 lines, but where a table is written as code."""
    tables = {"build_model", "torchvision_defaults"}  # each key of a configuration, once
    too_long = []
    for folder in FOLDERS[:-1]:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name not in {*tables, "parse"}:
                    lines = node.end_lineno - node.lineno + 1
                    if lines > 60:
                        too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not too_long


def test_public_functions_have_type_hints():
    without = []
    for folder in FOLDERS[:-1]:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    named = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
                    if node.returns is None or any(a.annotation is None for a in named):
                        without.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not without
