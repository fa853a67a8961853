"""Pre-training runs side by side, from folders whose content is known."""

import csv
import json
import sys

import pytest
from PIL import Image

from rsa_detectron2.common import record
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.tools import report
from rsa_detectron2.transfer.report import pretraining

IMAGES = {"name": "photographs", "images": 640, "classes": 0, "sha256": "0123456789abcdef"}
INIT = {"source": "model_final.pth", "sha256": "fedcba9876543210", "method": "rsa", "step": 20, "init": None}


def make_run(folder, rows, overrides=(), **facts):
    """A folder as tools/pretrain.py leaves it: 20 steps of 32 images, finished unless ``facts`` differ."""
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BATCH_SIZE", 32, "OUTPUT_DIR", str(folder), *overrides])
    known = {"seed": 0, "step": 20, "steps": 20, "bn_batch_size": 32, "processes": 1, "device": "CPU"}
    known |= {"seconds": 7200.0, "init": None, "data": IMAGES, "method": cfg.METHOD} | facts
    origin = record.Origin("pretrain/mine.yaml", (), record.flatten(get_cfg()))
    record.write(folder, record.describe("pretrain", cfg, origin, **known))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def two(tmp_path):
    """A finished run, and one of another method that started from it and was killed while it wrote a row."""
    first = [{"step": 0, "knn_top1": 10.0}]
    first += [{"step": 10, "loss": 2.0, "loss_aa": 1.5, "images_per_s": 40.0}]
    first += [
        {"step": 10, "knn_top1": 35.04},
        {"step": 20, "loss": 1.0, "loss_aa": 0.5, "images_per_s": 60.0},
    ]
    first += [{"step": 20, "knn_top1": 30.0}]
    second = [{"step": 0, "knn_top1": 30.0, "rank_backbone": 7.25}]
    second += [
        {"step": 5, "loss": 3.0, "images_per_s": 16.0},
        {"step": 10, "loss": 2.5, "images_per_s": 32.0},
    ]
    runs = [
        make_run(tmp_path / "a", first),
        make_run(
            tmp_path / "b",
            second,
            ["METHOD", "byol", "SOLVER.BASE_LR", 0.1, "MODEL.INIT", "a/model_final.pth"],
            init={**INIT, "method": "byol", "sha256": "77777777aa", "init": INIT},
            step=0,
            seconds=0.0,
            processes=2,
        ),
    ]
    with open(runs[1] / "metrics.jsonl", "ab") as file:
        file.write(b'5\n{"step": "x", "loss": 1}\n\xff\xfe\n{"step": 15, "lo')
    return runs


def test_what_runs_are_and_how_they_went(two, tmp_path):
    sections = dict(pretraining.write(two, tmp_path / "out"))
    assert list(sections) == ["Runs", "Settings that differ", "First and last figures", "Curves"]
    head, *lines = sections["Runs"]
    assert head == ["", "method", "recipe", "images", "starts from", "steps", "hours", "images/s"]
    images = "photographs, 640 (01234567)"
    start = "rsa, step 20 (model_final.pth, fedcba98)"
    assert lines[0][1:] == ["rsa", "pretrain/mine.yaml", images, "random", "20 of 20", "2.00", "50"]
    start = f"byol, step 20 (model_final.pth, 77777777), from {start}"
    # 5 steps of 32 images at 16 images/s, 5 at 32: 15 s
    assert lines[1][4:] == [start, "10 of 20", "0.00", "24"]
    assert pretraining.read(two[1]).seconds == pytest.approx(15)
    assert sections["Settings that differ"][1:] == [
        ["METHOD", "rsa", "byol"],
        ["MODEL.INIT", "–", "a/model_final.pth"],
        ["SOLVER.BASE_LR", "0.6", "0.1"],
        ["processes", "1", "2"],
    ]
    assert [row[1:] for row in sections["First and last figures"]] == [
        ["loss", "loss, aggressive–aggressive", "kNN top-1 (%)", "effective rank, backbone"],
        ["2.000 → 1.000", "1.500 → 0.500", "10.0 → 30.0 (best 35.0 at step 10)", "–"],
        ["3.000 → 2.500", "–", "30.0 → 30.0", "7.2 → 7.2"],
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"pretrain.{kind}" for kind in ("md", "html", "csv", "png")
    }
    with open(tmp_path / "out" / "pretrain.csv", newline="", encoding="utf-8") as file:
        a, b = csv.DictReader(file)
    assert (a["knn_top1 first"], a["knn_top1 last"], a["knn_top1 highest"]) == ("10.0", "30.0", "35.04")
    assert (b["alignment last"], b["SOLVER.BASE_LR"], b["step"], b["steps"]) == ("", "0.1", "10", "20")
    assert json.loads(b["init"])["init"] == INIT and a["sha256 of the list"] == IMAGES["sha256"]


