"""CONTRIBUTING.md's samples, applied to a copy of the tree: they work, and the tests accept them."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TINY

PACKAGES = ("common", "pretrain", "transfer", "tools", "configs")
SAMPLES = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)


def hunks(sample):
    """The parts of a sample that each begin with a file's name: (name, text before, text after)."""
    for part in re.split(r"^--- ", sample, flags=re.M)[1:]:
        name, *lines = part.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        yield name.strip(), before, after


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tree with all samples but the data set's: its class is the reader's own."""
    copy = tmp_path_factory.mktemp("contributing")
    for name in (*PACKAGES, "rsa_detectron2", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "pytest.ini", "setup.py"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:  # what setup.py's package_dir does
        (copy / "rsa_detectron2" / name).symlink_to(copy / name)
    for sample in SAMPLES:
        for name, before, after in hunks(sample):
            text = (copy / name).read_text() if before else ""
            assert text.count(before) == 1 or not before, f"{name} no longer has: {before}"
            if "MyImages" not in after:
                (copy / name).write_text(text.replace(before, after) if before else after)
    return copy


def run(copy, *words):
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_samples_are_found():
    assert [name for sample in SAMPLES for name, *_ in hunks(sample)] == [
        "pretrain/config.py",
        "pretrain/method/objectives.py",
        "pretrain/method/objectives.py",
        "configs/pretrain/cifar10_mine_R18.yaml",
        "transfer/convert/formats.py",
        "pretrain/data/datasets.py",
    ]


def test_tests_accept_the_samples(copy):
    said = run(
        copy,
        *("-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "--basetemp", copy / "tmp"),
        *("tests/pretrain/test_recipes.py", "tests/test_style.py", "tests/pretrain/method/test_networks.py"),
        *("-k", "mine or has_ or ruff or hints or methods_are_those"),
    )
    assert " passed" in said and "failed" not in said


def test_the_method_trains(copy, image_folder):
    """A step of it on a CPU, by the recipe that the sample adds."""
    size = ["--data", image_folder, *TINY, "MODEL.SMALL_STEM", "False", "SOLVER.BATCH_SIZE", "24"]
    length = ["SOLVER.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0", "OUTPUT_DIR", "run"]
    said = run(copy, "tools/pretrain.py", "--config-file", "pretrain/cifar10_mine_R18.yaml", *size, *length)
    assert "mine, test_resnet" in said and (copy / "run" / "model_final.pth").is_file()


def test_the_family_is_known(copy):
    said = run(
        copy,
        "-c",
        "from rsa_detectron2.transfer.convert import formats\n"
        "print(formats.__file__, [f.online for f in formats.FORMATS if f.name == 'My method'])",
    )
    assert said.startswith(str(copy)) and "['encoder.backbone.']" in said
