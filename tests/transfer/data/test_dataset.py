"""A user's data sets in Detectron2: it trains on what the embedded engine trains on, and measures the same
AP."""

import json
import sys
from copy import deepcopy

import pytest
import torch

from tests.conftest import write_json

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, Instances

from rsa_detectron2.transfer.d2 import data as d2_data
from rsa_detectron2.transfer.d2 import evaluation as d2_evaluation
from rsa_detectron2.transfer.data.annotations import dataset_name, forget_datasets, load_datasets
from rsa_detectron2.transfer.data.average_precision import coco_ap
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.coco import CocoInstances


def config(folder, train="a.json", val="a.json", masks=True):
    forget_datasets()  # tests write one file twice
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((dataset_name(folder / name, folder),) for name in (train, val))
    cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.INPUT.MASK_FORMAT = masks, 2, "bitmask"
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN, cfg.OUTPUT_DIR = "none", (0,), str(folder / "run")
    return cfg


def training_dicts(cfg, filter_empty=True):
    d2_data.register_datasets(cfg)
    return get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=filter_empty)


def test_a_sound_file_gives_what_detectron2_loads_itself(tiny_coco, tmp_path):
    path = write_json(tiny_coco, tmp_path)
    stock = load_coco_json(str(path), str(tmp_path), "stock")
    for record in stock:  # its mapper leaves crowds out
        record["annotations"] = [a for a in record["annotations"] if not a["iscrowd"]]
    cfg = config(tmp_path)
    assert training_dicts(cfg, filter_empty=False) == stock
    assert [record["image_id"] for record in training_dicts(cfg)] == [4]
    ours, theirs = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]), MetadataCatalog.get("stock")
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert ours.get(key) == theirs.get(key)


ODD = {  # change of the first of two objects, number of objects that are left
    "as it was": ({}, 2),
    "outside": ({"bbox": [90, 0, 5, 5]}, 1),
    "no size": ({"bbox": [3, 3, 0, 0]}, 1),
    "sliver": ({"bbox": [3, 3, 0.005, 3]}, 1),
    "in part": ({"bbox": [-3, 2, 20, 20]}, 2),
    "crowd": ({"iscrowd": 1}, 1),
    "one point": ({"segmentation": [[1, 1]]}, 1),
    "beside one": ({"segmentation": [[1, 1, 5, 1, 5, 5], [1, 1]]}, 2),
    "empty RLE": ({"segmentation": {"size": [6, 8], "counts": [48]}}, 1),
}


@pytest.mark.parametrize("change, left", ODD.values(), ids=ODD)
def test_both_engines_train_on_the_same_objects(tiny_coco, tmp_path, change, left):
    tiny_coco["annotations"][0].update(change)
    write_json(tiny_coco, tmp_path)
    cfg = config(tmp_path)
    (record,) = training_dicts(cfg)
    instances = DatasetMapper(cfg, True)(record)["instances"]
    _, target = CocoInstances(load_datasets(cfg)[cfg.DATASETS.TRAIN[0]], training=True)[0, False]
    assert len(instances) == left
    assert instances.gt_boxes.tensor.tolist() == target["boxes"].tolist()
    assert (instances.gt_classes + 1).tolist() == target["labels"].tolist()
    assert instances.gt_masks.tensor.tolist() == target["masks"].bool().tolist()


def test_an_image_without_a_usable_object_is_left_out_or_trained_without(tiny_coco, tmp_path):
    for annotation in tiny_coco["annotations"][:2]:
        annotation["bbox"] = [90, 0, 5, 5]
    tiny_coco["annotations"].append(
        {**tiny_coco["annotations"][0], "id": 9, "image_id": 11, "bbox": [1, 1, 4, 4]}
    )
    write_json(tiny_coco, tmp_path)
    cfg = config(tmp_path)
    dataset = load_datasets(cfg)[cfg.DATASETS.TRAIN[0]]
    for filter_empty, left in ((True, [11]), (False, [4, 9, 11])):
        assert [record["image_id"] for record in training_dicts(cfg, filter_empty)] == left
        ours = CocoInstances(dataset, training=True, filter_empty=filter_empty)
        assert ours.ids == left
        empty = [len(ours[n, True][1]["boxes"]) == 0 for n in range(len(left))]
        assert empty == [
            len(DatasetMapper(cfg, True)(record)["instances"]) == 0
            for record in training_dicts(cfg, filter_empty)
        ]


