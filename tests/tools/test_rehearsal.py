"""tools/reproduce.py --rehearse: one run through all of its commands, and its estimates of full runs."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from rsa_detectron2.pretrain.method.networks import build_backbone
from rsa_detectron2.tools import _rehearsal
from rsa_detectron2.tools._rehearsal import Rehearsal
from rsa_detectron2.transfer.convert.writers import ReadOptions, convert, load_weights
from rsa_detectron2.transfer.data.annotations import locate_dataset
from rsa_detectron2.transfer.report import paper
from tests.tools.test_report_top1 import CIFAR, cell_of


def test_a_row_of_table2(tool, tmp_path):
    done = tool("reproduce", "table2", "--rehearse", "--rows", "rsa", "--columns", "cifar10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    folder = tmp_path / "output" / "rehearsal"
    report = (folder / "table2" / "report.md").read_text()
    assert "REHEARSAL: 2 steps of each run, batch 8" in report and "drawn: CIFAR-10" in report
    assert "1 epochs instead of 200; " in report and "16 images instead of 50000" in report
    assert "92.3 ± 0.1" in report and "difference" not in report
    run = json.loads((folder / "seed0" / CIFAR.training.name / "run.json").read_text())
    assert run["data"]["name"] == "stand-in for cifar-10-batches-py train" and run["step"] == 2
    row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {CIFAR.training.name}"))
    _, memory, hours = (cell.strip().replace(",", "") for cell in row.strip("|").split("|"))
    assert 0.5 < float(memory) < 40 and float(hours) > 0
    again = tool(
        "reproduce",
        "table2",
        "--rehearse",
        "--rows",
        "rsa",
        "--columns",
        "cifar10",
        "--dry-run",
        cwd=tmp_path,
    )
    assert "0 of 2 to run, in a rehearsal" in again.stdout


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Rehearsal(SimpleNamespace(output_dir="reh"))


def test_hours_by_images_and_pixels():
    """2 steps of 8 views of 72 pixels in 8 s; an image of 224 pixels takes (224 / 72)^2 times as long."""
    cell = cell_of("table3", "rsa", "imagenet100")
    run = {"step": 2, "seconds": 8.0, "settings": {"SOLVER.BATCH_SIZE": 8, "DATA.IMAGE_SIZE": 72}}
    wanted = 8 / 16 * (224 / 72) ** 2 * 126689 * 100 / 3600
    assert _rehearsal.of_pretraining(run, cell.training) == pytest.approx(wanted)
    training = next(cell.training for cell in paper.cells("table5") if cell.row == "rsa")
    run = {
        "seconds": 6.0,
        "iterations": 2,
        "settings": {"SOLVER.IMS_PER_BATCH": 2, "INPUT.MIN_SIZE_TRAIN": [80]},
    }
    assert _rehearsal.of_fine_tuning(run, training) == pytest.approx(6 / 4 * 100 * 16 * 90000 / 3600)


def test_memory_grows_with_the_images_at_once():
    """ImageNet-100's 64 images under AMP against STL-10's 256 smaller ones in float32, per GPU."""
    small, large = (
        _rehearsal.gigabytes(cell_of(*place).training)
        for place in (("table2", "rsa", "cifar10"), ("table2", "rsa", "stl10"))
    )
    assert 3 < large / small < 4.2  # four times the pixels, beside weights


def test_memory_of_a_fine_tuning_is_the_model_zoos():
    """7.2 GB for the two images that a GPU has."""
    training = next(cell.training for cell in paper.cells("table5") if cell.row == "rsa")
    assert _rehearsal.memory_of_fine_tuning(training) == pytest.approx(7.2e9 / 2**30)


def test_the_users_data_are_taken_where_they_are(rehearsal, tmp_path):
    (tmp_path / "datasets/cifar10").mkdir(parents=True)
    assert str(rehearsal.data("cifar10")) == "datasets/cifar10" and rehearsal.drawn == []
    assert str(rehearsal.data("stl10")) == "reh/drawn/stl10" and "STL-10" in rehearsal.note()
    assert rehearsal.data("imagenet100") == rehearsal.data("imagenet")


@pytest.mark.parametrize("method", [*_rehearsal.LAYOUTS, "BYOL", "mine"])
def test_checkpoints_of_the_methods_authors(rehearsal, tmp_path, method):
    path, provenance = convert(
        rehearsal.weights(method), tmp_path / "w.pkl", options=ReadOptions(method=method)
    )
    assert provenance["method"] == method and len(load_weights(path)[0]) == 265
    if method in _rehearsal.LAYOUTS:
        assert provenance["format"] in ("InstDis, PIRL, InfoMin (PyContrast)", "MoCo v1, v2")


def test_weights_in_place_of_those_that_detectron2_fetches(rehearsal):
    for row, std in (("supervised", 1.0), ("supervised_torchvision", 58.395)):
        training = next(cell.training for cell in paper.cells("table5") if cell.row == row)
        state, provenance = load_weights(rehearsal.fetched(training))
        assert provenance["pixel_std"][0] == std and provenance["stride_in_1x1"] == (row == "supervised")
        assert len(state) == 265 and provenance["method"] == "supervised"
    assert len(build_backbone("resnet50").state_dict()) > 265


def test_a_small_part_of_the_users_coco(rehearsal, tmp_path, monkeypatch):
    for part in ("train2017", "val2017"):
        (tmp_path / "coco" / part).mkdir(parents=True)
        (tmp_path / "coco" / "annotations").mkdir(exist_ok=True)
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8} for i in range(40)]
        annotations = [{"id": i + 1, "image_id": i, "category_id": 1} for i in range(1, 40)]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
        (tmp_path / "coco" / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        for image in images:
            Image.new("RGB", (8, 8)).save(tmp_path / "coco" / part / image["file_name"])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert locate_dataset("coco_2017_train")
    folder = rehearsal.coco()
    found = json.loads((folder / "train.json").read_text())
    assert [image["id"] for image in found["images"]] == list(range(1, 33)) and len(
        found["annotations"]
    ) == 32
    assert Image.open(folder / "images" / "5.jpg").size == (8, 8) and rehearsal.drawn == []
