"""Fail closed before training: configs against Detectron2's stock ones, weights' provenance, YAML and annotations."""

import argparse
import json
from copy import deepcopy

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tests.conftest import ROOT
from tools import train_net
from tools._cli import merge_config
from transfer.annotations import (Annotations, check_annotations, check_datasets, dataset_name, locate_dataset,
                                  read_categories)
from transfer.config import RGB_IMAGENET, InputError, check_weights, protocol_of, scale_schedule, torchvision_defaults

CONFIGS = ROOT / "configs" / "transfer"
INFOMIN = {  # DESIGN's list of what the InfoMin protocol changes in the stock config
    "MODEL.WEIGHTS": "output/weights/rsa_r50.pkl",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
    "INPUT.FORMAT": "RGB",
    "TEST.PRECISE_BN.ENABLED": True,
}
HEADS = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC", "MODEL.ROI_BOX_HEAD.NORM",
         "MODEL.ROI_MASK_HEAD.NORM")
MOCO = {key: value for key, value in INFOMIN.items() if key not in HEADS}  # stock heads
ROWS = {  # row: what it changes in the protocol; "stock" where it goes back to Detectron2's value
    "": {},
    "_random": {"MODEL.WEIGHTS": ""},
    "_supervised": {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl"},
    "_msra": dict.fromkeys(("MODEL.WEIGHTS", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1",
                            "INPUT.FORMAT"), "stock"),
    "_ssl": {"MODEL.WEIGHTS": "output/weights/ssl_r50.pkl"},
}
TWICE = {"SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000}


def flat(cfg, prefix=""):
    for key, value in cfg.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def configured(cfg, name, protocol="infomin", overrides=(), **more):
    options = dict(config_file=f"transfer/{name}.yaml", protocol=protocol, scale_schedule=False, train=None, val=None,
                   eval_only=False, resume=False, overrides=list(overrides), **more)
    train_net.configure(cfg, argparse.Namespace(**options))
    return cfg


@pytest.mark.parametrize("protocol", ["infomin", "moco"])
@pytest.mark.parametrize("schedule", ["1x", "2x"])
@pytest.mark.parametrize("row", ROWS)
def test_configs_are_stock_but_for_the_protocol_and_the_row(row, schedule, protocol):
    pytest.importorskip("detectron2")
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    stock = get_cfg()
    stock.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    stock, name = dict(flat(stock)), f"mask_rcnn_R50_FPN_{schedule}{row}"
    wanted = {**(INFOMIN if protocol == "infomin" else MOCO), **ROWS[row], **(TWICE if schedule == "2x" else {}),
              "OUTPUT_DIR": f"output/{name}" + "_moco" * (protocol == "moco")}
    wanted = {key: value for key, value in wanted.items() if value != "stock"}
    if (schedule, row) == ("2x", ""):
        wanted["SOLVER.BASE_LR"] = 0.03  # RSA's own, by the paper
    ours = configured(get_cfg(), name, protocol)
    assert {key: value for key, value in flat(ours) if stock[key] != value} == wanted
    assert protocol_of(yaml.safe_load(ours.dump())) == protocol


def test_twice_the_1x_schedule_lies_between_detectron2s_1x_and_3x():
    pytest.importorskip("detectron2")
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    triple, ours = get_cfg(), configured(get_cfg(), "mask_rcnn_R50_FPN_2x_random")
    triple.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    rest = triple.SOLVER.MAX_ITER - triple.SOLVER.STEPS[1], triple.SOLVER.MAX_ITER - triple.SOLVER.STEPS[0]
    assert rest == (ours.SOLVER.MAX_ITER - ours.SOLVER.STEPS[1], ours.SOLVER.MAX_ITER - ours.SOLVER.STEPS[0])
    assert triple.SOLVER.MAX_ITER * 2 == ours.SOLVER.MAX_ITER * 3


def test_every_header_has_command_cost_and_expectation():
    configs = sorted(CONFIGS.glob("mask_rcnn_*.yaml"))
    assert len([path for path in configs if "_R50_" in path.name]) == 2 * len(ROWS)
    for path in configs:
        head = path.read_text().split("\n_BASE_")[0]
        assert f"--config-file transfer/{path.name}" in head and "GPU-hours" in head and "expected" in head, path


def test_embedded_engine_reads_every_config_that_it_can_honour():
    for path in CONFIGS.glob("mask_rcnn_*.yaml"):
        assert configured(torchvision_defaults(), path.stem, "moco").MODEL.ROI_BOX_HEAD.NUM_FC == 2


def test_protocols_by_their_layers():
    cfg = configured(torchvision_defaults(), "mask_rcnn_R50_FPN_1x")
    assert protocol_of(cfg) == "infomin"
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[part].NORM = "BN"  # what SyncBN is on CPU processes
    assert protocol_of(cfg) == "infomin"
    cfg.MODEL.ROI_MASK_HEAD.NORM = ""
    assert protocol_of(cfg) == "other" and protocol_of(torchvision_defaults()) == "other"


RSA = {"method": "rsa"}
MSRA = {"method": "supervised", "input_format": "BGR", "pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1, 1, 1],
        "stride_in_1x1": True}


@pytest.mark.parametrize("config, provenance, overrides, message", [
    ("1x", RSA, [], None),  # an older file without the keys
    ("1x", {**RSA, **RGB_IMAGENET}, [], None),
    ("1x", None, [], None),
    ("1x_msra", MSRA, [], None),
    ("1x_msra", MSRA, ["MODEL.RESNETS.NORM", "FrozenBN"], None),  # as Detectron2's own models do
    ("1x", RSA, ["INPUT.FORMAT", "BGR"], r"INPUT.FORMAT 'RGB' \(it is 'BGR'\)"),
    ("1x", RSA, ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], r"MODEL.PIXEL_STD \[58.395"),
    ("1x", RSA, ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]], r"MODEL.PIXEL_MEAN \[123.675"),
    ("1x", RSA, ["MODEL.PIXEL_MEAN", [123.675]], r"MODEL.PIXEL_MEAN"),
    ("1x", RSA, ["MODEL.RESNETS.STRIDE_IN_1X1", True], r"STRIDE_IN_1X1 False \(it is True\)"),
    ("1x", MSRA, [], "INPUT.FORMAT 'BGR'.*PIXEL_MEAN.*PIXEL_STD.*STRIDE_IN_1X1 True"),
    ("1x_msra", RSA, [], "INPUT.FORMAT 'RGB'.*PIXEL_MEAN.*PIXEL_STD.*STRIDE_IN_1X1 False"),
    ("1x", {**RSA, "pixel_mean": [127.5] * 3, "pixel_std": [127.5] * 3}, [], "PIXEL_MEAN.*127.5"),
    ("1x", RSA, ["MODEL.RESNETS.NORM", "FrozenBN"], "RESNETS.NORM is FrozenBN.*self-supervised.*SyncBN"),
    ("1x", {**RSA, "method": "MoCo v1, v2"}, ["MODEL.FPN.NORM", "FrozenBN"], "FPN.NORM is FrozenBN.*MoCo"),
    ("1x", RSA, ["MODEL.BACKBONE.FREEZE_AT", 2], "BACKBONE.FREEZE_AT is 2.*self-supervised.*FREEZE_AT 0"),
    ("1x_msra", MSRA, ["MODEL.BACKBONE.FREEZE_AT", 2], None),
])
def test_config_must_fit_the_weights(config, provenance, overrides, message):
    cfg = configured(torchvision_defaults(), f"mask_rcnn_R50_FPN_{config}", overrides=overrides)
    if message is None:
        check_weights(cfg, provenance)
    else:
        with pytest.raises(InputError, match=message) as error:
            check_weights(cfg, provenance)
        assert "\n" not in str(error.value)


