"""Where images come from: :func:`open_images` recognises what lies at a path and returns a source of images.

A source has ``len(images)``; ``images.read(index)``, uint8 RGB [3, H, W], which raises UnreadableImage;
``images.name(index)``, text that names one image; ``images.labels`` int64 [N], -1 where unlabelled; ``images.classes``,
their names; ``images.root``, its folder; ``images.own_val``, whether ``root`` holds its validation images as well,
which else lie in a folder beside it. Sources hold arrays, not long lists: a million strings would be copied into every
worker as soon as their reference counts are touched.
"""

import os
import re
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, STL10
from torchvision.datasets.folder import IMG_EXTENSIONS

from pretrain.config import InputError
from pretrain.images import decode, printable, read_file

VAL_NAMES = ("val", "validation", "valid", "test")  # of a folder or of Parquet shards, the first that is there
STL10_SPLITS = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}


def open_images(path, split="pretrain", classes_file=""):
    """What lies at ``path``: its images to pre-train on ("pretrain"), or its labelled ones ("train", "val").

    CIFAR-10/100 and STL-10 as torchvision downloads them; Parquet shards of the Hugging Face hub, or what
    ``datasets.save_to_disk`` wrote; Tiny ImageNet; a folder with train/ and val/ or test/; else ``path`` itself is the
    folder of images, whatever the split. ``classes_file`` lists the class folders to keep. Raises InputError.
    """
    path = Path(path)
    if not path.is_dir():
        kind = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}.get(path.name.lower().replace("-", ""))
        raise InputError(f"no image folder {path}: " + (_download(kind, path) if kind else
                         "correct the path (tools/pretrain.py takes it as --data PATH), or try tools/quickstart.py, which "
                         "makes its own images"))
    source = _open_data_set(path, split)
    if source:  # and it is not empty
        if classes_file:
            raise InputError(f"DATA.CLASSES {classes_file} keeps folders of classes; {path} has none: leave it empty")
        return source

    classes = read_classes(classes_file) if classes_file else None
    tiny = path.parent if path.name in ("train", "val") else path
    if (tiny / "wnids.txt").is_file():
        return tiny_imagenet(tiny, split, classes)
    inside = {entry.name for entry in os.scandir(path)}
    if "train" in inside and inside.intersection(VAL_NAMES) and not any(map(_is_image, inside)):
        path = path / _pick(inside, split, path)
    return ImageFolder(path, classes)


def _open_data_set(path, split):
    """The source at ``path`` unless it is a folder of images: None."""
    for kind in (CIFAR10, CIFAR100, STL10):
        root = path.parent if path.name == kind.base_folder else path
        if (root / kind.base_folder).is_dir():
            return ArrayImages(kind, root, split)
    if (path / "dataset_dict.json").is_file():
        return HuggingFace(path / _pick(os.listdir(path), split, path))
    if (path / "state.json").is_file():
        return HuggingFace(path)
    shards = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not shards:
        return None
    parsed = [re.match(r"(.+?)(?:-\d+-of-(\d+).*)?\.parquet", shard.name).groups() for shard in shards]
    name = _pick({name for name, _ in parsed}, split, path)
    shards = [shard for shard, (of, _) in zip(shards, parsed) if of == name]
    count = int(dict(parsed)[name] or len(shards))
    if len(shards) != count:
        raise InputError(f"{shards[0].parent} has {len(shards)} of the {count} shards of {name}: complete the download")
    return HuggingFace(path, shards)


def _pick(available, split, path):
    names = VAL_NAMES if split == "val" else ("train",)
    for name in names:
        if name in available:
            return name
    raise InputError(f"{path} has no {' or '.join(names)}, only {', '.join(sorted(available))}: give another folder")


def _download(kind, root):
    name = kind.__name__
    return f"download it with python3 -c \"from torchvision.datasets import {name}; {name}('{root}', download=True)\""


def _is_image(name):
    return name.lower().endswith(IMG_EXTENSIONS)


def read_classes(path):
    """The first word of every line of a file, without comments (#); looked up as given, then under configs/."""
    configs = Path(__file__).resolve().parents[1] / "configs"
    file = next((file for file in (Path(path), configs / path) if file.is_file()), None)
    if file is None:
        raise InputError(f"no file of classes (DATA.CLASSES) {path}: looked in {Path.cwd()} and in {configs}")
    classes = [word for line in file.read_text().splitlines() for word in line.split("#")[0].split()[:1]]
    if not classes:
        raise InputError(f"{file} (DATA.CLASSES) names no class: write one a line")
    return classes


class Source:
    """What the sources have in common."""

    own_val = False
    files = ()  # that hold the images, where they have none of their own
    value_range = ()  # DATA.RANGE

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        return decode(*self.encoded(index), self.value_range)


