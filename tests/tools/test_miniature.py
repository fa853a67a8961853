"""Table 5 in miniature at a tiny size: what runs, what is skipped, and what the report says."""

import csv
import json
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.record import flatten
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.tools import _miniature, _steps, _supervised, reproduce
from rsa_detectron2.tools._miniature import MiniatureTest, write_report
from rsa_detectron2.transfer.data.average_precision import AP_KEYS
from rsa_detectron2.transfer.data.drawn import write_image_folder
from rsa_detectron2.transfer.report.tables import COLUMNS
from tests.conftest import ROOT, assert_same

SMALL = (
    "SOLVER.EPOCHS 1 SOLVER.WARMUP_EPOCHS 0 SOLVER.BATCH_SIZE 18 SOLVER.AMP off DATA.IMAGE_SIZE 32 "
    "DATA.EVAL_RESIZE 32"
).split()
FINE_TUNING = (
    "SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (64,) "
    "INPUT.MIN_SIZE_TEST 64 TEST.PRECISE_BN.NUM_ITER 1"
).split()


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "miniature", *map(str, arguments)])
    monkeypatch.setattr(_miniature, "SIZES", {"train": 1, "val": 1, "coco_train": 4, "coco_val": 2})
    monkeypatch.setattr(MiniatureTest, "FINE_TUNING", FINE_TUNING)
    return reproduce.main()


def test_runs_are_done_once_and_reported(tmp_path, monkeypatch, capsys, forked_steps):
    arguments = ["--rows", "random", "supervised", "--seeds", 1, "--jobs", 2]
    arguments += ["--output-dir", tmp_path, "--set", *SMALL]
    assert call(monkeypatch, "--dry-run", *arguments) == 0
    assert capsys.readouterr().out.count("[to run]") == 6 and not list(tmp_path.iterdir())
    assert call(monkeypatch, *arguments) == 0
    folder = tmp_path / "miniature"
    results = {
        "/".join(path.parts[-3:-1]): json.loads(path.read_text())
        for path in folder.glob("seed0/*/*/results.json")
    }
    assert {
        name: ((run["weights"] or {}).get("method"), run["settings"]["MODEL.BACKBONE.FREEZE_AT"])
        for name, run in results.items()
    } == {
        "random/trained": (None, 0),
        "random/frozen": (None, 5),
        "supervised/trained": ("supervised", 0),
        "supervised/frozen": ("supervised", 5),
    }
    report = (folder / "report.md").read_text()
    assert "Backbone frozen:" in report and "| supervised classification | 1 " in report
    assert (folder / "seed0" / "random" / "frozen" / "results.log").is_file()
    capsys.readouterr()

    monkeypatch.setattr(_steps.subprocess, "Popen", lambda *_, **__: pytest.fail("ran again"))
    (folder / "report.md").unlink()
    assert call(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.count("[done]") == 6 and (folder / "report.md").read_text() == report
    with pytest.raises(InputError, match="trained holds another run .engine torchvision instead of det"):
        call(monkeypatch, *arguments, "--engine", "detectron2")
    with pytest.raises(InputError, match="supervised holds another run .*; 1 epochs instead of "):
        call(monkeypatch, *arguments[: arguments.index("--set")])


def test_steps_of_a_row():
    test = MiniatureTest(Path("out"), ["rsa"], 2, ["SOLVER.EPOCHS", "1"])
    steps = [(str(step.done), str(step.needs), shlex.join(step.command)) for step in test.steps()]
    assert [done for done, _, _ in steps[:4]] == [
        "out/seed0/rsa/model_final.pth",
        "out/seed0/rsa/backbone.pkl",
        "out/seed0/rsa/trained/results.json",
        "out/seed0/rsa/frozen/results.json",
    ]
    assert len(steps) == 8
    (_, _, pretrain), (_, first, convert), (_, second, trained), (_, third, frozen) = steps[4:]
    assert pretrain == (
        "tools/pretrain.py --config-file pretrain/miniature_rsa_R18.yaml --data out/images/train "
        "--output-dir out/seed1/rsa --seed 1 --workers 0 --num-processes 1 SOLVER.EPOCHS 1"
    )
    assert convert == "tools/convert_to_d2.py out/seed1/rsa/model_final.pth out/seed1/rsa/backbone.pkl"
    assert first == "out/seed1/rsa/model_final.pth" and second == third == "out/seed1/rsa/backbone.pkl"
    assert " --engine torchvision " in trained and " SEED 1 " in trained and " FREEZE_AT 0 " not in trained
    assert frozen == trained.replace("FREEZE_AT 0", "FREEZE_AT 5").replace("/trained", "/frozen")


def test_every_row_meets_the_same_detector():
    """The rows differ in nothing but the weights and the folders of their fine-tunings."""
    for seed in (0, 1):
        test = MiniatureTest(Path("out"), list(MiniatureTest.ROWS), 2, [])
        for backbone in _miniature.FREEZE_AT:
            commands = set()
            for row in test.rows:
                command = shlex.join(test.fine_tuning(row, seed, backbone).command)
                weights = "''" if row == "random" else f"out/seed{seed}/{row}/backbone.pkl"
                assert f"MODEL.WEIGHTS {weights} " in command
                commands.add(command.replace(weights, "W").replace(f"/{row}/", "/R/"))
            assert len(commands) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["miniature", "--seeds", 0], "--seeds is 0: it must be at least 1"),
        (["miniature", "--rows", "byo"], "miniature has no row byo: choose from random, simsiam, byol, "),
        (["miniature", "--rehearse"], "--rehearse: of no use for miniature; leave it out"),
        (["miniature", "--set", "SEED"], "--set takes KEY VALUE pairs, but 'SEED' has no value"),
        (["controlled", "--engine", "torchvision"], "--engine: of no use for controlled; leave it out"),
    ],
)
def test_wrong_options_are_one_line(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, options)])
    with pytest.raises(InputError, match=message):
        reproduce.main()


