"""The tools as a user runs them: the quick start, the default chain, and the errors of wrong arguments."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest
import yaml

from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.convert.writers import load_weights
from tests.conftest import ROOT, TINY, write_json


@pytest.mark.parametrize(
    "name, options", [("pretrain", ["--epochs", "3"]), ("train_net", ["--config-file", "a.yaml"])]
)
def test_overrides_may_stand_before_between_and_after_options(name, options, monkeypatch):
    tool = importlib.import_module(f"rsa_detectron2.tools.{name}")
    for words in (
        ["A", "1", *options, "B", "-2"],
        [*options, "A", "1", "B", "-2"],
        ["A", "1", "B", "-2", *options],
    ):
        monkeypatch.setattr(sys, "argv", [name, *words])
        args = tool.parse()
        assert args.overrides == ["A", "1", "B", "-2"]
        assert str(getattr(args, options[0].strip("-").replace("-", "_"))) == options[1]


def test_quickstart_fast(tool, tmp_path):
    """It runs with the engine that it chooses; each engine has its own tests."""
    engine = "detectron2" if importlib.util.find_spec("detectron2") else "torchvision"
    folder = tmp_path / "quick start"
    done = tool("quickstart", "--fast", "--seed", 3, "--output-dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"detection engine: {engine}" in done.stderr
    assert "Warning" not in done.stderr
    assert "| random |" in done.stdout and "| RSA    |" in done.stdout and "kNN top-1" in done.stdout
    written = {path.name for path in folder.iterdir()}
    assert {"report.md", "report.html", "table.csv"} <= written
    assert {"views.png", "neighbors.png", "curves.png", "detections.png"} <= written
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4 and "box AP75" in page and "mask AP75" in page
    runs = {
        name: json.loads((folder / engine / name / "results.json").read_text()) for name in ("random", "rsa")
    }
    assert runs["random"]["weights"] is None and runs["rsa"]["weights"]["method"] == "rsa"
    assert all(run["engine"] == engine and run["ap"]["bbox"]["AP"] is not None for run in runs.values())
    assert json.loads((folder / "pretrain" / "run.json").read_text())["settings"]["SEED"] == 3
    configs = [yaml.safe_load(run["config"]) for run in runs.values()]
    assert [config["SEED"] for config in configs] == [4, 4]
    for config in configs:
        del config["OUTPUT_DIR"], config["MODEL"]["WEIGHTS"]
    assert configs[0] == configs[1]

    model = folder / engine / "rsa" / "model_final.pth"
    judged = tool(
        "train_net",
        "--engine",
        engine,
        "--config-file",
        model.with_name("config.yaml"),
        "--eval-only",
        "MODEL.WEIGHTS",
        model,
        "OUTPUT_DIR",
        tmp_path / "judged",
    )
    assert judged.returncode == 0, judged.stderr[-3000:]
    results = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert results["ap"] == runs["rsa"]["ap"] and results["weights"] == runs["rsa"]["weights"]

    before = (folder / "pretrain" / "model_final.pth").stat().st_mtime_ns
    again = tool("quickstart", "--fast", "--seed", 3, "--output-dir", folder)
    assert again.returncode == 0 and (folder / "pretrain" / "model_final.pth").stat().st_mtime_ns == before


def test_defaults_chain(tool, tmp_path, image_folder, resnet50_checkpoint):
    """Each command without arguments finds what the command before it wrote."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "imagenet").symlink_to(image_folder.parent)
    done = tool("pretrain", *TINY, cwd=tmp_path)
    assert done.returncode == 0 and "recipe pretrain/imagenet_rsa_R50.yaml" in done.stdout, done.stderr
    refused = tool("convert_to_d2", cwd=tmp_path)  # it was a smaller network
    assert refused.returncode == 2 and "MODEL.BACKBONE test_resnet" in refused.stderr
    assert "next: tools/evaluate.py knn" in done.stdout
    judged = tool("evaluate", "knn", cwd=tmp_path)
    assert judged.returncode == 0 and 0 <= json.loads(judged.stdout)["knn_top1"] <= 100, judged.stderr
    linear = tool("evaluate", "linear", "--epochs", "2", cwd=tmp_path)
    assert linear.returncode == 0 and json.loads(linear.stdout)["protocol"] == "small", linear.stderr
    embedded = tool("embed", "--output", "features.npy", cwd=tmp_path)
    assert embedded.returncode == 0 and "features of 24 images" in embedded.stdout, embedded.stderr

    shutil.copy(resnet50_checkpoint, tmp_path / "output" / "pretrain" / "model_final.pth")
    converted = tool("convert_to_d2", cwd=tmp_path)
    assert converted.returncode == 0, converted.stderr
    for schedule in ("1x", "2x"):
        cfg = torchvision_defaults()
        cfg.merge_from_file(str(ROOT / "configs" / "transfer" / f"mask_rcnn_R50_FPN_{schedule}.yaml"))
        assert len(load_weights(tmp_path / cfg.MODEL.WEIGHTS)[0]) == 265


