"""Image folders as people have them: odd names, links, files that systems leave behind, and parts that are
for tests.
"""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_detectron2.common.cli import expand_home
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import check, expand_paths, get_cfg
from rsa_detectron2.pretrain.data import datasets, folders
from rsa_detectron2.pretrain.data.bad_images import BadImages, read_or_next
from rsa_detectron2.pretrain.data.datasets import ImageFolder, open_images
from rsa_detectron2.pretrain.data.images import UnreadableImage, printable
from rsa_detectron2.pretrain.data.source import say
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.evaluate.cache import fingerprint
from rsa_detectron2.pretrain.evaluate.knn import NoValidation, find_labeled
from tests.conftest import tiny_cfg

LATIN1 = os.fsdecode(b"caf\xe9")  # as an old archive unpacks it


def draw(root, *names):
    """Write small images with these names below ``root``, each in its own color: {name: color}."""
    colors = {}
    for i, name in enumerate(names):
        path, colors[name] = Path(root, name), 10 * i
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(
            path, **({"quality": 100} if name.endswith("jpg") else {"format": "PNG"})
        )
    return colors


def names(images):
    return [images.id(index) for index in range(len(images))]


@pytest.fixture(autouse=True)
def say_again():
    """Forget which lines were said: each is said once in a process, but pytest reuses folders for other
    tests."""
    say.cache_clear()


# ---- names ----


@pytest.mark.parametrize(
    "name",
    [
        f"a/{LATIN1}.png",
        f"{LATIN1}/x.png",
        "a/x\ny.png",
        "a\nb/x.png",
        'a/"x".png',
        "a/\x1b[31m.png",
        "a/x .png",
        "a/\u2028.png",
    ],
)
def test_every_name_is_read_and_printed_and_listed_once(tmp_path, name):
    draw(tmp_path / "images", "b/0.png", name)
    images = ImageFolder(tmp_path / "images")
    index = names(images).index(name)
    assert images.read(index).unique().tolist() == [10]
    assert len(images.classes) == (2 if name.startswith("a/") or LATIN1 in name or "\n" in name else 1)
    assert len(fingerprint(images)) == 64

    Path(images.name(index)).write_bytes(b"<html>404</html>")
    with pytest.raises(UnreadableImage) as error:
        images.read(index)
    assert str(error.value).isprintable() and printable(images.name(index)) in str(error.value)
    path = tmp_path / "bad_images.txt"
    for _ in range(2):  # a run that goes on
        again = ImageFolder(tmp_path / "images")
        BadImages(path, again, 0.001).start()
        read_or_next(again, index)
        BadImages(path, again, 0.001).add([index])
        assert (
            [json.loads(line) for line in path.read_text().splitlines()]
            == [name]
            == [*BadImages(path, again, 1).listed()]
        )
    assert again.known_bad() == [index]


def test_a_run_on_odd_names(tmp_path, capsys):
    """The folder has an odd name, too. Any terminal can show what is printed."""
    root = tmp_path / f"{LATIN1}\n" / "train"
    draw(root, *(f"{folder}/{i}.png" for folder in (LATIN1, "b") for i in range(8)))
    draw(root.parent / "val", *(f"{folder}/{i}.png" for folder in (LATIN1, "b") for i in range(2)))
    for name in (f"b/{LATIN1}.png", "b/x\ny.png"):
        (root / name).write_bytes(b"")
    run = tmp_path / "run"
    assert train_loop.train(tiny_cfg(root, tmp_path, "SOLVER.EPOCHS", 2)) == str(run / "model_final.pth")
    assert sorted(json.loads(line) for line in (run / "bad_images.txt").read_text().splitlines()) == sorted(
        [f"b/{LATIN1}.png", "b/x\ny.png"]
    )
    printed = capsys.readouterr()
    printed.out.encode()
    assert "kNN top-1" in printed.err and r"caf\xe9\n/train" in printed.out
    assert "2 of the 18 images of" in printed.err  # of the bank


