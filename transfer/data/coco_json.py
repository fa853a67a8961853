"""COCO-format annotation files as tools write them -> a sound :class:`transfer.data.dataset.Dataset`.

Tools count from 0, write ids as strings, and leave out what they do not need. What can only mean one thing
is corrected in memory and listed in the data set's ``notes``. Anything else is refused by an error that names
the file and its first bad entry.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.data.masks import are_numbers, is_polygon, mask_problem

NO_MASK = {  # why an annotation has no mask: the same in words
    "box": "only a box",
    "keypoints": "only keypoints and a box",
    "two points": "two points for a mask",
    "short polygon": "no polygon of at least three points",
}


def read_coco(path: str, folder: str) -> Dataset:
    """Annotation file and image folder -> its data set. The image files are not opened. Raises InputError."""
    coco, notes = parse(path), Notes(path)
    categories, category_ids = read_categories(notes, coco["categories"])
    images, image_ids = number(notes, "image", distinct(notes, "image", coco["images"]))
    find_files(notes, images, folder)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    annotations, reasons = [], []
    for entry in coco.get("annotations", ()):
        problem = annotation_problem(entry, image_ids, category_ids)
        reason = None
        if problem is None:
            problem, reason = tidy_mask(notes, entry, sizes[entry["image_id"]])
        if problem == ORPHAN:
            notes.add("annotations of images that are not in the file, left out", entry_name(entry))
        elif problem:
            notes.bad.append(f"annotation {entry_name(entry)} {problem}")
        else:
            if entry.pop("ignore", 0) and not entry["iscrowd"]:
                notes.add(
                    "annotations with ignore 1, treated as crowds",
                    entry_name(entry),
                )
                entry["iscrowd"] = 1
            annotations.append(entry)
            reasons.append(reason)
    written = number_annotations(notes, annotations)
    notes.refuse()
    no_mask = {entry["id"]: reason for entry, reason in zip(annotations, reasons) if reason}
    keypoints = {str(entry["name"]): entry.get("keypoints") for entry in coco["categories"]}
    return Dataset(
        path,
        folder,
        sorted(images, key=by_id),
        annotations,
        categories,
        "annotations" in coco,
        notes.lines(),
        written,
        no_mask,
        keypoints,
    )


def read_categories(notes: "Notes", entries: list) -> tuple[list[dict], dict[int | str, int]]:
    """The categories [{"id": int, "name": str}] sorted by id, and {key of an id as it is written: id}.

    Raises InputError.
    """
    entries, ids = number(notes, "category", distinct(notes, "category", entries))
    if not entries:
        raise InputError(f"{notes.path} has no categories")
    return sorted(({"id": entry["id"], "name": entry["name"]} for entry in entries), key=by_id), ids


def parse(path: str) -> dict:
    """Annotation file -> its content. JSON may be UTF-8 or UTF-16, with or without a byte order mark.

    Raises InputError.
    """
    try:
        coco = json.loads(Path(path).read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a COCO annotation file ({error}): save it as UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise InputError(
            f"{path} is not a COCO annotation file ({type(error).__name__}: {error}): export it again as COCO"
        ) from None
    if not isinstance(coco, dict):
        raise InputError(
            f"{path} is not a COCO annotation file (its JSON is a {type(coco).__name__}): export it as COCO"
        )
    for key in ("images", "categories", "annotations"):
        if not isinstance(coco.get(key, [] if key == "annotations" else None), list):
            raise InputError(
                f"{path} is not a COCO annotation file (it has no list of {key}): export it as COCO"
            )
    return coco


class Notes:
    """What is wrong with the file ``path`` (``bad``), and what was corrected in it."""

    def __init__(self, path: str):
        self.path, self.bad, self.mended = path, [], {}

    def add(self, text: str, name: object = None) -> None:
        """Add a note on the entry ``name``, or on the whole file where that is None."""
        count, first = self.mended.get(text, (0, name))
        self.mended[text] = count + 1, first

    def lines(self) -> tuple[str, ...]:
        return tuple(
            text if first is None else f"{text}: {count} (first: {first})"
            for text, (count, first) in self.mended.items()
        )

    def refuse(self) -> None:
        """Raises InputError if anything is wrong."""
        if self.bad:
            more = f" (and {len(self.bad) - 1} more such errors)" if self.bad[1:] else ""
            raise InputError(f"{self.path}: {self.bad[0]}{more}")


def by_id(entry: dict) -> int:
    return entry["id"]


def whole(value: object) -> int | None:
    """5, 5.0 and "5" give 5; anything that is not an integer of 64 bits gives None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    elif isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def id_key(value: object) -> int | str | None:
    """An id in the form that is compared: 5, 5.0 and "5" are the same. None for what cannot be an id."""
    number = whole(value)
    return value if number is None and isinstance(value, str) else number