IMAGENET = ["--config-file", "pretrain/imagenet_rsa_R50.yaml"]


@pytest.mark.parametrize(
    "options, lr, epochs, told",
    [
        (["--epochs", 100], 0.9, 100, "published for 100 epochs (0.9 for 100, 0.6 for 200); SOLVER.BASE_LR"),
        (["SOLVER.EPOCHS", 100], 0.9, 100, "published for 100 epochs"),
        ([*IMAGENET, "--epochs", 100, "--batch-size", 2048], 0.9, 100, "published for 100 epochs"),
        (["--epochs", 200], 0.6, 200, ""),
        ([], 0.6, 200, ""),
        (["--epochs", 90], 0.9, 90, "for 90 epochs (0.9 for 100, 0.6 for 200): taking 0.9; SOLVER.BASE_LR"),
        ([*IMAGENET, "--epochs", 90, "SOLVER.BASE_LR", 0.7], 0.7, 90, ""),
        (["--epochs", 100, "SOLVER.BASE_LR", 0.6], 0.6, 100, ""),
        (["--config-file", "inherits.yaml"], 0.9, 100, "published for 100 epochs"),
        (["--config-file", "sets.yaml"], 0.6, 100, ""),
        (["--config-file", "inherits_sets.yaml", "SOLVER.EPOCHS", 100], 0.6, 100, ""),
    ],
)
def test_length_chooses_the_learning_rate(tool, tmp_path, options, lr, epochs, told):
    """On ImageNet-1K, unless the user sets it: as an override, or in a recipe."""
    base = f"_BASE_: {ROOT}/configs/pretrain/imagenet_rsa_R50.yaml\n"
    (tmp_path / "inherits.yaml").write_text(base + "SOLVER: {EPOCHS: 100}\n")
    (tmp_path / "sets.yaml").write_text(base + "SOLVER: {EPOCHS: 100, BASE_LR: 0.6}\n")
    (tmp_path / "inherits_sets.yaml").write_text("_BASE_: sets.yaml\n")
    done = tool("pretrain", *options, cwd=tmp_path)
    assert f": base lr {lr}, batch 2048, {epochs} epochs, lars" in done.stdout, done.stderr
    assert told in done.stdout and ("sets another" in done.stdout) == bool(told)


