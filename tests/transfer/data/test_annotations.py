"""Annotation files as tools write them: what is corrected in memory, and what is refused in one line."""

import json
import re
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.annotations import (
    dataset_name,
    forget_datasets,
    load_datasets,
    locate_dataset,
)
from rsa_detectron2.transfer.data.average_precision import coco_ap
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.coco import CocoInstances
from rsa_detectron2.transfer.data.coco_json import read_coco
from rsa_detectron2.transfer.data.dataset import usable_objects
from tests.conftest import write_json


def config(train, val, classes=2, masks=True):
    """The configuration for annotation files that lie beside their images."""
    forget_datasets()  # tests write one file twice
    cfg = torchvision_defaults()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((dataset_name(path, path.parent),) for path in (train, val))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON = classes, masks
    return cfg


def check(coco, folder, **options):
    """Check ``coco`` as training and test set; return the result of :func:`check_datasets` and the test
    set."""
    path = write_json(coco, folder)
    cfg = config(path, path, **options)
    return check_datasets(cfg), load_datasets(cfg)[cfg.DATASETS.TEST[0]]


def refusal(*arguments, **options):
    """The line of the error with which a data set is refused."""
    with pytest.raises(InputError) as error:
        check(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sound_data_set(tiny_coco, tmp_path, capsys):
    (trained,), dataset = check(tiny_coco, tmp_path)
    assert (len(trained.images), trained.annotated(), trained.has_rle()) == (3, 1, True)
    assert dataset.annotations == tiny_coco["annotations"] and dataset.coco()["info"] == {}
    assert dataset.categories == [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}]
    tiny_coco["annotations"][1]["segmentation"] = [[0, 0, 8, 0, 8, 6, 0, 6]]
    (trained,), _ = check(tiny_coco, tmp_path)
    assert not trained.has_rle()  # a crowd's RLE does not count, because it is no training target
    said = capsys.readouterr()
    assert (
        "warning" not in said.err
        and said.out.count("crowds (iscrowd 1), which are neither trained on nor evaluated: 1 of 3") == 2
    )


BAD = {  # what is wrong: (where, key, value or None to remove it, words of the message)
    "missing box": (1, "bbox", None, "annotation 2 lacks bbox"),
    "missing mask": (
        1,
        "segmentation",
        None,
        r"1 of 2 objects have only a box \(first: annotation 2\) and no mask: give",
    ),
    "negative box": (1, "bbox", [3, 3, -1, 2], "annotation 2 has the bbox"),
    "short box": (1, "bbox", [3, 3, 1], "annotation 2 has the bbox"),
    "NaN box": (1, "bbox", [3, 3, 1, float("nan")], "annotation 2 has the bbox"),
    "words for a box": (1, "bbox", "3 3 1 1", "annotation 2 has the bbox"),
    "unknown category": (
        1,
        "category_id",
        1,
        "annotation 2 has category_id 1, which is none of the categories: add it",
    ),
    "list for an id": (1, "image_id", [4], "annotation 2 has image_id"),
    "same id": (1, "id", 1, "annotation 1 has the id of another"),
    "two points": (
        0,
        "segmentation",
        [[1, 1, 5, 5]],
        r"1 of 2 objects have two points for a mask .first: annotation 1., which is how "
        "labelme exports rectangles: give their four corners as polygons, or",
    ),
    "odd polygon": (
        0,
        "segmentation",
        [[1, 1, 5, 5, 3, 3, 2]],
        r"1 of 2 objects have no polygon of at least three points "
        r"\(first: annotation 1\), with which AP would be wrong: correct or remove them",
    ),
    "polygon of words": (
        0,
        "segmentation",
        [["1", "1", "5", "1", "5", "5"]],
        "annotation 1 has a polygon that is not a list of x, y",
    ),
    "no polygon": (
        0,
        "segmentation",
        [],
        r"1 of 2 objects have only a box \(first: annotation 1\) and no mask",
    ),
    "RLE of another size": (
        1,
        "segmentation",
        {"size": [8, 6], "counts": [48]},
        r"annotation 2 has an RLE of size \[8, 6\]",
    ),
    "RLE of another sum": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": [40]},
        "annotation 2 has RLE counts that do not",
    ),
    "RLE of size in floats": (
        1,
        "segmentation",
        {"size": [6.0, 8.0], "counts": [48]},
        r"annotation 2 has an RLE of size \[6.0, 8.0\]",
    ),
    "RLE of floats": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": [10.5, 37.5]},
        "annotation 2 has RLE counts that are not integers",
    ),
    "RLE of negative counts": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": [-10, 58]},
        "annotation 2 has RLE counts that are not integers of at least 0",
    ),
    "RLE of null": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": None},
        "annotation 2 has RLE counts that are neither",
    ),
    "RLE string": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": "!!!"},
        "annotation 2 has an RLE string that has the character '!'",
    ),
    "RLE string, non-ASCII": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": "0\u00e9"},
        "annotation 2 has an RLE string that has the character",
    ),
    "RLE string, short": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": "Sh1"},
        "annotation 2 has RLE counts that",
    ),
    "RLE string, empty": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": ""},
        "annotation 2 has RLE counts that do not add up to its image's 6 x 8 pixels",
    ),
    "RLE string, cut": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": "0`"},
        "annotation 2 has an RLE string that ends in the middle of a number",
    ),
    "RLE string, negative": (
        1,
        "segmentation",
        {"size": [6, 8], "counts": "N`12"},
        "annotation 2 has RLE counts that are not integers of at least 0",
    ),
    "true for an image": (1, "image_id", True, "annotation 2 has image_id True, which is not an integer"),
    "iscrowd of 2": (1, "iscrowd", 2, "annotation 2 has iscrowd 2: it must be 0 or 1"),
    "a word for iscrowd": (1, "iscrowd", "no", "annotation 2 has iscrowd 'no': it must be 0 or 1"),
    "RLE without counts": (
        1,
        "segmentation",
        {"size": [6, 8]},
        "annotation 2 has a segmentation that is neither",
    ),
}