def planted(*values):
    """Results of one row whose figures are the values and, in their order, up to eleven more."""
    keys = [(task, key) for task in ("bbox", "segm") for key in AP_KEYS]
    found = []
    for value in values:
        ap = {"bbox": {}, "segm": {}}
        for n, (task, key) in enumerate(keys):
            ap[task][key] = value + n
        found.append({"ap": ap})
    return found


def test_report_against_statistics(tmp_path):
    by_backbone = {
        "trained": {"byol": planted(10, 12, 14), "rsa": planted(13, 15, 17)},  # deviations of 2
        "frozen": {"byol": planted(10, 12, 14), "rsa": planted(8.9, 10.5, 12)},
    }
    text = write_report(tmp_path, by_backbone)
    lines = list(csv.DictReader(open(tmp_path / "table.csv")))
    assert [(line["backbone"], line["row"], line["seeds"]) for line in lines] == [
        (backbone, row, "3") for backbone in by_backbone for row in ("byol", "rsa")
    ]
    places = {"box AP": 0, "box AP50": 1, "box AP75": 2, "mask AP": 6, "mask AP50": 7, "mask AP75": 8}
    assert places.keys() == {*COLUMNS["ap"]}
    for name, n in places.items():
        values = [8.9 + n, 10.5 + n, 12 + n]
        assert float(lines[3][name]) == pytest.approx(statistics.fmean(values))
        assert float(lines[3][f"{name} std"]) == pytest.approx(statistics.stdev(values))
    assert "15.0 ± 2.0" in text and "21.0 ± 2.0" in text
    assert (
        "box AP, backbone trained: ahead (+3.0, deviation 2.0); mask AP, backbone trained: ahead "
        "(+3.0, deviation 2.0); box AP, backbone frozen: within the deviation (-1.5, deviation 2.0); "
    ) in text
    assert text in (tmp_path / "report.md").read_text()
    assert (tmp_path / "miniature.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ({"byol": planted(20, 21), "rsa": planted(10, 11)}, "trained: behind (-10.0, deviation 0.7)"),
        ({"byol": planted(20), "rsa": planted(10)}, "One seed has no deviation"),
    ],
)
def test_sentence_of_other_outcomes(tmp_path, rows, sentence):
    assert sentence in write_report(tmp_path, {"trained": rows, "frozen": rows})
    alone = {"rsa": rows["rsa"]}
    assert "BYOL" not in write_report(tmp_path, {"trained": alone, "frozen": alone})


