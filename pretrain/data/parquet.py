"""Images in tables: Parquet files, whoever wrote them, and what ``datasets.save_to_disk`` leaves."""

import errno
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.folders import is_skipped, part_of, pick
from rsa_detectron2.pretrain.data.images import printable, read_file
from rsa_detectron2.pretrain.data.source import Source, say

if TYPE_CHECKING:  # an extra, which need not be installed
    import pyarrow

# Names of columns in files without the hub's metadata, the preferred one first. Case does not count.
IMAGE_COLUMNS = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "photo",
    "bytes",
    "image_bytes",
    "data",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "cls",
    "class",
    "fine_label",
    "category",
    "target",
    "class_name",
    "label_name",
)
FULL, CLOSED = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)  # errors of a cache


def find_shards(path: Path, split: str) -> tuple[list[Path], bool]:
    """(files, whole): the Parquet files of a split at ``path`` ("val", else the training images), and
    whether ``path`` has the other splits as well.

    The files lie in ``path`` or in folders below it: train.parquet, data/train-00000-of-00002.parquet,
    plain_text/train-*.parquet, default/train/0000.parquet. Where no name is that of a part, ``path`` is a
    part itself. Raises InputError for several configurations and for missing shards.
    """
    configs = defaultdict(lambda: defaultdict(list))  # folder of a configuration -> part -> files
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not is_skipped(name))
        for name in sorted(names):
            if name.endswith(".parquet") and not name.startswith("."):
                config, part = place_of(Path(folder, name).relative_to(path))
                configs[config][part].append(Path(folder, name))
    if not configs:
        return [], False
    if len(configs) > 1:
        names = [printable(name or ".") for name in sorted(configs)]
        raise InputError(
            f"{printable(path)} holds several configurations, {', '.join(names)}: give the folder of one, "
            f"such as {printable(Path(path, names[-1]))}"
        )
    [parts] = configs.values()
    if not any(map(part_of, parts)) and not any(map(of_how_many, sum(parts.values(), []))):
        return sum(parts.values(), []), False
    name = pick(parts, "val" if split == "val" else "train", path)
    others = [printable(other) for other in parts if not part_of(other)]
    if others:
        say(f"{printable(path)}: left out the Parquet files of {', '.join(others)}")
    shards = parts[name]
    count = of_how_many(shards[0]) or len(shards)
    if len(shards) != count:
        raise InputError(
            f"{printable(shards[0].parent)} has {len(shards)} of the {count} shards of {name}: complete the "
            "download"
        )
    return shards, True


def place_of(file: Path) -> tuple[str, str]:
    """(configuration, part) of a relative path: its folders, without ``data``; the name of the file, or of
    its folder where only that names a part."""
    name, folders = re.sub(r"-\d+-of-\d+.*|\.parquet$", "", file.name), list(file.parts[:-1])
    if not part_of(name) and folders and part_of(folders[-1]):
        name = folders.pop()
    return "/".join(folder for folder in folders if folder != "data"), name


def of_how_many(file: Path) -> int:
    """The number of shards that a file is one of, by its name; 0 where the name does not say."""
    found = re.search(r"-\d+-of-(\d+)", file.name)
    return int(found[1]) if found else 0


