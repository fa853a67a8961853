"""Drawn data sets in the formats of the real ones, to rehearse with on a machine that has none of them.

A stand-in has a file :data:`STANDIN` in its folder. datasets.py then does not compare the checksums of the
real files, and the record of a run names the data set as a stand-in.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rsa_detectron2.common.config import CONFIGS
from rsa_detectron2.pretrain.data.source import STANDIN

IMAGENET100 = CONFIGS / "pretrain" / "imagenet100_classes.txt"


def draw(kind: str, folder: str | Path, num_images: int, seed: int = 0) -> Path:
    """Draw a data set of ``kind``, one of :data:`KINDS`, into ``folder``.

    It has ``num_images`` to train on and a quarter of that to validate on; where classes are folders, at
    least one image of each. Returns the path for --data of tools/pretrain.py.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = KINDS[kind](folder, num_images, max(1, num_images // 4), np.random.default_rng(seed))
    # Written last: it says that the folder is complete.
    (folder / STANDIN).write_text(f"drawn, {num_images} images in the format of {kind}\n")
    return place


def pixels(rng: np.random.Generator, labels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, size, size, 3]: a color for each label, and noise."""
    colors = np.random.default_rng(0).integers(40, 216, (1 + max(labels), 3))
    noise = rng.integers(-40, 41, (len(labels), size, size, 3))
    return (colors[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class CifarFormat:
    """The names in a release of CIFAR: its folder and the file of class names; keys of their dicts."""

    folder: str
    meta: str
    label_key: str
    names_key: str
    num_classes: int


CIFAR10 = CifarFormat("cifar-10-batches-py", "batches.meta", "labels", "label_names", 10)
CIFAR100 = CifarFormat("cifar-100-python", "meta", "fine_labels", "fine_label_names", 100)


def cifar(folder: Path, form: CifarFormat, files: dict[str, int], rng: np.random.Generator) -> Path:
    """CIFAR's Python pickles: rows of 3,072 bytes, red first; ``files``: {name: number of images}."""
    base = folder / form.folder
    base.mkdir(exist_ok=True)
    for name, count in files.items():
        labels = rng.permutation(np.arange(count) % form.num_classes)
        data = pixels(rng, labels, 32).transpose(0, 3, 1, 2).reshape(count, -1)
        batch = {"data": data, form.label_key: labels.tolist()}
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"class {i}" for i in range(form.num_classes)]
    (base / form.meta).write_bytes(pickle.dumps({form.names_key: names}, protocol=2))
    return folder


def cifar10(folder: Path, num_images: int, num_val: int, rng: np.random.Generator) -> Path:
    parts = np.array_split(np.arange(num_images), 5)
    files = {f"data_batch_{i + 1}": len(part) for i, part in enumerate(parts)}
    return cifar(folder, CIFAR10, files | {"test_batch": num_val}, rng)


def cifar100(folder: Path, num_images: int, num_val: int, rng: np.random.Generator) -> Path:
    return cifar(folder, CIFAR100, {"train": num_images, "test": num_val}, rng)


def stl10(folder: Path, num_images: int, num_val: int, rng: np.random.Generator) -> Path:
    """STL-10's binaries: planes of 96 x 96 bytes, column by column; labels count from 1. A quarter of the
    images is labeled."""
    place, labeled = folder / "stl10_binary", max(1, num_images // 4)
    place.mkdir(exist_ok=True)
    for name, count in (("train", labeled), ("unlabeled", num_images - labeled), ("test", num_val)):
        labels = np.arange(count) % 10
        pixels(rng, labels, 96).transpose(0, 3, 2, 1).tofile(place / f"{name}_X.bin")
        if name != "unlabeled":
            (1 + labels).astype(np.uint8).tofile(place / f"{name}_y.bin")
    (place / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    (place / "fold_indices.txt").write_text("")
    return folder


def tinyimagenet(folder: Path, num_images: int, num_val: int, rng: np.random.Generator) -> Path:
    """Tiny ImageNet's folders: images/ in each class folder of train/; one folder of validation images,
    with a table of their labels."""
    names = [f"n{i:08d}" for i in range(10)]
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    labels = np.arange(max(num_images, len(names))) % len(names)
    for i, (label, image) in enumerate(zip(labels, pixels(rng, labels, 64))):
        save(folder / "train" / names[label] / "images" / f"{names[label]}_{i}.JPEG", image)
    labels = np.arange(num_val) % len(names)
    for i, image in enumerate(pixels(rng, labels, 64)):
        save(folder / "val" / "images" / f"val_{i}.JPEG", image)
    rows = [f"val_{i}.JPEG\t{names[label]}\t0\t0\t63\t63\n" for i, label in enumerate(labels)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return folder


def imagenet(folder: Path, num_images: int, num_val: int, rng: np.random.Generator) -> Path:
    """Folders of ImageNet-100's classes. They stand in for ImageNet-1K as well."""
    names = [
        line.split()[0] for line in IMAGENET100.read_text().splitlines() if line.strip() and line[0] != "#"
    ]
    for part, count in (("train", num_images), ("val", num_val)):
        labels = np.arange(max(count, len(names))) % len(names)
        for i, label in enumerate(labels):
            save(
                folder / part / names[label] / f"{part}_{i:08d}.JPEG", pixels(rng, labels[i : i + 1], 256)[0]
            )
    return folder / "train"


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


KINDS = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "tinyimagenet": tinyimagenet,
    "imagenet100": imagenet,
    "imagenet": imagenet,
}
