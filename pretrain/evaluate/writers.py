"""Files of features that other programs read: Parquet, or numpy's array with a table beside it."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.common.signals import StopSignals
from rsa_detectron2.common.tables import write_rows
from rsa_detectron2.pretrain.data.images import utf8
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.chunks import Chunk, leave_if_asked


class Rows(NamedTuple):
    """Some rows of the file."""

    files: list[str]
    labels: list[str | None]  # names of classes
    features: np.ndarray  # float32 [n, D]


@dataclass
class Table:
    """All rows of the file, those of a chunk at a time. Raises InputError, and Interrupted."""

    images: Source
    chunks: list[Chunk]
    stop: StopSignals

    def __iter__(self) -> Iterator[Rows]:
        classes, labels = list(map(utf8, self.images.classes)), self.images.labels
        for chunk in tqdm(self.chunks, "writing", leave=False, dynamic_ncols=True, disable=None):
            leave_if_asked(self.stop)
            chunk.load()
            if chunk.done < len(chunk.span):
                raise InputError(f"{chunk.path} was damaged just now: run the same command again")
            index = chunk.index()
            yield Rows(
                [utf8(self.images.name(i)) for i in index],
                [classes[labels[i]] if labels[i] >= 0 else None for i in index],
                np.concatenate(chunk.features),
            )
            chunk.free()

    def shape(self) -> tuple[int, int]:
        left_out = sum(len(chunk.left_out) for chunk in self.chunks)
        return len(self.images) - left_out, next(iter(self)).features.shape[1]


def write_parquet(path: Path, table: Table) -> None:
    """Columns ``file``, ``label`` (null without one) and ``feature``, a fixed-size list of float32."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    dim = table.shape()[1]
    feature = pyarrow.list_(pyarrow.float32(), dim)
    schema = pyarrow.schema({"file": pyarrow.string(), "label": pyarrow.string(), "feature": feature})

    def write(file: BinaryIO) -> None:
        with ParquetWriter(file, schema, use_dictionary=["label"]) as writer:
            for files, labels, features in table:
                column = pyarrow.FixedSizeListArray.from_arrays(features.ravel(), dim)
                writer.write_table(pyarrow.table([files, labels, column], schema=schema))

    write_atomically(path, write)


def write_npy(path: Path, table: Table) -> None:
    """An array, float32 [N, D]; ``path.csv`` has the columns ``file`` and ``label`` of its rows."""
    rows = (row for files, labels, _ in table for row in zip(files, labels))
    write_rows(f"{path}.csv", ("file", "label"), rows)
    header = {"descr": "<f4", "fortran_order": False, "shape": table.shape()}

    def write(file: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for _, _, features in table:
            file.write(features.astype("<f4", copy=False).tobytes())

    write_atomically(path, write)


WRITERS = {".parquet": write_parquet, ".npy": write_npy}


def check_format(output: Path) -> None:
    """Raises InputError for a suffix that is not in WRITERS, or one whose library is missing."""
    if output.suffix not in WRITERS:
        raise InputError(f"--output {output}: the name must end in {' or '.join(WRITERS)}")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"--output {output} needs one more library: python3 -m pip install -c constraints.txt -e "
            "'.[hf]', or give a name that ends in .npy"
        )