class HuggingFace(Source):
    """A Hugging Face data set: what ``save_to_disk`` of the ``datasets`` library wrote to ``root``, or
    Parquet ``shards``.

    The library first copies the images of shards to its cache (HF_HOME), in a form that can be read in any
    order. :func:`choose_columns` finds images and labels; labels are numbers or strings. Raises InputError.
    """

    def __init__(self, root: Path, shards: Sequence[Path] = (), own_val: bool = False):
        self.root, self.shards, self.own_val = root, shards, own_val
        try:
            import datasets
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise InputError(
                f"{printable(root)} holds a Hugging Face data set, which needs one more library: "
                "python3 -m pip install -c constraints.txt -e '.[hf]'"
            ) from None
        try:
            if shards:
                metadata = [ParquetFile(shard) for shard in shards]
                # The number of each shard's first row.
                self.starts = np.cumsum([0, *(file.metadata.num_rows for file in metadata[:-1])])
                self.column, label, self.classes = choose_columns(metadata[0].schema_arrow, root)
                values = [
                    value for file in metadata if label for value in file.read([label])[label].to_pylist()
                ]
                table = datasets.Dataset.from_parquet(list(map(str, shards)), columns=[self.column])
                self.files = shards
            else:
                table, self.starts = datasets.load_from_disk(str(root)), [0]
                self.column, label, self.classes = choose_columns(table.features.arrow_schema, root)
                values = (
                    table.select_columns([label]).with_format("arrow")[:][label].to_pylist() if label else ()
                )
                self.files = [file["filename"] for file in table.cache_files]
        except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
            raise refusal(root, error, datasets.config.HF_DATASETS_CACHE) from None
        self.images = table.select_columns([self.column])
        if isinstance(table.features[self.column], datasets.Image):
            self.images = self.images.cast_column(self.column, datasets.Image(decode=False))
        self.labels = np.full(len(table), -1)
        if label:
            known = range(len(self.classes)) if self.classes else sorted({*values} - {None, -1})
            self.classes = self.classes or list(map(str, known))
            index = {value: i for i, value in enumerate(known)}
            self.labels = np.array([index.get(value, -1) for value in values])

    def id(self, index: int) -> str:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.shards[shard].name if self.shards else 'row'}:{index - self.starts[shard]}"

    def name(self, index: int) -> str:
        return self.id(index) if self.shards else f"{self.root}:{index}"

    def encoded(self, index: int) -> tuple[bytes, str]:
        image = self.images[int(index)][self.column]
        if not isinstance(image, dict):
            image = {"bytes": image}
        if image["bytes"] is None and image.get("path"):
            return read_file(self.root / image["path"]), printable(image["path"])
        return image["bytes"] or b"", printable(self.name(index))


def choose_columns(schema: "pyarrow.Schema", root: Path) -> tuple[str, str | None, list[str]]:
    """(column of images, column of labels or None, names of the classes or []) of an Arrow schema.

    The images are the first column of type Image, else a column of encoded images, by IMAGE_COLUMNS. Raises
    InputError where there is no such column.
    """
    from datasets import ClassLabel, Features, Image

    kinds = Features.from_arrow_schema(schema)
    image = next((name for name, kind in kinds.items() if isinstance(kind, Image)), None)
    if image is None:
        encoded = [field.name for field in schema if holds_images(field.type)]
        image = by_name(encoded, IMAGE_COLUMNS) or (encoded[0] if len(encoded) == 1 else None)
    if image is None:
        raise InputError(
            f"{printable(root)} has no column of images, only {', '.join(kinds)}: give another --data, or "
            f"name the column {IMAGE_COLUMNS[0]}"
        )
    label = next((name for name, kind in kinds.items() if isinstance(kind, ClassLabel)), None)
    if label:
        return image, label, kinds[label].names
    return image, by_name([field.name for field in schema if holds_labels(field.type)], LABEL_COLUMNS), []


def by_name(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of ``names`` that a column has, or None."""
    known = {column.lower(): column for column in columns}
    return next((known[name] for name in names if name in known), None)


def holds_images(kind: "pyarrow.DataType") -> bool:
    """Whether an Arrow type is that of encoded images: bytes, or a struct with ``bytes``."""
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_images(kind.field(index).type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def holds_labels(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return holds_labels(kind.value_type)
    return (
        types.is_integer(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
    )


def refusal(root: Path, error: BaseException, cache: str | Path) -> InputError:
    """The InputError for an ``error`` in reading a table: a cache that cannot be written, or a damaged
    table."""
    cause = error
    while True:
        number, place = getattr(cause, "errno", None), str(getattr(cause, "filename", None) or "")
        if (
            number in FULL
            or "Not enough disk space" in str(cause)
            or number in CLOSED
            and place.startswith(str(cache))
        ):
            return InputError(
                f"the cache of Hugging Face data sets, {cache}, cannot take {printable(root)} "
                f"({' '.join(str(cause).split())}): make room, or set HF_HOME to a folder on another disk"
            )
        following = cause.__cause__ or cause.__context__
        if following is None:
            return InputError(
                f"{printable(root)} cannot be read as a Hugging Face data set "
                f"({' '.join(str(cause).split())}): restore it"
            )
        cause = following
