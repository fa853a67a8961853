"""Libraries print nothing before an error line, nor beside a help text."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MISTAKES = {
    "ablation": ["--seeds", "2"],  # all that it says is where its test has gone
    "benchmark": ["data", "--data", "absent"],
    "check_device": ["absent"],
    "convert_to_d2": ["absent"],
    "embed": ["absent"],
    "evaluate": ["knn", "absent"],
    "export_onnx": ["absent", "out.onnx"],
    "label_fractions": ["--data", "absent"],
    "predict": ["absent", "absent"],
    "prepare_data": ["absent", "out"],
    "pretrain": ["--data", "absent", "--output-dir", "out"],
    "report": ["absent"],
    "report_top1": ["absent"],
    "reproduce": ["table1", "--set", "ABSENT", "1"],
    "show_features": ["absent"],
    "show_views": ["absent"],
    "train_net": ["--config-file", "transfer/mask_rcnn_R50_FPN_1x.yaml", "MODEL.WEIGHTS", "absent"],
}


def test_every_tool_is_here():
    """Every tool except the quick start, whose options only take choices; test_cli.py tests it."""
    assert {path.stem for path in (ROOT / "tools").glob("[a-z]*.py")} == {*MISTAKES, "quickstart"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(tool, tmp_path, name):
    done = tool(name, *MISTAKES[name], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name", [*list(MISTAKES)[1:], "quickstart"])
def test_help_is_all_that_is_printed(tool, name):
    done = tool(name, "--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: ")


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_a_mistake_is_one_line_in_a_fresh_process(engine, tmp_path):
    """Both engines import modules that warn. The test server may have imported them already."""
    if engine == "detectron2":
        pytest.importorskip("detectron2")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, ROOT / "tools" / "train_net.py", "--engine", engine, *MISTAKES["train_net"]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
