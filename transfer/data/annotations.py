"""Finds and reads the data sets of a fine-tuning run: each file once, with the training set's classes."""

import dataclasses
import functools
import os
from pathlib import Path

from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import classes_key, value_of
from rsa_detectron2.transfer.data.coco_json import Notes, parse, read_categories, read_coco
from rsa_detectron2.transfer.data.dataset import Dataset

# Detectron2's built-in names that the recipes use, under $DETECTRON2_DATASETS (default: datasets/).
COCO_2017 = {
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
}


def dataset_name(annotations: str | Path, images: str | Path) -> str:
    """The name under which any COCO-format data set enters ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Raises InputError if :func:`locate_dataset` could not split it into the two paths again.
    """
    name = f"{annotations}::{images}"
    if name.split("::") != [str(annotations), str(images)]:
        raise InputError(
            f"{annotations} and {images}: a data set's name is JSON::IMAGES, so neither path may "
            "contain '::', and the first may not end in ':': rename the file or folder"
        )
    return name


def locate_dataset(name: str) -> tuple[str, str]:
    """The annotation file and the image folder of a data set, both of which exist.

    ``name`` is one of :data:`COCO_2017` or a :func:`dataset_name`. Raises InputError.
    """
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    if name in COCO_2017:
        annotations, images = (Path(root) / part for part in COCO_2017[name])
    elif "::" in name:
        annotations, images = (Path(part).expanduser() for part in name.split("::", 1))
    else:
        raise InputError(f"unknown data set {name!r}: use {', '.join(COCO_2017)}, or --data FOLDER")
    if annotations.is_dir():
        raise InputError(f"{annotations} is a folder: the order is JSON IMAGES")
    if not annotations.is_file():
        advice = "give --train/--val JSON IMAGES"
        if name in COCO_2017:
            advice = f"put COCO 2017 under {root}/coco (or set DETECTRON2_DATASETS), or give --data FOLDER"
        raise InputError(f"no annotation file {annotations}: {advice}")
    if not images.is_dir():
        raise InputError(f"no image folder {images}, which belongs to {annotations}")
    return str(annotations), str(images)


def load_dataset(name: str) -> Dataset:
    """The data set with that name, as :func:`read_coco` reads it. Its file is parsed once, unless it changes.

    :func:`forget_datasets` frees the memory, which is gigabytes for COCO's own training set. Raises
    InputError.
    """
    path, folder = locate_dataset(name)
    status = os.stat(path)
    return _read_once(path, folder, status.st_mtime_ns, status.st_size)


@functools.lru_cache(4)
def _read_once(path, folder, changed, size):
    return read_coco(path, folder)


def forget_datasets() -> None:
    """Free what :func:`load_dataset` keeps."""
    _read_once.cache_clear()


def load_datasets(cfg: CfgNode, eval_only: bool = False, own_only: bool = False) -> dict[str, Dataset]:
    """The data sets of ``cfg`` by name, all with the categories of the first training set.

    eval_only: only those of DATASETS.TEST. own_only: leave out COCO's own sets, which Detectron2 loads
    itself. Raises InputError.
    """
    names = dict.fromkeys((*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST))
    loaded = {name: load_dataset(name) for name in names if not (own_only and name in COCO_2017)}
    for name in loaded.keys() & set(cfg.DATASETS.TEST):
        loaded[name] = loaded[name].measured()
    reference = reference_categories(cfg, eval_only) if loaded else None
    if reference is None:
        return loaded
    return {name: with_categories(dataset, *reference) for name, dataset in loaded.items()}


def reference_categories(cfg: CfgNode, eval_only: bool = False) -> tuple[str, list[dict]] | None:
    """(annotation file, categories) of the first training set.

    None in an evaluation if that set is not on this machine, or if it has another number of classes than
    the model.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    try:
        path, categories = locate_categories(cfg.DATASETS.TRAIN[0])
    except InputError:
        if eval_only:
            return None
        raise
    return None if eval_only and len(categories) != value_of(cfg, classes_key(cfg)) else (path, categories)


def locate_categories(name: str) -> tuple[str, list[dict]]:
    """Data set name -> (annotation file, its categories).

    COCO's two files have the same categories. Those of val are preferred: reading them takes a second,
    reading those of train takes many.
    """
    path = locate_dataset(name)[0]
    val = Path(path).with_name(Path(COCO_2017["coco_2017_val"][0]).name)
    if name in COCO_2017 and val.is_file():
        return str(val), read_categories(Notes(str(val)), parse(str(val))["categories"])[0]
    return path, load_dataset(name).categories


def with_categories(dataset: Dataset, path: str | None, categories: list[dict]) -> Dataset:
    """``dataset`` with the ``categories`` of the file ``path``, whose order is that of the model's classes.

    Each of its own categories is matched by id and name, else by name. One without objects needs no match.
    Raises InputError.
    """
    if dataset.categories == categories:
        return dataset
    by_name = {category["name"]: category["id"] for category in categories}
    used = {annotation["category_id"] for annotation in dataset.annotations}
    ids = {}
    for category in dataset.categories:
        if category in categories:
            ids[category["id"]] = category["id"]
        elif category["name"] in by_name:
            ids[category["id"]] = by_name[category["name"]]
        elif category["id"] in used:
            known = ", ".join(repr(name) for name in sorted(by_name)[:8]) + ", ..." * (len(by_name) > 8)
            raise InputError(
                f"{dataset.path} has objects of category {category['name']!r}, which {path} does not have (it"
                f" has {known}): give both the same names, or remove these objects"
            )
    if (
        len(set(ids.values())) < len(ids)
        or len(by_name) < len(categories)
        and any(a != b for a, b in ids.items())
    ):
        raise InputError(
            f"{dataset.path} and {path} number their categories differently, and some names occur twice: "
            "give both the same ids and names"
        )
    notes = list(dataset.notes)
    moved = any(a != b for a, b in ids.items())
    if moved:
        notes.append(f"categories are matched by name with those of {path}")
    absent = [category["name"] for category in categories if category["id"] not in ids.values()]
    if absent and dataset.measurable:
        notes.append(f"there is no category {listed(absent)}, so AP is the mean of the others")
    annotations = dataset.annotations
    if moved:
        annotations = [
            {**annotation, "category_id": ids[annotation["category_id"]]} for annotation in annotations
        ]
    return dataclasses.replace(dataset, categories=categories, annotations=annotations, notes=tuple(notes))


def listed(names: list[str]) -> str:
    """The first ten names as text, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more
