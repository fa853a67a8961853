"""Features of all images of a source in one file, computed in chunks that outlive an interruption.

Beside ``output`` lies ``output.json``, which says what it holds, and until it is whole the folder
``output.chunks``.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from rsa_detectron2.common import record
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import locked
from rsa_detectron2.common.progress import long_bar, say
from rsa_detectron2.common.signals import StopSignals
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.images import UnreadableImage, printable
from rsa_detectron2.pretrain.data.loader import build_loader
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.chunks import CHUNK, Chunk, leave_if_asked, making_room, open_chunks
from rsa_detectron2.pretrain.evaluate.features import BATCH, CenterCrops, Features
from rsa_detectron2.pretrain.evaluate.writers import WRITERS, Table


def embed(features: Features, images: Source, provenance: dict, output: Path) -> dict:
    """Write the center-crop features of all images that can be decoded to ``output``, in their order.

    ``provenance`` is that of the backbone; the suffix of ``output`` chooses one of WRITERS. After an
    interruption the same call goes on. Returns the content of ``output.json``: the provenance, ``images``,
    ``shape`` ([N, D]), and ``left_out``, the names of the images that cannot be decoded. Raises InputError,
    and Interrupted after the batch during which a signal came.
    """
    key = {
        "checkpoint": provenance["sha256"],
        "branch": provenance["branch"],
        **features.describe(images),
    }
    folder = Path(f"{output}.chunks")
    with locked(folder, "--output"), StopSignals() as stop:
        stop.stepping = True  # what was computed is saved
        about = read_finished(output, key)
        if about is None:
            claim(folder, key)
            chunks = open_chunks(folder, images)
            compute(features, images, chunks, stop)
            about = {"key": key, **provenance, "images": identity.summary(images)}
            about = assemble(Table(images, chunks, stop), about, output)
        shutil.rmtree(folder)
    return about


def read_finished(output: Path, key: dict) -> dict | None:
    """What ``output.json`` says of a whole file with the same ``key``; None where there is no file.

    Raises InputError for any other file.
    """
    if not output.exists():
        return None
    try:
        about = json.loads(Path(f"{output}.json").read_text())
        other = differences(about["key"], key)
    except (OSError, ValueError, TypeError, KeyError):
        other = "is not a file of this tool"
    if other:
        raise InputError(f"{output} is there already, and {other}: give another --output")
    return about


def claim(folder: Path, key: dict) -> None:
    """Say in a folder of chunks what they are of. Raises InputError where they are of something else."""
    if (folder / "key.json").is_file():
        if other := differences(json.loads((folder / "key.json").read_text()), key):
            raise InputError(f"{folder} was begun earlier, and {other}: give another --output, or remove it")
    else:
        record.write(folder, key, "key.json")


def differences(before: dict, now: dict) -> str:
    """``differs in checkpoint, branch``: what differs between two keys; "" if nothing does."""
    names = [name for name in now if before.get(name) != now[name]]
    return f"differs in {', '.join(names)}" if names else ""


class ReadableCrops(CenterCrops):
    """The validation transform: i -> (uint8 [3, size, size], index, what is wrong with the image or "")."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, str]:
        try:
            crop, problem = super().__getitem__(i)[0], ""
        except UnreadableImage as error:
            crop, problem = torch.zeros(3, self.size, self.size, dtype=torch.uint8), str(error)
        return crop, self.indices[i], problem


def compute(features: Features, images: Source, chunks: list[Chunk], stop: StopSignals) -> None:
    """Compute what ``chunks`` lack, and write it to their files.

    An image that cannot be decoded is named and left out. Raises InputError, and Interrupted.
    """
    # A chunk is saved between batches, and CHUNK is a multiple of BATCH. So no batch lies in two chunks, and
    # after an interruption every image is in the same batch as without one.
    todo = np.concatenate([np.arange(chunk.span.start + chunk.done, chunk.span.stop) for chunk in chunks])
    crops = ReadableCrops(images, todo, features.data.EVAL_RESIZE, features.data.IMAGE_SIZE)
    batches = BatchSampler(SequentialSampler(crops), BATCH, False)
    loader = build_loader(crops, batches, features.data.NUM_WORKERS)
    bar = long_bar("features", len(images), len(images) - len(todo), "image")
    chunk = None
    try:
        for batch, index, problems in loader:
            refuse_outage(problems)
            for problem in filter(None, problems):
                say(f"left out: {problem}")
            if chunk is None:
                chunk = chunks[index[0] // CHUNK]
                if chunk.done:
                    chunk.load()
            chunk.add(index.tolist(), problems, features(batch).cpu().numpy())
            bar.update(len(index))
            if chunk.done == len(chunk.span):
                chunk.save()
                chunk = None
            leave_if_asked(stop)
    finally:
        if chunk and chunk.features:
            chunk.save()
        bar.close()


def refuse_outage(problems: list[str]) -> None:
    """Raises InputError where no image of a whole batch can be decoded, as when a disk is gone."""
    if len(problems) == BATCH and all(problems):
        raise InputError(f"{BATCH} images in a row cannot be decoded; {problems[0]}")


def assemble(table: Table, about: dict, output: Path) -> dict:
    """Write the rows to ``output``; returns ``about`` with what it holds. Raises InputError, Interrupted."""
    shape = table.shape()
    if not shape[0]:
        raise InputError(
            f"no image of {printable(table.images.root)} can be decoded: give a folder of images"
        )
    names = [printable(table.images.name(index)) for chunk in table.chunks for index in chunk.left_out]
    about |= {"shape": shape, "left_out": names, "versions": record.versions()}
    with making_room(output):
        record.write(output.parent, about, f"{output.name}.json")
        WRITERS[output.suffix](output, table)
    return about
