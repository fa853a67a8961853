"""One folder that holds a training and a validation set in COCO's format: where the files of each are."""

from collections.abc import Iterator
from pathlib import Path

from rsa_detectron2.common.errors import InputError

# The words that name a part, in folders and files.
TRAIN, VAL = ("train",), ("valid", "val")
# Where the images of a part are, the first that exists. {folder}: of its annotation file; {split}: the name
# of that file without instances_.
BESIDE, APART = ("{folder}/images", "{folder}"), ("{split}", "images/{split}", "images")
# Where the annotation file of a part may be, the preferred place first, and its images. {}: the part's word.
PLACES = {
    "{}/_annotations.coco.json": BESIDE,  # Roboflow
    "{}/instances_*.json": BESIDE,
    "{}/*.json": BESIDE,
    "annotations/instances_{}*.json": APART,  # COCO's own
    "instances_{}*.json": APART,
    "{}.json": APART,
}


def locate_parts(folder: str | Path) -> tuple[tuple[str, str], tuple[str, str]]:
    """(annotation file, image folder) of the training set, and of the validation set, in ``folder``.

    Raises InputError if a part is not found, or if it might be one of several files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: --data takes one with a training and a validation set")
    return _locate(folder, "training", TRAIN), _locate(folder, "validation", VAL)


def _locate(folder: Path, part: str, words: tuple[str, ...]) -> tuple[str, str]:
    for place, image_places in PLACES.items():
        files = sorted(set(_matches(folder, place, words)))
        if len(files) > 1:
            raise InputError(
                f"{folder} has several {part} sets, {' and '.join(map(str, files))}: remove or rename all "
                "but one, or give --train JSON IMAGES --val JSON IMAGES"
            )
        if files:
            return str(files[0]), str(_image_folder(folder, files[0], image_places))
    looked = ", ".join(place.format(word) for place in PLACES for word in words)
    raise InputError(f"{folder} has no {part} set: looked for {looked}")


def _matches(folder: Path, place: str, words: tuple[str, ...]) -> Iterator[Path]:
    for word in words:
        for file in folder.glob(place.format(word)):
            if file.is_file() and not file.name.startswith("."):  # "._a.json" is a Mac's
                yield file


def _image_folder(folder: Path, file: Path, places: tuple[str, ...]) -> Path:
    split = file.stem.removeprefix("instances_")
    folders = [folder / place.format(folder=file.parent.name, split=split) for place in places]
    for found in folders:
        if found.is_dir():
            return found
    raise InputError(f"no folder with the images of {file}: looked for {', '.join(map(str, folders))}")
