"""How the code is written: ruff's rules (pyproject.toml), with no exception in a line."""

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
