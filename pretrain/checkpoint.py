"""Checkpoints: written to a temporary file, fsync'ed and renamed, so that a reader finds an old or a new one, whole."""

import os
from pathlib import Path

import torch

from pretrain.config import InputError, differences

LAST, FINAL = "checkpoint_last.pth", "model_final.pth"


def write_atomically(path, write):
    """``write(file)`` into a temporary file beside ``path``, then rename it to ``path``."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def save(path, state):
    """Save a dict of tensors, numbers and strings."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path):
    """Load on the CPU without running any code of the file. Raises InputError when it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the ways in which a broken file fails are torch's, zipfile's and pickle's
        raise InputError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): "
                         f"{' '.join(str(error).split())[:150]}") from None


def start_folder(cfg):
    """Make the output folder, or take up the run in it. Returns the last checkpoint, or None.

    The configuration is written once, when the run starts; starting again with another one is refused, naming each
    difference, because the result would be neither the one run's nor the other's.
    """
    folder = Path(cfg.OUTPUT_DIR)
    config = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config.is_file():
            if changed := differences(config.read_text(), cfg):
                raise InputError(f"{folder} holds a run with another configuration ({'; '.join(changed)}): "
                                 "give the same options, or another --output-dir")
        else:
            write_atomically(config, lambda file: file.write(cfg.dump().encode()))
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {folder}: {error.strerror}") from None
    return load(folder / LAST) if (folder / LAST).is_file() else None
