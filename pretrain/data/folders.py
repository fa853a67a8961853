"""Folders of images: which files count, and which folders are parts of a data set (train, val)."""

import heapq
import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.images import printable, read_file
from rsa_detectron2.pretrain.data.source import Source, say

SUFFIXES = (*IMG_EXTENSIONS, ".jpe", ".jfif", ".pbm", ".pnm", ".gif", ".jp2", ".avif")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".7z", ".rar")
# What operating systems put among a user's files, besides hidden folders (.ipynb_checkpoints, .Trash-1000).
SYSTEM_FOLDERS = (
    "__macosx",
    "@eadir",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
)
# Words that name a part of a data set, the preferred one first.
PARTS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "validation", "valid", "eval", "evaluation", "dev", "test", "testing"),
}
# Words that may stand beside those: train_images, test-set, ILSVRC2012_img_val. Case and digits do not count.
FILLERS = (
    "images",
    "image",
    "imgs",
    "img",
    "pictures",
    "photos",
    "set",
    "data",
    "dataset",
    "split",
    "folder",
    "ilsvrc",
    "partial",
    "part",
    "shard",
    "of",
)
NAMED = {"train": "train", "val": "val or test"}  # in messages
SHOWN = 8  # kinds of files that one line names


def part_of(name: str) -> str:
    """The part that a folder or a split is, by its name: "train" or "val"; "" where the name is no part's."""
    return next((part for part, words in PARTS.items() if _word(name) in words), "")


def _word(name):
    """The word of :data:`PARTS` in a name; "" where there is none, or anything but fillers beside it."""
    words, fillers = "|".join(sum(PARTS.values(), ())), "|".join(FILLERS)
    found = re.fullmatch(f"(?:{fillers})*({words})(?:{fillers})*", re.sub(r"[\W\d_]", "", name.lower()))
    return found[1] if found else ""


def rank(name: str) -> tuple[int, bool]:
    """A sort key for names of one part: the preferred name is the lowest."""
    return PARTS[part_of(name)].index(_word(name)), name.lower() != _word(name)


def pick(names: Collection[str], part: str, place: Path) -> str:
    """The best of ``names`` for a part of the data set at ``place``.

    Raises InputError if none is of that part, or if several are equally good.
    """
    ranked = sorted((name for name in names if part_of(name) == part), key=lambda name: (rank(name), name))
    if not ranked:
        raise InputError(
            f"{printable(place)} has only {', '.join(sorted(map(printable, names)))}, no "
            f"{NAMED[part]}: name the folder that is meant"
        )
    equal = [printable(name) for name in ranked if rank(name) == rank(ranked[0])]
    if len(equal) > 1:
        raise InputError(
            f"{printable(place)} has several {part} parts, {', '.join(equal)}: give the folder of one"
        )
    return ranked[0]


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_skipped(name: str) -> bool:
    """Whether a folder is hidden or a system's."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def find_folders(path: Path) -> list[str]:
    """Names of the folders in ``path`` that are not skipped, sorted."""
    return sorted(entry.name for entry in entries(path) if is_folder(entry) and not is_skipped(entry.name))


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise InputError(
            f"the folder {printable(folder)} cannot be read ({error.strerror}): make it readable, or move "
            "it out of the data set"
        ) from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


@dataclass
class Files:
    """The image files below a folder, and what was left out."""

    names: list[str] = field(default_factory=list)  # relative paths, sorted
    folders: Counter[str] = field(default_factory=Counter)  # number of images in each folder
    left_out: Counter[str] = field(default_factory=Counter)  # number of files of each kind
    links_back: list[str] = field(default_factory=list)  # links to folders that are read already


def find_images(root: str | Path, is_kept: Callable[[str], bool] = lambda folder: True) -> Files:
    """The Files below ``root``. ``is_kept`` tells which of the first-level folders to read.

    Links are followed, but a folder that can be reached by several paths is read once: by its own path if
    that lies below ``root``, else by the first.
    """
    files, seen, folders, links = Files(), set(), [""], []
    while folders or links:
        folder, linked = (folders.pop(), False) if folders else (heapq.heappop(links), True)
        status = os.stat(os.path.join(root, folder))
        place = status.st_dev, status.st_ino
        if linked and place in seen:
            files.links_back.append(folder)
            continue
        seen.add(place)
        for entry in entries(os.path.join(root, folder)):
            path = os.path.join(folder, entry.name)
            if not is_folder(entry):
                add_file(files, folder, entry)
            elif is_skipped(entry.name):
                files.left_out[f"in {printable(entry.name)}/"] += sum(
                    len(names) for *_, names in os.walk(entry.path)
                )
            elif not folder and not is_kept(entry.name):
                continue
            elif linked or entry.is_symlink():
                heapq.heappush(links, path)
            else:
                folders.append(path)
    files.names.sort()
    return files


def add_file(files: Files, folder: str, entry: os.DirEntry[str]) -> None:
    """Add a file to the images, or to what is left out."""
    name, exists = entry.name, is_file(entry)
    if name.startswith("._"):  # a Mac's resource forks
        kind = "._*"
    elif name.startswith("."):
        kind = "hidden"
    elif not exists:
        kind = "broken links" if entry.is_symlink() else "that are no files"
    elif not is_image(name):
        kind = printable(os.path.splitext(name)[1].lower()) or "without suffix"
    else:
        files.names.append(os.path.join(folder, name))
        files.folders[folder] += 1
        return
    files.left_out[kind] += 1


def listing(left_out: Counter[str]) -> str:
    """``3 .avif, 1 hidden``: a count of each kind, the largest first."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {kind}" for kind, count in kinds[:SHOWN]]
    if len(kinds) > SHOWN:
        parts.append(f"{sum(count for _, count in kinds[SHOWN:])} of other kinds")
    return ", ".join(parts)


