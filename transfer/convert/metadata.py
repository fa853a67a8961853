"""What a checkpoint says besides its tensors: network, method, step and pixel statistics."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES, supported
from rsa_detectron2.transfer.convert.files import printable
from rsa_detectron2.transfer.convert.formats import IMAGENET, OTHER_STRIDES, SAID, UNSCALED, Pixels
from rsa_detectron2.transfer.convert.stored import Call

DILATED = ("deeplab", "fcn", "pspnet", "lraspp")
# What torchvision's and timm's ResNets have, of the settings of a fine-tuned detector.
NEEDED_SETTINGS = {"INPUT.FORMAT": "RGB", "MODEL.RESNETS.STRIDE_IN_1X1": False}
NAMED_PIXELS = {"imagenet": IMAGENET, "unscaled": UNSCALED}


def said(contents: dict, what: str, kind: type = str) -> str | int | None:
    """The first value of type ``kind`` under one of the keys of :data:`SAID`, or None."""
    found = (peek(contents, key) for key in SAID[what])
    return next((value for value in found if type(value) is kind), None)


def peek(contents: Any, keys: str) -> Any:
    """The value under "a.b" in nested dicts and in the attributes of pickled objects, or None."""
    for key in (*keys.split("."), None):
        if type(contents) is Call and type(contents.state) is dict:
            contents = contents.state.get("_content", contents.state.get("_val", contents.state))
        if key:
            contents = contents.get(key) if type(contents) is dict else None
    return contents


def beside(path: str | Path, most: int = 1 << 20) -> dict:
    """{"hub": content} of the config.json of Hugging Face beside a file; {} where there is none.

    Raises InputError where it cannot be read.
    """
    config = Path(path).with_name("config.json")
    if (
        Path(path).name not in ("model.safetensors", "pytorch_model.bin")
        or not config.is_file()
        or (config.stat().st_size > most)
    ):
        return {}
    try:
        return {"hub": json.loads(config.read_bytes())}
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: the config.json beside it, which says what network it is, cannot be read "
            f"({type(error).__name__}): restore it, or move it away"
        ) from None


def finetune_settings(contents: dict) -> dict:
    """{"INPUT.FORMAT": "RGB", ...} in the record of a detector that this project fine-tuned, else {}."""
    settings = peek(contents, "run.settings")
    return settings if type(settings) is dict and peek(contents, "run.kind") == "finetune" else {}


def stated_pixels(contents: dict) -> Pixels | None:
    """Mean and std in [0, 1] that a file says it was trained on, or None."""
    settings = finetune_settings(contents)
    found = [settings.get(key) for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")]
    if all(map(is_rgb, found)):
        return [[value / 255 for value in values] for values in found]
    found = [
        next((list(value) for value in (peek(contents, key) for key in SAID[what]) if is_rgb(value)), None)
        for what in ("mean", "std")
    ]
    return found if all(found) else None


def is_rgb(values: object) -> bool:
    """Whether it is three finite numbers."""
    return (
        type(values) in (list, tuple)
        and len(values) == 3
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def parse_pixels(text: str) -> Pixels:
    """ "imagenet", "unscaled" or "R,G,B/R,G,B" -> (mean, std) in [0, 1].

    Where a value is above 1, all are taken as 0-255. Raises InputError.
    """
    if text in NAMED_PIXELS:
        return NAMED_PIXELS[text]
    try:
        pixels = [[float(value) for value in part.split(",")] for part in text.split("/")]
        scale = 255 if max(max(part) for part in pixels) > 1 else 1
        mean, std = ([value / scale for value in part] for part in pixels)
    except ValueError:
        mean, std = (), ()
    if not is_rgb(mean) or not is_rgb(std) or min(std) <= 0:
        raise InputError(
            f"--pixels {text}: give imagenet, unscaled, or mean and std of R,G,B as "
            "0.5,0.5,0.5/0.25,0.25,0.25"
        )
    return mean, std


def own_config(contents: dict) -> dict:
    """The configuration in a checkpoint of this project, {} where it has none."""
    config = yaml.safe_load(contents.get("config") or "{}")
    if type(config) is not dict or not all(
        type(part) is dict for part in (config.get("DATA", {}), config.get("MODEL", {}))
    ):
        raise ValueError("its configuration cannot be read")
    return config


def own_pixels(contents: dict) -> Pixels:
    """Mean and std in [0, 1] from the configuration in a checkpoint of this project."""
    data = own_config(contents).get("DATA", {})
    mean, std = (data.get(key, values) for key, values in zip(("MEAN", "STD"), IMAGENET))
    if not is_rgb(mean) or not is_rgb(std):
        raise ValueError("DATA.MEAN and DATA.STD of its configuration are not those of three channels")
    return mean, std


def check_own_network(contents: dict, path: str | Path) -> None:
    """Raises InputError where a checkpoint of this project has a backbone that is not converted."""
    model = own_config(contents).get("MODEL", {})
    name = model.get("BACKBONE", "resnet50")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{path} holds a network of MODEL.BACKBONE {printable(name)}; what is converted: {supported()}"
        )
    if model.get("SMALL_STEM"):
        raise InputError(
            f"{path} holds a {name} with MODEL.SMALL_STEM, the 3x3 stem for small images: Detectron2, "
            "torchvision and timm have no such network"
        )


def check_network(contents: dict, architecture: str, path: str | Path) -> None:
    """Raises InputError where the file says that its network is not ``architecture``.

    Some networks have a ResNet's names and shapes, but other strides or another pooling.
    """
    name = said(contents, "network")
    for key, value in NEEDED_SETTINGS.items():
        found = finetune_settings(contents).get(key, value)
        if found != value:
            raise InputError(f"{path} was fine-tuned with {key} {found}; what is converted has {key} {value}")
    if peek(contents, "hub.downsample_in_bottleneck") is True:
        raise InputError(
            f"{path} strides in the 1x1 convolution (downsample_in_bottleneck in its config.json), which "
            "torchvision's and timm's ResNets do not"
        )
    for pattern, what in OTHER_STRIDES:
        if re.search(pattern, said(contents, "config") or ""):
            raise InputError(
                f"{path} says in its configuration that the ResNet {what}, which torchvision's and timm's "
                "do not"
            )
    if name and is_other_network(name, architecture):
        raise InputError(
            f"{path} says that its network is {printable(name)!r}: its names and shapes are those of a "
            f"{ARCHITECTURES[architecture].label}, but not its strides or its pooling, so that it would "
            "compute something else"
        )


def is_other_network(name: str, architecture: str) -> bool:
    """Whether a name such as "resnetblur50" means a network other than ``architecture``.

    Words before the network do not count ("tv_resnet50"), except those of networks that dilate it. A name
    without a ResNet in it may be anything, such as a method's, and does not count either.
    """
    plain = name.rpartition("/")[2].partition(".")[0].lower().replace("-", "").removesuffix("_v1b")
    network = re.search(r"(?:^|_)((?:wide_)?resne.*)", plain)
    if "resne" not in plain:
        return False
    return (
        not network
        or plain.startswith(DILATED)
        or re.sub("[^a-z0-9]", "", network[1]) != re.sub("[^a-z0-9]", "", architecture)
    )
