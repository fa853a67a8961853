"""Checkpoints: checked when they are read; the newest whole one is found, and compared with the command."""

import os
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import check_tensors, write_atomically
from rsa_detectron2.pretrain.config import BACKBONE_KEYS, DATA_KEYS, FREE_KEYS, differences, get_cfg

LAST, PREVIOUS, FINAL = "checkpoint_last.pth", "checkpoint_previous.pth", "model_final.pth"
CONFIG = "config.yaml"
FORMAT = "rsa-pretraining"


class Damaged(InputError):
    """A file's bytes are not those that were written."""


def load(path: str | Path) -> dict:
    """Load a checkpoint to the CPU, without running any code of the file.

    Raises Damaged when its bytes are not those that were written, InputError when it is no checkpoint of this
    project, and FileNotFoundError.
    """
    try:
        check_tensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):  # not the file's fault
        raise
    except Exception as error:  # the ways in which a broken file fails are torch's, zipfile's and pickle's
        raise Damaged(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): "
            f"{' '.join(str(error).split())[:150]}"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of tools/pretrain.py")
    return state


def newest(folder: Path) -> str | None:
    """Path of the newest whole checkpoint in ``folder`` to go on from, or None where no run has saved one.

    A damaged one is put aside and named, and the one before it is taken: the run only repeats some steps.
    Raises InputError when there are checkpoints, but none that can be read.
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
            print(
                f"warning: {problem}; it is put aside as *.damaged, "
                f"and the run goes on from {path}, step {step}"
            )
        if problems and (folder / LAST).is_file():  # or the next save would move it over the whole one
            os.replace(folder / LAST, folder / (LAST + ".damaged"))
        return str(path)
    if problems:
        raise InputError(
            f"{'; '.join(problems)}; no older checkpoint is whole: restore one from a backup, or give "
            "another --output-dir to start again"
        )
    return None


def finished(folder: Path) -> dict | None:
    """The content of a run's model_final.pth, None where it is not there yet. Raises InputError."""
    try:
        return load(folder / FINAL) if (folder / FINAL).is_file() else None
    except InputError as error:
        raise InputError(f"{error}: move it away, or give another --output-dir") from None


def compare_run(cfg: CfgNode, saved: dict | None, path: str | Path) -> tuple[int, bool]:
    """Compare ``cfg`` with the run in the output folder: with its checkpoint ``saved``, or config.yaml.

    ``path``: of a checkpoint with the run's newest weights, for the message. Returns the run's micro-batch, 0
    if it chose none, and whether its data set has the same path. Raises InputError that names each difference
    from the configuration of the checkpoint: a run under two configurations would be a result of neither.
    """
    folder = Path(cfg.OUTPUT_DIR)
    config = folder / CONFIG
    if saved:
        text = saved["config"]
    else:
        text = config.read_text() if config.is_file() else get_cfg().dump()
    images_known = saved is None or "data" in saved
    free = FREE_KEYS + DATA_KEYS if images_known else FREE_KEYS
    own, changed = differences(text, cfg, config, free)
    if changed and saved:
        keys = {text.partition(":")[0] for text in changed}
        raise InputError(
            f"{folder} holds a run with another configuration ({'; '.join(changed)}): "
            f"give the same options, or another --output-dir{start_from(path, keys)}"
        )
    return 0 if changed else own["SOLVER.MICRO_BATCH"], own["DATA.PATH"] == cfg.DATA.PATH


def start_from(path: str | Path, keys: set[str]) -> str:
    """How a run that differs in ``keys`` may start from the backbone in ``path``: the end of a message."""
    advice = "" if keys & {*BACKBONE_KEYS} else f" with --init {path}, to start from its backbone"
    if "SOLVER.EPOCHS" in keys:
        advice += (
            "; a run keeps its length, because the cosines of learning rate, beta and tau are spread over it"
        )
    return advice


def write_config(cfg: CfgNode) -> None:
    """Write the configuration beside the checkpoints, with the micro-batch that was chosen. Raises
    InputError."""
    try:
        write_atomically(Path(cfg.OUTPUT_DIR) / CONFIG, lambda file: file.write(cfg.dump().encode()))
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {cfg.OUTPUT_DIR}: {error.strerror}") from None
