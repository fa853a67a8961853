"""How a run recognizes its images when it resumes, wherever they lie.

A checkpoint's ``data`` holds ``sha256``, over names, labels and classes, and ``names``, to say what has
changed. The order of every epoch follows from the list of names, so a run keeps its list.
"""

import hashlib
import os
import socket
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.source import STANDIN, Source


def names_of(images: Source) -> list[bytes]:
    """The files of a source: paths below its root, as bytes; empty where images are not files."""
    return images.names.tolist() if hasattr(images, "names") else []


def digest(images: Source, named: bool = True) -> str:
    """Hexadecimal sha256 over the names, labels and classes of a source; without names if not ``named``."""
    result = hashlib.sha256(b"\0".join(names_of(images) if named else []))
    result.update(np.asarray(images.labels, dtype=np.int64).tobytes())
    result.update("\0".join(images.classes).encode(errors="surrogateescape"))
    return result.hexdigest()


def describe(images: Source) -> dict[str, str | torch.Tensor]:
    """The ``data`` of a checkpoint. ``names`` is a compressed uint8 tensor."""
    names = np.frombuffer(zlib.compress(b"\0".join(names_of(images))), np.uint8)
    return {"sha256": digest(images), "names": torch.from_numpy(names.copy())}


def summary(images: Source) -> dict[str, str | int]:
    """What a run's record says of its data set."""
    root = images.root.absolute()
    name = getattr(images, "part", None) or "/".join(root.parts[-2:])
    drawn = any((folder / STANDIN).is_file() for folder in (root, root.parent))
    return {
        "name": f"stand-in for {name}" if drawn else name,
        "images": len(images),
        "classes": len(images.classes),
        "sha256": digest(images),
    }


def check_same_everywhere(images: Source) -> None:
    """Raises InputError in a process that has other images than the first one.

    That happens where each machine reads a copy of its own, and one copy is incomplete.
    """
    mine = len(images), digest(images)
    first = distributed.from_first(mine)
    if mine != first:
        raise InputError(
            f"{images.root} has {mine[0]} images on {socket.gethostname()}, other than the "
            f"{first[0]} that the first process has: make the copies equal"
        )


def recognize(images: Source, saved: dict, unreadable: set[str], folder: Path) -> int:
    """Check that ``images`` are those of the run in ``folder``, by its checkpoint ``saved``.

    An image that is gone keeps its place if its name is in ``unreadable``: the next image stands in for it,
    as it did before. Returns how many images are gone. Raises InputError that says what differs.
    """
    if "data" not in saved:  # a checkpoint of an early version
        if saved["num_images"] != len(images):
            raise changed(images, saved, folder)
        return 0
    sha256 = saved["data"]["sha256"]
    # Early versions left the names out under DATA.LIMIT.
    if sha256 in (digest(images), digest(images, named=False)):
        return 0
    if "names" not in saved["data"] or not names_of(images):
        raise changed(images, saved, folder)
    before = zlib.decompress(saved["data"]["names"].numpy().tobytes()).split(b"\0")
    now = set(names_of(images))
    gone, new = [name for name in before if name not in now], sorted(now.difference(before))
    lost = [name for name in gone if not is_listed(name, unreadable)]
    if lost or new or not hasattr(images, "take"):
        raise changed(images, saved, folder, lost, new)
    images.take(before)
    if sha256 != digest(images):
        raise changed(images, saved, folder)
    return len(gone)


def is_listed(name: bytes, listed: Iterable[str]) -> bool:
    """Whether an image is in a list of names, with or without the folder before it."""
    entries = map(os.fsencode, listed)
    return any(entry == name or entry.endswith(b"/" + name) for entry in entries)


def changed(
    images: Source, saved: dict, folder: Path, lost: Sequence[bytes] = (), new: Sequence[bytes] = ()
) -> InputError:
    """The InputError for another data set; ``lost`` and ``new`` are names of images."""
    parts = [
        f"{names[0].decode(errors='backslashreplace')} is {word}"
        + (f", and {len(names) - 1} more" if len(names) > 1 else "")
        for word, names in (("gone", lost), ("new", new))
        if names
    ]
    differs = "; ".join(parts) or "names, labels or classes differ"
    return InputError(
        f"{folder} holds a run on {saved['num_images']} images, and {images.root} has "
        f"{len(images)}; {differs}: restore the data set, or give another --output-dir"
    )