def test_random_weights_must_be_asked_for():
    """A config file that says nothing of the weights means the converted ones, never silent random initialisation."""
    quickstart = configured(torchvision_defaults(), "quickstart_mask_rcnn_R50_FPN")
    assert quickstart.MODEL.WEIGHTS == "output/weights/rsa_r50.pkl"
    assert configured(torchvision_defaults(), "mask_rcnn_R50_FPN_1x_random").MODEL.WEIGHTS == ""


@pytest.mark.parametrize("text, line", [
    ("SOLVER:\n  MAX_ITER: 3\n  BASE_LR: 0.1\n  MAX_ITER: 5\n", "line 4: SOLVER.MAX_ITER is given a second time"),
    ("SOLVER:\n  MAX_ITER: 3\nMODEL:\n  MASK_ON: True\nSOLVER:\n  BASE_LR: 0.1\n", "line 5: SOLVER is given a second"),
    ("a: [{b: 1, b: 2}]", None)])
def test_a_repeated_key_is_one_line_with_file_and_line(tmp_path, text, line):
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\nOUTPUT_DIR: x\n")
    for name in ("base.yaml", "child.yaml"):
        with pytest.raises(InputError) as error:
            merge_config(torchvision_defaults(), str(tmp_path / name), [], InputError)
        if line:
            assert f"{tmp_path / 'base.yaml'}, {line}" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_yaml_file_runs_no_code(tmp_path):
    (tmp_path / "c.yaml").write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(InputError, match="python/object"):
        merge_config(torchvision_defaults(), str(tmp_path / "c.yaml"), [], InputError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("images, max_iter, steps, warmup", [
    (117266, 90000, (60000, 80000), 1000), (58633, 45000, (30000, 40000), 1000),
    (234532, 180000, (120000, 160000), 1000),
    (5863, 4500, (3000, 4000), 450), (120, 3000, (2000, 2667), 300), (1, 3000, (2000, 2667), 300)])
def test_schedule_follows_the_size_of_the_data_set(images, max_iter, steps, warmup):
    solver = configured(torchvision_defaults(), "mask_rcnn_R50_FPN_1x").SOLVER
    solver.WARMUP_ITERS = 1000
    line = scale_schedule(solver, images)
    assert solver.MAX_ITER == pytest.approx(max_iter, abs=1) and solver.STEPS == pytest.approx(steps, abs=1)
    assert solver.WARMUP_ITERS == pytest.approx(warmup, abs=1)
    assert f"{solver.MAX_ITER * 16 / images:.1f} epochs of {images} images" in line


def test_schedule_of_a_smaller_batch_has_as_many_epochs(coco, tmp_path, capsys):
    """IMS_PER_BATCH given as KEY VALUE counts."""
    path = str(write(coco, tmp_path))
    args = argparse.Namespace(config_file="transfer/mask_rcnn_R50_FPN_1x.yaml", protocol="infomin", eval_only=False,
                              resume=False, scale_schedule=False, train=(path, str(tmp_path)), val=None,
                              overrides=["SOLVER.IMS_PER_BATCH", "2"])
    cfg = torchvision_defaults()
    train_net.configure(cfg, args)
    assert cfg.SOLVER.MAX_ITER == 24000 and cfg.SOLVER.STEPS == (16000, 21333)
    args.overrides = ["SOLVER.IMS_PER_BATCH", "0"]
    with pytest.raises(InputError, match="SOLVER.IMS_PER_BATCH is 0"):
        train_net.configure(torchvision_defaults(), args)
    said = capsys.readouterr().out
    assert "48000.0 epochs of 1 images" in said and "SOLVER.BASE_LR is 0.02, that of the recipes is for 16" in said


@pytest.fixture
def coco(tmp_path):
    """Three images: a polygon and an RLE mask, a crowd, nothing; category ids with gaps."""
    square = [1, 1, 5, 1, 5, 5, 1, 5]
    annotations = [
        {"id": 1, "image_id": 4, "category_id": 3, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0,
         "segmentation": [square]},
        {"id": 2, "image_id": 4, "category_id": 90, "bbox": [0, 0, 8, 6], "area": 48, "iscrowd": 0,
         "segmentation": {"size": [6, 8], "counts": [0, 48]}},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [0, 0, 8, 6], "area": 48, "iscrowd": 1,
         "segmentation": {"size": [6, 8], "counts": [0, 48]}}]
    images = [{"id": i, "file_name": f"{i}.png", "height": 6, "width": 8} for i in (4, 9, 11)]
    for image in images:
        Image.new("RGB", (8, 6)).save(tmp_path / image["file_name"])
    return {"images": images, "annotations": annotations,
            "categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}]}


def write(coco, folder, name="a.json"):
    (folder / name).write_text(json.dumps(coco))
    return folder / name


def test_a_sound_data_set(coco, tmp_path):
    path = write(coco, tmp_path)
    assert check_annotations(path, tmp_path, evaluated=True) == Annotations(images=3, annotated=1, rle=True)
    coco["annotations"] = coco["annotations"][:1] + coco["annotations"][2:]
    # a crowd's RLE is no matter: it is no training target
    assert check_annotations(write(coco, tmp_path)) == Annotations(images=3, annotated=1, rle=False)


BAD = {  # what is wrong: (where, key, value or None to take it away, words of the message)
    "missing box": (1, "bbox", None, "annotation 2 lacks bbox"),
    "missing mask": (1, "segmentation", None, "annotation 2 lacks segmentation"),
    "missing id": (0, "id", None, "annotation without an id lacks id"),
    "missing area": (1, "area", None, "annotation 2 lacks area"),
    "negative box": (1, "bbox", [3, 3, -1, 2], "annotation 2 has the bbox"),
    "short box": (1, "bbox", [3, 3, 1], "annotation 2 has the bbox"),
    "NaN box": (1, "bbox", [3, 3, 1, float("nan")], "annotation 2 has the bbox"),
    "words for a box": (1, "bbox", "3 3 1 1", "annotation 2 has the bbox"),
    "unknown image": (1, "image_id", 77, "annotation 2 has the unknown image_id 77"),
    "unknown category": (1, "category_id", 1, "annotation 2 has the unknown category_id 1"),
    "list for an id": (1, "image_id", [4], "annotation 2 has image_id"),
    "same id": (1, "id", 1, "annotation 1 has the id of another"),
    "two points": (0, "segmentation", [[1, 1, 5, 5]], "annotation 1 has a polygon"),
    "odd polygon": (0, "segmentation", [[1, 1, 5, 5, 3, 3, 2]], "annotation 1 has a polygon"),
    "flat polygon": (0, "segmentation", [1, 1, 5, 5, 3, 3], "annotation 1 has a polygon"),
    "no polygon": (0, "segmentation", [], "annotation 1 has an empty segmentation"),
    "null mask": (0, "segmentation", None.__class__, "annotation 1 has a segmentation that is neither"),
    "RLE of another size": (1, "segmentation", {"size": [8, 6], "counts": [48]},
                            r"annotation 2 has an RLE of size \[8, 6\]"),
    "RLE of another sum": (1, "segmentation", {"size": [6, 8], "counts": [40]},
                           "annotation 2 has RLE counts that do not"),
    "RLE of size in floats": (1, "segmentation", {"size": [6.0, 8.0], "counts": [48]},
                              r"annotation 2 has an RLE of size \[6.0, 8.0\]"),
    "RLE of floats": (1, "segmentation", {"size": [6, 8], "counts": [10.5, 37.5]},
                      "annotation 2 has RLE counts that are not integers"),
    "RLE of negative counts": (1, "segmentation", {"size": [6, 8], "counts": [-10, 58]},
                               "annotation 2 has RLE counts that are not integers of at least 0"),
    "RLE of null": (1, "segmentation", {"size": [6, 8], "counts": None},
                    "annotation 2 has RLE counts that are neither"),
    "RLE string": (1, "segmentation", {"size": [6, 8], "counts": "!!!"},
                   "annotation 2 has an RLE string that has the character '!'"),
    "RLE string, non-ASCII": (1, "segmentation", {"size": [6, 8], "counts": "0\u00e9"},
                              "annotation 2 has an RLE string that has the character"),
    "RLE string, short": (1, "segmentation", {"size": [6, 8], "counts": "Sh1"},
                          "annotation 2 has RLE counts that"),
    "RLE string, empty": (1, "segmentation", {"size": [6, 8], "counts": ""},
                          "annotation 2 has RLE counts that do not add up to its image's 6 x 8 pixels"),
    "RLE string, cut": (1, "segmentation", {"size": [6, 8], "counts": "0`"},
                        "annotation 2 has an RLE string that ends amid a number"),
    "RLE string, negative": (1, "segmentation", {"size": [6, 8], "counts": "N`12"},
                             "annotation 2 has RLE counts that are not integers of at least 0"),
    "id 0": (1, "id", 0, "annotation 0 has an id below 1, .* number the annotations from 1"),
    "id -1": (1, "id", -1, "annotation -1 has an id below 1"),
    "true for an id": (1, "id", True, "annotation True has id True, which is no integer"),
    "area of null": (1, "area", type(None), "annotation 2 has the area None: it must be a number"),
    "area in words": (1, "area", "12", "annotation 2 has the area '12'"),
    "negative area": (1, "area", -1, "annotation 2 has the area -1"),
    "endless area": (1, "area", float("inf"), "annotation 2 has the area inf"),
    "iscrowd of null": (1, "iscrowd", type(None), "annotation 2 has iscrowd None: it must be 0 or 1"),
    "iscrowd in words": (1, "iscrowd", "0", "annotation 2 has iscrowd '0': it must be 0 or 1"),
    "RLE without counts": (1, "segmentation", {"size": [6, 8]}, "annotation 2 has a segmentation that is neither"),
}


@pytest.mark.parametrize("where, key, value, message", BAD.values(), ids=BAD)
def test_a_bad_annotation_is_one_line_with_file_and_id(coco, tmp_path, where, key, value, message):
    annotation = coco["annotations"][where]
    if value is None:
        del annotation[key]
    else:
        annotation[key] = None if value is type(None) else value
    path = write(coco, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        check_annotations(path, tmp_path, evaluated=True)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (lambda c: c["images"].append(dict(c["images"][0])), 
     "image id 4 occurs twice, for 4.png and 4.png: give every image an id of its own"),
    (lambda c: c["images"][0].pop("height"), "image 4 lacks height"),
    (lambda c: c["images"][1].update(file_name="gone.png"), "image 9: no file .*gone.png"),
    (lambda c: c["images"][1].update(file_name=None), "image 9 has a file_name that is no string"),
    (lambda c: c["images"][1].update(width="8"), "image 9 has .* a size that is no integer"),
    (lambda c: c["images"][1].update(width=0), "image 9 is 0 x 6 pixels .*: give the size of 9.png"),
    (lambda c: c["images"][1].update(height=-6), "image 9 is 8 x -6 pixels"),
    (lambda c: c["images"][1].update(id=True), "image id True is no integer"),
    (lambda c: c["annotations"][0].update(iscrowd=None), "annotation 1 has iscrowd None"),
    (lambda c: c["annotations"][0].update(iscrowd="0"), "annotation 1 has iscrowd '0'"),
    (lambda c: c["annotations"][0].update(segmentation={"size": 4, "counts": "a"}),
     "annotation 1 has an RLE of size 4"),
    (lambda c: c.pop("annotations"), "is not a COCO annotation file.*annotations"),
    (lambda c: c.update(images={}), "is not a COCO annotation file"),
    (lambda c: c["annotations"].append(7), "annotation 7 lacks"),
])
def test_bad_images_and_files(coco, tmp_path, change, message):
    change(coco)
    with pytest.raises(InputError, match=message):
        check_annotations(write(coco, tmp_path), tmp_path)