@pytest.mark.parametrize("where, key, value, message", BAD.values(), ids=BAD)
def test_a_bad_annotation_is_one_line_with_file_and_id(tiny_coco, tmp_path, where, key, value, message):
    annotation = tiny_coco["annotations"][where]
    if value is None:
        del annotation[key]
    else:
        annotation[key] = value
    path = write_json(tiny_coco, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        check_datasets(config(path, path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c["images"].append({**c["images"][0], "file_name": "9.png"}),
            "image id 4 occurs twice, for '4.png' and '9.png': give every image an id of its own",
        ),
        (lambda c: c["images"][0].pop("height"), "image 4 lacks height"),
        (lambda c: c["images"][1].update(file_name="gone.png"), "image 9: no file .*gone.png"),
        (lambda c: c["images"][1].update(file_name=None), "image 9 needs a file_name that is a string"),
        (
            lambda c: c["images"][1].update(file_name="https://a.com/9.png"),
            "image 9: its file_name https.* is a URL.*download",
        ),
        (lambda c: c["images"][1].update(width="8 px"), "image 9 needs .* a width and height in pixels"),
        (lambda c: c["images"][1].update(width=0), "image 9 is 0 x 6 pixels .*: give the size of 9.png"),
        (lambda c: c["images"][1].update(height=-6), "image 9 is 8 x -6 pixels"),
        (lambda c: c["images"][1].update(id=True), "image id True is not an integer"),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": 4, "counts": "a"}),
            "annotation 1 has an RLE of size 4",
        ),
        (
            lambda c: c.pop("images"),
            "is not a COCO annotation file .it has no list of images.: export it as COCO",
        ),
        (lambda c: c.update(images={}), "is not a COCO annotation file"),
        (
            lambda c: c.update(annotations=None),
            "is not a COCO annotation file .it has no list of annotations",
        ),
        (lambda c: c["annotations"].append(7), "annotation 7 lacks"),
    ],
)
def test_bad_images_and_files(tiny_coco, tmp_path, change, message):
    change(tiny_coco)
    path = write_json(tiny_coco, tmp_path)
    with pytest.raises(InputError, match=message):
        check_datasets(config(path, path))


