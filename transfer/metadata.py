"""What a checkpoint says of itself beside its tensors: network, method, step and pixel statistics."""

import re

import yaml

from transfer.architectures import ARCHITECTURES, supported
from transfer.config import InputError
from transfer.formats import IMAGENET, SAID
from transfer.safe_load import Call, printable


def said(contents, what, kind=str):
    """The first value of type ``kind`` under one of the keys of :data:`SAID`, or None."""
    found = (peek(contents, key) for key in SAID[what])
    return next((value for value in found if type(value) is kind), None)


def peek(contents, keys):
    """The value under "a.b" in nested dicts and in the attributes of pickled objects, OmegaConf's among them; or None."""
    for key in (*keys.split("."), None):
        if type(contents) is Call and type(contents.state) is dict:
            contents = contents.state.get("_content", contents.state.get("_val", contents.state))
        if key:
            contents = contents.get(key) if type(contents) is dict else None
    return contents


def own_config(contents):
    """The configuration in a checkpoint of this project, {} where it has none."""
    config = yaml.safe_load(contents.get("config") or "{}")
    if type(config) is not dict or not all(type(part) is dict for part in (config.get("DATA", {}), config.get("MODEL", {}))):
        raise ValueError("its configuration cannot be read")
    return config


def own_pixels(contents):
    """Mean and std in [0, 1] from the configuration in a checkpoint of this project."""
    data = own_config(contents).get("DATA", {})
    mean, std = (data.get(key, values) for key, values in zip(("MEAN", "STD"), IMAGENET))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("DATA.MEAN and DATA.STD of its configuration are not those of three channels")
    return [float(value) for value in mean], [float(value) for value in std]


def check_own_network(contents, path):
    """Raises InputError where a checkpoint of this project says that its backbone is none that is converted."""
    model = own_config(contents).get("MODEL", {})
    name = model.get("BACKBONE", "resnet50")
    if name not in ARCHITECTURES:
        raise InputError(f"{path} holds a network of MODEL.BACKBONE {printable(name)}; what is converted: {supported()}")
    if model.get("SMALL_STEM"):
        raise InputError(f"{path} holds a {name} with MODEL.SMALL_STEM, the 3x3 stem for small images: Detectron2, "
                         "torchvision and timm have no such network")


def check_network(contents, architecture, path):
    """Raises InputError where the file names another network than ``architecture``: names and shapes of some networks are
    a ResNet's, but their strides or their pooling are not."""
    name = said(contents, "network")
    if name and is_other_network(name, architecture):
        raise InputError(f"{path} says that its network is {printable(name)!r}: its names and shapes are those of a "
                         f"{ARCHITECTURES[architecture].label}, but not its strides or its pooling, so that it would "
                         "compute something else")


def is_other_network(name, architecture):
    """Whether a name such as "resnetblur50" means a ResNet other than ``architecture``. Names that are none of a ResNet
    are taken for something else, such as a method's."""
    plain = name.rpartition("/")[2].partition(".")[0].lower().replace("-", "_")
    plain = re.sub(r"^(tv|ssl|swsl|gluon)_|_v1b$", "", plain)
    return "resne" in plain and re.sub("[^a-z0-9]", "", plain) != re.sub("[^a-z0-9]", "", architecture)
