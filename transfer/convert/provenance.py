"""The provenance of weights, which goes with them from file to file: source, method, step, branch, pixels.

It is a dict of plain JSON values.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path

import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import RGB_IMAGENET
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES
from rsa_detectron2.transfer.convert.files import printable
from rsa_detectron2.transfer.convert.formats import ASK, ASSUMED, FORMATS, IMAGENET, OURS, Format, Pixels
from rsa_detectron2.transfer.convert.match import Match
from rsa_detectron2.transfer.convert.metadata import is_rgb, own_pixels, said, stated_pixels

BRANCHES = ("online", "target")


def is_json(value: object) -> bool:
    """Whether a value is JSON text."""
    try:
        json.loads(value if type(value) is str else "")
    except (ValueError, RecursionError):
        return False
    return True


# Key of a provenance: test of the value that a file claims.
CLAIMS = {
    "branch": BRANCHES.__contains__,
    "architecture": ARCHITECTURES.__contains__,
    "input_format": ("RGB", "BGR").__contains__,
    "stride_in_1x1": lambda value: type(value) is bool,
    "step": lambda value: type(value) is int,
    **{
        key: lambda value: type(value) is str
        for key in ("source", "sha256", "format", "method", "pixel_source")
    },
    **{key: is_rgb for key in ("pixel_mean", "pixel_std")},
    "run": is_json,
}


def describe_source(contents: dict, match: Match, path: str | Path, pixels: Pixels | None = None) -> dict:
    """The provenance of a file that a row of formats.py accounts for.

    ``pixels``: (mean, std) in [0, 1] that the user states. Raises InputError.
    """
    (mean, std), source = find_pixels(contents, match.layout, path, pixels)
    method, step = said(contents, "method"), said(contents, "step", int)
    return {
        "source": Path(path).name,
        "sha256": sha256(path),
        "format": match.layout.name,
        "branch": match.branch,
        "method": "unknown" if method is None else printable(method),
        "step": -1 if step is None else step,
        "pixel_mean": [round(255 * value, 3) for value in mean],
        "pixel_std": [round(255 * value, 3) for value in std],
        "pixel_source": source,
        "input_format": "RGB",
        "stride_in_1x1": False,
        "architecture": match.architecture,
        **({"run": record_of(contents, path)} if match.layout.name == OURS and "run" in contents else {}),
    }


def record_of(contents: dict, path: str | Path) -> str:
    """The record of the pre-training in a checkpoint, as JSON text. Raises InputError."""
    try:
        return json.dumps(contents["run"], allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{path} is damaged: its record of the run is not plain JSON") from None


def find_pixels(
    contents: dict, layout: Format, path: str | Path, given: Pixels | None = None
) -> tuple[Pixels, str]:
    """((mean, std) in [0, 1] that a file was trained on, where they come from).

    They come from the "file", the user ("given"), the "format", or are "assumed". Raises InputError.
    """
    stated = own_pixels(contents) if layout.name == OURS else stated_pixels(contents)
    if stated and given and not same_pixels(stated, given):
        raise InputError(f"{path} says that it was trained on mean and std {stated}: leave --pixels out")
    if stated:
        return stated, "file"
    if given:
        return given, "given"
    if layout.pixels == ASK:
        raise InputError(
            f"{path} holds {layout.name}, which does not say how it sees pixels: where that was RGB and "
            "STRIDE_IN_1X1 False, give --pixels imagenet or its mean and std; else it cannot be converted"
        )
    return (IMAGENET, ASSUMED) if layout.pixels == ASSUMED else (layout.pixels, "format")


def same_pixels(one: Pixels, other: Pixels) -> bool:
    """Whether two (mean, std) of three channels are equal."""
    return all(
        math.isclose(a, b, abs_tol=1e-4) for mine, yours in zip(one, other) for a, b in zip(mine, yours)
    )


def is_untrained(state: dict[str, torch.Tensor]) -> bool:
    """Whether every BatchNorm still has its initial statistics."""
    return all(
        torch.all(tensor == name.endswith("var")) for name, tensor in state.items() if "running_" in name
    )


def method_of(provenance: dict) -> str:
    """The method of converted weights for a message: "rsa", or "unknown method (layout of SimSiam)"."""
    method, layout = provenance.get("method", "unknown"), provenance.get("format")
    return f"unknown method (layout of {layout})" if method == "unknown" and layout else method


def remarks(provenance: dict) -> list[str]:
    """Lines with what the user should know of a file that was read."""
    lines = []
    if provenance.get("pixel_source") == ASSUMED:
        lines.append(
            "pixels: the file does not say how it was trained to see them; RGB with ImageNet's mean and std "
            "is assumed (--pixels states another)"
        )
    note = next((layout.note for layout in FORMATS if layout.name == provenance["format"]), "")
    if note and provenance["branch"] == "online":
        lines.append(f"note: {note}")
    if "untrained" in provenance:
        lines.append("warning: every BatchNorm has its initial statistics: these weights look untrained")
    return lines


def complete(
    provenance: dict, path: str | Path, branch: str | None = None, pixels: Pixels | None = None
) -> dict:
    """A converted file's provenance, with defaults for what files of early versions lack.

    ``pixels`` replace those that were assumed. Raises InputError if the file is of another branch, or says
    that it has other pixels.
    """
    held = provenance.get("branch", "online")
    if branch not in (None, held):
        raise InputError(
            f"{path} was converted from the {held} branch and holds no other: convert the checkpoint "
            f"({provenance.get('source', 'its source')}) again with --branch {branch}"
        )
    if pixels:
        known = {**RGB_IMAGENET, **provenance}
        stated = [[value / 255 for value in known[key]] for key in ("pixel_mean", "pixel_std")]
        if provenance.get("pixel_source") == ASSUMED:
            mean, std = ([round(255 * value, 3) for value in values] for values in pixels)
            provenance = provenance | {"pixel_mean": mean, "pixel_std": std, "pixel_source": "given"}
        elif not same_pixels(stated, pixels):
            raise InputError(
                f"{path} says that it was trained on mean {known['pixel_mean']} and std "
                f"{known['pixel_std']}: leave --pixels out"
            )
    return {
        "source": Path(path).name,
        "format": "unknown",
        "branch": held,
        "method": "unknown",
        "step": -1,
        **RGB_IMAGENET,
        **provenance,
        "sha256": provenance.get("sha256") or sha256(path),
    }


def checksum(state: dict[str, torch.Tensor], provenance: dict) -> int:
    """CRC-32 of tensors and provenance: pickle and safetensors have none of their own."""
    crc = zlib.crc32(json.dumps(provenance).encode())
    for tensor in state.values():
        crc = zlib.crc32(tensor.numpy(), crc)
    return crc


def is_plain(provenance: object) -> bool:
    """Whether it is a flat dict of JSON values: numbers, texts, and lists of those."""
    return type(provenance) is dict and all(
        type(name) is str
        and all(type(part) in (str, int, float, bool) for part in (value if type(value) is list else [value]))
        for name, value in provenance.items()
    )


def is_sound(provenance: object) -> bool:
    """Whether what a file holds as its provenance can be one, by :data:`CLAIMS`."""
    return is_plain(provenance) and all(
        test(provenance[key]) for key, test in CLAIMS.items() if key in provenance
    )


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