@pytest.mark.parametrize(
    "content",
    ["[" * 200000, '{"categories": 7}', "{}", "[]", "", b"\xff\xfe{}", b"{\xe9}"],
    ids=["nested without end", "number", "no key", "list", "empty", "half of UTF-16", "Latin-1"],
)
def test_a_file_that_is_no_coco_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="a.json is not a COCO annotation file") as error:
        read_coco(str(path), str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "categories, message",
    [
        (
            [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}, {"id": 3, "name": "c"}],
            "category id 3 occurs twice, for 'a' and 'c': give every category an id of its own",
        ),
        ([{"id": 3}], "category {'id': 3} needs an id that is an integer and a name"),
        ([{"id": True, "name": "a"}], "category {'id': True, 'name': 'a'} needs an id"),
        ([{"id": 3, "name": None}], "category .* needs an id that is an integer and a name"),
        (["a"], "category 'a' needs an id"),
        ([], "a.json has no categories"),
    ],
)
def test_bad_categories_are_one_line(tiny_coco, tmp_path, categories, message):
    path = write_json({**tiny_coco, "categories": categories}, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        read_coco(str(path), str(tmp_path))
    assert str(error.value).startswith(str(path))


def test_errors_are_counted(tiny_coco, tmp_path):
    for annotation in tiny_coco["annotations"]:
        del annotation["bbox"]
    assert "annotation 1 lacks bbox (and 2 more such errors)" in refusal(tiny_coco, tmp_path)


# ---- what can only mean one thing ------------------------------------------------------------------------


def each(part, **values):
    """A change of every entry of ``part``: new values, functions of the old ones, or None to remove a key."""

    def change(coco):
        for entry in coco[part]:
            for key, value in values.items():
                if value is None:
                    entry.pop(key)
                else:
                    entry[key] = value(entry[key]) if callable(value) else value

    return change


def image_strings(coco):
    each("images", id="img-{}".format)(coco)
    each("annotations", image_id="img-{}".format)(coco)


def category_strings(coco):
    coco["categories"].reverse()  # by the numbers that they had before
    each("categories", id="cat-{}".format)(coco)
    each("annotations", category_id="cat-{}".format)(coco)


MENDED = {  # habit of a tool: (change, words of the note, or None)
    "annotation ids from 0": (each("annotations", id=lambda i: i - 1), "annotations are numbered from 1"),
    "annotation ids missing": (each("annotations", id=None), "annotations are numbered from 1"),
    "annotation ids of null": (
        lambda c: [a.update(id=None) for a in c["annotations"]],
        "annotations are numbered from 1",
    ),
    "annotation ids negative": (each("annotations", id=lambda i: -i), "annotations are numbered from 1"),
    "annotation ids as words": (each("annotations", id="a{}".format), "annotations are numbered from 1"),
    "annotation ids as strings": (each("annotations", id=str), None),
    "all ids as strings": (
        lambda c: [
            each("annotations", id=str, image_id=str, category_id=str)(c),
            each("images", id=str)(c),
            each("categories", id=str)(c),
        ],
        None,
    ),
    "ids as floats": (each("annotations", id=float, image_id=float, category_id=float), None),
    "ids of images as strings only there": (each("images", id=str), None),
    "ids of images as words": (
        image_strings,
        "image ids are not integers .first: 'img-4'.: numbered from 1",
    ),
    "ids of categories as words": (category_strings, "category ids are not integers .first: 'cat-3'."),
    "sizes as floats": (each("images", width=float, height=float), None),
    "sizes as strings": (each("images", width=str, height=str), None),
    "no iscrowd": (lambda c: [c["annotations"].pop(), each("annotations", iscrowd=None)(c)], None),
    "iscrowd of null": (lambda c: c["annotations"][0].update(iscrowd=None), None),
    "iscrowd as string": (lambda c: each("annotations", iscrowd=str)(c), None),
    "iscrowd as bool": (lambda c: each("annotations", iscrowd=bool)(c), None),
    "ignore of 0": (lambda c: [a.update(ignore=0) for a in c["annotations"]], None),
    "images repeated": (
        lambda c: c["images"].append(dict(c["images"][0])),
        "repeated image entries, left out: 1",
    ),
    "categories repeated": (
        lambda c: c["categories"].append(dict(c["categories"][0])),
        "repeated category entries",
    ),
    "a stray polygon": (
        lambda c: c["annotations"][0]["segmentation"].append([1, 1, 2, 2]),
        "polygons of fewer than three points, left out: 1 .first: annotation 1.",
    ),
    "an odd polygon": (
        lambda c: c["annotations"][0]["segmentation"].insert(0, [1, 1, 2, 2, 3, 3, 4]),
        "polygons of fewer than three points, left out: 1 .first: annotation 1.",
    ),
    "a flat polygon": (
        lambda c: c["annotations"][0].update(segmentation=c["annotations"][0]["segmentation"][0]),
        None,
    ),
    "an annotation of no image": (
        lambda c: c["annotations"].append({**c["annotations"][0], "id": 8, "image_id": 77}),
        "annotations of images that are not in the file, left out: 1 .first: 8.",
    ),
    "area missing": (
        each("annotations", area=None),
        "areas .* are taken from the masks or boxes .first: annotation 1",
    ),
    "area of null": (lambda c: c["annotations"][1].update(area=None), "areas .*first: annotation 2"),
    "area of 0": (lambda c: c["annotations"][1].update(area=0), "areas .*first: annotation 2"),
    "area negative": (lambda c: c["annotations"][1].update(area=-48), "areas .*first: annotation 2"),
    "area endless": (lambda c: c["annotations"][1].update(area=float("inf")), "areas .*first: annotation 2"),
    "area as string": (each("annotations", area=str), "areas .*first: annotation 1"),
    "names of classes are numbers": (lambda c: c["categories"][0].update(name=5), None),
    "info is something": (lambda c: c.update(info={"year": 2026}, licenses=[]), None),
}


@pytest.mark.parametrize("change, message", MENDED.values(), ids=MENDED)
def test_what_tools_write_otherwise_gives_the_same_targets_and_metric(
    tiny_coco, tmp_path, capsys, change, message
):
    """The checks pass, and the targets and COCO's metric equal those of the sound file."""

    def outcome(coco):
        (trained,), dataset = check(coco, tmp_path)
        targets = CocoInstances(trained, training=True)
        target = {key: value.tolist() for key, value in targets[0, False][1].items()}
        assert [a["id"] for a in dataset.annotations] == sorted({a["id"] for a in dataset.annotations})
        assert dataset.annotations[0]["id"] == 1
        # The object of the second class is detected, that of the first is not.
        found = [
            {
                "image_id": targets.ids[0],
                "category_id": targets.categories[1],
                "bbox": [0, 0, 8, 6],
                "score": 0.9,
                "segmentation": {"size": [6, 8], "counts": "0`1"},
            }
        ]
        areas = [annotation["area"] for annotation in dataset.annotations[:2]]
        return len(targets.ids), target, coco_ap(dataset, found), areas

    sound = outcome(deepcopy(tiny_coco))
    capsys.readouterr()
    assert sound[2]["segm"]["AP"] == pytest.approx(50) and sound[2]["bbox"]["AP"] == pytest.approx(50)
    change(tiny_coco)
    assert outcome(tiny_coco) == sound
    said = capsys.readouterr()
    notes = [line for line in said.out.splitlines() if "crowds" not in line or message]
    assert not said.err and len(notes) == bool(message)
    if message:
        assert notes[0].startswith(f"{tmp_path / 'a.json'}: ")
        assert re.search(message, notes[0])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(tiny_coco, tmp_path, encoding):
    tiny_coco["categories"][0]["name"] = "汽车"
    (tmp_path / "a.json").write_bytes(json.dumps(tiny_coco, ensure_ascii=False).encode(encoding))
    assert read_coco(str(tmp_path / "a.json"), str(tmp_path)).categories[1]["name"] == "汽车"


def test_ignored_objects_are_crowds(tiny_coco, tmp_path, capsys):
    """ignore 1 says that an object is neither trained on nor evaluated, which is what iscrowd 1 does."""
    tiny_coco["annotations"][1].update(ignore=1, segmentation=[])
    (trained,), dataset = check(tiny_coco, tmp_path)
    assert "annotations with ignore 1, treated as crowds: 1 (first: 2)" in capsys.readouterr().out
    assert CocoInstances(trained, training=True)[0, False][1]["labels"].tolist() == [1]
    found = [
        {
            "image_id": 4,
            "category_id": 3,
            "bbox": [1, 1, 4, 4],
            "score": 0.9,
            "segmentation": {"size": [6, 8], "counts": "0`1"},
        }
    ]
    # the other class has no object left
    assert coco_ap(dataset, found)["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "written",
    [
        "images/{}",
        "images\\{}",
        "..\\..\\label-studio\\media\\upload\\4\\{}",
        "/home/somebody/data/images/{}",
        "./{}",
    ],
)
def test_file_names_of_another_place(tiny_coco, tmp_path, capsys, written):
    for image in tiny_coco["images"]:
        image["file_name"] = written.format(image["file_name"])
    (trained,), _ = check(tiny_coco, tmp_path)
    assert CocoInstances(trained, training=False).image(4).shape == (3, 6, 8)
    said = f"file names shortened to what exists in {tmp_path}: 3 (first: {written.format('4.png')})"
    assert (said in capsys.readouterr().out) == (written != "./{}")


def test_a_backslash_in_some_file_names(tiny_coco, tmp_path):
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "b" / "9.png")
    tiny_coco["images"][1]["file_name"] = "b\\9.png"
    (trained,), _ = check(tiny_coco, tmp_path)
    assert CocoInstances(trained, training=False).image(9).max() == 9


