"""The folder of a fine-tuning run: what it holds already, and which checkpoint to go on from."""

import json
import sys
import zipfile
from pathlib import Path

from common.files import check_tensors, write_atomically
from transfer.config import InputError

FINAL = "model_final.pth"
LAST = "last_checkpoint"  # Detectron2's: a file that holds the name of one
TRAINING = "training.json"  # from the first iteration on: the weights' provenance, and the config
RESULTS = "results.json"  # at the end


def checkpoints(folder):
    """A run's model_*.pth, the one to go on from first: that which last_checkpoint names, then the newest."""
    found = [folder / FINAL, *sorted(folder.glob("model_[0-9]*.pth"), reverse=True)]
    return [path for path in dict.fromkeys([folder / last_name(folder), *found]) if path.is_file()]


def last_name(folder):
    """What last_checkpoint says, "" where it is lost."""
    path = folder / LAST
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def find_start(folder, resume):
    """Path of the checkpoint that training in ``folder`` goes on from; None where it starts anew.

    Without ``resume``, only a folder without a run is trained in. A damaged checkpoint is passed over, with a line, and
    so is a lost last_checkpoint, which is written again. Raises InputError where a run would be overwritten.
    """
    folder = Path(folder)
    found = checkpoints(folder)
    results = [folder / RESULTS] if has_training_results(folder) else []
    left = [*found, *results, *(path for path in [folder / TRAINING] if path.is_file())]
    if left and not resume:
        raise InputError(f"{folder} holds a run ({left[0].name}): give --resume to go on with it, or another OUTPUT_DIR")
    if not resume:
        return None
    for path in found:
        try:
            check_tensors(path)
        except (OSError, zipfile.BadZipFile) as error:
            print(f"warning: {path} is damaged ({error}); the checkpoint before is taken", file=sys.stderr, flush=True)
            continue
        if last_name(folder) != path.name:
            print(f"{folder / LAST} names no whole checkpoint: training goes on from {path.name}", flush=True)
            write_atomically(folder / LAST, lambda file: file.write(path.name.encode()))
        return path
    if found:
        raise InputError(f"{folder} holds a run, but none of its {len(found)} checkpoints is whole: restore one, or give "
                         "another OUTPUT_DIR")
    if results:
        raise InputError(f"{folder} holds the results of a run, but none of its checkpoints (model_*.pth): restore one, "
                         "or give another OUTPUT_DIR")
    print(f"--resume: {folder} holds no checkpoint; training starts at iteration 0", flush=True)
    return None


def has_training_results(folder):
    """Whether results.json is there and is not of an evaluation alone, which training may overwrite."""
    path = folder / RESULTS
    try:
        return path.is_file() and not json.loads(path.read_text())["eval_only"]
    except (ValueError, TypeError, KeyError):
        return True


def trained_model(folder):
    """Path of the newest model in a run's folder. Raises InputError where there is none."""
    found = checkpoints(Path(folder))
    if not found:
        raise InputError(f"{folder} holds no model to evaluate (model_*.pth): train it first, or leave out --resume and "
                         "give MODEL.WEIGHTS")
    return found[0]