def test_commands_for_your_own_images(tmp_path, monkeypatch, image_folder, tiny_coco):
    """As docs/commands.md has them: the first gives a sound configuration, the third finds its data."""
    from rsa_detectron2.tools import pretrain, train_net
    from rsa_detectron2.tools._recipe import load_recipe

    text = (ROOT / "docs" / "commands.md").read_text().split("## Your own images\n")[1]
    first, second, third = re.findall(r"^    tools/(.*)", text, re.M)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").symlink_to(image_folder)
    for split in ("train", "valid"):
        (tmp_path / "export" / split).mkdir(parents=True)
        write_json(tiny_coco, tmp_path / "export" / split, "_annotations.coco.json")

    monkeypatch.setattr(sys, "argv", shlex.split(first))
    args, given = pretrain.parse(), []
    monkeypatch.setattr(pretrain, "load_recipe", lambda *words: given.append(words) or sys.exit())
    with pytest.raises(SystemExit):
        pretrain.main()
    cfg = load_recipe(*given[0])[0]
    assert args.data == cfg.DATA.PATH == "photographs" and not cfg.DATA.CLASSES
    solver = cfg.SOLVER
    assert (solver.BATCH_SIZE, solver.EPOCHS, solver.WARMUP_EPOCHS, solver.OPTIMIZER) == (256, 200, 0, "sgd")
    assert second == "convert_to_d2.py" and cfg.OUTPUT_DIR == "output/pretrain"
    cfg = torchvision_defaults()
    train_net.configure(cfg, train_net.parse(shlex.split(third)[1:]))
    assert cfg.SOLVER.MAX_ITER == 3000 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


def test_another_optimizer_keeps_its_learning_rate(tmp_path):
    """And the rate that is taken stands in the record of the run."""
    from rsa_detectron2.tools._recipe import load_recipe

    recipe = "pretrain/imagenet_rsa_R50.yaml"
    cfg, origin, note = load_recipe(recipe, ["SOLVER.EPOCHS", 100])
    assert cfg.SOLVER.BASE_LR == 0.9 and origin.overrides[-2:] == ("SOLVER.BASE_LR", 0.9) and note
    for overrides in (["SOLVER.OPTIMIZER", "sgd"], ["METHOD", "byol"], ["SOLVER.WEIGHT_DECAY", "1e-4"]):
        cfg, origin, note = load_recipe(recipe, ["SOLVER.EPOCHS", 100, *overrides])
        assert cfg.SOLVER.BASE_LR == 0.6 and not note and "SOLVER.BASE_LR" not in origin.overrides
    assert load_recipe("pretrain/imagenet100_rsa_R50.yaml", ["SOLVER.EPOCHS", 100])[0].SOLVER.BASE_LR == 0.2