def test_the_longest_end_of_a_file_name_counts_and_two_images_are_never_one(tiny_coco, tmp_path):
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "b" / "4.png")
    tiny_coco["images"][0]["file_name"] = "a/b/4.png"
    (trained,), _ = check(tiny_coco, tmp_path)
    assert CocoInstances(trained, training=False).image(4).max() == 9
    tiny_coco["images"][0]["file_name"], tiny_coco["images"][1]["file_name"] = "x/4.png", "y/4.png"
    assert f"images x/4.png and y/4.png would both be {tmp_path / '4.png'}: give the folder" in refusal(
        tiny_coco, tmp_path
    )


# ---- masks, boxes and crowds ---------------------------------------------------------------------------


def test_boxes_alone_train_without_masks(tiny_coco, tmp_path):
    each("annotations", segmentation=[])(tiny_coco)
    assert "a.json has boxes only, no masks: train without masks (MODEL.MASK_ON False)" in refusal(
        tiny_coco, tmp_path
    )
    (trained,), dataset = check(tiny_coco, tmp_path, masks=False)
    image, target = CocoInstances(trained, training=True, masks=False)[0, True]
    assert target["boxes"].tolist() == [[3, 1, 7, 5], [0, 0, 8, 6]] and "masks" not in target
    found = [
        {"image_id": 4, "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in tiny_coco["annotations"][:2]
    ]
    assert coco_ap(dataset, found, ("bbox",))["bbox"]["AP"] == pytest.approx(100)
    for nothing in ([[]], {}, "", None):  # as other tools write it
        for annotation in tiny_coco["annotations"]:
            annotation["segmentation"] = nothing
        assert "boxes only" in refusal(tiny_coco, tmp_path)
        assert check(tiny_coco, tmp_path, masks=False)[0][0].annotated(masks=False) == 1
    for annotation in tiny_coco["annotations"]:
        annotation["keypoints"] = [1, 1, 2]
    assert "a.json has keypoints and boxes only, no masks: train without" in refusal(tiny_coco, tmp_path)


def test_crowds_alone_are_refused_with_a_command_that_fixes_them(tiny_coco, tmp_path):
    """CVAT exports masks in this way."""
    each("annotations", iscrowd=1)(tiny_coco)
    folder = tmp_path / "my data"
    folder.mkdir()
    for image in tiny_coco["images"]:
        Image.new("RGB", (8, 6)).save(folder / image["file_name"])
    line = refusal(tiny_coco, folder)
    assert (
        "a.json: all 3 annotations are crowds (iscrowd 1), which are neither trained on"
        " nor evaluated; CVAT exports masks like this" in line
    )
    subprocess.run(line.split("To make objects of them: ")[1], shell=True, check=True)
    path = folder / "a.json"
    (trained,) = check_datasets(config(path, path))
    assert trained.annotated() == 2


@pytest.mark.parametrize("key", ["train", "val"])
def test_nothing_to_train_on_or_to_measure_is_refused_before(tiny_coco, tmp_path, key):
    good, empty = write_json(tiny_coco, tmp_path, "good.json"), {**tiny_coco, "annotations": []}
    bad = write_json(empty, tmp_path, "bad.json")
    with pytest.raises(
        InputError, match="bad.json has no annotations, so there is nothing to train on or to measure"
    ):
        check_datasets(config(*((bad, good) if key == "train" else (good, bad))))
    write_json({**empty, "images": []}, tmp_path, "bad.json")
    with pytest.raises(InputError, match="bad.json has no (annotations|image to evaluate)"):
        check_datasets(config(*((bad, good) if key == "train" else (good, bad))))


def test_a_test_set_without_annotations_is_predicted_on(tiny_coco, tmp_path, capsys):
    """COCO's test-dev is such a set. --eval-only also takes an empty list."""
    good = write_json(tiny_coco, tmp_path, "good.json")
    unlabeled = {key: value for key, value in tiny_coco.items() if key != "annotations"}
    said = "there are no annotations: detections are written, and there is nothing to measure"
    for coco, eval_only in ((unlabeled, False), (unlabeled, True), ({**unlabeled, "annotations": []}, True)):
        cfg = config(good, write_json(coco, tmp_path, "test.json"))
        check_datasets(cfg, eval_only)
        assert said in capsys.readouterr().out
        dataset = load_datasets(cfg, eval_only)[cfg.DATASETS.TEST[0]]
        assert coco_ap(dataset, []) == {} and len(CocoInstances(dataset, training=False).ids) == 3
        assert ("annotations" in dataset.coco()) == ("annotations" in coco)
    with pytest.raises(InputError, match="test.json has no annotations"):
        check_datasets(config(write_json(unlabeled, tmp_path, "test.json"), good))


@pytest.mark.parametrize("bbox", [[90, 0, 5, 5], [3, 3, 0, 0], [3, 3, 0.005, 3], [-5, 0, 5, 5], [8, 0, 4, 4]])
def test_both_engines_agree_on_what_a_usable_object_is(tiny_coco, tmp_path, capsys, bbox):
    """Detectron2's dicts come from the same function (test_dataset.py)."""
    image, (first, second, crowd) = tiny_coco["images"][0], tiny_coco["annotations"]
    assert [a["id"] for _, a in usable_objects(image, [first, second, crowd])] == [1, 2]
    first["bbox"] = bbox
    assert [a["id"] for _, a in usable_objects(image, [first, second, crowd])] == [2]
    (trained,), _ = check(tiny_coco, tmp_path)
    assert (
        "objects outside their image or of no size, not trained on: 1 of 2 (first: annotation 1)"
        in capsys.readouterr().out
    )
    second["bbox"] = bbox
    assert "a.json has no image with a usable annotation: objects outside" in refusal(tiny_coco, tmp_path)


def test_boxes_are_clipped_and_masks_must_cover_a_pixel(tiny_coco):
    image, (first, second, _) = tiny_coco["images"][0], tiny_coco["annotations"]
    first["bbox"] = [-3, 2, 20, 20]
    assert usable_objects(image, [first]) == [([0, 2, 8, 6], first)]
    for empty in ({"size": [6, 8], "counts": [48]}, {"size": [6, 8], "counts": "`1"}, [], [[1, 1, 5, 5]]):
        second["segmentation"] = empty
        assert (
            usable_objects(image, [second]) == [] and len(usable_objects(image, [second], masks=False)) == 1
        )


DOUBTFUL = {  # change of every box in the file, words of the warning
    "corners": (
        lambda box, w, h: [box[0], box[1], box[0] + box[2], box[1] + box[3]],
        "the box of its mask is",
    ),
    "relative": (
        lambda box, w, h: [box[0] / w, box[1] / h, box[2] / w, box[3] / h],
        "its image is larger than a pixel",
    ),
    "elsewhere": (lambda box, w, h: [box[0] + 30, box[1], box[2], box[3]], "the box of its mask is"),
}


@pytest.mark.parametrize("change, words", DOUBTFUL.values(), ids=DOUBTFUL)
def test_boxes_that_contradict_their_masks_are_one_warning(tmp_path, capsys, change, words):
    width, height, boxes = 80, 60, ([10, 10, 30, 20], [30, 20, 20, 30], [5, 4, 40, 40])
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [],
    }
    for n, (x, y, w, h) in enumerate(boxes, start=1):
        coco["annotations"].append(
            {
                "id": n,
                "image_id": 1,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
    check(coco, tmp_path, classes=1)
    assert capsys.readouterr().err == ""
    for annotation in coco["annotations"]:
        annotation["bbox"] = change(annotation["bbox"], width, height)
    check(coco, tmp_path, classes=1)
    said = capsys.readouterr().err
    first = coco["annotations"][0]["bbox"]
    assert (
        said.count("warning") == 1
        and f"the boxes of 3 of 3 objects look wrong (first: annotation 1: box {first}" in said
    )
    assert words in said and "a box is x, y, width, height in pixels" in said


def test_a_box_alone_that_leaves_its_image_is_a_warning(tiny_coco, tmp_path, capsys):
    each("annotations", segmentation=[])(tiny_coco)
    tiny_coco["annotations"][0]["bbox"] = [4, 3, 8, 6]  # corners
    check(tiny_coco, tmp_path, masks=False)
    assert (
        "the boxes of 1 of 2 objects look wrong (first: annotation 1: box [4, 3, 8, 6], but its image is"
        " 8 x 6" in (capsys.readouterr().err)
    )


# ---- the classes of two files --------------------------------------------------------------------------


def pair(tiny_coco, folder, change, train_change=lambda coco: None):
    """A configuration whose evaluated set is a changed copy of its training set."""
    other = deepcopy(tiny_coco)
    train_change(tiny_coco)
    change(other)
    return config(
        write_json(tiny_coco, folder, "train.json"),
        write_json(other, folder, "val.json"),
        classes=len(tiny_coco["categories"]),
    )


def renumber(numbers):
    def change(coco):
        each("categories", id=numbers.get)(coco)
        each("annotations", category_id=numbers.get)(coco)

    return change


def metric_of_the_truth(cfg):
    dataset = load_datasets(cfg)[cfg.DATASETS.TEST[0]]
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in dataset.annotations
        if not a["iscrowd"]
    ]
    return coco_ap(dataset, found, ("bbox",))["bbox"]["AP"]


@pytest.mark.parametrize(
    "numbers", [{3: 0, 90: 1}, {3: 90, 90: 3}, {3: 200, 90: 100}], ids=["from 0", "swapped", "order"]
)
def test_categories_of_val_are_matched_by_name(tiny_coco, tmp_path, capsys, numbers):
    cfg = pair(tiny_coco, tmp_path, renumber(numbers))
    check_datasets(cfg)
    assert (
        f"val.json: categories are matched by name with those of {tmp_path / 'train.json'}"
        in capsys.readouterr().out
    )
    val = load_datasets(cfg)[cfg.DATASETS.TEST[0]]
    assert val.categories == [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}]
    assert [a["category_id"] for a in val.annotations] == [3, 90, 3] and metric_of_the_truth(
        cfg
    ) == pytest.approx(100)