def test_boxes_alone(tiny_coco, tmp_path):
    for annotation in tiny_coco["annotations"]:
        annotation["segmentation"] = []
    write_json(tiny_coco, tmp_path)
    cfg = config(tmp_path, masks=False)
    (record,) = training_dicts(cfg)
    instances = DatasetMapper(cfg, True)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[1, 1, 5, 5], [0, 0, 8, 6]] and not instances.has(
        "gt_masks"
    )


def write_sound(cfg):
    """Write the files that :func:`d2_engine.train` writes before it starts processes."""
    load_datasets(cfg)[cfg.DATASETS.TEST[0]].save(d2_data.sound_annotations(cfg))


def evaluate(cfg, detections):
    """Box AP of detections [(image id, class, box x0 y0 x1 y1)] by Detectron2's evaluator, and the file it
    writes."""
    d2_data.register_datasets(cfg)
    write_sound(cfg)
    evaluator = d2_evaluation.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator._distributed = False
    evaluator.reset()
    for image_id, label, box in detections:
        instances = Instances(
            (6, 8),
            pred_boxes=Boxes(torch.tensor([box])),
            scores=torch.tensor([0.9]),
            pred_classes=torch.tensor([label]),
        )
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    results = evaluator.evaluate()
    path = d2_data.sound_annotations(cfg).with_name("coco_instances_results.json")
    return results.get("bbox", {}).get("AP"), json.loads(path.read_text())


def test_the_metric_takes_what_tools_write(tiny_coco, tmp_path):
    """The file has ids from 0, no area, iscrowd or info, and its classes in another order than in training.
    AP equals that of the embedded engine, and is 100 for the ground truth."""
    write_json(deepcopy(tiny_coco), tmp_path, "train.json")
    del tiny_coco["annotations"][2]
    for number, annotation in enumerate(tiny_coco["annotations"]):
        annotation.update(id=number, category_id={3: 1, 90: 0}[annotation["category_id"]])
        del annotation["area"], annotation["iscrowd"]
    tiny_coco["categories"] = [{"id": 0, "name": "b"}, {"id": 1, "name": "a"}]
    write_json(tiny_coco, tmp_path, "val.json")
    cfg = config(tmp_path, "train.json", "val.json")
    ap, found = evaluate(cfg, [(4, 0, [1.0, 1, 5, 5]), (4, 1, [0.0, 0, 8, 6])])
    assert ap == pytest.approx(100)
    assert [d["category_id"] for d in found] == [
        3,
        90,
    ]  # the training set's categories, which the file beside it has
    assert coco_ap(load_datasets(cfg)[cfg.DATASETS.TEST[0]], found, ("bbox",))["bbox"]["AP"] == pytest.approx(
        100
    )


def test_each_file_is_parsed_once(tiny_coco, tmp_path):
    """The checks, the training set and all evaluations share one reading, although memory is freed in
    between."""
    files = {str(write_json(tiny_coco, tmp_path, name)): 0 for name in ("train.json", "val.json")}
    cfg = config(tmp_path, "train.json", "val.json")

    def count(event, arguments):
        if event == "open" and str(arguments[0]) in files:
            files[str(arguments[0])] += 1

    sys.addaudithook(count)  # for good: an audit hook cannot be removed
    check_datasets(cfg)
    assert len(training_dicts(cfg)) == 1
    write_sound(cfg)
    forget_datasets()
    for _ in range(2):
        assert len(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])) == 3
        d2_evaluation.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    assert list(files.values()) == [1, 1]


def test_a_class_that_val_lacks_has_no_part_in_ap(tiny_coco, tmp_path):
    write_json(deepcopy(tiny_coco), tmp_path, "train.json")
    del tiny_coco["categories"][0], tiny_coco["annotations"][1]
    write_json(tiny_coco, tmp_path, "val.json")
    ap, found = evaluate(
        config(tmp_path, "train.json", "val.json"), [(4, 0, [1.0, 1, 5, 5]), (4, 1, [0.0, 0, 8, 6])]
    )
    assert ap == pytest.approx(100) and [d["category_id"] for d in found] == [3, 90]


def test_a_set_without_annotations_gives_detections_alone(tiny_coco, tmp_path):
    write_json(deepcopy(tiny_coco), tmp_path, "train.json")
    del tiny_coco["annotations"]
    write_json(tiny_coco, tmp_path, "test.json")
    ap, found = evaluate(config(tmp_path, "train.json", "test.json"), [(11, 1, [0.0, 0, 8, 6])])
    assert ap is None and found[0]["image_id"] == 11
