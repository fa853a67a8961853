"""Checkpoints that survive: written whole or not at all, checked when read, with the one before kept."""

import contextlib
import fcntl
import os
import socket
import zipfile
from pathlib import Path

import torch

from pretrain.config import DATA_KEYS, FREE_KEYS, InputError, differences, get_cfg

LAST, PREVIOUS, FINAL = "checkpoint_last.pth", "checkpoint_previous.pth", "model_final.pth"
CONFIG = "config.yaml"
FORMAT = "rsa-pretraining"


class Damaged(InputError):
    """A file whose bytes are not those that were written."""


def write_atomically(path, write, previous=None):
    """``write(file)`` into a temporary file beside ``path``, then rename it to ``path``, so that a reader finds an old
    or a new file, whole. What ``path`` held until then moves to ``previous``, if given. Raises OSError, and leaves
    ``path`` as it was, when the disk does not take it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        raise
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def save(path, state, previous=None):
    """Save a dict of tensors, numbers and strings. Raises OSError when the disk does not take it."""

    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch's archive writer makes of a refused write
            raise (error.__context__ if isinstance(error.__context__, OSError) else error)

    write_atomically(path, write, previous)


def load(path):
    """Load on the CPU without running any code of the file. Raises Damaged when its bytes are not those written, and
    InputError when it is no checkpoint of this project.

    torch.save stores a CRC-32 with every tensor, but torch.load does not compare it; zipfile does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the ways in which a broken file fails are torch's, zipfile's and pickle's
        raise Damaged(f"{path} cannot be read as a checkpoint ({type(error).__name__}): "
                      f"{' '.join(str(error).split())[:150]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of tools/pretrain.py")
    return state


@contextlib.contextmanager
def locked(folder):
    """Make ``folder`` and hold it for this process. Raises InputError when another process trains in it, or when it
    cannot be written.

    A POSIX lock, because it dies with its process and is not inherited: workers that outlive a killed run for some
    seconds must not keep the next one out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(f"another run is at work in {folder} ({file.read().strip()}): wait for it, stop it, or "
                             "give another --output-dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def newest(folder):
    """Path of the newest whole checkpoint in ``folder`` to go on from, or None where no run has saved one.

    A damaged one is put aside and named, and the one before is taken: a run that resumes bit for bit only repeats
    some steps. Raises InputError when there are checkpoints, but none that can be read.
    """
    kept = sorted(folder.glob("checkpoint_[0-9]*.pth"), reverse=True)
    problems = []
    for path in filter(Path.is_file, [folder / LAST, folder / PREVIOUS, *kept]):
        try:
            step = load(path)["step"]
        except Damaged as error:
            problems.append(str(error))
            continue
        except InputError as error:
            raise InputError(f"{error}: move it away, or give another --output-dir") from None
        for problem in problems:
            print(f"warning: {problem}; it is put aside as *.damaged, and the run goes on from {path}, step {step}")
        if problems and (folder / LAST).is_file():  # else the next save would move it over the good one
            os.replace(folder / LAST, folder / (LAST + ".damaged"))
        return str(path)
    if problems:
        raise InputError(f"{'; '.join(problems)}; no older checkpoint is whole: restore one from a backup, or give "
                         "another --output-dir to start again")
    return None


def take_up(cfg, saved):
    """The micro-batch of the run in the output folder, from its checkpoint ``saved`` or from config.yaml, 0 if there is
    none; and whether that run's data set has the same path. Raises InputError, naming each difference, when that run has
    another configuration and anything to lose: the result would be neither the one run's nor the other's."""
    folder = Path(cfg.OUTPUT_DIR)
    config = folder / CONFIG
    text = saved["config"] if saved else config.read_text() if config.is_file() else get_cfg().dump()
    known_images = saved is None or "data" in saved
    own, changed = differences(text, cfg, config, FREE_KEYS + DATA_KEYS * known_images)
    if changed and saved:
        raise InputError(f"{folder} holds a run with another configuration ({'; '.join(changed)}): "
                         "give the same options, or another --output-dir")
    return 0 if changed else own["SOLVER.MICRO_BATCH"], own["DATA.PATH"] == cfg.DATA.PATH


def write_config(cfg):
    """Leave the configuration beside the checkpoints, with what was chosen at the start."""
    try:
        write_atomically(Path(cfg.OUTPUT_DIR) / CONFIG, lambda file: file.write(cfg.dump().encode()))
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {cfg.OUTPUT_DIR}: {error.strerror}") from None