def test_val_may_lack_a_category(tiny_coco, tmp_path, capsys):
    def without_b(coco):
        del coco["categories"][0], coco["annotations"][1]

    cfg = pair(tiny_coco, tmp_path, without_b)
    check_datasets(cfg)
    assert "val.json: there is no category 'b', so AP is the mean of the others" in capsys.readouterr().out
    assert len(load_datasets(cfg)[cfg.DATASETS.TEST[0]].categories) == 2 and metric_of_the_truth(
        cfg
    ) == pytest.approx(100)
    # In an evaluation the training set still defines the classes; without it, one line says what to give.
    check_datasets(cfg, eval_only=True)
    (tmp_path / "train.json").unlink()
    forget_datasets()
    with pytest.raises(
        InputError, match="val.json has 1 categories, but MODEL.ROI_HEADS.NUM_CLASSES is 2: .*--train JSON"
    ):
        check_datasets(cfg, eval_only=True)


def test_a_category_of_val_that_train_lacks(tiny_coco, tmp_path):
    def third(coco):
        coco["categories"].append({"id": 5, "name": "c"})

    def used(coco):
        third(coco)
        coco["annotations"][0]["category_id"] = 5

    check_datasets(pair(deepcopy(tiny_coco), tmp_path, third))  # without an object it is no matter
    with pytest.raises(
        InputError,
        match=r"val.json has objects of category 'c', which .*train.json does not have "
        r"\(it has 'a', 'b'\): give both the same names, or remove these objects",
    ):
        check_datasets(pair(tiny_coco, tmp_path, used))


