"""Features of many images in files of some thousand each, so that an interruption costs little."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.common.progress import say
from rsa_detectron2.common.signals import StopSignals
from rsa_detectron2.pretrain.data.images import UnreadableImage
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.features import BATCH

CHUNK = 16 * BATCH  # images: at most so many are computed again after a kill; a row group of a Parquet file


class Chunk:
    """Features of the images of ``span``, of which the first ``done`` are dealt with, in a file.

    ``left_out``: the indices of those that cannot be decoded. ``features``: batches of float32 [n, D] of the
    others, in memory from load() or the first add() until free().
    """

    def __init__(self, path: Path, span: range):
        self.path, self.span = path, span
        self.begin_anew()

    def index(self) -> list[int]:
        """The images that have features."""
        left_out = {*self.left_out}
        return [index for index in self.span[: self.done] if index not in left_out]

    def load(self) -> None:
        """Read the file, if there is one. A damaged one counts as absent: numpy's archive has a CRC-32."""
        if not self.path.is_file():
            return
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                features, left_out, done = (arrays[name] for name in ("features", "left_out", "done"))
        except (OSError, MemoryError):
            raise
        except Exception:  # the ways in which a broken archive fails are zipfile's and numpy's
            say(f"warning: {self.path} is damaged: computed anew")
            self.begin_anew()
        else:
            self.done, self.left_out, self.features = int(done), left_out.tolist(), [features]

    def add(self, index: list[int], problems: list[str], features: np.ndarray) -> None:
        """Add the next batch: indices, what is wrong with each image or "", and features [B, D]."""
        self.left_out += [i for i, problem in zip(index, problems) if problem]
        self.features.append(features[[not problem for problem in problems]])
        self.done += len(index)

    def save(self) -> None:
        """Write the file, whole or not at all, and free the memory. Raises InputError where it cannot."""
        arrays = {
            "features": np.concatenate(self.features),
            "left_out": np.array(self.left_out, dtype=np.int64),
        }
        with making_room(self.path):
            write_atomically(self.path, lambda file: np.savez(file, done=self.done, **arrays))
        self.free()

    def free(self) -> None:
        self.features = []

    def begin_anew(self) -> None:
        self.done, self.left_out, self.features = 0, [], []


@contextlib.contextmanager
def making_room(path: Path) -> Iterator[None]:
    """Turns an OSError of writing ``path`` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room, then run the same command again, "
            "which goes on from there"
        ) from None


def open_chunks(folder: Path, images: Source) -> list[Chunk]:
    """The chunks of a source, as far as they are in ``folder``.

    One that left out an image which can be read by now is begun anew.
    """
    spans = [range(first, min(first + CHUNK, len(images))) for first in range(0, len(images), CHUNK)]
    chunks = [Chunk(folder / f"{span.start:09d}.npz", span) for span in spans]
    for chunk in tqdm(chunks, "chunks that are there", leave=False, dynamic_ncols=True, disable=None):
        chunk.load()
        chunk.free()
        if any(can_be_read(images, index) for index in chunk.left_out):
            chunk.begin_anew()
    return chunks


def can_be_read(images: Source, index: int) -> bool:
    try:
        images.read(index)
    except UnreadableImage:
        return False
    return True


def leave_if_asked(stop: StopSignals) -> None:
    """Raises Interrupted after a signal. Call it where everything is saved, or will be on the way out."""
    if stop.asked:
        raise Interrupted(f"stopped by {stop.name}; what was computed is saved, and {stop.again} goes on")
