"""The folder of a fine-tuning run: when training goes on, when it starts anew, and when it does neither."""

import json

import pytest
import torch

from rsa_detectron2.common import files
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import train_net
from rsa_detectron2.transfer.report.run_folder import checkpoints, find_start, trained_model
from tests.conftest import processes
from tests.pretrain.engine.test_checkpoint import flip


@pytest.fixture
def run(tmp_path):
    """The folder of a run with three checkpoints; last_checkpoint names the last one."""
    for iteration in (99, 1999, 19999):
        files.save_tensors(tmp_path / f"model_{iteration:07d}.pth", {"model": torch.arange(1000.0)})
    (tmp_path / "last_checkpoint").write_text("model_0019999.pth")
    (tmp_path / "training.json").write_text("{}")
    return tmp_path


def test_goes_on_from_the_last(run, capsys):
    assert find_start(run, resume=True) == trained_model(run) == run / "model_0019999.pth"
    (run / "last_checkpoint").write_text("model_0001999.pth")  # a user returns to it
    assert find_start(run, resume=True) == run / "model_0001999.pth"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [None, "", "model_0029999.pth", "\0\0\0"])
def test_a_lost_last_checkpoint_is_found_again(run, capsys, content):
    """A kill or a full disk may leave it empty; it may name a file that is gone."""
    (run / "last_checkpoint").unlink()
    if content is not None:
        (run / "last_checkpoint").write_text(content)
    assert find_start(run, resume=True) == run / "model_0019999.pth"
    assert (run / "last_checkpoint").read_text() == "model_0019999.pth"  # Detectron2 reads it
    said = f"{run}/last_checkpoint names no whole checkpoint: training goes on from model_0019999.pth\n"
    assert capsys.readouterr().out == said
    (run / "last_checkpoint").unlink()
    files.save_tensors(run / "model_final.pth", {})
    assert find_start(run, resume=True) == run / "model_final.pth"


def test_a_damaged_checkpoint_is_passed_over(run, capsys):
    flip(run / "model_0019999.pth", 0.5)
    (run / "model_0001999.pth").write_bytes(b"")
    assert find_start(run, resume=True) == run / "model_0000099.pth"
    assert (run / "last_checkpoint").read_text() == "model_0000099.pth"
    printed = capsys.readouterr()
    assert printed.err.count("is damaged") == 2 and f"warning: {run}/model_0019999.pth" in printed.err
    flip(run / "model_0000099.pth", 0.5)
    with pytest.raises(
        InputError, match="no whole checkpoint of it .*restore one, or give another OUTPUT_DIR"
    ):
        find_start(run, resume=True)


@pytest.mark.parametrize("kept", ["model_0019999.pth", "training.json", "results.json"])
def test_a_run_is_only_trained_on_with_resume(run, kept):
    (run / "results.json").write_text(json.dumps({"eval_only": False}))
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    line = f"holds a run .{kept}.: give --resume to go on with it, or another OUTPUT_DIR$"
    with pytest.raises(InputError, match=line):
        find_start(run, resume=False)
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_nothing_to_resume_is_said(tmp_path, capsys):
    """It is no error, because a scheduler's script always gives --resume."""
    assert find_start(tmp_path / "new", resume=False) is None
    assert capsys.readouterr().out == ""
    for folder in (tmp_path / "new", tmp_path):
        assert find_start(folder, resume=True) is None
        line = f"--resume: {folder} holds no checkpoint; training starts at iteration 0\n"
        assert capsys.readouterr().out == line
        (tmp_path / "training.json").write_text("{}")  # killed before the first checkpoint
    with pytest.raises(InputError, match="holds no model to evaluate"):
        trained_model(tmp_path)


def test_results_without_checkpoints_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"eval_only": True}))
    assert find_start(tmp_path, resume=False) is None  # those of an evaluation
    for content in (json.dumps({"eval_only": False}), "damaged"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match="holds a run, but no whole checkpoint of it .model_.*restore"):
            find_start(tmp_path, resume=True)


def test_order_of_the_checkpoints(run):
    names = [path.name for path in checkpoints(run)]
    assert names == ["model_0019999.pth", "model_0001999.pth", "model_0000099.pth"]


def hold(folder, ready, done):
    with files.locked(folder, "OUTPUT_DIR"):
        ready.set()
        done.wait(300)


def full_after(name):
    """A save_tensors for which the disk has space only for the file with this name."""

    def save(path, state):
        if path.name != name:
            raise OSError(28, "No space left on device")
        files.save_tensors(path, state)

    return save


def test_two_commands_in_one_folder(tmp_path, monkeypatch):
    ready, done = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(300)
    config = "transfer/mask_rcnn_R50_FPN_1x_random.yaml"
    monkeypatch.setattr(
        "sys.argv",
        ["train_net.py", "--config-file", config, "--engine", "torchvision", "OUTPUT_DIR", str(tmp_path)],
    )
    line = f"another run is at work in .* .process {other.pid} on .*another OUTPUT_DIR$"
    with pytest.raises(InputError, match=line):
        train_net.main()
    done.set()
    other.join()
