"""Checkpoint files -> the tensors of a ResNet under torchvision's names, and what is known of them.

A tensor that is missing, misshapen or not finite, or a name that no row of formats.py accounts for, is an
error that names it. Opening a file never runs its code (pickles.py).
"""

from pathlib import Path
from typing import Any

import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert import architectures
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES, supported
from rsa_detectron2.transfer.convert.files import local_file, open_checkpoint, printable
from rsa_detectron2.transfer.convert.formats import AVERAGES, DETECTRON2, FORMATS, OWN_FILE, Pixels
from rsa_detectron2.transfer.convert.match import Match, find_matches, places, rename
from rsa_detectron2.transfer.convert.metadata import beside, check_network, check_own_network
from rsa_detectron2.transfer.convert.provenance import (
    checksum,
    complete,
    describe_source,
    is_sound,
    is_untrained,
)
from rsa_detectron2.transfer.convert.stored import Call, as_tensor
from rsa_detectron2.transfer.convert.survey import (
    describe,
    networks,
    networks_in,
    other_network,
    what_is_wrong,
)


def read_checkpoint(
    path: str | Path, branch: str | None = None, pixels: Pixels | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """Checkpoint file -> (float32 CPU tensors under torchvision's names, provenance dict of plain JSON
    values).

    branch: "online" or "target"; None: online, or the one that a converted file holds. pixels: (mean, std)
    of RGB in [0, 1], for a file that does not say. For fine-tuning to check, the provenance says what the
    backbone was trained on: ``pixel_mean`` and ``pixel_std`` (0-255), ``input_format`` and
    ``stride_in_1x1``. A file that this project has converted keeps its provenance. Raises InputError with
    one line that names the file and what is missing, left over, misshapen or not finite.
    """
    path = local_file(
        path, f"no checkpoint {path}: give the file as INPUT, or pre-train first (tools/pretrain.py)"
    )
    with open_checkpoint(path) as contents:
        if type(contents) is not dict or not all(type(name) is str for name in contents):
            raise InputError(f"{path} {describe(contents)}")
        if "provenance" in contents:
            state, provenance = read_converted(contents, path)
            return state, complete(provenance, path, branch, pixels)
        if contents.get("format") == OWN_FILE:
            check_own_network(contents, path)
        match = find_branch(contents, branch or "online", path)
        statements = contents | beside(path)
        check_network(statements, match.architecture, path)
        state = read_tensors(match.found, path, match.architecture, match.prefix)
        provenance = describe_source(statements, match, path, pixels)
    if is_untrained(state):
        provenance["untrained"] = True
    return state, provenance


def find_branch(contents: dict, branch: str, path: str | Path) -> Match:
    """The :class:`Match` of ``branch`` in the first row that accounts for the file. Raises InputError."""
    rows = [(layout, list(find_matches(layout, contents))) for layout in FORMATS]
    for sought in ("online", "target"):  # where a file holds both, the online network tells the layout
        for layout, matches in rows:
            if any(match.whole() for match in matches if match.branch == sought):
                match = _only_one(
                    [match for match in matches if match.branch == branch], layout, branch, path
                )
                _check_no_other(
                    contents, match, {other.container for other in matches if other.whole()}, path
                )
                return match
    if other := other_network(contents):
        raise InputError(f"{path} holds {other}; what is converted: {supported()}")
    nearest = min(
        (match for _, matches in rows for match in matches if match.branch == branch and match.partial()),
        key=lambda match: (len(match.missing), len(match.left_over)),
        default=None,
    )
    raise InputError(f"{path}: {what_is_wrong(nearest) if nearest else networks_in(contents)}")


def _only_one(matches, layout, branch, path):
    """The whole one of the ``matches`` of ``branch``. Raises InputError unless there is exactly one."""
    whole = [match for match in matches if match.whole()]
    if len(whole) > 1:
        raise InputError(
            f"{path} holds more than one {branch} network, under {' and '.join(m.place for m in whole)}: "
            "save the state dict of one of them alone"
        )
    if whole:
        return whole[0]
    if matches:
        raise InputError(f"{path}: {what_is_wrong(matches[0])}")
    sought = dict.fromkeys("/".join(filter(None, place)) for kind, *place in places(layout) if kind == branch)
    raise InputError(
        f"{path}: a checkpoint of {layout.name} without the {branch} branch: nothing lies under "
        f"{' or '.join(sought)}"
    )


def _check_no_other(contents, match, known, path):
    """Raises InputError where the file has another ResNet, in a dict that the row does not know.

    ``known``: the dicts where the row found a ResNet. Moving averages do not count.
    """
    known = known | {container for _, container, _ in places(match.layout) if container}
    for container, prefix in networks(contents):
        if container not in known and container.rpartition("/")[2] not in AVERAGES:
            raise InputError(
                f"{path} holds a network under {match.place or 'its own names'} and another "
                f"under {container}/{prefix}, and does not say which is meant: save one of their state dicts "
                "alone"
            )


def read_tensors(
    found: dict[str, Any], path: str | Path, architecture: str = "resnet50", prefix: str = ""
) -> dict[str, torch.Tensor]:
    """{torchvision name: stored value} of a network -> the same, float32 and contiguous, checked.

    Raises InputError.
    """
    state, label = {}, ARCHITECTURES[architecture].label
    for name, shape in architectures.tensor_shapes(architecture).items():
        tensor = as_tensor(found[name])
        if tensor is None or tensor.shape != shape:
            raise InputError(
                f"{path}: {prefix}{name} has shape {_kind(found[name], tensor)}, "
                f"a {label} needs {tuple(shape)}"
            )
        tensor = tensor.read()
        if not tensor.is_floating_point():
            raise InputError(f"{path}: {prefix}{name} holds {tensor.dtype}, a {label} needs floats")
        # A copy, because small tensors may be views of one large storage
        state[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(torch.stack(state[name].aminmax())).all():
            raise InputError(f"{path}: {prefix}{name} holds NaN or infinite values")
    return state


def read_converted(contents: dict, path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A file of tools/convert_to_d2.py, of any of its formats -> (tensors, provenance). Raises InputError."""
    foreign = f"{path} is not a file of tools/convert_to_d2.py: "
    stored, provenance = contents.get("model", contents.get("state_dict")), contents["provenance"]
    if type(stored) is not dict or not is_sound(provenance):
        raise InputError(foreign + "it has no model with its provenance")
    found = {rename(name, DETECTRON2): value for name, value in stored.items() if type(name) is str}
    architecture = architectures.nearest(found)
    shapes = architectures.tensor_shapes(architecture)
    missing, unknown = shapes.keys() - found.keys(), len(stored) - len(shapes.keys() & found.keys())
    if missing or unknown:
        raise InputError(
            foreign + f"{len(missing)} of {len(shapes)} tensors are missing, {unknown} are unknown"
        )
    state = read_tensors(found, path, architecture)
    crc = checksum(state, provenance)
    # Early versions wrote a checksum into Detectron2's files only.
    if contents.get("crc32", None if "__author__" in contents else crc) != crc:
        raise InputError(
            f"{path} is damaged, its checksum differs: write it again with tools/convert_to_d2.py"
        )
    if provenance.setdefault("architecture", architecture) != architecture:
        raise InputError(
            foreign + f"it holds a {architecture} and says {printable(provenance['architecture'])}"
        )
    return state, provenance


def _kind(value, tensor):
    if isinstance(value, Call):  # the function may itself be a call, nested to any depth
        return printable(value.function if isinstance(value.function, str) else "a call")
    return printable(tensor.shape if tensor else type(value).__name__)