def entry_name(entry: object) -> object:
    return entry.get("id", "without an id") if isinstance(entry, dict) else repr(entry)[:40]


def lacking(entry: object, keys: Iterable[str]) -> str:
    return ", ".join(key for key in keys if not isinstance(entry, dict) or key not in entry)


# The keys that must agree if an entry occurs twice.
IDENTITY = {"category": ("name",), "image": ("file_name", "width", "height")}


def distinct(notes: Notes, what: str, entries: list) -> list[dict]:
    """The sound entries of ``what``, "image" or "category", each once. Raises InputError for any other."""
    problem_of = {"category": category_problem, "image": image_problem}[what]
    found = {}
    for entry in entries:
        problem = problem_of(entry)
        if problem:
            notes.bad.append(problem)
            continue
        first = found.setdefault(id_key(entry["id"]), entry)
        if any(first[key] != entry[key] for key in IDENTITY[what]):
            names = " and ".join(repr(each[IDENTITY[what][0]]) for each in (first, entry))
            notes.bad.append(
                f"{what} id {entry['id']} occurs twice, for {names}: give every {what} an id of its own"
            )
        elif first is not entry:
            notes.add(f"repeated {what} entries, left out", entry["id"])
    notes.refuse()
    return list(found.values())


def number(notes: Notes, what: str, entries: list[dict]) -> tuple[list[dict], dict[int | str, int]]:
    """Give distinct entries integer ids, in place. Returns them and {key of an id as it is written: id}."""
    keys = [id_key(entry["id"]) for entry in entries]
    ids = dict(zip(keys, keys))
    if not all(isinstance(key, int) for key in keys):
        ids = {key: number for number, key in enumerate(keys, start=1)}
        first = next(key for key in keys if not isinstance(key, int))
        notes.add(f"{what} ids are not integers (first: {first!r}): numbered from 1 in the file's order")
    for entry, key in zip(entries, keys):
        entry["id"] = ids[key]
    return entries, ids


def category_problem(entry: Any) -> str | None:
    """What is wrong with a category, in words, or None."""
    if not lacking(entry, ("id", "name")) and id_key(entry["id"]) is not None:
        if isinstance(entry["name"], str) or whole(entry["name"]) is not None:
            entry["name"] = str(entry["name"])
            return None
    return f"category {repr(entry)[:80]} needs an id that is an integer and a name that is a string"


def image_problem(image: Any) -> str | None:
    """What is wrong with an image's entry, in words, or None; its size becomes integers."""
    if missing := lacking(image, ("id", "file_name", "width", "height")):
        return f"image {entry_name(image)} lacks {missing}"
    name, size = image["id"], (whole(image["width"]), whole(image["height"]))
    if id_key(name) is None:
        return f"image id {name!r} is not an integer"
    if not isinstance(image["file_name"], str) or None in size:
        return f"image {name} needs a file_name that is a string, and a width and height in pixels"
    if "://" in image["file_name"]:
        return (
            f"image {name}: its file_name {image['file_name']} is a URL, and URLs are not fetched: download"
            " the images and give the names of their files"
        )
    if min(size) < 1:
        return (
            f"image {name} is {size[0]} x {size[1]} pixels (width x height): give the size of"
            f" {image['file_name']}"
        )
    image["width"], image["height"] = size
    return None


