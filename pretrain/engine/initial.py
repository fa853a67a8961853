"""The weights that a run starts from: the backbone of MODEL.INIT, or random ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fvcore.common.config import CfgNode
from torch import Tensor

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.record import flatten
from rsa_detectron2.pretrain.config import BACKBONE_KEYS

# Path of a checkpoint -> the tensors of its backbone under timm's names, the configuration that it was
# trained with, and what a record says of it. The one in tools/_weights.py reads other projects' files, too.
Reader = Callable[[str], tuple[dict[str, Tensor], CfgNode, dict]]


@dataclass(frozen=True)
class Initial:
    """The weights that a run starts, or has started, from."""

    about: dict | None = None  # what the run's record says of MODEL.INIT; None: random weights
    backbone: dict[str, Tensor] | None = None  # only where the run begins


def find_initial(cfg: CfgNode, known: dict | None, reader: Reader | None) -> Initial:
    """The initial weights of the run whose newest checkpoint is ``known``, or of one that begins.

    A run that goes on does not need the file any more. Raises InputError.
    """
    if known:
        return Initial(known.get("run", {}).get("init"))
    if not cfg.MODEL.INIT:
        return Initial()
    # The first process reads for all, so that all have the same weights.
    return distributed.from_first(read(cfg, reader) if distributed.rank() == 0 else None)


def read(cfg: CfgNode, reader: Reader) -> Initial:
    """Read MODEL.INIT. Raises InputError where it does not fit the configuration."""
    backbone, trained_with, about = reader(cfg.MODEL.INIT)
    given, needed = flatten(cfg), flatten(trained_with)
    if fixes := [f"{key} {text(needed[key])}" for key in BACKBONE_KEYS if not agree(given[key], needed[key])]:
        raise InputError(
            f"{cfg.MODEL.INIT} was trained with {', '.join(fixes)}: give the same here, or another --init"
        )
    return Initial(about, backbone)


def agree(given: object, needed: object) -> bool:
    """Whether two settings are equal, numbers to 1e-4."""
    if isinstance(needed, list):
        return all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(given, needed))
    return given == needed


def text(value: object) -> str:
    """A setting as a command line takes it."""
    return f'"({", ".join(f"{part:.4g}" for part in value)})"' if isinstance(value, list) else str(value)


def in_words(about: dict) -> str:
    """What is known of the weights: "rsa, step 500, online branch"."""
    method = about["method"]
    if method == "unknown":  # the file does not say; its layout is all that is known
        method = f"layout of {about['format']}"
    step = f", step {about['step']}" if about["step"] >= 0 else ""
    return f"{method}{step}, {about['branch']} branch"