class ImageFolder(Source):
    """All images below ``root``, in the order of their paths.

    ``classes``: the first-level folders to read; None: all. ``without``: those not to read. The label of an
    image is the index in ``self.classes`` of its first-level folder, -1 for an image that lies in ``root``
    itself. Prints to stderr what was left out. Raises InputError where no image is found, or a class has
    none.
    """

    def __init__(
        self, root: str | Path, classes: Collection[str] | None = None, without: Collection[str] = ()
    ):
        self.root = Path(root)
        kept = None if classes is None else set(classes)
        files = find_images(root, lambda name: name not in without and (kept is None or name in kept))
        names = files.names if classes is None else [name for name in files.names if os.sep in name]
        self.take([os.fsencode(name) for name in names])
        missing = sorted(set(classes or ()) - set(self.classes))
        if missing:
            raise InputError(
                f"{printable(root)} has no images of {len(missing)} of the classes asked for, "
                f"{printable(missing[0])} first: complete it, or correct DATA.CLASSES"
            )
        if not names:
            raise NoImages(root, files.left_out)
        if files.left_out:
            say(f"{printable(root)}: {len(names)} images; files left out: {listing(files.left_out)}")
        if files.links_back:
            more = f" and {len(files.links_back) - 1} more" if len(files.links_back) > 1 else ""
            say(
                f"{printable(root)}: links to folders that are read already, left out: "
                f"{printable(min(files.links_back))}{more}"
            )
        self.folders = files.folders

    def take(self, names: list[bytes]) -> None:
        """Set the images to ``names``: paths below the root, as bytes, in this order. They need not exist."""
        folders = [os.fsdecode(name).split(os.sep)[0] if b"/" in name else None for name in names]
        self.classes = sorted({folder for folder in folders if folder})
        index = {folder: i for i, folder in enumerate(self.classes)}
        self.names = np.array(names)
        self.labels = np.array([index.get(folder, -1) for folder in folders])
        self.__dict__.pop("bad", None)

    def id(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def indices(self, ids: Collection[str]) -> list[int]:
        prefix = f"{self.root}{os.sep}"  # lists of early versions hold whole paths
        wanted = [os.fsencode(name.removeprefix(prefix)) for name in ids]
        return np.flatnonzero(np.isin(self.names, wanted)).tolist() if wanted else []

    def name(self, index: int) -> str:
        return str(self.root / self.id(index))

    def encoded(self, index: int) -> tuple[bytes, str]:
        return read_file(self.name(index)), printable(self.name(index))


class NoImages(InputError):
    """A folder without images."""

    def __init__(self, root: str | Path, left_out: Counter[str]):
        archives = [kind for kind in left_out if kind in ARCHIVES]
        there = f", only other files: {listing(left_out)}" if left_out else f" ({', '.join(SUFFIXES)})"
        super().__init__(
            f"no images below {printable(root)}{there}"
            + (": unpack them" if archives else ": correct the path")
        )
