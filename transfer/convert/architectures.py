"""The ResNets that are converted: names and shapes of their tensors, Detectron2's keys for them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torchvision

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert.stored import as_tensor


@dataclass(frozen=True)
class Architecture:
    """``label`` in messages, ``short`` in file names; the rest are Detectron2's MODEL.RESNETS keys."""

    label: str
    short: str
    depth: int
    groups: int = 1
    width: int = 64
    res2: int = 256

    def resnets(self) -> dict[str, int]:
        """{key of Detectron2's MODEL.RESNETS: value} that build this network."""
        return {
            "DEPTH": self.depth,
            "NUM_GROUPS": self.groups,
            "WIDTH_PER_GROUP": self.width,
            "RES2_OUT_CHANNELS": self.res2,
        }


# torchvision and timm call each by the same name.
ARCHITECTURES = {
    "resnet50": Architecture("ResNet-50", "r50", 50),
    "resnet18": Architecture("ResNet-18", "r18", 18, res2=64),
    "resnet34": Architecture("ResNet-34", "r34", 34, res2=64),
    "resnet101": Architecture("ResNet-101", "r101", 101),
    "resnet152": Architecture("ResNet-152", "r152", 152),
    "resnext50_32x4d": Architecture("ResNeXt-50 32x4d", "x50", 50, groups=32, width=4),
    "resnext101_32x8d": Architecture("ResNeXt-101 32x8d", "x101", 101, groups=32, width=8),
    "resnext101_64x4d": Architecture("ResNeXt-101 64x4d", "x101_64x4d", 101, groups=64, width=4),
    "wide_resnet50_2": Architecture("Wide ResNet-50-2", "w50", 50, width=128),
    "wide_resnet101_2": Architecture("Wide ResNet-101-2", "w101", 101, width=128),
}


def supported() -> str:
    """The labels of all architectures, for a message."""
    return ", ".join(architecture.label for architecture in ARCHITECTURES.values())


def of_config(resnets: dict) -> str:
    """The name of the network that Detectron2's MODEL.RESNETS (a dict) build. Raises InputError."""
    deep = [name for name, architecture in ARCHITECTURES.items() if architecture.depth == resnets["DEPTH"]]
    for name in deep:
        if all(resnets[key] == value for key, value in ARCHITECTURES[name].resnets().items()):
            return name
    choices = " or ".join(
        ", ".join(f"{key} {value}" for key, value in ARCHITECTURES[name].resnets().items() if key != "DEPTH")
        for name in deep
    )
    given = ", ".join(
        f"{key} {resnets[key]}" for key in ("NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS")
    )
    fix = f": give {choices}" if deep else ""
    raise InputError(
        f"MODEL.RESNETS.DEPTH {resnets['DEPTH']} with {given} is no network that this engine knows{fix}"
    )


@lru_cache
def tensor_shapes(name: str = "resnet50") -> dict[str, torch.Size]:
    """{torchvision name: shape} of a network's convolutions and of the four tensors of each BatchNorm,
    without fc: 265 for a ResNet-50."""
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    return {
        tensor: value.shape
        for tensor, value in state.items()
        if not tensor.startswith("fc.") and not tensor.endswith("num_batches_tracked")
    }


def nearest(found: dict[str, Any]) -> str:
    """The name of the architecture that ``found``, {torchvision name: stored value}, is most like.

    Names count first. Shapes decide between architectures with the same names.
    """
    apart = {name: len(tensor_shapes(name).keys() ^ found.keys()) for name in ARCHITECTURES}
    alike = [name for name in apart if apart[name] == min(apart.values())]
    return min(alike, key=lambda name: _misshapen(found, name)) if len(alike) > 1 else alike[0]


def _misshapen(found, name):
    """How many of the ``found`` tensors have another shape than in the architecture ``name``."""
    shapes = tensor_shapes(name)
    return sum(not _has_shape(found[tensor], shapes[tensor]) for tensor in shapes if tensor in found)


def _has_shape(value, shape):
    tensor = as_tensor(value)
    return tensor is not None and tensor.shape == shape
