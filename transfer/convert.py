"""The 265 tensors of a pre-trained ResNet-50 -> Detectron2, torchvision and timm files, and back.

Every file carries its provenance (source, sha256, format, branch, method, step), so that a table of results can say
which weights it measured.
"""

import io
import json
import os
import pickle
import re
import zlib
from pathlib import Path

import safetensors.torch
import torch

from transfer.config import DEFAULT_WEIGHTS, InputError
from transfer.readers import read_checkpoint, read_tensors, resnet50_shapes
from transfer.safe_load import as_tensor, open_checkpoint

DEFAULT_INPUT = "output/pretrain/model_final.pth"
SUFFIXES = {"detectron2": ".pkl", "torchvision": ".pth", "timm": ".safetensors"}


def convert(source=DEFAULT_INPUT, output=None, to="detectron2", branch="online"):
    """Read ``source``, write it for library ``to``, by default beside :data:`DEFAULT_WEIGHTS` under its method's name;
    returns (path written, provenance). Raises InputError."""
    state, provenance = read_checkpoint(source, branch)
    if output is None:
        method = re.sub("[^a-z0-9]+", "_", provenance["method"].removeprefix("the authors' ").lower()).strip("_")
        output = Path(DEFAULT_WEIGHTS).with_name(f"{method}_r50{'_target' * (branch == 'target')}{SUFFIXES[to]}")
    output = Path(output)
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
                         "provenance": provenance, "crc32": checksum(state, provenance)}, protocol=4)


def checksum(state, provenance):
    """CRC-32 of what :func:`load_weights` returns: a pickle has none of its own."""
    crc = zlib.crc32(json.dumps(provenance).encode())
    for tensor in state.values():
        crc = zlib.crc32(tensor.numpy(), crc)
    return crc


def encode_torchvision(state, provenance):
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "provenance": provenance}, buffer)
    return buffer.getvalue()


def encode_timm(state, provenance):
    # timm's ResNet-50 has torchvision's names; load with num_classes=0.
    return safetensors.torch.save(state, metadata={"provenance": json.dumps(provenance)})


ENCODERS = {"detectron2": encode_detectron2, "torchvision": encode_torchvision, "timm": encode_timm}


def load_weights(path):
    """Detectron2 ``.pkl`` of :func:`convert` -> (265 float32 tensors under torchvision's names, provenance).

    Raises InputError when the file is absent, unreadable, damaged or not whole. Never runs code of the file.
    """
    if not Path(path).is_file():
        raise InputError(f"no weights {path}: write them with tools/convert_to_d2.py, or ask for random "
                         'initialisation with MODEL.WEIGHTS ""')
    foreign = f"{path} is not a file of tools/convert_to_d2.py: "
    with open_checkpoint(path) as contents:
        stored, provenance = map(contents.get, ("model", "provenance")) if type(contents) is dict else (None, None)
        if type(stored) is not dict or not _is_plain(provenance):
            raise InputError(foreign + "it has no model with its provenance")
        found = {name: stored[detectron2_name(name)] for name in resnet50_shapes() if detectron2_name(name) in stored}
        if len(found) != len(resnet50_shapes()) or len(stored) != len(found):
            raise InputError(foreign + f"{len(resnet50_shapes()) - len(found)} of {len(resnet50_shapes())} tensors are "
                             f"missing, {len(stored) - len(found)} are unknown")
        state = read_tensors(found, path)
        if contents.get("crc32") != checksum(state, provenance):
            raise InputError(f"{path} is damaged, its checksum differs: write it again with tools/convert_to_d2.py")
    return state, provenance


def load_model(path, needed):
    """A fine-tuned model of either engine -> (its tensors, float32 or as ``needed`` {name: tensor} has them; the
    iterations that it took, -1 where the file does not say; the provenance that the embedded engine keeps there, or None).

    Raises InputError when the file is absent, unreadable, or lacks a tensor. Never runs code of the file.
    """
    foreign = f"{path} is not a model that tools/train_net.py has fine-tuned: "
    with open_checkpoint(path) as contents:
        stored = contents.get("model") if type(contents) is dict else None
        if type(stored) is not dict:
            raise InputError(foreign + "it has no model")
        found = {name: as_tensor(stored.get(name)) for name in needed}
        wrong = [name for name, tensor in found.items() if tensor is None or tensor.shape != needed[name].shape]
        if wrong:
            raise InputError(f"{path} lacks {len(wrong)} tensors of this config's model, or has them in another shape: "
                             f"{', '.join(wrong[:3])}")
        state = {name: tensor.read().to(needed[name].dtype, copy=True) for name, tensor in found.items()}
        iteration, weights = contents.get("iteration", -2), contents.get("weights")
        if type(iteration) is not int or weights is not None and not _is_plain(weights):
            raise InputError(foreign + "its iteration or its weights' provenance is of another kind")
    return state, iteration + 1, weights


def _is_plain(provenance):
    """Whether all values are JSON's, without nesting but for lists of numbers."""
    return type(provenance) is dict and all(
        type(name) is str and all(type(part) in (str, int, float, bool) for part in
                                  (value if type(value) is list else [value])) for name, value in provenance.items())
