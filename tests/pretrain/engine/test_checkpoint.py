"""Files that a disk or a user has damaged are detected, and never mistaken for a run's state."""

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rsa_detectron2.common import files
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.engine.checkpoint import FINAL, LAST, PREVIOUS
from tests.conftest import assert_same, final_weights, tiny_cfg

STATE = {"format": "rsa-pretraining", "step": 1, "model": {"a": torch.arange(4000.0), "b": torch.ones(3, 5)}}


def test_any_changed_byte_is_found_or_harmless(tmp_path):
    """Of 300 files with one changed byte, each is refused or reads as it was saved (the byte was padding)."""
    files.save_tensors(tmp_path / LAST, STATE)
    whole = (tmp_path / LAST).read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for position in rng.integers(0, len(whole), 300):
        changed = bytearray(whole)
        changed[position] ^= int(rng.integers(1, 256))
        (tmp_path / "x.pth").write_bytes(changed)
        try:
            state = checkpoint.load(tmp_path / "x.pth")
        except InputError:
            found += 1
        else:
            assert state["step"] == 1 and all(
                torch.equal(state["model"][name], STATE["model"][name]) for name in "ab"
            )
    assert found > 250


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a checkpoint", b"\x80\x02}q\x00."])
def test_unreadable_checkpoint_is_named(tmp_path, content):
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(checkpoint.Damaged, match=LAST):
        checkpoint.load(tmp_path / LAST)


def test_failed_write_keeps_the_checkpoint_before(tmp_path):
    files.save_tensors(tmp_path / LAST, STATE)

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        files.write_atomically(tmp_path / LAST, fail)
    assert checkpoint.load(tmp_path / LAST)["step"] == 1 and os.listdir(tmp_path) == [LAST]


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    return train_loop.train(tiny_cfg(image_folder, tmp_path_factory.mktemp("whole")))


@pytest.fixture
def run(uninterrupted, tmp_path):
    """The folder of a run that was killed before its last file, after step 9."""
    folder = shutil.copytree(Path(uninterrupted).parent, tmp_path / "run")
    (folder / FINAL).unlink()
    return folder


def flip(path, fraction):
    content = bytearray(path.read_bytes())
    content[int(fraction * len(content))] ^= 1
    path.write_bytes(content)


SPOILS = {
    "damaged": lambda path: flip(path, 0.5),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100_000]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_spoiled_checkpoint_gives_way_to_the_one_before(
    image_folder, tmp_path, run, uninterrupted, capsys, spoil
):
    spoil(run / LAST)
    final = train_loop.train(tiny_cfg(image_folder, tmp_path))
    said = capsys.readouterr().out
    assert (
        f"warning: {run / LAST} cannot be read" in said and f"goes on from {run / PREVIOUS}, step 6" in said
    )
    assert_same(final_weights(final), final_weights(uninterrupted))
    assert (run / (LAST + ".damaged")).is_file()
    assert checkpoint.load(run / LAST)["step"] == 9 and checkpoint.load(run / PREVIOUS)["step"] == 6


def test_kept_checkpoints_stand_in_as_well(image_folder, tmp_path, run, uninterrupted):
    flip(run / LAST, 0.3)
    flip(run / PREVIOUS, 0.6)
    (run / "checkpoint_0000009.pth").unlink()
    assert_same(
        final_weights(train_loop.train(tiny_cfg(image_folder, tmp_path))), final_weights(uninterrupted)
    )


def test_killed_between_the_two_renames(image_folder, tmp_path, run, uninterrupted):
    (run / LAST).unlink()
    assert_same(
        final_weights(train_loop.train(tiny_cfg(image_folder, tmp_path))), final_weights(uninterrupted)
    )


def test_nothing_whole_is_an_error_not_a_new_run(image_folder, tmp_path, run):
    for path in run.glob("*.pth"):
        flip(path, 0.5)
    with pytest.raises(InputError, match="no older checkpoint is whole"):
        train_loop.train(tiny_cfg(image_folder, tmp_path))


def test_foreign_checkpoint_is_refused(image_folder, tmp_path, run):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, run / LAST)
    with pytest.raises(InputError, match="not a checkpoint of tools/pretrain.py: move it away"):
        train_loop.train(tiny_cfg(image_folder, tmp_path))
    assert (run / LAST).is_file()


def test_spoiled_config_is_named(image_folder, tmp_path, run):
    for path in run.glob("*.pth"):
        path.unlink()
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="config.yaml cannot be read"):
        train_loop.train(tiny_cfg(image_folder, tmp_path))


def test_full_disk_is_survived(image_folder, tmp_path, uninterrupted, monkeypatch, capsys):
    """From step 4 to 7 no file may grow beyond 100 kB, so the checkpoint of step 6 fails. That of step 9 is
    written."""
    step, steps = train_loop.train_step, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        steps.append(1)
        full = 4 <= len(steps) <= 7
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else limits[0], limits[1]))
        if len(steps) == 8:
            assert checkpoint.load(tmp_path / "run" / LAST)["step"] == 3
            assert not list((tmp_path / "run").glob("*.tmp"))
        return step(*arguments)

    monkeypatch.setattr(train_loop, "train_step", limited)
    try:
        final = train_loop.train(tiny_cfg(image_folder, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all("File too large" in line and "tries again" in line for line in warnings)
    assert_same(final_weights(final), final_weights(uninterrupted))
    assert (
        checkpoint.load(tmp_path / "run" / LAST)["step"] == 9
        and checkpoint.load(tmp_path / "run" / PREVIOUS)["step"] == 3
    )


def test_existing_folder_that_cannot_be_written(image_folder, tmp_path):
    with pytest.raises(InputError, match="cannot write to --output-dir /proc/self"):
        train_loop.train(tiny_cfg(image_folder, tmp_path, "OUTPUT_DIR", "/proc/self"))
