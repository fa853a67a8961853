"""The folder of a fine-tuning run: what it holds already, and which checkpoint to go on from."""

import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.common.files import check_tensors, save_tensors, write_atomically

FINAL = "model_final.pth"
BEST = "model_best.pth"  # the model with the best AP among those that were evaluated
LAST = "last_checkpoint"  # Detectron2's file with the name of the last checkpoint
TRAINING = "training.json"  # written at the first iteration: the weights' provenance and the config
RESULTS = "results.json"  # written at the end
AGAIN_WITH_RESUME = "the same command with --resume"


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints: first the one that last_checkpoint names, then the others, newest first."""
    numbered = sorted(folder.glob("model_[0-9]*.pth"), reverse=True)
    paths = dict.fromkeys([folder / last_name(folder), folder / FINAL, *numbered])
    return [path for path in paths if path.is_file()]


def last_name(folder: Path) -> str:
    """The name in last_checkpoint; "" where that file is lost."""
    path = folder / LAST
    return path.read_text(errors="replace").strip("\0\n ") if path.is_file() else ""


def save_checkpoint(folder: str | Path, name: str, state: dict) -> bool:
    """Write a checkpoint, whole or not at all, and its name into last_checkpoint; returns whether it did.

    Where the disk is full, a line says so and training goes on; for the final model, InputError is raised.
    """
    folder = Path(folder)
    try:
        save_tensors(folder / name, state)
        write_atomically(folder / LAST, lambda file: file.write(name.encode()))
        return True
    except OSError as error:
        reason = f"cannot write {folder / name} ({error.strerror or error})"
        if name == FINAL:
            raise InputError(f"{reason}: make room, and run it again with --resume") from None
        print(
            f"warning: {reason}; training goes on, and tries again at the next checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return False


def leave(step: int, steps: int, saved: bool) -> NoReturn:
    """Raise Interrupted after iteration ``step`` of ``steps``, which a signal has stopped."""
    outcome = "saved" if saved else "NOT saved, the iterations since the last checkpoint will be repeated"
    raise Interrupted(f"stopped after iteration {step} of {steps}, {outcome}; {AGAIN_WITH_RESUME} goes on")


def find_start(folder: str | Path, resume: bool) -> Path | None:
    """Path of the checkpoint that training in ``folder`` goes on from; None where it starts anew.

    Raises InputError for a folder that holds a run, unless ``resume`` is set. Then a damaged checkpoint is
    passed over, and last_checkpoint is written again where it names no whole one; a line says so.
    """
    folder = Path(folder)
    found, results = checkpoints(folder), has_training_results(folder)
    if not resume:
        left = [path.name for path in found]
        if results:
            left.append(RESULTS)
        if (folder / TRAINING).is_file():
            left.append(TRAINING)
        if left:
            raise InputError(
                f"{folder} holds a run ({left[0]}): give --resume to go on with it, or another OUTPUT_DIR"
            )
        return None
    if start := first_whole(found):
        if last_name(folder) != start.name:
            print(
                f"{folder / LAST} names no whole checkpoint: training goes on from {start.name}", flush=True
            )
            write_atomically(folder / LAST, lambda file: file.write(start.name.encode()))
        return start
    if found or results:
        raise InputError(
            f"{folder} holds a run, but no whole checkpoint of it (model_*.pth): restore "
            "one, or give another OUTPUT_DIR"
        )
    print(f"--resume: {folder} holds no checkpoint; training starts at iteration 0", flush=True)
    return None


def iterations_of(path: Path) -> int:
    """How many iterations led to a checkpoint of a run, which is whole."""
    import torch  # here, because reports read a run's folder without it

    return torch.load(path, mmap=True, map_location="cpu", weights_only=True)["iteration"] + 1


def first_whole(paths: Iterable[Path]) -> Path | None:
    """The first of these checkpoints that is not damaged, or None."""
    for path in paths:
        try:
            check_tensors(path)
            return path
        except (OSError, zipfile.BadZipFile) as error:
            print(f"warning: {path} is damaged ({error})", file=sys.stderr, flush=True)
    return None


def has_training_results(folder: Path) -> bool:
    """Whether results.json is that of a training. That of an evaluation may be overwritten."""
    path = folder / RESULTS
    try:
        return path.is_file() and not json.loads(path.read_text())["eval_only"]
    except (ValueError, TypeError, KeyError):
        return True


def trained_model(folder: str | Path) -> Path:
    """Path of the model in a run's folder. Raises InputError where there is none."""
    found = checkpoints(Path(folder))
    if not found:
        raise InputError(
            f"{folder} holds no model to evaluate (model_*.pth): train one, or leave out "
            "--resume and give MODEL.WEIGHTS"
        )
    return found[0]