@pytest.mark.parametrize("content", ["[" * 200000, '{"categories": 7}', "{}", "[]", "", b"\xff\xfe{}"],
                         ids=["nested without end", "number", "no key", "list", "empty", "no UTF-8"])
def test_a_file_that_is_no_coco_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (read_categories, check_annotations):
        with pytest.raises(InputError, match="a.json is not a COCO annotation file") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("categories, message", [
    ([{"id": 3, "name": "a"}, {"id": 90, "name": "b"}, {"id": 3, "name": "c"}],
     "category id 3 occurs twice, for 'a' and 'c': give every category an id of its own"),
    ([{"id": 3}], "category {'id': 3} needs an id that is an integer and a name"),
    ([{"id": "3", "name": "a"}], "category {'id': '3', 'name': 'a'} needs an id"),
    ([{"id": True, "name": "a"}], "category {'id': True, 'name': 'a'} needs an id"),
    ([{"id": 3, "name": None}], "category .* needs an id that is an integer and a name"),
    (["a"], "category 'a' needs an id"),
    ([], "a.json has no categories"),
])
def test_bad_categories_are_one_line(coco, tmp_path, categories, message):
    path = write({**coco, "categories": categories}, tmp_path)
    for read in (read_categories, check_annotations):
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert str(error.value).startswith(str(path))