def test_two_categories_of_one_name_are_matched_by_id_alone(tiny_coco, tmp_path):
    same_names = each("categories", name="a")
    check_datasets(pair(deepcopy(tiny_coco), tmp_path, same_names, same_names))
    with pytest.raises(
        InputError,
        match="number their categories differently, and some names occur twice: give both the same",
    ):
        check_datasets(
            pair(
                deepcopy(tiny_coco),
                tmp_path,
                lambda c: [same_names(c), renumber({3: 1, 90: 2})(c)],
                same_names,
            )
        )
    with pytest.raises(InputError, match="names occur twice"):
        check_datasets(pair(tiny_coco, tmp_path, lambda c: c["categories"].append({"id": 7, "name": "a"})))


@pytest.mark.parametrize("names", [["a", "b", "_background_"], [f"c{n}" for n in range(20)] + ["a", "b"]])
def test_classes_without_objects_are_named(tiny_coco, tmp_path, capsys, names):
    tiny_coco["categories"] = [
        {"id": {"a": 3, "b": 90}.get(name, 1000 + n), "name": name} for n, name in enumerate(names)
    ]
    check(tiny_coco, tmp_path, classes=len(names))
    said = capsys.readouterr().out
    assert (
        "no object is of category " + ("'_background_'" if len(names) == 3 else "'c0', 'c1', 'c2', ") in said
    )
    assert ("'c9' and 10 more" in said) == (len(names) > 3)


