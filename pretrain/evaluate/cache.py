"""A cache beside a checkpoint of what was computed from it: features, statistics, classifiers."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.pretrain.data.source import Source


class FeatureCache:
    """Arrays by description, in the folder ``<checkpoint>.features``.

    A file holds the checkpoint's sha256 and the description, and both are compared when it is read. Files
    of another sha256 are removed: the checkpoint has been written anew. A damaged file (numpy's archive has
    a CRC-32 of each array) counts as absent, and a line on stderr says so, as it does where the folder
    cannot be written.
    """

    def __init__(self, checkpoint: str | Path, sha256: str):
        self.folder, self.sha256 = Path(f"{checkpoint}.features"), sha256
        for path in self.folder.glob("*.npz"):
            if not path.name.startswith(sha256[:16]):
                path.unlink(missing_ok=True)

    def place(self, what: dict) -> tuple[Path, str]:
        """(path, identity) of a description ``what``, a dict that JSON can hold."""
        identity = json.dumps({"checkpoint": self.sha256, **what}, sort_keys=True)
        return (
            self.folder / f"{self.sha256[:16]}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz",
            identity,
        )

    def get(self, what: dict) -> dict[str, np.ndarray] | None:
        """{name: array} as they were put, or None."""
        path, identity = self.place(what)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            if str(arrays.pop("identity")) != identity:
                raise ValueError("it is of something else")
            return arrays
        except Exception as error:  # the ways in which a broken archive fails are zipfile's and numpy's
            print(
                f"warning: {path} is damaged ({' '.join(str(error).split())[:100]}): computed anew",
                file=sys.stderr,
            )
            return None

    def put(self, what: dict, **arrays: np.ndarray) -> None:
        path, identity = self.place(what)
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(path, lambda file: np.savez(file, identity=identity, **arrays))
        except OSError as error:
            print(
                f"warning: cannot write {path} ({error.strerror}); the next call computes it anew",
                file=sys.stderr,
            )


def fingerprint(images: Source) -> str:
    """Hexadecimal sha256 over a source: its folder, and the names, labels, sizes and times of its files."""
    digest = hashlib.sha256(os.fsencode(f"{images.root.resolve()}\n{images.classes}\n"))
    digest.update(np.asarray(images.labels, dtype=np.int64).tobytes())
    for name in (*images.files, *map(images.name, range(len(images)))):
        digest.update(os.fsencode(name))
        try:
            status = os.stat(name)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            pass  # a row of a table or of an array has no file
    return digest.hexdigest()
