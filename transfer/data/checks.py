"""Checks, before a run starts, that its data sets can be trained on and evaluated."""

import functools
import shlex
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fvcore.common.config import CfgNode
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import classes_key, value_of
from rsa_detectron2.transfer.data.annotations import (
    COCO_2017,
    listed,
    load_datasets,
    locate_categories,
    locate_dataset,
)
from rsa_detectron2.transfer.data.coco_json import NO_MASK
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.data.masks import has_mask, mask_box


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> list[Dataset]:
    """Check the data sets of ``cfg``; return its training sets, but for COCO's own, which are assumed sound.

    Raises InputError unless all sets exist, are sound, and fit the model and each other. Prints what was
    corrected in them, and what is doubtful.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(
            f"DATASETS.TEST is {cfg.DATASETS.TEST}: give exactly one data set, because results are of one"
        )
    if not cfg.DATASETS.TRAIN and not eval_only:
        raise InputError("DATASETS.TRAIN is empty: give --data FOLDER")
    training, masks = () if eval_only else cfg.DATASETS.TRAIN, cfg.MODEL.MASK_ON
    names = dict.fromkeys((*training, *cfg.DATASETS.TEST))
    for name in names:
        locate_dataset(name)
    datasets = load_datasets(cfg, eval_only, own_only=True)
    check_classes(cfg, names, datasets)
    for name, dataset in datasets.items():
        notes = [*dataset.notes, *class_notes(dataset)]
        check_masks(dataset, masks)
        if name in training:
            notes += check_trainable(dataset, masks)
        if name in cfg.DATASETS.TEST:
            notes += check_measurable(dataset, masks, eval_only)
        if notes:
            print(f"{dataset.path}: {'; '.join(dict.fromkeys(notes))}", flush=True)
        warn_of_boxes(dataset)
        if problems := file_problems(dataset):
            more = f" (and {len(problems) - 1} more such errors)" if problems[1:] else ""
            raise InputError(f"{dataset.path}: {problems[0]}{more}")
    return [datasets[name] for name in training if name in datasets]


def check_classes(cfg: CfgNode, names: Collection[str], datasets: dict[str, Dataset]) -> None:
    """Raises InputError unless the data sets ``names`` have the classes of the model."""
    key = classes_key(cfg)
    classes = value_of(cfg, key)
    reference = next(iter(datasets.values()), None)
    for name in names:
        found = len(datasets[name].categories) if name in datasets else 80
        if found == classes:
            continue
        path = locate_dataset(name)[0]
        hint = f"add {key} {found}"
        if name not in cfg.DATASETS.TRAIN:  # an evaluation, which cannot change the model
            hint += ", or also give --train JSON IMAGES of its training: classes are matched by name"
        raise InputError(f"{path} has {found} categories, but {key} is {classes}: {hint}")
    for name in names if reference else ():
        if name in COCO_2017:  # Detectron2 loads these itself
            path, categories = locate_categories(name)
            if differ := [c["name"] for c in categories if c not in reference.categories]:
                raise InputError(
                    f"{path} has {listed(differ)}, but {reference.path} has others: give both the same "
                    "category ids and names"
                )


def class_notes(dataset: Dataset) -> list[str]:
    """One line that names the classes without objects, or no line if there are none."""
    used = {annotation["category_id"] for annotation in dataset.annotations}
    if not dataset.measurable or not used:
        return []
    without = [category["name"] for category in dataset.categories if category["id"] not in used]
    absent = any(note.startswith("there is no category") for note in dataset.notes)  # it names them, too
    return [f"no object is of category {listed(without)}"] if without and not absent else []


def check_masks(dataset: Dataset, masks: bool) -> None:
    """Raises InputError if objects lack the masks that training or evaluation needs."""
    objects = [annotation for annotation in dataset.annotations if not annotation["iscrowd"]]
    lacking = {}
    for annotation in objects if masks else ():
        if reason := dataset.no_mask.get(annotation["id"]):
            lacking.setdefault(reason, []).append(annotation)
    whole = sum(map(len, lacking.values())) == len(objects)
    for reason, found in lacking.items():
        first = (
            f"{len(found)} of {len(objects)} objects have {NO_MASK[reason]} (first: {dataset.name(found[0])})"
        )
        if reason == "two points":
            raise InputError(
                f"{dataset.path}: {first}, which is how labelme exports rectangles: give their four "
                "corners as polygons, or train without masks (MODEL.MASK_ON False)"
            )
        if reason in ("box", "keypoints"):
            words = {"box": "boxes", "keypoints": "keypoints and boxes"}[reason]
            if whole:
                raise InputError(
                    f"{dataset.path} has {words} only, no masks: train without masks (MODEL.MASK_ON False)"
                )
            raise InputError(
                f"{dataset.path}: {first} and no mask: give them masks, or train without masks "
                "(MODEL.MASK_ON False)"
            )


def check_trainable(dataset: Dataset, masks: bool) -> list[str]:
    """Lines on what of a training set is not trained on. Raises InputError if that is all of it."""
    check_counts(dataset)
    objects = [annotation for annotation in dataset.annotations if not annotation["iscrowd"]]
    usable = {a["id"] for image in dataset.images for _, a in dataset.objects(image, masks)}
    unusable = {"without a mask": [], "outside their image or of no size": []}
    for annotation in objects:
        if annotation["id"] not in usable:
            masked = not masks or has_mask(annotation["segmentation"])
            unusable["outside their image or of no size" if masked else "without a mask"].append(annotation)
    lines = [
        f"objects {reason}, not trained on: {len(found)} of {len(objects)} (first: {dataset.name(found[0])})"
        for reason, found in unusable.items()
        if found
    ]
    if not usable:
        raise InputError(f"{dataset.path} has no image with a usable annotation: {'; '.join(lines)}")
    return [*lines, *crowd_notes(dataset, len(objects))]


def check_measurable(dataset: Dataset, masks: bool, eval_only: bool) -> list[str]:
    """Lines on the parts of a set that are not evaluated.

    Raises InputError if a training would end without an AP, or with a wrong one.
    """
    if not dataset.images:
        raise InputError(f"{dataset.path} has no image to evaluate")
    if not dataset.measurable or eval_only and not dataset.annotations:
        return ["there are no annotations: detections are written, and there is nothing to measure"]
    check_counts(dataset)
    objects = [annotation for annotation in dataset.annotations if not annotation["iscrowd"]]
    short = [annotation for annotation in objects if masks and annotation["id"] in dataset.no_mask]
    if short:  # pycocotools would take four numbers for a box, and fail with fewer
        raise InputError(
            f"{dataset.path}: {len(short)} of {len(objects)} objects have {NO_MASK['short polygon']} (first: "
            f"{dataset.name(short[0])}), with which AP would be wrong: correct or remove them"
        )
    return crowd_notes(dataset, len(objects))


def check_counts(dataset: Dataset) -> None:
    """Raises InputError if no annotation would be trained on or evaluated."""
    if not dataset.annotations:
        raise InputError(
            f"{dataset.path} has no annotations, so there is nothing to train on or to measure: give a file"
            " with annotations (with --eval-only, detections are written without them)"
        )
    if all(annotation["iscrowd"] for annotation in dataset.annotations):
        command = f'sed -i \'s/"iscrowd": *1/"iscrowd": 0/g\' {shlex.quote(dataset.path)}'
        raise InputError(
            f"{dataset.path}: all {len(dataset.annotations)} annotations are crowds (iscrowd 1), which are"
            " neither trained on nor evaluated; CVAT exports masks like this. To make objects of them:"
            f" {command}"
        )


def crowd_notes(dataset: Dataset, num_objects: int) -> list[str]:
    """A line if more than a tenth of the annotations are crowds; COCO has only a few."""
    crowds = len(dataset.annotations) - num_objects
    if crowds <= 0.1 * len(dataset.annotations):
        return []
    return [
        f"crowds (iscrowd 1), which are neither trained on nor evaluated: {crowds} of"
        f" {len(dataset.annotations)} annotations; CVAT exports brush masks like this"
    ]


def warn_of_boxes(dataset: Dataset) -> None:
    """Print one warning if boxes contradict masks or images, as x0 y0 x1 y1 and relative coordinates do."""
    objects = [annotation for annotation in dataset.annotations if not annotation["iscrowd"]]
    sizes = {image["id"]: (image["width"], image["height"]) for image in dataset.images}
    found = [(a, doubt) for a in objects if (doubt := box_doubt(a, *sizes[a["image_id"]]))]
    if found:
        first, doubt = found[0]
        print(
            f"warning: {dataset.path}: the boxes of {len(found)} of {len(objects)} objects look wrong (first:"
            f" {dataset.name(first)}: box {first['bbox']}, but {doubt}): a box is x, y, width, height in"
            " pixels",
            file=sys.stderr,
            flush=True,
        )


def box_doubt(annotation: dict, width: int, height: int) -> str | None:
    """What contradicts an annotation's box, in words, or None."""
    x, y, w, h = annotation["bbox"]
    box = x, y, x + w, y + h
    if max(map(abs, annotation["bbox"])) <= 1 < min(width, height):
        return "its image is larger than a pixel"
    if annotation["segmentation"] and has_mask(annotation["segmentation"]):
        around = mask_box(annotation["segmentation"])
        corners = max(abs(a - b) for a, b in zip(annotation["bbox"], around)) < 1
        if max(abs(a - b) for a, b in zip(box, around)) > 2 and (corners or overlap(box, around) < 0.5):
            x0, y0, x1, y1 = (round(v, 1) for v in around)
            return f"the box of its mask is {[x0, y0, round(x1 - x0, 1), round(y1 - y0, 1)]}"
    elif box[0] < width and box[1] < height and (box[2] > 1.1 * width or box[3] > 1.1 * height):
        return f"its image is {width} x {height} pixels (width x height)"
    return None


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    w, h = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return w * h / (areas - w * h) if areas > w * h else 0


