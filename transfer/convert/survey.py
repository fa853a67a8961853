"""What lies where in a file that no row of formats.py accounts for, as text for an error line."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rsa_detectron2.transfer.convert import architectures
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES
from rsa_detectron2.transfer.convert.files import printable
from rsa_detectron2.transfer.convert.formats import CONTAINERS, FORMATS, OTHER_NETWORKS
from rsa_detectron2.transfer.convert.match import Match
from rsa_detectron2.transfer.convert.stored import Call

# The last stage's first convolution, by the names of torchvision, nn.Sequential, Detectron2 and Hugging Face.
LANDMARK = re.compile(
    r"(?:layer4\.0|(?<![^.])7\.0|res5\.0)\.conv1\.weight$|"
    r"encoder\.stages\.3\.layers\.0\.layer\.0\.convolution\.weight$"
)
MODULE = "holds a whole pickled module, whose code is never run: save its state_dict() instead"
DEPTH = 3  # levels of dicts that are looked into


def state_dicts(
    contents: Any, key: str = "", depth: int = DEPTH, seen: set[int] | None = None
) -> Iterator[tuple[str, dict]]:
    """("a/b", dict) of each dict in a file, each once, because dicts may hold one another."""
    seen = set() if seen is None else seen
    if type(contents) is not dict or id(contents) in seen:
        return
    seen.add(id(contents))
    yield key, contents
    for name, value in contents.items() if depth else ():
        yield from state_dicts(value, f"{key}/{name}".lstrip("/"), depth - 1, seen)


def networks(contents: Any) -> list[tuple[str, str]]:
    """[(container, prefix)] of each ResNet in a file, known format or not."""
    return [
        (key, LANDMARK.sub("", name))
        for key, state in state_dicts(contents)
        for name in state
        if type(name) is str and LANDMARK.search(name)
    ]


def other_network(contents: dict) -> str | None:
    """The network that a file holds instead of a ResNet, where a name in it tells; else None."""
    names = [(key, name) for key, state in state_dicts(contents) for name in state if type(name) is str]
    for key, name in names:
        for pattern, label in OTHER_NETWORKS:
            if re.search(pattern, name[:200]):
                return f"{label} ({printable(f'{key}/{name}'.lstrip('/'), 80)})"
    return None


def describe(contents: object) -> str:
    """What a file that is no dict of strings holds."""
    if _is_module(contents):
        return MODULE
    return f"does not hold a state dict but a {type(contents).__name__}"


def networks_in(contents: dict) -> str:
    """Why a file fits no row, and what lies where in it."""
    if places := networks(contents):
        shown = some(["/".join(filter(None, place)) or "the names themselves" for place in places]).strip(
            " ()"
        )
        return (
            f"unknown checkpoint, its keys begin with {beginnings(contents)}: ResNets lie under {shown}, "
            f"which is none of {len(FORMATS)} known layouts (transfer/convert/formats.py); "
            "save one backbone's state_dict() alone"
        )
    for key, state in state_dicts(contents):
        for name, value in state.items():
            if _is_module(value):
                return f"{printable(f'{key}/{name}'.lstrip('/'), 80)} {MODULE}"
    return (
        f"unknown checkpoint, its keys begin with {beginnings(contents)}: no ResNet was found in it, "
        f"and it is none of {len(FORMATS)} known layouts (transfer/convert/formats.py)"
    )


def _is_module(value):
    return type(value) is Call and type(value.state) is dict and "_modules" in value.state


def beginnings(contents: dict) -> str:
    """The first components of the names in a file's state dict; without one, of its keys."""
    contents = next((contents[key] for key in CONTAINERS if type(contents.get(key)) is dict), contents)
    found = sorted({name.split(".")[0] for name in contents if type(name) is str})
    return ", ".join(printable(name, 40) for name in found[:8]) or "nothing"


def grouped(names: list[str], most: int = 6) -> str:
    """Many names in few words, the largest groups first: "encoder_k. (265), projector. (12), …"."""
    heads = Counter("".join(name.partition(".")[:2]) for name in names).most_common()
    shown = [
        f"{printable(head, 40)} ({count})"
        if count > 1
        else printable(next(name for name in names if name.startswith(head)), 80)
        for head, count in heads[:most]
    ]
    return ", ".join([*shown, "…"] if len(heads) > most else shown)


def some(names: list[str], most: int = 4) -> str:
    """ " (a, b, c, d, …)"; "" for no names."""
    shown = ", ".join(printable(name, 80) for name in names[:most])
    return f" ({shown}{', …' if len(names) > most else ''})" if names else ""


def what_is_wrong(match: Match) -> str:
    """Why a branch that a row found is not taken."""
    label, place = ARCHITECTURES[match.architecture].label, f" under {match.place}" if match.place else ""
    total = len(architectures.tensor_shapes(match.architecture))
    rest = f"; not accounted for: {grouped(match.left_over)}" if match.left_over else ""
    if any(name.startswith(f"{match.prefix}layer") for name in match.left_over):
        return (
            f"the network{place} is not one that is converted; it is most like a {label}, with "
            f"{len(match.missing)} of {total} tensors missing{rest}"
        )
    if not match.missing:
        return (
            f"the {match.branch} branch is whole, a {label}{place}{rest}; no checkpoint of "
            f"{match.layout.name} has that, so save the backbone's state_dict() alone"
        )
    norm = all(name.endswith(("running_mean", "running_var")) for name in match.missing)
    norm = ": its norm layers are no BatchNorm (GroupNorm?)" if norm and len(match.missing) > 2 else ""
    lost = f"{len(match.missing)} of {total} tensors missing{some(match.missing)}"
    return f"not a whole {label}{place}: {lost}{norm}{rest}"