def test_data_sets_must_fit_the_model(tiny_coco, tmp_path):
    path = write_json(tiny_coco, tmp_path)
    with pytest.raises(
        InputError, match="2 categories, but MODEL.ROI_HEADS.NUM_CLASSES is 80: add .*NUM_CLASSES 2$"
    ):
        check_datasets(config(path, path, classes=80))
    assert check_datasets(config(tmp_path / "absent.json", path), eval_only=True) == []
    cfg = config(path, path)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(InputError, match="DATASETS.TRAIN is empty"):
        check_datasets(cfg)
    cfg.DATASETS.TEST = ()
    with pytest.raises(InputError, match="give exactly one data set"):
        check_datasets(cfg)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_another_set_beside_coco_has_its_categories(tiny_coco, tmp_path, monkeypatch, key):
    """COCO's categories are read from its val file for either of its sets, never from the large train
    file."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for folder in ("annotations", "train2017", "val2017"):
        (tmp_path / "coco" / folder).mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").write_text("not to be read")
    tiny_coco["categories"] = [{"id": number, "name": f"c{number}"} for number in range(1, 91) if number % 9]
    coco = write_json(tiny_coco, tmp_path / "coco" / "annotations", "instances_val2017.json")
    for annotation in tiny_coco["annotations"]:
        annotation["category_id"] = 3
    tiny_coco["annotations"][0]["category_id"] = tiny_coco["categories"][-1]["id"]

    def checked():
        path = write_json(tiny_coco, tmp_path)
        cfg = config(path, path, classes=80)
        cfg.DATASETS["TEST" if key == "TRAIN" else "TRAIN"] = (
            f"coco_2017_{'val' if key == 'TRAIN' else 'train'}",
        )
        return check_datasets(cfg)

    assert [found.annotated() for found in checked()] == [1] * (key == "TRAIN")
    tiny_coco["categories"][-1]["name"] = "other"
    message = (
        f"{coco} has 'c89', but .*a.json has others"
        if key == "TRAIN"
        else (f"a.json has objects of category 'other', which {coco} does not have")
    )
    with pytest.raises(InputError, match=message):
        checked()
    coco.write_text("damaged")
    with pytest.raises(InputError, match="instances_val2017.json is not a COCO annotation file"):
        checked()


# ---- paths and image files -----------------------------------------------------------------------------


def test_a_path_that_a_data_set_name_cannot_hold_is_refused(tiny_coco, tmp_path, monkeypatch):
    path = write_json(tiny_coco, tmp_path)
    assert locate_dataset(dataset_name(path, tmp_path)) == (str(path), str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_dataset("~/a.json::~") == (str(path), str(tmp_path))
    for annotations, images in (("a::b.json", "images"), ("a.json", "b::c"), ("a:", "images")):
        with pytest.raises(InputError, match="neither path may contain '::'"):
            dataset_name(annotations, images)


def test_paths_that_are_not_there_say_what_to_give(tiny_coco, tmp_path):
    path = write_json(tiny_coco, tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} is a folder: the order is JSON IMAGES$"):
        locate_dataset(dataset_name(tmp_path, path))
    with pytest.raises(InputError, match="no annotation file absent.json: give --train/--val JSON IMAGES$"):
        locate_dataset(dataset_name("absent.json", tmp_path))


def test_a_file_is_parsed_once(tiny_coco, tmp_path):
    """The checks, both sets, the targets and the metric share one reading."""
    files = {str(write_json(tiny_coco, tmp_path, name)): 0 for name in ("train.json", "val.json")}
    cfg = config(*(tmp_path / name for name in ("train.json", "val.json")))

    def count(event, arguments):
        if event == "open" and str(arguments[0]) in files:
            files[str(arguments[0])] += 1

    sys.addaudithook(count)  # for good: an audit hook cannot be removed
    check_datasets(cfg)
    train, val = load_datasets(cfg).values()
    CocoInstances(train, training=True)[0, False]
    coco_ap(val, [])
    assert list(files.values()) == [1, 1]


@pytest.mark.parametrize("dtype, mode", [("uint16", "I;16"), ("int32", "I"), ("float32", "F")])
def test_pixels_of_more_than_8_bits_are_refused(tiny_coco, tmp_path, dtype, mode):
    """PIL's convert("RGB"), with which both engines read, would turn them white."""
    image = Image.fromarray(np.full((6, 8), 4096, dtype))
    assert image.convert("RGB").getextrema() == ((255, 255),) * 3
    tiny_coco["images"][0]["file_name"] = "deep.tif"
    image.save(tmp_path / "deep.tif")
    assert (
        f"deep.tif has pixels of more than 8 bits (PIL's mode {mode}), which would be read as white: convert"
        " it to 8 bits" in (refusal(tiny_coco, tmp_path))
    )


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("1", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("YCbCr", "jpg"),
        ("RGBA", "webp"),
    ],
)
def test_other_modes_of_images_are_fine(tiny_coco, tmp_path, mode, suffix):
    Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode).save(tmp_path / f"x.{suffix}")
    tiny_coco["images"][0]["file_name"] = f"x.{suffix}"
    (trained,), _ = check(tiny_coco, tmp_path)
    assert CocoInstances(trained, training=True)[0, False][0].float().mean() > 250


