"""Opening a data set: :func:`open_images` finds out what lies at a path."""

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from rsa_detectron2.common.config import CONFIGS
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.folders import (
    ARCHIVES,
    ImageFolder,
    NoImages,
    entries,
    find_folders,
    is_image,
    part_of,
    pick,
)
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.parquet import HuggingFace, find_shards
from rsa_detectron2.pretrain.data.source import STANDIN, Sample, SampleOfFiles, Source, say

STL10_SPLITS = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}


def open_images(
    path: str | os.PathLike, split: str = "pretrain", classes_file: str = "", limit: int = 0
) -> Source:
    """The source of images at ``path``.

    ``split``: "pretrain" for the images to pre-train on, "train" or "val" for the labeled ones.
    At most ``limit`` images, evenly spaced; 0: all.

    It may hold CIFAR-10/100 or STL-10 as torchvision downloads them, Parquet files, what
    ``datasets.save_to_disk`` wrote, Tiny ImageNet, or the parts of a data set (folders.PARTS). Otherwise
    ``path`` itself is the folder of images, whatever the split. ``classes_file`` lists the class folders to
    keep. Raises InputError.
    """
    source = _open(Path(path).expanduser(), split, classes_file)
    if not 0 < limit < len(source):
        return source
    return (SampleOfFiles if hasattr(source, "encoded") else Sample)(source, limit)


def images_of(data: CfgNode, split: str = "pretrain") -> Source:
    """The images of a configuration's DATA, read as it says; see :func:`open_images`. Raises InputError."""
    images = open_images(data.PATH, split, data.CLASSES, data.LIMIT)
    images.value_range = tuple(data.RANGE)
    images.reduced_decode = data.REDUCED_DECODE
    return images


def _open(path, split, classes_file):
    if path.is_file():
        fix = "unpack it and give that folder" if path.suffix in ARCHIVES else "give the folder that holds it"
        raise InputError(f"{printable(path)} is a file: {fix}")
    if not path.is_dir():
        kinds = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}
        fix = (
            "correct the path (tools/pretrain.py takes it as --data PATH), or try tools/quickstart.py, "
            "which makes its own images"
        )
        if kind := kinds.get(path.name.lower().replace("-", "")):
            fix = _download(kind, path)
        raise InputError(f"no image folder {printable(path)}: {fix}")
    source = _open_data_set(path, split)
    if source is None:
        return _open_folder(path, split, read_classes(classes_file) if classes_file else None)
    if classes_file:
        raise InputError(
            f"DATA.CLASSES {classes_file} keeps folders of classes; {printable(path)} has none: leave it "
            "empty"
        )
    return source


def _open_data_set(path, split):
    """The source at ``path``, or None where that is a folder of images."""
    for kind in (CIFAR10, CIFAR100, STL10):
        root = path.parent if path.name == kind.base_folder else path
        if (root / kind.base_folder).is_dir():
            return ArrayImages(kind, root, split)
    if (path / "dataset_dict.json").is_file():
        return HuggingFace(path / pick(find_folders(path), "val" if split == "val" else "train", path))
    if (path / "state.json").is_file():
        return HuggingFace(path)
    if any(path.glob("*.parquet")) or any((path / "data").glob("*.parquet")):
        return HuggingFace(path, *find_shards(path, split))
    return None


def _open_folder(path, split, classes):
    tiny = path.parent if path.name in ("train", "val") else path
    if (tiny / "wnids.txt").is_file():
        return tiny_imagenet(tiny, split, classes)
    root, held_out = choose_part(path, split)
    try:
        images = ImageFolder(root, classes, held_out)
    except NoImages:
        shards, whole = find_shards(root, split)
        if not shards:
            raise
        return HuggingFace(root, shards, whole)
    images.own_val = bool(held_out)
    if split != "val":
        tested = sorted(folder for folder in images.folders if "val" in map(part_of, folder.split(os.sep)))
        if tested:
            count = sum(images.folders[folder] for folder in tested)
            say(
                f"warning: {count} of the {len(images)} images of {printable(root)} are trained on although "
                f"they lie in folders like {printable(tested[0])}: move those out of it if they are for tests"
            )
    return images


def choose_part(path: Path, split: str) -> tuple[Path, tuple[str, ...]]:
    """(folder, held out): the folder of a split of the data set at ``path``, and the folders in it that are
    kept for validation.

    Prints what is left out. Raises InputError where there are only images for tests.
    """
    path = find_parts(path)
    folders = find_folders(path)
    kinds = {name: part_of(name) for name in folders}
    part = "val" if split == "val" else "train"
    have = {"train", "val"}.intersection(kinds.values())
    others = [name for name in folders if not kinds[name]]
    loose = sum(is_image(entry.name) for entry in entries(path))
    if have == {"train", "val"} or have == {"train"} and not others and not loose:
        name = pick(folders, part, path)
        rest = [f"{printable(other)}/" for other in others]
        if loose:
            rest.append(f"{loose} images beside them")
        if rest and part == "train":
            say(
                f"{printable(path)}: images of {printable(name)}/ are trained on; left out: {', '.join(rest)}"
            )
        return path / name, ()
    if have == {"val"}:
        if part == "val":
            return path / pick(folders, part, path), ()
        held_out = [name for name in folders if kinds[name] == "val"]
        shown = ", ".join(f"{printable(name)}/" for name in held_out)
        if not others and not loose:
            raise InputError(
                f"{printable(path)} has only {shown} whose images are not for training: give that folder "
                "itself to train on them"
            )
        say(
            f"{printable(path)}: {shown} taken for validation, not trained on: rename a folder that is a "
            "class"
        )
        return path, tuple(held_out)
    return path, ()


