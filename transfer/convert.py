"""The 265 tensors of a pre-trained ResNet-50 -> Detectron2, torchvision and timm files, and back.

Every file carries its provenance (source, sha256, format, branch, method, step), so that a table of results can say
which weights it measured.
"""

import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from transfer.config import InputError
from transfer.readers import read_checkpoint, resnet50_shapes

# The transfer configs look for their weights here.
DEFAULT_INPUT = "output/pretrain/model_final.pth"
DEFAULT_OUTPUT = {
    "detectron2": "output/weights/rsa_r50.pkl",
    "torchvision": "output/weights/rsa_r50.pth",
    "timm": "output/weights/rsa_r50.safetensors",
}


def convert(source=DEFAULT_INPUT, output=None, to="detectron2", branch="online"):
    """Read ``source``, write it for library ``to``; returns (path written, provenance). Raises InputError."""
    state, provenance = read_checkpoint(source, branch)
    output = Path(output or DEFAULT_OUTPUT[to])
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(ENCODERS[to](state, provenance))
    os.replace(temporary, output)
    return output, provenance


def detectron2_name(name):
    """torchvision's name of a ResNet tensor -> Detectron2's, e.g. layer1.0.bn2.bias -> res2.0.conv2.norm.bias."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    return name if name.startswith("res") else "stem." + name


def encode_detectron2(state, provenance):
    # With "__author__" the checkpointer takes the file as one of its own zoo; the heuristics then match these
    # names, which lack the prefix "backbone.bottom_up.", by suffix.
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    return pickle.dumps({"model": arrays, "__author__": "RSA", "matching_heuristics": True,
                         "provenance": provenance}, protocol=4)


def encode_torchvision(state, provenance):
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "provenance": provenance}, buffer)
    return buffer.getvalue()


def encode_timm(state, provenance):
    # timm's ResNet-50 has torchvision's names; load with num_classes=0.
    return safetensors.torch.save(state, metadata={"provenance": json.dumps(provenance)})


ENCODERS = {"detectron2": encode_detectron2, "torchvision": encode_torchvision, "timm": encode_timm}


def load_weights(path):
    """Detectron2 ``.pkl`` of :func:`convert` -> (265 tensors under torchvision's names, provenance).

    Raises InputError when the file is absent, unreadable or not whole.
    """
    if not Path(path).is_file():
        raise InputError(f"no weights {path}: write them with tools/convert_to_d2.py, or ask for random "
                         'initialisation with MODEL.WEIGHTS ""')
    try:
        with open(path, "rb") as file:
            contents = ArrayUnpickler(file).load()
        arrays, provenance = contents["model"], contents["provenance"]
        state = {name: torch.from_numpy(arrays.pop(detectron2_name(name))) for name in resnet50_shapes()}
    except Exception as error:  # a broken pickle can fail in any way
        raise InputError(f"{path} is not a file of tools/convert_to_d2.py ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:150]})") from None
    wrong = [name for name, shape in resnet50_shapes().items() if state[name].shape != shape]
    if wrong or arrays:
        raise InputError(f"{path}: {len(wrong)} tensors of a wrong shape, {len(arrays)} unknown: "
                         f"{', '.join([*wrong, *arrays][:4])}")
    return state, provenance


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers, nothing that could run code."""

    ALLOWED = {("numpy", "dtype"), ("numpy", "ndarray"),
               ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
               ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is not an array")
        # numpy 2 renamed numpy.core to numpy._core; a file may come from either.
        return super().find_class(module if hasattr(np, "_core") else module.replace("._core", ".core"), name)