def test_a_file_of_another_size_is_refused_before_training(tiny_coco, tmp_path):
    Image.new("RGB", (6, 8)).save(tmp_path / "9.png")
    line = refusal(tiny_coco, tmp_path)
    assert (
        "image 9: " in line
        and "9.png is 6 x 8 pixels (width x height, upright), but its width and height say 8 x 6" in line
    )
    assert "more such" not in line
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a right angle: upright it is 8 x 6
    for suffix in ("png", "jpg", "webp"):
        tiny_coco["images"][1]["file_name"] = f"turned.{suffix}"
        Image.new("RGB", (6, 8)).save(tmp_path / f"turned.{suffix}", exif=exif)
        check(tiny_coco, tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.webp", exif=exif)
    assert "turned.webp is 6 x 8" in refusal(tiny_coco, tmp_path)
    (tmp_path / "turned.webp").write_text("no image")
    assert "turned.webp cannot be read as an image (of no known format)" in refusal(tiny_coco, tmp_path)


def test_sizes_are_read_without_decoding_and_shown_for_many(tiny_coco, tmp_path, monkeypatch):
    def shown(iterable, disable, **options):
        bars.append((options["total"], disable))
        return iterable

    bars = []
    monkeypatch.setattr("rsa_detectron2.transfer.data.checks.tqdm", shown)
    tiny_coco["images"] = [{**tiny_coco["images"][0], "id": number} for number in range(4, 5005)]
    tiny_coco["annotations"] = tiny_coco["annotations"][:2]
    monkeypatch.setattr(PngImageFile, "load", None)
    assert len(check(tiny_coco, tmp_path)[1].images) == 5001
    tiny_coco["images"].pop()
    check(tiny_coco, tmp_path)
    assert bars == [(5001, None), (5000, True)]  # None shows the bar only where stderr is a terminal


def test_a_saved_data_set_reads_as_before(tiny_coco, tmp_path):
    """Also one with keypoints, whose names are in its categories."""
    tiny_coco["categories"][0]["keypoints"] = ["left eye", "right eye"]
    dataset = read_coco(str(write_json(tiny_coco, tmp_path)), str(tmp_path))
    dataset.save(tmp_path / "saved.json")
    again = read_coco(str(tmp_path / "saved.json"), str(tmp_path))
    assert again.keypoints == dataset.keypoints == {"b": ["left eye", "right eye"], "a": None}
    for part in ("images", "annotations", "categories"):
        assert getattr(again, part) == getattr(dataset, part)