def test_curves_are_over_the_images_seen(two, tmp_path, monkeypatch):
    """A run with a batch of 64 has seen twice as many after a step."""
    large = make_run(tmp_path / "c", [{"step": 10, "loss": 2.0}], ["SOLVER.BATCH_SIZE", 64])
    pretraining.write([*two, large], tmp_path / "out")
    # four panels of 4.2 x 3 inches at 150 dpi
    assert Image.open(tmp_path / "out" / "pretrain.png").size == (2520, 450)
    drawn = []
    monkeypatch.setattr(pretraining, "draw_panels", lambda rows, *_: drawn.extend(rows))
    pretraining.plot([pretraining.read(run) for run in (two[0], large)], ["loss", "knn_top1"], tmp_path / "p")
    [[(title, xlabel, _, [curves, _]), (_, _, _, [knn, _])]] = drawn
    assert (title, xlabel) == ("loss", "images seen")
    assert curves == [(str(two[0]), ((320, 640), (2.0, 1.0))), (str(large), ((640,), (2.0,)))]
    # The empty curve keeps its place, and so the others their colors.
    assert knn == [(str(two[0]), ((0, 320, 640), (10.0, 35.04, 30.0))), (str(large), ((), ()))]


def test_other_images_are_said(two, tmp_path):
    other = make_run(tmp_path / "c", [], data={**IMAGES, "sha256": "ffff"})
    assert "Images" not in dict(pretraining.write(two, tmp_path / "out"))
    assert "different images" in dict(pretraining.write([two[0], other], tmp_path / "out"))["Images"]


def test_a_setting_that_an_earlier_version_did_not_have_is_its_default(two, tmp_path):
    about = json.loads((two[0] / "run.json").read_text())
    for key in ("MODEL.INIT", "SOLVER.TF32"):
        del about["settings"][key]
    (two[0] / "run.json").write_text(json.dumps(about))
    found = pretraining.settings_that_differ([pretraining.read(run) for run in two])
    assert found["MODEL.INIT"] == ["", "a/model_final.pth"] and "SOLVER.TF32" not in found


def test_a_run_without_figures_is_left_to_its_record(tmp_path, capsys):
    run = make_run(tmp_path / "a", [])
    (run / "metrics.jsonl").unlink()
    assert [heading for heading, _ in pretraining.write([run], tmp_path / "out")] == ["Runs"]
    assert capsys.readouterr().err.startswith(f"{run} has no metrics.jsonl with figures")


def test_the_command(two, tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, words), "--output", str(tmp_path / "out")])
        report.main()
        return capsys.readouterr().out

    said = call("--pretrain", *two)
    assert "| SOLVER.BASE_LR | 0.6" in said and said.endswith(f"{tmp_path}/out/pretrain.html\n")
    page = (tmp_path / "out" / "pretrain.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 1 and ", from rsa, step 20" in page
    fine_tuning = tmp_path / "ft"
    fine_tuning.mkdir()
    for words, message in (
        ([], "^give the folders of fine-tuning runs, or of pre-training runs after --pretrain$"),
        ([fine_tuning, "--pretrain", "absent"], "^absent has no metrics.jsonl: give the folder of a pre-"),
        (["--pretrain", "absent"], "^absent/run.json cannot be read .no such file."),
        ([two[0]], "a holds a pre-training run: give it after --pretrain$"),
        ([fine_tuning, "--pretrain", *two], "^--pretrain takes one folder beside fine-tuning runs: compare"),
        (["--table", "table5", "--pretrain", *two], "^--table table5 shows fine-tuning runs: give their"),
    ):
        with pytest.raises(InputError, match=message):
            call(*words)
    (fine_tuning / "training.json").write_text("{}")
    with pytest.raises(InputError, match="ft holds a fine-tuning run: give it before --pretrain$"):
        call("--pretrain", two[0], fine_tuning)