COMMANDS = {
    "no data": (
        ["pretrain", "--epochs", "200"],
        "no image folder datasets/imagenet/train.*--data PATH.*quickstart.py",
    ),
    "no config": (["pretrain", "--config-file", "absent.yaml"], "no config file absent.yaml"),
    "wrong key": (["pretrain", "--epochs", "200", "SOLVER.BASE_LRR", "1"], "SOLVER.BASE_LRR"),
    "wrong seed": (["pretrain", "--seed", "-1"], "SEED is -1"),
    "no GPU": (
        ["pretrain", "--data", "IMAGES", "--num-processes", "0"],
        "--num-processes 0: it must be at least 1",
    ),
    "unwritable": (
        ["pretrain", "--data", "IMAGES", "--batch-size", "8", "--output-dir", "/proc/run"],
        "/proc/run",
    ),
    "wrong type": (["pretrain", "SOLVER.EPOCHS", "many"], "EPOCHS"),
    "wrong value": (
        ["pretrain", "SOLVER.OPTIMIZER", "adam"],
        "SOLVER.OPTIMIZER is 'adam': choose one of lars, sgd",
    ),
    "no value": (["pretrain", "SOLVER.EPOCHS"], "'SOLVER.EPOCHS' has no value"),
    "no recipe": (
        ["pretrain", "--method", "byol_aw"],
        "byol_aw has no ImageNet-1K recipe: give --config-file",
    ),
    "short": (["pretrain", "--epochs", "5"], "warm-up of 10 epochs"),
    "no backbone": (
        ["pretrain", "MODEL.BACKBONE", "resnet999", "--data", "none"],
        "resnet999' is not a model that timm knows",
    ),
    "micro-batch": (
        ["pretrain", "--data", "IMAGES", "--batch-size", "24", "--micro-batch", "5", "--amp", "off"],
        "5 does not divide the 24 images .* --micro-batch 4 or 6",
    ),
    "one image at a time": (
        ["pretrain", "--data", "IMAGES", "--batch-size", "8", "--micro-batch", "1"],
        "BatchNorm would see one image at a time",
    ),
    "views larger than what they are cut from": (
        ["pretrain", "DATA.IMAGE_SIZE", "320"],
        "DATA.EVAL_RESIZE is 256: .*320",
    ),
    "no checkpoint": (["convert_to_d2"], "no checkpoint output/pretrain/model_final.pth"),
    "no fine-tuning config": (
        ["train_net", "--config-file", "absent.yaml", "--engine", "torchvision"],
        "absent.yaml",
    ),
    "wrong detection key": (
        [
            "train_net",
            "--config-file",
            "transfer/mask_rcnn_R50_FPN_1x.yaml",
            "--engine",
            "torchvision",
            "MODEL.KEYPOINT_ON",
            "True",
        ],
        "MODEL.KEYPOINT_ON",
    ),
    "no period": (
        [
            *("train_net", "--config-file", "transfer/mask_rcnn_R50_FPN_1x.yaml"),
            *("--engine", "torchvision", "SOLVER.CHECKPOINT_PERIOD", "0"),
        ],
        "SOLVER.CHECKPOINT_PERIOD is 0: it must be at least 1",
    ),
    "no COCO": (
        ["train_net", "--config-file", "transfer/mask_rcnn_R50_FPN_1x.yaml", "--engine", "torchvision"],
        "datasets/coco/annotations",
    ),
    "train without val": (
        [
            *("train_net", "--config-file", "transfer/mask_rcnn_R50_FPN_1x.yaml"),
            *("--engine", "torchvision", "--train", "a.json", "images"),
        ],
        "evaluates on coco_2017_val, which is not here: with --train give --val too",
    ),
    "few images": (
        ["pretrain", "--data", "IMAGES"],
        "24 images, fewer than the global batch of 2048: lower it with --batch-size 16$",
    ),
    "no evaluation": (["evaluate", "knn", "absent.pth"], "no checkpoint absent.pth"),
    "no run": (["report", "absent"], "absent/results.json"),
}


@pytest.mark.parametrize("command, message", COMMANDS.values(), ids=COMMANDS)
def test_wrong_arguments_are_one_line(tool, tmp_path, image_folder, command, message):
    done = tool(*[image_folder if word == "IMAGES" else word for word in command], cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(message, lines[0]), done.stderr


def test_a_config_file_is_looked_up_before_detectron2_is_imported(monkeypatch):
    from rsa_detectron2.common.errors import InputError
    from rsa_detectron2.tools import train_net

    monkeypatch.setattr(train_net, "import_detectron2", lambda: pytest.fail("imported"))
    monkeypatch.setattr(sys, "argv", ["train_net", "--config-file", "absent.yaml"])
    with pytest.raises(InputError, match="no config file absent.yaml"):
        train_net.main()


def test_missing_detectron2_says_how_to_install_it(tool, tmp_path):
    """An import finder hides the package, as on a machine without it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'detectron2' else find(name, *a)\n"
    )
    command = [
        sys.executable,
        ROOT / "tools" / "train_net.py",
        "--config-file",
        "transfer/mask_rcnn_R50_FPN_1x.yaml",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "wheels.astral.sh" in done.stderr and "--engine torchvision" in done.stderr


def test_tools_run_as_programs():
    for path in (ROOT / "tools").glob("[a-z]*.py"):
        assert path.stat().st_mode & stat.S_IXUSR and path.read_text().startswith(
            "#!/usr/bin/env python3\n"
        ), path
