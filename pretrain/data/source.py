"""What all sources of images have in common. The sources are in folders.py, parquet.py and datasets.py."""

import functools
import mmap
import sys
from collections.abc import Collection

import numpy as np
import torch
from tqdm import tqdm

from rsa_detectron2.common import distributed
from rsa_detectron2.pretrain.data.images import decode

STANDIN = "STANDIN"  # a file in the folder of a drawn data set (standins.py)


class Source:
    """``len(source)`` images, which are known by their index.

    ``read(index)``: uint8 RGB [3, H, W]; raises UnreadableImage. ``encoded(index)``, where images are
    encoded: their bytes, and the name for a message. ``name(index)``: text that names one image.
    ``labels``: int64 [N], -1 where unlabeled. ``classes``: the names of the labels. ``root``: the folder.

    Sources hold arrays, not long lists: a million strings would be copied into every worker as soon as
    their reference counts are touched.
    """

    own_val = False  # whether the validation images lie in the same data set, not in a folder beside ``root``
    files = ()  # that hold many images each; () where each image is a file
    value_range = ()  # DATA.RANGE
    reduced_decode = True  # DATA.REDUCED_DECODE

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> torch.Tensor:
        return decode(*self.encoded(index), self.value_range)

    def id(self, index: int) -> str:
        """A name of an image that stays the same when the data set is moved."""
        return self.name(index)

    def indices(self, ids: Collection[str]) -> list[int]:
        """The indices of the images that have one of these ids, ascending."""
        return [index for index in range(len(self)) if self.id(index) in ids] if ids else []

    @functools.cached_property
    def bad(self) -> mmap.mmap:
        """A byte for each image, 1 where it is known to be unreadable.

        It is made on first use. Workers that are forked later share it.
        """
        return mmap.mmap(-1, max(1, len(self)))

    def share_bad(self) -> None:
        """Make ``bad`` now, so that workers that are forked later share it."""
        _ = self.bad

    def known_bad(self) -> list[int]:
        """Indices of the images that are known to be unreadable."""
        return np.flatnonzero(np.frombuffer(self.bad[:], np.uint8)[: len(self)]).tolist()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "bad"}


class Sample(Source):
    """``count`` images of a ``source``, evenly spaced."""

    def __init__(self, source: Source, count: int):
        self.source, self.places = source, np.arange(count) * len(source) // count
        self.labels, self.classes = source.labels[self.places], source.classes
        self.root, self.own_val, self.files = source.root, source.own_val, source.files
        if hasattr(source, "names"):
            self.names = source.names[self.places]
        self.part = getattr(source, "part", None)

    @property
    def value_range(self) -> tuple[float, ...]:
        return self.source.value_range

    @value_range.setter
    def value_range(self, value: tuple[float, ...]) -> None:
        self.source.value_range = value

    def read(self, index: int) -> torch.Tensor:
        return self.source.read(int(self.places[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.places[index]))

    def id(self, index: int) -> str:
        return self.source.id(int(self.places[index]))


class SampleOfFiles(Sample):
    def encoded(self, index: int) -> tuple[bytes, str]:
        return self.source.encoded(int(self.places[index]))


@functools.cache  # the same folder may be opened several times
def say(line: str) -> None:
    """Print a line about a data set to stderr, once. Only the first process prints."""
    if distributed.is_first_process():
        tqdm.write(line, file=sys.stderr)  # above a progress bar, if there is one
