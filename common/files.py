"""Files that are written whole or not at all, and folders that one process at a time works in."""

import contextlib
import fcntl
import os
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rsa_detectron2.common.errors import InputError


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], object], previous: str | Path | None = None
) -> None:
    """Call ``write(file)`` with a temporary file beside ``path``, then rename that file to ``path``.

    So a reader finds the old or the new file, and either is whole. The old file is renamed to ``previous``,
    if given. Raises OSError, and leaves ``path`` as it was, when the disk refuses the new file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # free its space: the disk may be full
        raise
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def save_tensors(path: str | Path, state: dict, previous: str | Path | None = None) -> None:
    """``torch.save`` of a dict of tensors, numbers and strings, atomically. Raises OSError."""
    import torch  # here, because the tools read their options without it

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's archive writer raises it for a failed write
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    write_atomically(path, write, previous)


def check_tensors(path: str | Path) -> None:
    """Raises zipfile.BadZipFile, or OSError, unless ``path`` holds the bytes that torch.save wrote.

    It stores a CRC-32 with every tensor, but torch.load does not compare it; zipfile does.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


@contextlib.contextmanager
def locked(folder: str | Path, option: str) -> Iterator[None]:
    """Create ``folder`` and lock it for this process. ``option`` sets another folder, for messages.

    Raises InputError when another process works in the folder, or when it cannot be written. It is a POSIX
    lock, because that ends with its process and is not inherited: workers that outlive a killed run for
    some seconds must not keep the next one out.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")
    except OSError as error:
        raise InputError(
            f"cannot write to {option} {folder} ({error.strerror}): give another folder"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"another run is at work in {folder} ({file.read().strip()}): wait for it, "
                f"stop it, or give another {option}"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