def find_files(notes: Notes, images: list[dict], folder: str) -> None:
    """Make every file_name a path under ``folder``, in place, if it was written for another folder or system.

    Of a name such as images/1.jpg or C:\\data\\images\\1.jpg, the longest ending that is a file in ``folder``
    is taken. If the first image exists under its name as written, only names with backslashes are looked up,
    because looking for every image takes long on network storage.
    """
    first_found = bool(images) and os.path.isfile(os.path.join(folder, images[0]["file_name"]))
    taken = {}
    for image in images:
        written = image["file_name"]
        if first_found and "\\" not in written:
            continue
        parts = [part for part in written.replace("\\", "/").split("/") if part]
        ends = (written, *("/".join(parts[start:]) for start in range(len(parts))))
        name = next((end for end in ends if os.path.isfile(os.path.join(folder, end))), written)
        if taken.setdefault(name, written) != written:
            notes.bad.append(
                f"images {taken[name]} and {written} would both be {os.path.join(folder, name)}: give the "
                "folder that these names are relative to"
            )
        if name != written:
            image["file_name"] = name
            notes.add(f"file names shortened to what exists in {folder}", written)


ORPHAN = "is of an image that is not in the file"


def annotation_problem(
    entry: Any, image_ids: dict[int | str, int], category_ids: dict[int | str, int]
) -> str | None:
    """What is wrong with an annotation, its mask aside, in words, or None. Corrects it in place.

    image_ids, category_ids: {key of an id as it is written: id}.
    """
    if missing := lacking(entry, ("image_id", "category_id", "bbox")):
        return f"lacks {missing}"
    for key in ("image_id", "category_id"):
        if id_key(entry[key]) is None:
            return f"has {key} {entry[key]!r}, which is not an integer"
    if id_key(entry["image_id"]) not in image_ids:
        return ORPHAN
    if id_key(entry["category_id"]) not in category_ids:
        return f"has category_id {entry['category_id']}, which is none of the categories: add it to them"
    entry["image_id"] = image_ids[id_key(entry["image_id"])]
    entry["category_id"] = category_ids[id_key(entry["category_id"])]
    for key in ("iscrowd", "ignore"):
        value = entry.get(key) or 0
        if whole(int(value) if isinstance(value, bool) else value) not in (0, 1):
            return f"has {key} {value!r}: it must be 0 or 1"
        entry[key] = int(value)
    if not are_numbers(entry["bbox"]) or len(entry["bbox"]) != 4 or min(entry["bbox"][2:]) < 0:
        return f"has the bbox {entry['bbox']}, which is not [x, y, width, height] with a size of at least 0"
    return None


def tidy_mask(notes: Notes, entry: dict, size: tuple[int, int]) -> tuple[str | None, str | None]:
    """Keep only polygons of at least three points in an annotation's segmentation, in place.

    size: height, width of its image. Returns what is wrong with it, in words, or None, and why it has no
    mask, a key of :data:`NO_MASK`, or None.
    """
    written = entry.get("segmentation")
    if written and are_numbers(written):
        written = [written]
    if not written or isinstance(written, list) and not any(written):  # [] and [[]]
        entry["segmentation"] = []
        return None, "keypoints" if entry.get("keypoints") else "box"
    if problem := mask_problem(written, *size):
        return problem, None
    if isinstance(written, dict):
        return None, None
    entry["segmentation"] = [polygon for polygon in written if is_polygon(polygon)]
    if not entry["segmentation"]:
        return None, "two points" if all(len(polygon) == 4 for polygon in written) else "short polygon"
    for _ in range(len(written) - len(entry["segmentation"])):
        notes.add("polygons of fewer than three points, left out", f"annotation {entry_name(entry)}")
    return None, None


def number_annotations(notes: Notes, entries: list[dict]) -> dict[int, Any]:
    """Number annotations from 1, in place, unless their ids are integers above 0 already.

    Returns {id: id as it is written}, {} if they keep their ids.

    pycocotools marks a detection by the id of its object, where 0 means none.
    """
    written = [entry.get("id") for entry in entries]
    keys = [key for key in map(id_key, written) if key is not None]
    if len(set(keys)) < len(keys):
        seen = set()
        again = next(key for key in keys if key in seen or seen.add(key))
        notes.bad.append(f"annotation {again} has the id of another: give every annotation an id of its own")
    if len(keys) == len(entries) and all(isinstance(key, int) and key > 0 for key in keys):
        for entry, key in zip(entries, keys):
            entry["id"] = key
        return {}
    for n, entry in enumerate(entries, start=1):
        entry["id"] = n
    notes.add("annotations are numbered from 1, because COCO's metric needs ids above 0")
    return dict(enumerate(written, start=1))