def find_parts(path: Path, depth: int = 3) -> Path:
    """The folder that holds the parts of a data set: ``path``, or below it the only folder or images/."""
    place = path
    for _ in range(depth):
        folders = find_folders(place)
        if any(map(part_of, folders)) or any(is_image(entry.name) for entry in entries(place)):
            break
        inside = folders if len(folders) == 1 else [name for name in folders if name.lower() == "images"]
        if not inside:
            break
        place = place / inside[0]
    return place if {"train", "val"} <= set(map(part_of, find_folders(place))) else path


def _download(kind, root):
    name = kind.__name__
    program = f"from torchvision.datasets import {name}; {name}('{root}', download=True)"
    return f'download it with python3 -c "{program}"'


def read_text(path: Path) -> str:
    """The text of a file, in which file names need not be UTF-8."""
    return path.read_text("utf-8-sig", errors="surrogateescape")


def read_classes(path: str | Path) -> list[str]:
    """The first word of every line of a file, without comments (#).

    The file is looked up as given, then under configs/. Raises InputError.
    """
    file = next((file for file in (Path(path).expanduser(), CONFIGS / path) if file.is_file()), None)
    if file is None:
        raise InputError(f"no file of classes (DATA.CLASSES) {path}: looked in {Path.cwd()} and in {CONFIGS}")
    classes = [word for line in read_text(file).splitlines() for word in line.split("#")[0].split()[:1]]
    if not classes:
        raise InputError(f"{file} (DATA.CLASSES) names no class: write one a line")
    return classes


def tiny_imagenet(root: Path, split: str, classes: Collection[str] | None = None) -> ImageFolder:
    """Tiny ImageNet below ``root``, whose validation images lie in one folder, with their labels in a table.

    Raises InputError where the table lacks an image.
    """
    classes, table = (
        sorted(classes or read_text(root / "wnids.txt").split()),
        root / "val/val_annotations.txt",
    )
    if split != "val" or not table.is_file():
        return ImageFolder(root / ("val" if split == "val" else "train"), classes)
    images = ImageFolder(root / "val")
    wnids = {os.fsencode(row[0]): row[1] for row in map(str.split, read_text(table).splitlines())}
    found = [wnids.get(os.path.basename(name)) for name in images.names]
    if None in found:
        raise InputError(f"{table} has no class for {images.name(found.index(None))}: restore both")
    keep = np.isin(found, classes)
    images.classes, images.names = classes, images.names[keep]
    images.labels = np.searchsorted(classes, np.array(found)[keep])
    return images


def without_checksums(kind: type[CIFAR10 | STL10]) -> type[CIFAR10 | STL10]:
    """``kind`` without its checksums, so that it reads other files than those that it would download."""
    lists = {name: [[file, None] for file, _ in getattr(kind, name)] for name in ("train_list", "test_list")}
    meta = {"meta": {**kind.meta, "md5": None}} if hasattr(kind, "meta") else {}
    return type(kind.__name__, (kind,), {**lists, **meta})


class ArrayImages(Source):
    """CIFAR-10/100 or STL-10 below ``root``, held in memory. ``kind``: its class in torchvision.datasets."""

    own_val = True

    def __init__(self, kind: type[CIFAR10 | STL10], root: Path, split: str):
        stl10 = kind is STL10
        if stl10:
            part = STL10_SPLITS[split]
        else:
            part = "test" if split == "val" else "train"
        self.root, self.part = root, f"{kind.base_folder} {part}"
        if (root / STANDIN).is_file():
            kind = without_checksums(kind)
        try:
            data = kind(root, part) if stl10 else kind(root, train=part == "train")
        except RuntimeError:  # a file is missing, or its checksum differs
            raise InputError(
                f"{root / kind.base_folder} is incomplete or damaged: remove it, then "
                + _download(kind, root)
            ) from None
        # A tensor, because workers share its memory even where they are not forked.
        self.pixels = torch.from_numpy(data.data if stl10 else data.data.transpose(0, 3, 1, 2))
        self.labels = np.array(data.labels if stl10 else data.targets).astype(np.int64)
        self.classes = data.classes

    def name(self, index: int) -> str:
        return f"{self.part}:{index}"

    def read(self, index: int) -> torch.Tensor:
        return self.pixels[index].contiguous()
