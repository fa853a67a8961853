"""The settings of each row of the paper, compared with a second transcript of its sections 4.1, 4.2 and 4.7.

Where the paper is silent, they come from the authors' code (stem, widths of the heads, BatchNorm over 64
images, warm-up, AMP) or, as the recipes say, from the methods' own papers.
"""

import re
from pathlib import Path

import pytest

from rsa_detectron2.pretrain.config import METHODS, check, get_cfg
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS as OBJECTIVES
from rsa_detectron2.transfer.report import paper
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "pretrain"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Those that a row of configs/paper.yaml trains.
OF_PAPER = {
    Path(cell.training.recipe).stem
    for table, content in paper.load()["tables"].items()
    if content["shows"] in ("top1", "hours")
    for cell in paper.cells(table)
    if cell.training
}

# One line per row of the paper's tables; the file's head names the columns.
LINES = (ROOT / "tests" / "data" / "paper_rows.txt").read_text().splitlines()
ROWS = [line for line in LINES if not line.startswith("#")]
COLUMNS = (
    "METHOD",
    "SOLVER.EPOCHS",
    "MODEL.BETA",
    "MODEL.BETA_SCHEDULE",
    "MODEL.BACKBONE",
    "DATA.IMAGE_SIZE",
    "SOLVER.OPTIMIZER",
    "SOLVER.BASE_LR",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.BATCH_SIZE",
    "SOLVER.WARMUP_EPOCHS",
    "MODEL.HIDDEN_DIM",
    "MODEL.OUT_DIM",
    "tau",
    "bn",
    "SOLVER.AMP",
)
# The paper's.
GPUS = {"cifar10": 1, "cifar100": 1, "stl10": 1, "tinyimagenet": 1, "imagenet100": 4, "imagenet": 8}


def load(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(FOLDER / f"{name}.yaml"))
    return cfg


def resolve(training):
    cfg = load(Path(training.recipe).stem)
    cfg.merge_from_list([item for pair in training.overrides for item in pair])
    check(cfg)
    return cfg


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("line", ROWS, ids=lambda line: "-".join(line.split()[:3] + line.split()[4:5]))
def test_settings_of_each_row(line):
    table, row, dataset, *expected = line.split()
    [training] = {
        cell.training
        for cell in paper.cells(table)
        if cell.row == row
        and cell.training
        and cell.training.dataset == dataset
        and cell.training.settings["SOLVER.EPOCHS"] == int(expected[1])
    }
    cfg = resolve(training)
    tau = "-"
    if OBJECTIVES[cfg.METHOD].target:
        tau = f"{cfg.MODEL.TAU:g}" + ">1" * (cfg.MODEL.TAU_SCHEDULE == "cosine")
    assert training.bn == int(expected[-2])
    size = cfg.SOLVER.BATCH_SIZE // GPUS[dataset]
    bn = cfg.SOLVER.BATCH_SIZE if cfg.MODEL.SYNC_BN else min(cfg.SOLVER.MICRO_BATCH or size, size)
    found = {key: value(cfg, key) for key in COLUMNS if key not in ("tau", "bn")} | {"tau": tau, "bn": bn}
    wanted = dict(zip(COLUMNS, expected))
    if wanted["MODEL.BETA"] == "-":  # the method has no beta
        del wanted["MODEL.BETA"], wanted["MODEL.BETA_SCHEDULE"]
    wanted["MODEL.BACKBONE"] = {"R18": "resnet18", "R50": "resnet50"}[wanted["MODEL.BACKBONE"]]
    assert {key: type(found[key])(text) for key, text in wanted.items()} == {
        key: found[key] for key in wanted
    }
    assert cfg.MODEL.SMALL_STEM == (cfg.MODEL.BACKBONE == "resnet18") and cfg.SOLVER.MOMENTUM == 0.9
    assert OBJECTIVES[cfg.METHOD].fix_predictor_lr == cfg.METHOD.startswith("simsiam")


def test_every_row_is_in_the_file():
    cells = [
        cell
        for table, content in paper.load()["tables"].items()
        if content["shows"] in ("top1", "hours")
        for cell in paper.cells(table)
        if cell.training
    ]
    assert len(ROWS) == len(cells)


def test_each_row_of_the_paper_has_its_recipe():
    assert set(RECIPES) >= OF_PAPER
    files = [path for path in FOLDER.rglob("*") if path.suffix == ".yaml"]
    assert len(files) == len(RECIPES)  # no recipe in a folder below, which --config-file would also accept


def header(recipe):
    """The lines of a recipe's header that repeat what configs/paper.yaml says."""
    cells = [
        cell
        for table, content in paper.load()["tables"].items()
        if content["shows"] == "top1"
        for cell in paper.cells(table)
        if cell.training and cell.training.recipe == recipe
    ]
    hours = {cell.training.settings["SOLVER.EPOCHS"]: cell.training.hours for cell in cells}
    cost = ", ".join(f"{hours[epochs]:.3g} for {epochs} epochs" for epochs in sorted(hours))
    lines = [f"#   cost       V100-hours by the paper's Table 7: {cost}\n"]
    label = "published"
    for cell in cells:
        if cell.published[0]:
            mean, std = cell.published[0]
            row = paper.load()["tables"][cell.table]["rows"][cell.row]["title"]
            figure = f"{mean}" if std is None else f"{mean} ± {std}"
            table = re.sub(r"(\D+)", r"\1 ", cell.table.capitalize())
            epochs = cell.training.settings["SOLVER.EPOCHS"]
            lines.append(f"#   {label:<10} {table}, {row}, {epochs} epochs: {figure}\n")
            label = ""
    return "".join(lines)


@pytest.mark.parametrize("name", RECIPES)
def test_header_is_a_command_that_takes_this_file(name):
    text = re.match(r"(#.*\n)+", (FOLDER / f"{name}.yaml").read_text()).group()
    check(load(name))
    if name.startswith("quickstart"):
        assert "command    tools/quickstart.py\n" in text
        return
    assert f"#   command    tools/pretrain.py --config-file pretrain/{name}.yaml\n" in text
    assert re.search(r"^#   data       \S", text, re.M)
    assert name not in OF_PAPER or header(f"pretrain/{name}.yaml") in text


# A recipe of each method with each of its backbones.
BUILT = {(cfg.METHOD, cfg.MODEL.BACKBONE): name for name, cfg in zip(RECIPES, map(load, RECIPES))}


def test_each_method_has_a_recipe():
    assert {method for method, _ in BUILT} == set(METHODS)


@pytest.mark.parametrize("name", BUILT.values())
def test_networks_of_each_backbone_and_method(name):
    cfg = load(name)
    cfg.merge_from_list(["MODEL.HIDDEN_DIM", 16, "MODEL.OUT_DIM", 8, "MODEL.QUEUE", 32])
    networks = build_networks(cfg, OBJECTIVES[cfg.METHOD])
    assert networks.online.backbone.num_features == (512 if "R18" in name else 2048)
    assert networks.online.backbone.conv1.stride == ((1, 1) if "R18" in name else (2, 2))
    assert (
        networks.objective is OBJECTIVES[cfg.METHOD].objective
        and networks.temperature == cfg.MODEL.TEMPERATURE
    )
