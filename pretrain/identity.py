"""How a run knows its data set: by the images in it, wherever they lie and however their path is spelled.

A checkpoint holds ``data``: ``sha256`` over names, labels and classes, and ``names``, which tell what has changed. The
order of every epoch follows from that list, so a run that goes on keeps it.
"""

import hashlib
import os
import socket
import zlib

import numpy as np
import torch

from pretrain import distributed
from pretrain.config import InputError


def digest(images):
    """Hexadecimal sha256 of a source: the names of its files below ``root``, if it has any, labels and classes."""
    result = hashlib.sha256(b"\0".join(getattr(images, "names", np.array([])).tolist()))
    result.update(np.asarray(images.labels, dtype=np.int64).tobytes())
    result.update("\0".join(images.classes).encode(errors="surrogateescape"))
    return result.hexdigest()


def describe(images):
    """A checkpoint's ``data`` of a source. ``names``: uint8 tensor, compressed, empty where images are not files."""
    names = b"\0".join(getattr(images, "names", np.array([])).tolist())
    return {"sha256": digest(images), "names": torch.from_numpy(np.frombuffer(zlib.compress(names), np.uint8).copy())}


def check_same_everywhere(images):
    """Raises InputError in a process whose images are not those of the first one: on another machine, say."""
    mine = len(images), digest(images)
    first = distributed.from_first(mine)
    if mine != first:
        raise InputError(f"{images.root} has {mine[0]} images on {socket.gethostname()}, and other ones, {first[0]}, "
                         "where the first process runs: make the copies equal")


def recognise(images, saved, unreadable, folder):
    """Check that ``images`` are those of the run in ``folder``, by its checkpoint ``saved``, and give them its order.

    Images that are gone, but are among ``unreadable`` (names), keep their place: the next one stands in, as it did when
    they could not be decoded. Returns how many. Raises InputError that says what differs.
    """
    data, counts = saved.get("data"), f"{saved['num_images']} images, and {images.root} has {len(images)}"
    if data is None and saved["num_images"] == len(images) or data and data["sha256"] == digest(images):
        return 0  # a checkpoint without ``data`` is of an older version
    gone, new = [], []
    if data and "names" in data and hasattr(images, "names"):
        before = zlib.decompress(data["names"].numpy().tobytes()).split(b"\0")
        now = set(images.names.tolist())
        gone, new = [name for name in before if name not in now], sorted(now.difference(before))
        removed = [name for name in gone if _is_among(map(os.fsencode, unreadable), name)]
        if not new and len(removed) == len(gone):
            images.take(before)
            if data["sha256"] == digest(images):
                return len(removed)
        gone = [name for name in gone if name not in removed]
    told = [f"{_text(names[0])} is {word}" + f", and {len(names) - 1} more" * (len(names) > 1)
            for word, names in (("gone", gone), ("new", new)) if names]
    raise InputError(f"{folder} holds a run on {counts}" + "".join(f"; {part}" for part in told or ["other names, labels or classes"])
                     + ": restore the data set, or give another --output-dir")


def _text(name):
    return name.decode(errors="backslashreplace")


def _is_among(listed, name):
    """Whether the name of an image below the root is in a list that has it with or without a folder before it."""
    return any(entry == name or entry.endswith(b"/" + name) for entry in listed)
