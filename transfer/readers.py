"""Checkpoints of known pre-training methods -> the 265 tensors of a ResNet-50 under torchvision's names.

A format is a row of :data:`FORMATS`: the prefix that holds each branch's backbone, and the keys that are dropped
knowingly. Reading fails closed: a missing, misshapen or not-finite tensor, or a key that no row accounts for, is an
error that names it. Opening a file never runs its code (``weights_only=True``).
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torchvision.models import resnet50

from transfer.config import InputError

BRANCHES = ("online", "target")


@dataclass(frozen=True)
class Format:
    """``prefixes[branch]`` is taken as the backbone; every other key must start with one of ``drops``."""

    name: str
    prefixes: dict
    drops: tuple


FORMATS = (
    Format("this project's pre-training", {"online": "online.backbone.", "target": "target.backbone."},
           drops=("online.projector.", "target.projector.", "predictor.", "queue.")),
    Format("the authors' RSA", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("encoder_q_head.", "encoder_k_head.", "pred.")),
)


@lru_cache
def resnet50_shapes():
    """{torchvision name: shape} of the 53 convolutions and 53 x 4 BatchNorm tensors, 265 in all."""
    with torch.device("meta"):
        state = resnet50().state_dict()
    return {name: tensor.shape for name, tensor in state.items()
            if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}


def read_checkpoint(path, branch="online"):
    """Checkpoint file -> (265 float32 CPU tensors under torchvision's names, provenance dict).

    Raises InputError with one line that names the file and what is missing, left over, misshapen or not finite.
    """
    contents = load_tensors_only(path)
    state = contents
    for container in ("model", "state_dict"):
        if isinstance(state.get(container), dict):
            state = state[container]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}

    layout = find_format(state, path)
    if branch not in layout.prefixes or not any(name.startswith(layout.prefixes[branch]) for name in state):
        raise InputError(f"{path}: a checkpoint of {layout.name} without the {branch} branch")
    provenance = {
        "source": Path(path).name, "sha256": sha256(path), "format": layout.name, "branch": branch,
        "method": str(contents.get("method", "unknown")), "step": int(contents.get("step", -1)),
    }
    return take_backbone(state, layout, branch, path), provenance


def take_backbone(state, layout, branch, path):
    """Select and check the backbone of ``branch``; ``state`` maps names (without ``module.``) to tensors."""
    prefix = layout.prefixes[branch]
    dropped = layout.drops + tuple(other for other in layout.prefixes.values() if other != prefix)
    backbone = {name.removeprefix(prefix): tensor for name, tensor in state.items()
                if name.startswith(prefix) and not name.endswith("num_batches_tracked")}
    left_over = sorted([name for name in state if not name.startswith((prefix, *dropped))]
                       + [prefix + name for name in backbone if name not in resnet50_shapes()])
    missing = [prefix + name for name in resnet50_shapes() if name not in backbone]
    if missing or left_over:
        raise InputError(f"{path}: not a ResNet-50 of {layout.name}: {len(missing)} of 265 tensors missing"
                         f"{_some(missing)}, {len(left_over)} left over{_some(left_over)}")
    for name, shape in resnet50_shapes().items():
        tensor = backbone[name]
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InputError(f"{path}: {prefix}{name} has shape {found}, a ResNet-50 needs {tuple(shape)}")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {prefix}{name} holds NaN or infinite values")
    return {name: backbone[name].float().contiguous() for name in resnet50_shapes()}


def find_format(state, path):
    """The row of :data:`FORMATS` one of whose prefixes the names carry. Raises InputError."""
    for layout in FORMATS:
        if any(name.startswith(tuple(layout.prefixes.values())) for name in state):
            return layout
    found = sorted({name.split(".")[0] for name in state})
    raise InputError(f"{path}: unknown checkpoint, its keys begin with {', '.join(found[:8]) or 'nothing'}; "
                     f"known: {'; '.join(f'{f.name} ({f.prefixes[BRANCHES[0]]}*)' for f in FORMATS)}")


def load_tensors_only(path):
    """``torch.load`` that runs no code of the file. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}: give the file as INPUT, or pre-train first (tools/pretrain.py)")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the ways in which a broken file fails are torch's, zipfile's and pickle's
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint: "
                         f"{type(error).__name__}: {' '.join(str(error).split())[:150]}") from None
    if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
        raise InputError(f"{path} does not hold a state dict but a {type(contents).__name__}")
    return contents


def sha256(path):
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _some(names, most=4):
    return f" ({', '.join(names[:most])}{', …' if len(names) > most else ''})" if names else ""
