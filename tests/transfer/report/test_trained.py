"""What is known of a fine-tuned model: from its own record, from the files beside it, or from neither."""

import json

import pytest
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.report.trained import find_trained
from tests.conftest import write_json


def config(*overrides):
    cfg = torchvision_defaults()
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 2, *overrides])
    return cfg


def save(folder, record=None):
    folder.mkdir(exist_ok=True)
    torch.save({"model": {}, "run": record} if record else {"model": {}}, folder / "model_final.pth")
    return folder


def test_a_model_alone_says_what_it_is(tmp_path):
    categories = [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}]
    cfg = config("INPUT.MIN_SIZE_TEST", 77)
    record = {"engine": "torchvision", "config": cfg.dump(), "categories": categories}
    folder = save(tmp_path / "run", record)
    write_json({"engine": "detectron2", "config": ""}, folder, "training.json")  # of another run
    for path in (folder, folder / "model_final.pth"):
        trained = find_trained(path)
        assert trained.path == folder / "model_final.pth" and trained.engine == "torchvision"
        assert trained.merge_into(torchvision_defaults()) == cfg
        assert trained.categories(cfg) == categories


def test_an_old_model_is_known_by_the_files_beside_it(tmp_path, tiny_coco):
    name = dataset_name(write_json(tiny_coco, tmp_path), tmp_path)
    cfg = config("DATASETS.TRAIN", (name,))
    folder = save(tmp_path / "run")
    (folder / "config.yaml").write_text(cfg.dump())
    assert find_trained(folder).engine == "detectron2"  # Detectron2's own training writes no more
    write_json({"engine": "torchvision", "config": cfg.dump()}, folder, "training.json")
    trained = find_trained(folder)
    assert trained.engine == "torchvision"
    assert trained.categories(cfg) == [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}]
    for other in (config("DATASETS.TRAIN", ("absent.json::images",)), config()):
        assert [c["name"] for c in trained.categories(other)] == ["class 1", "class 2"]


def test_categories_that_do_not_fit_the_model_are_not_taken(tmp_path):
    record = {"engine": "torchvision", "config": config().dump(), "categories": [{"id": 1, "name": "a"}]}
    trained = find_trained(save(tmp_path / "run", record))
    assert [c["name"] for c in trained.categories(config())] == ["class 1", "class 2"]


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"run holds no model \(model_\*.pth\): give the OUTPUT_DIR"):
        (tmp_path / "run").mkdir()
        find_trained(tmp_path / "run")
    with pytest.raises(InputError, match="no model .*absent.pth: give one that"):
        find_trained(tmp_path / "absent.pth")
    unknown = "model_final.pth does not say how it was trained, and no training.json or config.yaml"
    with pytest.raises(InputError, match=unknown):
        find_trained(save(tmp_path / "run"))
    for record in ({"engine": "torchvision"}, {"engine": "other", "config": ""}, json.dumps({})):
        with pytest.raises(InputError, match=unknown):
            find_trained(save(tmp_path / "run", record))
    trained = find_trained(save(tmp_path / "run", {"engine": "torchvision", "config": "NO_SUCH: 1"}))
    with pytest.raises(InputError, match=r"settings that do not fit this version \(.*NO_SUCH"):
        trained.merge_into(torchvision_defaults())
