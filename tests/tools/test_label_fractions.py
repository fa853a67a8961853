"""Fractions of the labeled images at a tiny size: what is drawn, what runs, and what the report says."""

import csv
import json
import shlex
import sys

import numpy as np
import pytest
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.method.networks import build_backbone
from rsa_detectron2.tools import _fractions, _steps, label_fractions
from rsa_detectron2.tools._fractions import LabelFractions, write_report
from rsa_detectron2.transfer.convert.writers import convert
from rsa_detectron2.transfer.data.annotations import dataset_name, load_dataset
from rsa_detectron2.transfer.data.drawn import write_coco
from rsa_detectron2.transfer.report.tables import AP, COLUMNS
from tests.conftest import rsa_networks, write_json

RECIPE = "transfer/quickstart_mask_rcnn_R18_FPN.yaml"
SMALL = (
    "SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (64,) "
    "INPUT.MIN_SIZE_TEST 64 TEST.PRECISE_BN.NUM_ITER 1 DATALOADER.NUM_WORKERS 0"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 20 drawn images with labels, one without, and 2 images for evaluation."""
    folder = tmp_path_factory.mktemp("data")
    train = write_coco(folder, "train", 20, 64, 2)
    write_coco(folder, "val", 2, 64, 3)
    coco = json.loads(train.read_text())
    coco["images"].append({**coco["images"][0], "id": 77, "file_name": "empty.jpg"})
    train.write_text(json.dumps(coco))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Converted weights of an untrained ResNet-18."""
    folder = tmp_path_factory.mktemp("weights")
    state = rsa_networks(build_backbone("resnet18"), 64, 16).state_dict()
    torch.save(
        {"format": "rsa-pretraining", "method": "rsa", "step": 7, "config": "", "model": state},
        folder / "a.pth",
    )
    return convert(folder / "a.pth", folder / "mine.pkl")[0]


@pytest.fixture
def arguments(data, tmp_path):
    """Of a run on half of the images; a test may give other --fractions."""
    words = ["--data", data, "--config-file", RECIPE, "--engine", "torchvision"]
    return [*words, "--output-dir", tmp_path / "out", "--fractions", 50]


def options(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["label_fractions.py", *map(str, arguments)])
    return label_fractions.parse()


def test_fractions_are_nested_and_the_same_for_every_row(arguments, weights, data, monkeypatch):
    arguments += ["--fractions", 10, 5, 50, 100, "--seeds", 3, "--weights", f"mine={weights}"]
    test = LabelFractions(options(monkeypatch, *arguments))
    test.prepare()
    whole = json.loads((data / "train.json").read_text())
    labeled = {annotation["image_id"] for annotation in whole["annotations"]}
    assert len(labeled) == 20 and 77 not in labeled
    files, drawn = {}, {}
    for step in test.steps():
        seed, percent, row = step.done.parts[-4:-1]
        train = step.command[step.command.index("--train") + 1]
        assert files.setdefault((seed, percent), train) == train, row
    assert len(files) == 12
    for (seed, percent), train in files.items():
        part = json.loads(open(train).read())
        assert part["categories"] == whole["categories"]
        drawn[seed, percent] = ids = {image["id"] for image in part["images"]}
        expected = [each for each in whole["annotations"] if each["image_id"] in ids]
        assert [each["id"] for each in part["annotations"]] == [each["id"] for each in expected]
        assert load_dataset(dataset_name(train, data / "images")).annotated() == int(percent) / 5
    for seed in ("seed0", "seed1", "seed2"):
        assert drawn[seed, "5"] < drawn[seed, "10"] < drawn[seed, "50"] < labeled
        assert files[seed, "100"] == str(data / "train.json")
    assert len({frozenset(drawn[f"seed{seed}", "50"]) for seed in range(3)}) == 3

    again = LabelFractions(options(monkeypatch, *arguments))
    assert all(again.content(part, seed) == test.content(part, seed) for part in (5, 50) for seed in range(3))
    again.prepare()  # what is there is kept
    (test.folder / "seed1" / "10.json").write_text("{}")
    with pytest.raises(InputError, match="seed1/10.json was drawn from other annotations: move .*/out away"):
        again.prepare()


def test_commands_of_the_plan(arguments, weights, data, monkeypatch, tmp_path, capsys):
    arguments += ["--seeds", 2, "--weights", f"mine={weights}", "--rows", "mine", "random", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["label_fractions.py", *map(str, arguments), "--set", *SMALL])
    assert label_fractions.main() == 0
    assert not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "50 % of the labeled images: 10, 2 iterations of 2, 0.4 epochs"
    commands = [line.removeprefix("[to run] ") for line in lines[1:-1]]
    out = tmp_path / "out"
    assert commands == [
        f"tools/train_net.py --config-file {RECIPE} --resume --engine torchvision --num-gpus 1 "
        f"--train {out}/seed{seed}/50.json {data}/images --val {data}/val.json {data}/images "
        f"{shlex.join(SMALL)} MODEL.WEIGHTS {path} SEED {seed} OUTPUT_DIR {out}/seed{seed}/50/{row}"
        for seed in (0, 1)
        for row, path in (("random", "''"), ("mine", weights))
    ]
    assert lines[-1].startswith("4 of 4 to run, ")


def test_schedules_follow_the_number_of_images(arguments, monkeypatch):
    """As many epochs as COCO gets, and a thirtieth of its iterations at least."""
    arguments[arguments.index(RECIPE)] = "transfer/mask_rcnn_R50_FPN_1x.yaml"
    job = LabelFractions(options(monkeypatch, *arguments, "--rows", "random", "--fractions", 10, 100))
    assert [cfg.SOLVER.MAX_ITER for cfg in job.configs.values()] == [3000, 3000]
    assert job.config(11727).SOLVER.MAX_ITER == 9000  # a tenth of COCO
    assert job.hours(10) == pytest.approx(3000 * 0.345 * 8 / 3600)  # by Detectron2's model zoo


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", 0], "--seeds is 0: it must be at least 1"),
        (["--fractions", 0], "--fractions 0: it must be above 0, and 100 percent at most"),
        (["--fractions", 1, 5], "5 % of 20 labeled images are as many as a smaller fraction, 1: leave one"),
        (["--rows", "rsa"], "rsa needs --weights rsa=FILE, .*: there is no output/weights/rsa_r50.pkl"),
        (["--rows", "mine"], "the table has no row mine: choose from random, supervised, rsa"),
        (["--weights", "mine=absent.pkl"], "mine needs --weights mine=FILE, .*: there is no absent.pkl"),
        (["--weights", "random=a.pkl"], "--weights random=FILE: random cannot be the name of a row"),
        (["--weights", "../a=a.pkl"], "--weights ../a=FILE: ../a cannot be the name of a row"),
        (["--set", "SEED", 3], "--set SEED: give --seeds instead"),
        (["--set", "SOLVER.MAX_ITR", 3], "there is no key SOLVER.MAX_ITR: did you mean SOLVER.MAX_ITER"),
        (["--set", "SOLVER.MAX_ITER"], "but 'SOLVER.MAX_ITER' has no value"),
        (["--train", "a", "b"], "--data takes the place of --train and --val: leave these out"),
    ],
)
def test_wrong_options_are_one_line(arguments, words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        LabelFractions(options(monkeypatch, *arguments, *words))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_data_is_needed(arguments, weights, monkeypatch, tmp_path, tiny_coco):
    with pytest.raises(InputError, match="no data set: give --data FOLDER, or --train JSON IMAGES and --val"):
        LabelFractions(options(monkeypatch, *arguments[2:]))
    tiny_coco["annotations"] = []
    path = write_json(tiny_coco, tmp_path)
    with pytest.raises(InputError, match="a.json has no image with a usable annotation"):
        files = ["--train", path, tmp_path, "--val", path, tmp_path]
        LabelFractions(options(monkeypatch, *arguments[2:], *files))
    arguments[arguments.index(RECIPE)] = "transfer/mask_rcnn_R50_FPN_1x.yaml"
    with pytest.raises(InputError, match="mine.pkl was trained with MODEL.RESNETS.DEPTH 18 .it is 50"):
        LabelFractions(options(monkeypatch, *arguments, "--weights", f"mine={weights}"))


def test_weights_that_are_not_here_are_left_out(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    job = LabelFractions(options(monkeypatch, *arguments, "--fractions", 100))
    assert job.weights == {"random": ""}
    assert capsys.readouterr().out == (
        "left out: supervised needs --weights supervised=FILE, a file of tools/convert_to_d2.py\n"
        "left out: rsa needs --weights rsa=FILE, a file of tools/convert_to_d2.py\n"
    )


def test_runs_are_done_once_and_reported(arguments, weights, monkeypatch, capfd, tmp_path, forked_steps):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["label_fractions.py", *map(str, [*arguments, *words])])
        return label_fractions.main()

    arguments += ["--rows", "random", "mine", "--weights", f"mine={weights}", "--seeds", 1, "--fractions", 25]
    assert call("--set", *SMALL) == 0
    folder = tmp_path / "out"
    results = [
        json.loads((folder / f"seed0/25/{row}/results.json").read_text()) for row in ("random", "mine")
    ]
    assert [(run["weights"] or {}).get("method") for run in results] == [None, "rsa"]
    assert [run["data"]["images"] for run in results] == [5, 5]
    report = (folder / "report.md").read_text()
    assert "| 25 % (5), mine   | 1 " in report and (folder / "curve.png").is_file()
    capfd.readouterr()

    monkeypatch.setattr(_steps.subprocess, "Popen", lambda *_, **__: pytest.fail("ran again"))
    (folder / "report.md").unlink()
    assert call("--set", *SMALL) == 0
    assert capfd.readouterr().out.count("[done]") == 2 and (folder / "report.md").read_text() == report
    with pytest.raises(InputError, match="25/random holds another run .*; 2 iterations instead of 220"):
        call()
    with pytest.raises(InputError, match="25/mine holds another run .other weights"):
        (folder / "seed0/25/random/results.json").unlink()
        results[1]["weights"]["step"] = 8
        (folder / "seed0/25/mine/results.json").write_text(json.dumps(results[1]))
        call("--set", *SMALL)
    results[1]["weights"]["step"], results[1]["data"]["sha256"] = 7, ["0"]
    (folder / "seed0/25/mine/results.json").write_text(json.dumps(results[1]))
    with pytest.raises(InputError, match="25/mine holds another run .other images or annotations"):
        call("--set", *SMALL)


def planted(rng, seeds):
    """Results of a row's seeds with random figures."""
    return [
        {"ap": {task: {key: rng.uniform(0, 60) for _, key in AP.values()} for task in ("bbox", "segm")}}
        for _ in range(seeds)
    ]


def test_report_against_numpy(tmp_path):
    rng, images = np.random.default_rng(0), {1: 12, 10: 120, 100: 1203}
    results = {(row, fraction): planted(rng, 3) for fraction in images for row in ("random", "rsa")}
    text = write_report(tmp_path, results, images)
    lines = list(csv.DictReader(open(tmp_path / "table.csv")))
    assert [(line["row"], float(line["percent"]), int(line["images"])) for line in lines] == [
        (row, fraction, images[fraction]) for row, fraction in results
    ]
    for line, seeds in zip(lines, results.values()):
        for column in COLUMNS["ap"]:
            task, key = AP[column]
            values = [seed["ap"][task][key] for seed in seeds]
            assert float(line[column]) == pytest.approx(np.mean(values), rel=1e-12)
            assert float(line[f"{column} std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    values = [seed["ap"]["segm"]["AP75"] for seed in results["rsa", 10]]
    (line,) = [line for line in text.splitlines() if "10 % (120), rsa" in line]
    assert line.split("|")[-2].strip() == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert text in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_curve_shows_means_and_deviations(tmp_path, monkeypatch):
    """As drawn: a logarithmic axis of images, and bars of one deviation to each side."""
    figures = []
    monkeypatch.setattr(_fractions.Figure, "savefig", lambda figure, path: figures.append(figure))
    rng, images = np.random.default_rng(1), {10: 8, 100: 80}
    results = {(row, fraction): planted(rng, 2) for fraction in images for row in ("random", "rsa")}
    for seeds in results.values():
        for seed in seeds:  # a detector of boxes alone
            seed["ap"]["segm"] = dict.fromkeys(seed["ap"]["segm"])
    write_report(tmp_path, results, images)
    (ax,) = figures[0].axes
    assert ax.get_xscale() == "log" and list(ax.get_xticks()) == [8, 80]
    for bars, row in zip(ax.containers, ("random", "rsa")):
        (segments,) = (part.get_segments() for part in bars.lines[2])
        for fraction, (low, high) in zip(images, segments):
            values = [seed["ap"]["bbox"]["AP"] for seed in results[row, fraction]]
            assert (low[1] + high[1]) / 2 == pytest.approx(np.mean(values))
            assert (high[1] - low[1]) / 2 == pytest.approx(np.std(values, ddof=1))
            assert low[0] == pytest.approx(images[fraction], rel=0.05)