def test_an_output_folder_that_tensorboard_refuses():
    cfg = get_cfg()
    cfg.OUTPUT_DIR = LATIN1
    with pytest.raises(InputError, match="OUTPUT_DIR is 'caf.*e9': TensorBoard takes names in UTF-8 only"):
        check(cfg)


# ---- links ----


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "links, expected, said",
    [
        ({"again": "."}, [], "again"),
        ({"again": "../set"}, [], "again"),
        ({"a/up": ".."}, [], "a/up"),
        ({"a/to_b": "../b", "b/to_a": "../a"}, [], "a/to_b and 1 more"),
        ({"0": "b"}, [], "0"),  # its own path, although the link comes first
        ({"c": "../elsewhere/c"}, ["c/1.png"], None),
        ({"c": "../elsewhere/c", "d": "../elsewhere/c"}, ["c/1.png"], "d"),
        ({"c": "../elsewhere"}, ["c/c/1.png"], "c/back"),
        ({"c/2.png": "../../elsewhere/c/1.png"}, ["c/2.png"], None),
    ],
)
def test_links_are_followed_once(tmp_path, capsys, links, expected, said):
    draw(tmp_path / "set", "a/0.png", "b/0.png")
    draw(tmp_path / "elsewhere", "c/1.png")
    if "c/back" == said:
        link(tmp_path / "elsewhere/back", tmp_path / "set")
    for name, target in links.items():
        link(tmp_path / "set" / name, target)
    assert names(ImageFolder(tmp_path / "set")) == ["a/0.png", "b/0.png", *expected]
    line = capsys.readouterr().err
    assert line.count("\n") == (said is not None) and (
        said is None or f"read already, left out: {said}\n" in line
    )


