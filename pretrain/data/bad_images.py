"""Images that cannot be decoded: the next one stands in for each, and a list names them."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.pretrain.data.images import UnreadableImage, printable
from rsa_detectron2.pretrain.data.source import Source, say

TRIES = 100  # so many images in a row may be unreadable
HANDFUL = 5  # so many images may be unreadable, however small the data set


def read_or_next(
    images: Source, index: int, read: Callable[[int], torch.Tensor] | None = None
) -> tuple[torch.Tensor, int]:
    """Image ``index``, or the next that can be decoded, and how many were skipped.

    ``read``: what to do instead of ``images.read``. After the last image comes the first. Images that are
    known to be unreadable are not decoded again, which does not change the result. Raises InputError after
    :data:`TRIES` images.
    """
    read = read or images.read
    for skipped in range(min(TRIES, len(images))):
        at = (index + skipped) % len(images)
        if images.bad[at]:
            continue
        try:
            return read(at), skipped
        except UnreadableImage:
            images.bad[at] = 1
    first, last = printable(images.name(index)), printable(images.name(at))
    raise InputError(
        f"{skipped + 1} images in a row cannot be decoded, {first} to {last}: restore the data set"
    )


class BadImages:
    """The list of images that could not be decoded: a file with one ``id`` per line, in JSON.

    Any process may add to it. ``max_bad`` is DATA.MAX_BAD; ``removed`` of the listed images are gone by now
    and do not count.
    """

    def __init__(self, path: str | Path, images: Source, max_bad: float):
        self.path, self.images, self.max_bad, self.added = Path(path), images, max_bad, set()
        self.removed = 0

    def __len__(self) -> int:
        return len(self.listed())

    def listed(self) -> set[str]:
        return parse(self.path.read_bytes()) if self.path.is_file() else set()

    def start(self) -> None:
        """Take the images that have been repaired or removed off the list, and mark the others as unreadable.

        Call it on every rank. Raises InputError when too many are left.
        """
        still = None
        if distributed.rank() == 0 and self.path.is_file():
            listed = tqdm(
                self.images.indices(self.listed()), "unreadable images, again", leave=False, disable=None
            )
            still = [index for index in listed if not self.can_be_read(index)]
            lines = "".join(map(self.line, still)).encode()
            write_atomically(self.path, lambda file: file.write(lines))
        for index in distributed.from_first(still) or ():
            self.images.bad[index] = 1
            self.added.add(index)
        self.check(len(self.added))

    def can_be_read(self, index: int) -> bool:
        try:
            self.images.read(index)
        except UnreadableImage:
            return False
        return True

    def line(self, index: int) -> str:
        return json.dumps(self.images.id(index)) + "\n"

    def add(self, indices: Iterable[int]) -> None:
        """Add images to the list.

        Raises InputError when it names too many of the data set. A full disk is no error.
        """
        new = sorted({int(index) for index in indices} - self.added)
        if not new:
            return
        self.added.update(new)
        count = len(self.added)
        try:
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another process may list the same image
                file.seek(0)
                text = file.read()
                listed = parse(text)
                lines = [self.line(index) for index in new if self.images.id(index) not in listed]
                if text and not text.endswith(b"\n"):  # a full disk may have cut the last line
                    file.write(b"\n")
                file.write("".join(lines).encode())
            count = len(listed) + len(lines)
        except OSError as error:
            say(f"warning: cannot write {self.path} ({error.strerror}); the run goes on without the list")
        self.check(count)

    def check(self, count: int) -> None:
        allowed = max(HANDFUL, int(self.max_bad * len(self.images))) if self.max_bad else 0
        if count - self.removed > allowed:
            first = printable(self.images.name(min(self.added)))
            raise InputError(
                f"{self.path} lists {count} of {len(self.images)} images as unreadable, {first} first, and "
                f"DATA.MAX_BAD allows {allowed}: replace or remove them, or raise it, and run the same "
                "command again"
            )


def parse(text: bytes) -> set[str]:
    """The names in a list. Older versions wrote them as they are, without JSON's quotes."""
    return {unquoted(line) for line in os.fsdecode(text).split("\n") if line}


def unquoted(line: str) -> str:
    try:
        return str(json.loads(line)) if line.startswith('"') else line
    except ValueError:
        return line
