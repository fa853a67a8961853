"""tools/predict.py: the detections of --eval-only, images of all kinds, and what an interruption leaves."""

import json
import signal
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.tools import predict
from rsa_detectron2.transfer.data.coco_json import read_coco
from rsa_detectron2.transfer.data.drawn import TOYS


@pytest.fixture
def call(tmp_path, monkeypatch):
    """``call(model, images, ...)`` runs the tool and returns its detections.json."""

    def run(*arguments, output="out", threshold=0):
        words = [*arguments, "--output", tmp_path / output, "--threshold", threshold]
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, words)])
        predict.main()
        return json.loads((tmp_path / output / "detections.json").read_text())

    return run


def by_file(images, detections):
    """What counts of detections, in their order, with the name of the file for the image's id."""
    names = {image["id"]: image["file_name"] for image in images}
    keys = ("category_id", "bbox", "score", "segmentation")
    return [(names[d["image_id"]], *(d[key] for key in keys)) for d in detections]


def test_detections_are_those_of_an_evaluation(trained, coco, call):
    evaluated = json.loads((trained / "inference" / "coco_instances_results.json").read_text())
    annotations = json.loads((trained / "inference" / "annotations.json").read_text())
    found = call(trained, coco / "images")
    assert len(evaluated) > 20
    assert by_file(found["images"], found["annotations"]) == by_file(annotations["images"], evaluated)
    assert [category["name"] for category in found["categories"]] == TOYS.classes
    kept = call(trained / "model_final.pth", coco / "images", output="kept", threshold=0.06)["annotations"]
    assert 0 < len(kept) < len(evaluated)
    assert [d["score"] for d in kept] == [d["score"] for d in evaluated if d["score"] >= 0.06]


@pytest.fixture
def fake(monkeypatch):
    """A model that finds one square in every image. ``fake.interrupt``: at which image a signal comes."""

    def detect(image):
        detect.calls += 1
        if detect.calls == detect.interrupt:
            signal.raise_signal(signal.SIGTERM)
        mask = {"size": list(image.shape[:2]), "counts": [0, 5, image[..., 0].size - 5]}
        return [{"category_id": 1, "bbox": [0.0, 0.0, 2.0, 3.0], "score": 0.75, "segmentation": mask}]

    detect.calls, detect.interrupt = 0, None
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    monkeypatch.setattr(predict, "load", lambda trained: (detect, categories))
    monkeypatch.setattr(predict, "sha256", lambda path: "0")
    monkeypatch.setattr(predict, "find_trained", lambda path: type("Trained", (), {"path": path}))
    return detect


@pytest.fixture
def photographs(tmp_path):
    """Images of several kinds and sizes in folders of several depths, and files that are none."""
    root, rng = tmp_path / "photographs", np.random.default_rng(0)
    sizes = {"a.jpg": (30, 40), "b/c/a.png": (90, 20), "b/gray.JPEG": (25, 25), "wide.webp": (10, 300)}
    for name, (height, width) in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        (image.convert("L") if "gray" in name else image).save(root / name)
    (root / "b" / "damaged.jpg").write_bytes((root / "a.jpg").read_bytes()[:300])
    (root / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("x")
    return root, sizes


def test_a_folder_of_anything(photographs, fake, call, tmp_path, capsys):
    root, sizes = photographs
    found = call("model", root)
    said = capsys.readouterr()
    assert "4 detections in 4 images; 2 files left out, named above" in said.out
    assert "damaged.jpg cannot be used" in said.err and "empty.png cannot be used" in said.err
    assert "files left out: 1 .txt" in said.err
    assert {i["file_name"]: (i["height"], i["width"]) for i in found["images"]} == sizes
    assert found["info"] == {"model": "0", "threshold": 0.0, "folder": str(root)}
    for name, (height, width) in sizes.items():
        picture = tmp_path / "out" / (name if name.lower().endswith((".jpg", ".jpeg")) else name + ".jpg")
        assert Image.open(picture).size == (width, height)


def test_the_file_is_a_data_set_and_holds_results(photographs, fake, call, tmp_path, capsys):
    found = call("model", photographs[0])
    truth = COCO(tmp_path / "out" / "detections.json")
    assert truth.loadCats([7])[0]["name"] == "dog"
    assert [a["area"] for a in found["annotations"]] == [5] * 4
    assert len(truth.loadRes(found["annotations"]).anns) == 4
    read = read_coco(str(tmp_path / "out" / "detections.json"), found["info"]["folder"])
    assert not read.notes and len(read.annotations) == 4


def test_files_and_folders_together(photographs, fake, call):
    root, _ = photographs
    found = call("model", root / "a.jpg", root / "b" / "c", root / "b" / "c" / "a.png")
    assert [image["file_name"] for image in found["images"]] == ["a.jpg", "b/c/a.png"]


def test_an_interrupted_run_goes_on(photographs, fake, call, tmp_path, capsys):
    whole = call("model", photographs[0], output="whole")
    fake.calls, fake.interrupt = 0, 3
    with pytest.raises(Interrupted, match="stopped by SIGTERM after 3 images; the same command goes on"):
        call("model", photographs[0])
    half = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert half["images"] == whole["images"][:3] and half["annotations"] == whole["annotations"][:3]
    assert call("model", photographs[0]) == whole and fake.calls == 4
    with pytest.raises(InputError, match="detections.json is there already, of another model, threshold or"):
        call("model", photographs[0], threshold=0.5)


def test_what_is_refused(photographs, fake, call, tmp_path):
    root, _ = photographs
    for words, message in {
        (root / "absent",): "no image or folder .*absent: correct the path",
        (tmp_path,): "--output .* lies in .*: give a folder outside",
        (root / "b" / "damaged.jpg",): "no image can be read",
    }.items():
        with pytest.raises(InputError, match=message):
            call("model", *words)
    with pytest.raises(InputError, match="--threshold 50.0: it must lie between 0 and 1"):
        call("model", root, threshold=50)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in .*empty"):
        call("model", tmp_path / "empty")