def test_a_path_that_a_data_set_name_cannot_hold_is_refused(coco, tmp_path):
    path = write(coco, tmp_path)
    assert locate_dataset(dataset_name(path, tmp_path)) == (str(path), str(tmp_path))
    for annotations, images in (("a::b.json", "images"), ("a.json", "b::c"), ("a:", "images")):
        with pytest.raises(InputError, match="neither path may contain '::'"):
            dataset_name(annotations, images)


def test_what_training_does_not_read_may_be_missing_or_of_another_kind(coco, tmp_path):
    for number, annotation in enumerate(coco["annotations"]):
        annotation.update(id=number, area=None, iscrowd=[0, False, True][number])
    coco["annotations"][0].pop("iscrowd")
    assert check_annotations(write(coco, tmp_path), tmp_path) == Annotations(images=3, annotated=1, rle=True)


def test_an_evaluated_set_needs_an_image(coco, tmp_path):
    path = write({**coco, "images": [], "annotations": []}, tmp_path)
    assert check_annotations(path, tmp_path).images == 0
    with pytest.raises(InputError, match="a.json: has no image to evaluate"):
        check_annotations(path, tmp_path, evaluated=True)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_file_of_another_size_is_refused_before_training(coco, tmp_path, evaluated):
    def check():
        return check_annotations(write(coco, tmp_path), tmp_path, evaluated)

    Image.new("RGB", (6, 8)).save(tmp_path / "9.png")
    with pytest.raises(InputError, match="a.json: image 9: .*9.png is 6 x 8 .* and height say 8 x 6: give") as error:
        check()
    assert "more such" not in str(error.value)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a right angle: upright it is 8 x 6
    for suffix in ("png", "jpg", "webp"):
        coco["images"][1]["file_name"] = f"turned.{suffix}"
        Image.new("RGB", (6, 8)).save(tmp_path / f"turned.{suffix}", exif=exif)
        assert check().images == 3
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.webp", exif=exif)
    with pytest.raises(InputError, match="image 9: .*turned.webp is 6 x 8"):
        check()
    (tmp_path / "turned.webp").write_text("no image")
    with pytest.raises(InputError, match=r"image 9: .*turned.webp cannot be read as an image \(of no known format\)"):
        check()