# PIL's 8-bit modes, which convert("RGB") reads correctly. Gray of 16 or 32 bits would become white.
MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}


def file_problems(dataset: Dataset) -> list[str]:
    """What is wrong with the image files, in words: one text for each that cannot be used."""
    images = dataset.images
    with ThreadPoolExecutor(16) as pool:  # opening a file on network storage is mostly waiting
        problems = pool.map(functools.partial(file_problem, dataset.folder), images)
        quiet = None if len(images) > 5000 else True  # None: hidden only where stderr is no terminal
        bar = tqdm(
            problems,
            desc="sizes of images",
            total=len(images),
            unit="image",
            dynamic_ncols=True,
            disable=quiet,
        )
        return [problem for problem in bar if problem]


def file_problem(folder: str, image: dict) -> str | None:
    """What is wrong with the file of an image, in words, or None."""
    path, given = Path(folder, image["file_name"]), (image["width"], image["height"])
    try:
        with Image.open(path) as file:
            size, mode = upright_size(file), file.mode
            # A PNG may store its orientation after its pixels, and PIL itself may rotate a TIFF.
            if size != given:
                size = ImageOps.exif_transpose(file).size
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"image {image['id']}: no file {path}"
    except Exception as error:  # PIL raises errors of almost any type for a damaged file
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        return f"image {image['id']}: {path} cannot be read as an image ({reason}): restore or replace it"
    if mode not in MODES:
        return (
            f"image {image['id']}: {path} has pixels of more than 8 bits (PIL's mode {mode}), which would be"
            " read as white: convert it to 8 bits"
        )
    if size != given:
        return (
            f"image {image['id']}: {path} is {size[0]} x {size[1]} pixels (width x height, upright), but its"
            f" width and height say {given[0]} x {given[1]}: give those of the file"
        )
    return None


def upright_size(file: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened PIL image as its EXIF orientation turns it, from the header alone."""
    try:
        # getexif of PIL's PNG class would decode the pixels.
        turned = Image.Image.getexif(file).get(0x0112) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF data, which Detectron2 ignores as well
        turned = False
    return file.size[::-1] if turned else file.size
