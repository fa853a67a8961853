"""The tensors of a pre-trained ResNet -> files for Detectron2, torchvision and timm, and back.

Every file holds its provenance (source, sha256, format, branch, method, step), so that a table of results can
say which weights it measured.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import DEFAULT_WEIGHTS
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES
from rsa_detectron2.transfer.convert.files import local_file, open_checkpoint
from rsa_detectron2.transfer.convert.formats import Pixels
from rsa_detectron2.transfer.convert.provenance import checksum, is_plain
from rsa_detectron2.transfer.convert.readers import read_checkpoint, read_converted
from rsa_detectron2.transfer.convert.stored import as_tensor

DEFAULT_INPUT = "output/pretrain/model_final.pth"
SUFFIXES = {"detectron2": ".pkl", "torchvision": ".pth", "timm": ".safetensors"}


@dataclass(frozen=True)
class ReadOptions:
    """What the user states of a checkpoint: which network to take, and what the file does not say."""

    branch: str | None = None  # "online" or "target"; None: online, or the one that a converted file holds
    pixels: Pixels | None = None  # (mean, std) of RGB in [0, 1]
    method: str | None = None


def convert(
    source: str | Path = DEFAULT_INPUT,
    output: str | Path | None = None,
    to: str = "detectron2",
    options: ReadOptions = ReadOptions(),
    overwrite: bool = False,
) -> tuple[Path, dict]:
    """Read ``source`` and write it for library ``to``, a key of :data:`SUFFIXES`.

    ``output``: by default beside :data:`DEFAULT_WEIGHTS`, with a name by its method, or by ``source`` where
    the method is unknown. Returns (path written, provenance). Raises InputError, also where ``output``
    holds anything but the same weights and ``overwrite`` is not set.
    """
    state, provenance = read_checkpoint(source, options.branch, options.pixels)
    if options.method and provenance["method"] not in ("unknown", options.method):
        held = provenance["method"]
        raise InputError(f"{source} says that its method is {held}: leave out --method {options.method}")
    provenance["method"] = options.method or provenance["method"]
    output = Path(output).expanduser() if output is not None else _default_output(provenance, to)
    if output.is_dir():
        raise InputError(f"{output} is a folder: give a file as OUTPUT")
    if output.exists() and not overwrite:
        _refuse_other_weights(output, provenance)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(ENCODERS[to](state, provenance))
    os.replace(temporary, output)
    return output, provenance


def _default_output(provenance, to):
    """Path for converted weights, such as output/weights/rsa_r50_target.pkl."""
    name = provenance["method"] if provenance["method"] != "unknown" else Path(provenance["source"]).stem
    words = [
        re.sub("[^a-z0-9]+", "_", name.lower()).strip("_"),
        ARCHITECTURES[provenance["architecture"]].short,
    ]
    if provenance["branch"] == "target":
        words.append("target")
    return Path(DEFAULT_WEIGHTS).with_name("_".join(words) + SUFFIXES[to])


def _refuse_other_weights(output, provenance):
    """Raises InputError unless ``output`` was converted from the same branch of the same source."""
    held = {}
    with contextlib.suppress(InputError), open_checkpoint(output) as contents:
        if type(contents) is dict and "provenance" in contents:
            held = read_converted(contents, output)[1]
    if any(held.get(key) != provenance[key] for key in ("sha256", "branch")):
        what = (
            f"weights of another source ({held.get('source')}, {held.get('branch')} branch)"
            if held
            else "something else"
        )
        raise InputError(f"{output} is there already, and holds {what}: give another OUTPUT, or --overwrite")


def detectron2_name(name: str) -> str:
    """torchvision's name -> Detectron2's, e.g. layer1.0.bn2.bias -> res2.0.conv2.norm.bias."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    return name if name.startswith("res") else "stem." + name


def encode_detectron2(state: dict[str, torch.Tensor], provenance: dict) -> bytes:
    # By "__author__" Detectron2's checkpointer takes the file for one of its own zoo. The heuristics then
    # match these names by suffix, because they lack the prefix "backbone.bottom_up.".
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    return pickle.dumps(
        {
            "model": arrays,
            "__author__": "RSA",
            "matching_heuristics": True,
            "provenance": provenance,
            "crc32": checksum(state, provenance),
        },
        protocol=4,
    )


def encode_torchvision(state: dict[str, torch.Tensor], provenance: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "provenance": provenance, "crc32": checksum(state, provenance)}, buffer)
    return buffer.getvalue()


def encode_timm(state: dict[str, torch.Tensor], provenance: dict) -> bytes:
    # timm's ResNets have torchvision's names. Without its fc, a file loads with num_classes=0.
    return safetensors.torch.save(
        state,
        metadata={"provenance": json.dumps(provenance), "crc32": json.dumps(checksum(state, provenance))},
    )


ENCODERS = {"detectron2": encode_detectron2, "torchvision": encode_torchvision, "timm": encode_timm}


def load_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Detectron2 ``.pkl`` of :func:`convert` -> (float32 tensors under torchvision's names, provenance).

    Raises InputError when the file is absent, unreadable, damaged or not whole. Never runs code of the file.
    """
    path = local_file(
        path,
        f"no weights {path}: write them with tools/convert_to_d2.py, or ask for random "
        'initialization with MODEL.WEIGHTS ""',
    )
    with open_checkpoint(path) as contents:
        if type(contents) is not dict or "provenance" not in contents or "__author__" not in contents:
            raise InputError(
                f"{path} is not a Detectron2 file of tools/convert_to_d2.py; convert it first: "
                f"tools/convert_to_d2.py {shlex.quote(path)}"
            )
        return read_converted(contents, path)


def load_model(
    path: str | Path, needed: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int, dict | None]:
    """A fine-tuned model of either engine -> (tensors, iterations, provenance).

    The tensors are those of ``needed``, {name: tensor}, with its dtypes. Iterations: how many the training
    took, -1 where the file does not say. Provenance: of the weights that training started from, which only
    the embedded engine keeps there; else None. Raises InputError when the file is absent, unreadable, or
    lacks a tensor. Never runs code of the file.
    """
    foreign = f"{path} is not a model that tools/train_net.py has fine-tuned: "
    path = local_file(path, f"no model {path}: give one that tools/train_net.py has fine-tuned")
    with open_checkpoint(path) as contents:
        stored = contents.get("model") if type(contents) is dict else None
        if type(stored) is not dict:
            raise InputError(foreign + "it has no model")
        found = {name: as_tensor(stored.get(name)) for name in needed}
        wrong = [
            name for name, tensor in found.items() if tensor is None or tensor.shape != needed[name].shape
        ]
        if wrong:
            raise InputError(
                f"{path} lacks {len(wrong)} tensors of this config's model, or has them in another shape: "
                f"{', '.join(wrong[:3])}"
            )
        state = {name: tensor.read().to(needed[name].dtype, copy=True) for name, tensor in found.items()}
        iteration, weights = contents.get("iteration", -2), contents.get("weights")
        if type(iteration) is not int or weights is not None and not is_plain(weights):
            raise InputError(foreign + "its iteration or its weights' provenance is of another kind")
    return state, iteration + 1, weights