def test_sizes_are_read_without_decoding_and_shown_for_many(coco, tmp_path, monkeypatch):
    def shown(iterable, disable, **options):
        bars.append((options["total"], disable))
        return iterable

    bars = []
    monkeypatch.setattr("transfer.annotations.tqdm", shown)
    coco["images"] = [{**coco["images"][0], "id": number} for number in range(4, 5005)]
    coco["annotations"] = coco["annotations"][:2]
    path = write(coco, tmp_path)
    monkeypatch.setattr(PngImageFile, "load", None)
    assert check_annotations(path, tmp_path).images == 5001
    coco["images"].pop()
    check_annotations(write(coco, tmp_path), tmp_path)
    assert bars == [(5001, None), (5000, True)]  # None: where stderr is a terminal


def test_errors_are_counted(coco, tmp_path):
    for annotation in coco["annotations"]:
        del annotation["bbox"]
    with pytest.raises(InputError, match=r"annotation 1 lacks bbox \(and 2 more such errors\)"):
        check_annotations(write(coco, tmp_path))


def test_data_sets_must_fit_the_model_and_each_other(coco, tmp_path):
    def cfg(train, val, classes):
        cfg = torchvision_defaults()
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (dataset_name(train, tmp_path),), (dataset_name(val, tmp_path),)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
        return cfg

    good, (other, swapped, crowds) = write(coco, tmp_path), (deepcopy(coco) for _ in range(3))
    same = write(coco, tmp_path, "same.json")
    assert [found.annotated for found in check_datasets(cfg(same, good, 2))] == [1]
    with pytest.raises(InputError, match="2 categories, but MODEL.ROI_HEADS.NUM_CLASSES is 80"):
        check_datasets(cfg(good, good, 80))
    other["categories"][0]["id"] = other["annotations"][1]["category_id"] = 91
    with pytest.raises(InputError, match="same.json has category 90 'b' where .*b.json has 91 'b': give both the same"):
        check_datasets(cfg(same, write(other, tmp_path, "b.json"), 2))
    swapped["categories"] = [{"id": 90, "name": "a"}, {"id": 3, "name": "b"}]
    with pytest.raises(InputError, match="same.json has category 3 'a' where .*swapped.json has 3 'b'"):
        check_datasets(cfg(same, write(swapped, tmp_path, "swapped.json"), 2))
    crowds["annotations"] = crowds["annotations"][2:]
    with pytest.raises(InputError, match="c.json has no image with a usable annotation"):
        check_datasets(cfg(write(crowds, tmp_path, "c.json"), good, 2))
    assert check_datasets(cfg("absent.json", good, 2), eval_only=True) == []
    empty = cfg(good, good, 2)
    empty.DATASETS.TRAIN = ()
    with pytest.raises(InputError, match="DATASETS.TRAIN is empty"):
        check_datasets(empty)
    empty.DATASETS.TEST = ()
    with pytest.raises(InputError, match="results are of one data set"):
        check_datasets(empty)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_another_set_beside_coco_must_have_its_categories(coco, tmp_path, monkeypatch, key):
    """Those of COCO are read from its val file, whichever of its sets it is, and never from the large train file."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for folder in ("annotations", "train2017", "val2017"):
        (tmp_path / "coco" / folder).mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").write_text("not to be read")
    coco["categories"] = [{"id": number, "name": f"c{number}"} for number in range(1, 91) if number % 9]
    good = write(coco, tmp_path / "coco" / "annotations", "instances_val2017.json")
    for annotation in coco["annotations"]:
        annotation["category_id"] = 3
    coco["annotations"][0]["category_id"] = coco["categories"][-1]["id"]

    def check():
        cfg = torchvision_defaults()
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
        cfg.DATASETS[key] = (dataset_name(write(coco, tmp_path), tmp_path),)
        return check_datasets(cfg)

    assert [found.annotated for found in check()] == [1] * (key == "TRAIN")
    coco["categories"][-1]["name"] = "other"
    with pytest.raises(InputError, match=f"a.json has category 89 'other' where {good} has 89 'c89': give both"):
        check()
    good.write_text("damaged")
    with pytest.raises(InputError, match="instances_val2017.json is not a COCO annotation file"):
        check()


def test_train_option_takes_classes_and_schedule_from_the_data_set(coco, tmp_path, capsys):
    path = write(coco, tmp_path)

    def made(*overrides, eval_only=False, config_file="transfer/mask_rcnn_R50_FPN_1x.yaml"):
        cfg = torchvision_defaults()
        train_net.configure(cfg, argparse.Namespace(
            config_file=config_file, protocol="infomin", scale_schedule=False,
            eval_only=eval_only, resume=False, train=(str(path), str(tmp_path)), val=(str(path), str(tmp_path)),
            overrides=list(overrides)))
        return cfg

    cfg = made()
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2 and cfg.SOLVER.MAX_ITER == 3000
    assert "schedule: 3000 iterations instead of 90000" in capsys.readouterr().out
    assert made("SOLVER.MAX_ITER", "77").SOLVER.MAX_ITER == 77
    assert made("SOLVER.STEPS", "(5,)").SOLVER.MAX_ITER == 90000
    assert made(eval_only=True).SOLVER.MAX_ITER == 90000 and capsys.readouterr().out == ""
    assert made(eval_only=True).OUTPUT_DIR == f"{cfg.OUTPUT_DIR}_eval"  # beside the results of the recipe's own run
    (tmp_path / "own.yaml").write_text("SOLVER:\n  MAX_ITER: 5000\n  STEPS: [4000]\n")
    assert made(config_file=str(tmp_path / "own.yaml")).SOLVER.MAX_ITER == 5000