class ImageFolder(Source):
    """All images below ``root``, in the order of their paths; with ``classes``, those in these folders only.

    The label of an image is the index in ``self.classes`` of the first-level folder that holds it, -1 for an image that
    lies in ``root`` itself.
    """

    def __init__(self, root, classes=None):
        self.root = Path(root)
        tops = [self.root] if classes is None else [self.root / name for name in set(classes)]
        names = sorted(os.path.relpath(os.path.join(folder, name), root)
                       for top in tops for folder, _, files in os.walk(top, followlinks=True) for name in files
                       if _is_image(name))
        self.take([os.fsencode(name) for name in names])
        missing = sorted(set(classes or ()) - set(self.classes))
        if missing:
            raise InputError(f"{root} has no images of {len(missing)} of the classes asked for, {missing[0]} first: "
                             "complete it, or correct DATA.CLASSES")
        if not names:
            raise InputError(f"no images below {root} ({', '.join(IMG_EXTENSIONS)})")

    def take(self, names):
        """Hold these images, ``names`` below the root as bytes, in this order, there or not."""
        folders = [os.fsdecode(name).split(os.sep)[0] if b"/" in name else None for name in names]
        self.classes = sorted({folder for folder in folders if folder})
        index = {folder: i for i, folder in enumerate(self.classes)}
        self.names = np.array(names)
        self.labels = np.array([index.get(folder, -1) for folder in folders])

    def name(self, index):
        return str(self.root / os.fsdecode(self.names[index]))

    def encoded(self, index):
        """The bytes of an image's file, and its name for a message."""
        return read_file(self.name(index)), printable(self.name(index))


def tiny_imagenet(root, split, classes=None):
    """An ImageFolder of Tiny ImageNet; the validation images lie in one folder, their labels in a table."""
    classes, table = sorted(classes or (root / "wnids.txt").read_text().split()), root / "val/val_annotations.txt"
    if split != "val" or not table.is_file():
        return ImageFolder(root / ("val" if split == "val" else "train"), classes)
    images = ImageFolder(root / "val")
    wnids = {os.fsencode(row[0]): row[1] for row in map(str.split, table.read_text().splitlines())}
    found = [wnids.get(os.path.basename(name)) for name in images.names]
    if None in found:
        raise InputError(f"{table} has no class for {images.name(found.index(None))}: restore both")
    keep = np.isin(found, classes)
    images.classes, images.names = classes, images.names[keep]
    images.labels = np.searchsorted(classes, np.array(found)[keep])
    return images


class ArrayImages(Source):
    """CIFAR-10/100 or STL-10, ``kind`` of torchvision.datasets, below ``root``; held in memory."""

    own_val = True

    def __init__(self, kind, root, split):
        stl10 = kind is STL10
        part = STL10_SPLITS[split] if stl10 else "test" if split == "val" else "train"
        self.root, self.part = root, f"{kind.base_folder} {part}"
        try:
            data = STL10(root, part) if stl10 else kind(root, train=part == "train")
        except RuntimeError:  # a file lacks or has another check sum
            raise InputError(f"{root / kind.base_folder} is incomplete or damaged: remove it, then "
                             + _download(kind, root)) from None
        # A tensor, because workers share its memory even where they are not forked.
        self.pixels = torch.from_numpy(data.data if stl10 else data.data.transpose(0, 3, 1, 2))
        self.labels = np.array(data.labels if stl10 else data.targets).astype(np.int64)
        self.classes = data.classes

    def name(self, index):
        return f"{self.part}:{index}"

    def read(self, index):
        return self.pixels[index].contiguous()


class HuggingFace(Source):
    """A table of the ``datasets`` library: what ``save_to_disk`` wrote to ``root``, or Parquet ``shards``, which the
    library first copies to its cache (HF_HOME) in a form that can be read in any order."""

    def __init__(self, root, shards=()):
        self.root, self.shards, self.own_val = root, shards, bool(shards)
        try:
            from datasets import ClassLabel, Dataset, Image as ImageFeature, Value, load_from_disk
            from datasets.exceptions import DatasetsError
            from pyarrow.parquet import read_metadata
        except ImportError:
            raise InputError(f"{root} holds a Hugging Face data set, which needs one more library: "
                             "python3 -m pip install -c constraints.txt -e '.[hf]'") from None
        try:
            self.starts = np.cumsum([0, *(read_metadata(shard).num_rows for shard in shards[:-1])])  # rows, by shard
            table = Dataset.from_parquet(list(map(str, shards))) if shards else load_from_disk(str(root))
            self.files = shards or [file["filename"] for file in table.cache_files]
        except (DatasetsError, OSError, ValueError) as error:
            raise InputError(f"{root} cannot be read as a Hugging Face data set: {error}") from None
        kinds = table.features
        self.column = next((name for name, kind in kinds.items() if isinstance(kind, ImageFeature)), None)
        if self.column is None:
            raise InputError(f"{root} has no column of images, only {', '.join(kinds)}: give another --data")
        self.images = table.select_columns([self.column]).cast_column(self.column, ImageFeature(decode=False))
        label = next((name for name, kind in kinds.items() if isinstance(kind, ClassLabel)),
                     next((name for name in ("label", "labels") if isinstance(kinds.get(name), Value)), None))
        self.classes, self.labels = [], np.full(len(table), -1)
        if label:
            values = table.select_columns([label]).with_format("arrow")[:][label].to_pylist()
            named = isinstance(kinds[label], ClassLabel)
            known = range(kinds[label].num_classes) if named else sorted({*values} - {None, -1})
            self.classes = kinds[label].names if named else list(map(str, known))
            index = {value: i for i, value in enumerate(known)}
            self.labels = np.array([index.get(value, -1) for value in values])

    def name(self, index):
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.shards[shard].name if self.shards else self.root}:{index - self.starts[shard]}"

    def encoded(self, index):
        image = self.images[int(index)][self.column] or {"bytes": b"", "path": None}
        if image["bytes"] is None and image["path"]:
            return read_file(image["path"]), printable(image["path"])
        return image["bytes"] or b"", self.name(index)
