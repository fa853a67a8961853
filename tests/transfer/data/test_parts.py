"""One folder of data in the layouts of Roboflow, COCO and others; what is missing or doubtful is named."""

import re
import sys

import pytest

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import train_net
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.data.parts import locate_parts
from rsa_detectron2.transfer.tv import engine
from tests.conftest import write_json

LAYOUTS = {  # files, with a / at the end of folders: (annotation file, image folder) of each part
    "Roboflow": (
        "train/_annotations.coco.json valid/_annotations.coco.json test/_annotations.coco.json",
        ("train/_annotations.coco.json", "train"),
        ("valid/_annotations.coco.json", "valid"),
    ),
    "Roboflow beside other JSON files": (
        "train/_annotations.coco.json train/notes.json val/_annotations.coco.json",
        ("train/_annotations.coco.json", "train"),
        ("val/_annotations.coco.json", "val"),
    ),
    "instances and images": (
        "train/instances_default.json train/captions.json train/images/ val/any.json val/._any.json",
        ("train/instances_default.json", "train/images"),
        ("val/any.json", "val"),
    ),
    "COCO": (
        "annotations/instances_train2017.json annotations/instances_val2017.json "
        "annotations/captions_val2017.json train2017/ val2017/",
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_val2017.json", "val2017"),
    ),
    "COCO below images": (
        "annotations/instances_train.json annotations/instances_valid.json images/train/ images/valid/",
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_valid.json", "images/valid"),
    ),
    "one folder of images": (
        "instances_train.json instances_val.json images/",
        ("instances_train.json", "images"),
        ("instances_val.json", "images"),
    ),
    "this project's drawn toys": (
        "train.json val.json images/",
        ("train.json", "images"),
        ("val.json", "images"),
    ),
}
WRONG = {  # files: words of the message
    "": "has no training set: looked for train/_annotations.coco.json, train/instances_.*train.json$",
    "train/a.json": "has no validation set: looked for valid/_annotations.coco.json, val/.*val.json$",
    "train/a.json train/b.json valid/c.json": "several training sets, .*/train/a.json and .*/train/b.json: ",
    "train/a.json valid/b.json val/c.json": "several validation sets, .*/val/c.json and .*/valid/b.json: ",
    "annotations/instances_train2014.json annotations/instances_train2017.json": (
        "several training sets, .*train2014.json and .*train2017.json: "
    ),
    "annotations/instances_train2017.json": (
        "no folder with the images of .*: looked for .*/train2017, .*/images$"
    ),
}


def make(root, files):
    for name in files.split():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("{}")


@pytest.mark.parametrize("files, train, val", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, files, train, val):
    make(tmp_path, files)
    assert locate_parts(tmp_path) == tuple(
        (str(tmp_path / annotations), str(tmp_path / images)) for annotations, images in (train, val)
    )


@pytest.mark.parametrize("files", WRONG)
def test_what_is_missing_or_doubtful_is_named(tmp_path, files):
    make(tmp_path, files)
    with pytest.raises(InputError) as error:
        locate_parts(tmp_path)
    assert re.search(WRONG[files], str(error.value)) and "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="no folder .*absent"):
        locate_parts(tmp_path / "absent")


def test_train_net_takes_the_folder(tiny_coco, tmp_path, monkeypatch):
    """Data sets and classes are those of --train and --val with the same files."""
    configs = []
    monkeypatch.setattr(engine, "train", lambda cfg, **_: configs.append(cfg))

    def run(*options):
        recipe = ["--config-file", "transfer/mask_rcnn_R50_FPN_1x.yaml", "--engine", "torchvision"]
        output = ["OUTPUT_DIR", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["train_net", *recipe, *map(str, options), *output])
        train_net.main()

    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        write_json(tiny_coco, tmp_path / part, "_annotations.coco.json")
    train, val = (
        (tmp_path / part / "_annotations.coco.json", tmp_path / part) for part in ("train", "valid")
    )
    run("--data", tmp_path)
    run("--train", *train, "--val", *val)
    assert configs[0] == configs[1]
    assert configs[0].DATASETS.TRAIN == (dataset_name(*train),)
    assert configs[0].MODEL.ROI_HEADS.NUM_CLASSES == 2
    with pytest.raises(InputError, match="--data takes the place of --train and --val"):
        run("--data", tmp_path, "--val", *val)