def settings(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "pretrain" / f"{name}.yaml"))
    return flatten(cfg)


def test_recipes_differ_from_the_quick_starts_in_their_method_alone():
    base, changed = settings("quickstart_rsa_R18"), {}
    for row in MiniatureTest.ROWS.keys() - {"random", "supervised"}:
        recipe = settings(f"miniature_{row}_R18").items()
        changed[row] = {key: value for key, value in recipe if value != base[key]}
        assert changed[row].pop("OUTPUT_DIR") == f"output/miniature_{row}_R18"
        assert changed[row].pop("DATA.PATH") == "output/reproduce/miniature/images/train"
        assert changed[row].pop("SOLVER.MICRO_BATCH") == base["SOLVER.BATCH_SIZE"]
    assert changed == {
        "rsa": {},
        "rsa_fixed_beta": {"MODEL.BETA_SCHEDULE": "fixed"},
        "byol": {"METHOD": "byol"},
        "byol_aw": {"METHOD": "byol_aw"},
        "simsiam": {"METHOD": "simsiam", "MODEL.OUT_DIM": 512},
    }


def classify(monkeypatch, data, folder, *overrides, seed=0):
    words = ["--config-file", "pretrain/miniature_rsa_R18.yaml", "--data", data, "--output-dir", folder]
    words += ["--seed", seed, "--workers", 0, "MODEL.BACKBONE", "test_resnet", *SMALL, *overrides]
    monkeypatch.setattr(sys, "argv", ["_supervised.py", *map(str, words)])
    _supervised.main()
    return torch.load(folder / "model_final.pth", weights_only=True)["state_dict"]


def test_supervised_classification_learns_and_repeats(tmp_path, monkeypatch, capsys):
    data = write_image_folder(tmp_path / "images", 2, 32, 0)
    first = classify(monkeypatch, data, tmp_path / "a")
    assert_same(first, classify(monkeypatch, data, tmp_path / "b"))
    other = classify(monkeypatch, data, tmp_path / "c", seed=1)
    assert not torch.equal(first["fc.weight"], other["fc.weight"]) and first["fc.weight"].shape[0] == 18
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["method"] == "supervised" and about["steps"] == 2 and about["data"]["classes"] == 18

    capsys.readouterr()
    classify(monkeypatch, data, tmp_path / "d", "SOLVER.EPOCHS", 60, "SOLVER.BATCH_SIZE", 36)
    last = capsys.readouterr().out.splitlines()[-2]
    assert float(last.split()[-3]) > 40  # percent right, where 6 are chance


def test_supervised_classification_refuses_in_one_line(tmp_path, monkeypatch):
    data = write_image_folder(tmp_path / "images", 1, 32, 0)
    with pytest.raises(InputError, match="circle-red has no labels: it must hold a folder of images for"):
        classify(monkeypatch, data / "circle-red", tmp_path / "a")
    with pytest.raises(InputError, match="SOLVER.OPTIMIZER is lars: supervised training takes sgd alone"):
        classify(monkeypatch, data, tmp_path / "a", "SOLVER.OPTIMIZER", "lars")
    with pytest.raises(InputError, match="the loss is .* at step 1: lower SOLVER.BASE_LR"):
        classify(monkeypatch, data, tmp_path / "a", "DATA.STD", "(1e-45, 1e-45, 1e-45)")
