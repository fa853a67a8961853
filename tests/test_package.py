"""The wheel, installed into its own environment and used in an empty folder outside the checkout."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from rsa_detectron2 import __version__, cli
from tests.conftest import ROOT, TINY

pytest.importorskip("setuptools", reason="setuptools builds the wheel")
SOURCES = ("common", "configs", "pretrain", "rsa_detectron2", "tools", "transfer")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Path of the environment. It uses this environment's libraries, but no file of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run([*pip, *build], check=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (wheel,) = folder.glob("*.whl")
    site = next(environment.glob("lib/python*/site-packages"))
    before = {path.name for path in site.iterdir()}
    install = ["--python", environment / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    new = {path.name for path in site.iterdir()} - before
    assert new == {"rsa_detectron2", f"rsa_detectron2-{__version__}.dist-info"}
    # The libraries come after the wheel. Their .pth files, such as that of an editable install, are ignored.
    (site / "libraries.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    return environment


@pytest.fixture
def command(installed, tmp_path):
    """``command("pretrain", ...)`` runs the wheel's ``rsa-d2 pretrain ...`` in an empty folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments):
        words = [str(installed / "bin" / "rsa-d2"), *map(str, arguments)]
        return subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )

    return run


def test_modules_are_the_wheels(installed, tmp_path):
    code = (
        "import rsa_detectron2 as rsa; from rsa_detectron2.pretrain.engine import trainer;"
        "from rsa_detectron2.tools import pretrain;"
        "print(rsa.__version__, trainer.__file__, pretrain.__file__)"
    )
    words = [installed / "bin" / "python", "-c", code]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == __version__ and all(path.startswith(str(installed)) for path in said[1:])


HELP_OF_ALL = """
import sys
from rsa_detectron2 import cli
for words in *([name, "--help"] for name in cli.COMMANDS), ["reproduce", "table5", "--dry-run"]:
    sys.argv = ["rsa-d2", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, words
"""


def test_every_command_explains_itself(installed, command, tmp_path):
    assert command("--version").stdout == f"rsa-d2 {__version__}\n"
    listed = command("--help").stdout
    # In one process, because each takes seconds to import torch.
    words = [installed / "bin" / "python", "-c", HELP_OF_ALL]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(cli.COMMANDS)
    assert "tools/train_net.py" in done.stdout.rpartition("usage: ")[2]  # a table of the paper
    assert all(f"  {name} " in listed for name in cli.COMMANDS)
    wrong = command("pretrian")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "pretrain" in wrong.stderr


def test_commands_are_the_tools():
    tools = {path.stem for path in (ROOT / "tools").glob("[a-z]*.py")}
    assert set(cli.COMMANDS) == tools - set(cli.MOVED)


def test_recipes_are_found_and_train(command, image_folder, tmp_path):
    recipe = ["--config-file", "pretrain/cifar10_rsa_R18.yaml", "--data", image_folder]
    done = command("pretrain", *recipe, *TINY, "MODEL.SMALL_STEM", False)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "output" / "cifar10_rsa_R18" / "run.json").read_text())
    assert about["recipe"] == "pretrain/cifar10_rsa_R18.yaml" and about["step"] == about["steps"]


@pytest.mark.slow
def test_quickstart(command, tmp_path):
    done = command("quickstart", "--fast", "--engine", "torchvision")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "output" / "quickstart-fast" / "report.html").is_file()