def test_links_that_lead_nowhere_and_what_is_no_file(tmp_path, capsys, monkeypatch):
    draw(tmp_path, "a/0.png")
    link(tmp_path / "a/1.png", "absent.png")
    link(tmp_path / "class", "of another disk")
    link(tmp_path / "a/2.png", "2.png")
    os.mkfifo(tmp_path / "a/3.png")  # which would wait for a writer
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        listening.bind("4.png")
    assert names(ImageFolder(tmp_path)) == ["a/0.png"]
    assert "files left out: 3 broken links, 2 that are no files" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Otherwise its images would be lost without a word."""
    draw(tmp_path, "a/0.png", "b/0.png")
    scandir = os.scandir

    def refused(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(
        InputError, match="the folder .*/b cannot be read .Permission denied.: make it readable"
    ):
        ImageFolder(tmp_path)


# ---- what is left out ----


def test_what_is_left_out_is_counted_by_kind(tmp_path, capsys):
    draw(
        tmp_path / "set",
        "a/0.png",
        "b/0.png",
        "a/._0.png",
        "b/._0.png",
        "a/.hidden.png",
        ".ipynb_checkpoints/0.png",
        "__MACOSX/a/._0.png",
        "__MACOSX/0.png",
        "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
        "$RECYCLE.BIN/1.png",
        "lost+found/1.png",
        "System Volume Information/1.png",
    )
    for name in (".DS_Store", "a/Thumbs.db", "a/1.heic", "a/2.HEIC", "a/notes", "a/x.y\nz"):
        (tmp_path / "set" / name).write_bytes(b"...")
    images = ImageFolder(tmp_path / "set")
    assert names(images) == ["a/0.png", "b/0.png"] and images.classes == ["a", "b"]
    assert capsys.readouterr().err == (
        f"{tmp_path}/set: 2 images; files left out: 2 ._*, 2 .heic, 2 hidden, 2 in __MACOSX/, 1 .db, "
        "1 .y\\nz, 1 in $RECYCLE.BIN/, 1 in .ipynb_checkpoints/, 4 of other kinds\n"
    )
    ImageFolder(tmp_path / "set")
    assert not capsys.readouterr().err  # said once
    # a folder that the user names may be hidden itself
    hidden = (tmp_path / "set").rename(tmp_path / ".cache")
    assert len(ImageFolder(hidden)) == 2
    assert not find_labeled_names(hidden)


def find_labeled_names(root):
    with pytest.raises(NoValidation):
        find_labeled(cfg_of(root), ImageFolder(root))
    return []


def cfg_of(path, **data):
    cfg = get_cfg()
    cfg.DATA.update(PATH=str(path), **data)
    return cfg


@pytest.mark.parametrize(
    "format, suffix",
    [
        ("GIF", "gif"),
        ("JPEG2000", "jp2"),
        ("AVIF", "avif"),
        ("JPEG", "jfif"),
        ("JPEG", "JPE"),
        ("PPM", "pnm"),
        ("WEBP", "WebP"),
    ],
)
def test_formats_that_are_read(tmp_path, format, suffix):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"Pillow here does not write {format}")
    gradient = np.linspace(0, 255, 40 * 40 * 3).reshape(40, 40, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / f"x.{suffix}", format)
    [image] = map(ImageFolder(tmp_path).read, [0])
    assert (image.permute(1, 2, 0).float() - torch.from_numpy(gradient).float()).abs().mean() < 4


@pytest.mark.parametrize(
    "files, words",
    [
        ((), r"no images below .* \(.jpg, .*.avif\): correct the path"),
        (("a.tar", "b.tar", "c.txt"), "no images below .*, only other files: 2 .tar, 1 .txt: unpack them"),
        (("a.heic",), "only other files: 1 .heic: correct the path"),
        ((".a.png",), "only other files: 1 hidden"),
    ],
)
def test_folders_without_images_say_what_they_hold(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_bytes(b"...")
    with pytest.raises(InputError, match=words):
        open_images(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    for name, words in (
        ("x.tar", "x.tar is a file: unpack it"),
        ("x.parquet", "x.parquet is a file: give the folder"),
    ):
        (tmp_path / name).write_bytes(b"...")
        with pytest.raises(InputError, match=words):
            open_images(tmp_path / name)


# ---- parts of a data set ----


@pytest.mark.parametrize(
    "train, val",
    [
        ("train", "val"),
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAIN", "VAL"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("train_images", "test-images"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        ("images/train", "images/val"),
        ("Data/Training", "Data/Validation"),
        ("dataset/x/train", "dataset/x/valid"),
        (".", "test"),
        (".", "Testing"),
        ("train", "dev"),
        ("trainset", "TestSet"),
        ("trainval", "test"),
        ("Images/train", "Images/val"),
    ],
)
def test_parts_are_known_by_their_names(tmp_path, train, val):
    draw(tmp_path / "set" / train, "a/0.png", "b/0.png", "b/1.png")
    draw(tmp_path / "set" / val, "a/0.png", "b/0.png")
    for split in ("pretrain", "train"):
        images = open_images(tmp_path / "set", split)
        assert images.root == tmp_path / "set" / train and names(images) == ["a/0.png", "b/0.png", "b/1.png"]
    bank, found = find_labeled(cfg_of(tmp_path / "set"), images)
    assert bank is images and found.root == tmp_path / "set" / val and len(found) == 2
    part = tmp_path / "set" / train  # given itself, with the other beside it
    assert find_labeled(cfg_of(part), open_images(part))[1].root == tmp_path / "set" / val


@pytest.mark.parametrize(
    "present, chosen",
    [
        (("train", "test", "val"), "val"),
        (("train", "test", "validation"), "validation"),
        (("train", "Test", "valid"), "valid"),
        (("train", "val2017", "val"), "val"),
    ],
)
def test_the_best_of_several_parts(tmp_path, present, chosen):
    for name in present:
        draw(tmp_path / name, "a/0.png", "b/0.png")
    assert find_labeled(cfg_of(tmp_path), open_images(tmp_path))[1].root.name == chosen


@pytest.mark.parametrize(
    "present, held_out",
    [
        (("a", "b", "test"), "test/"),
        (("a", "b", "val", "Testing"), "Testing/, val/"),
        ((".", "test"), "test/"),
    ],
)
def test_images_for_tests_beside_classes_are_not_trained_on(tmp_path, capsys, present, held_out):
    for name in present:
        draw(tmp_path / name, "0.png")
    images = open_images(tmp_path)
    assert len(images) == len(present) - 1 - held_out.count(",") and not any(
        "est" in name for name in names(images)
    )
    assert f"{tmp_path}: {held_out} taken for validation, not trained on: rename" in capsys.readouterr().err


def test_what_lies_beside_the_parts_is_named(tmp_path, capsys):
    draw(tmp_path, "train/a/0.png", "test/a/0.png", "unlabeled/0.png", "sample.png")
    assert names(open_images(tmp_path)) == ["a/0.png"]
    assert (
        f"{tmp_path}: images of train/ are trained on; left out: unlabeled/, 1 images beside them"
        in capsys.readouterr().err
    )


def test_only_images_for_tests(tmp_path):
    draw(tmp_path, "test/a/0.png", "val/a/0.png")
    with pytest.raises(
        InputError, match="has only test/, val/ whose images are not for training: give that folder"
    ):
        open_images(tmp_path)
    assert len(open_images(tmp_path / "test")) == 1
    assert open_images(tmp_path, "val").root == tmp_path / "val"


def test_several_training_parts_are_refused(tmp_path):
    draw(tmp_path, "train2014/0.png", "train2017/0.png", "val2017/0.png")
    with pytest.raises(
        InputError, match="has several train parts, train2014, train2017: give the folder of one"
    ):
        open_images(tmp_path)


def test_parts_below_the_classes_are_not_trained_on_in_silence(tmp_path, capsys):
    draw(
        tmp_path,
        "bottle/train/0.png",
        "bottle/test/0.png",
        "bottle/test/1.png",
        "cable/train/0.png",
        "cable/test/0.png",
    )
    assert len(open_images(tmp_path)) == 5
    assert "warning: 3 of the 5 images" in (said := capsys.readouterr().err) and "like bottle/test:" in said


def test_classes_that_are_called_like_a_part(tmp_path, capsys):
    """COCO has a class train."""
    draw(tmp_path, "bus/0.png", "train/0.png", "test_tube/0.png")
    images = open_images(tmp_path)
    assert images.classes == ["bus", "test_tube", "train"] and not capsys.readouterr().err


# ---- ~ ----


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    draw(tmp_path / "set", "train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png")
    (tmp_path / "classes.txt").write_text("b\n")
    assert open_images("~/set").root == tmp_path / "set/train"
    assert open_images("~/set", "pretrain", "~/classes.txt").classes == ["b"]
    cfg = cfg_of("~/set/train", VAL="~/set/val", CLASSES="~/classes.txt")
    cfg.OUTPUT_DIR = "~/run"
    expand_paths(cfg)
    assert [cfg.DATA.PATH, cfg.DATA.VAL, cfg.DATA.CLASSES, cfg.OUTPUT_DIR] == [
        f"{tmp_path}/{name}" for name in ("set/train", "set/val", "classes.txt", "run")
    ]
    assert [*map(expand_home, ("~/x", "--train=~/x", "--seed=3", "a~b", "--val=a=~/x"))] == [
        f"{tmp_path}/x",
        f"--train={tmp_path}/x",
        "--seed=3",
        "a~b",
        "--val=a=~/x",
    ]


def test_rules_are_sound():
    words = [word for part in folders.PARTS.values() for word in part]
    assert len(words) == len({*words}) and not {*words} & {*folders.FILLERS}
    assert all(
        name == name.lower()
        for name in (*words, *folders.FILLERS, *folders.SYSTEM_FOLDERS, *folders.SUFFIXES)
    )
    assert datasets.ImageFolder is ImageFolder
