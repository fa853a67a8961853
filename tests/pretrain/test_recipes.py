"""What each row of the paper trains, against the settings of its section 4.1, 4.2 and 4.7, written down a
second time.

Where the paper is silent these are the authors' code's (stem, widths of the heads, BatchNorm over 64
images, warm-up, AMP) or, as the recipes say, the methods' own.
"""

import re

import pytest

from rsa_detectron2.pretrain.config import METHODS, check, get_cfg
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS as OBJECTIVES
from rsa_detectron2.transfer.report import paper
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "pretrain"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
OF_PAPER = [name for name in RECIPES if not name.startswith(("quickstart", "shapes"))]

# Table, row, data set, method; epochs, beta_base and its schedule; backbone, pixels; optimizer, base lr,
# weight decay, batch, epochs of warm-up; widths of the heads; tau; images under one BatchNorm on the
# paper's GPUs; AMP. MoCo on ImageNet-100 synchronizes its BatchNorm, in place of shuffled keys.
ROWS = """
table1   byol_aa      cifar10       byol         200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aa      cifar100      byol         200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aa      stl10         byol         200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aa      tinyimagenet  byol         200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aa      imagenet100   byol         100    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table1   byol_aw      cifar10       byol_aw      200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aw      cifar100      byol_aw      200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aw      stl10         byol_aw      200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aw      tinyimagenet  byol_aw      200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   byol_aw      imagenet100   byol_aw      100    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table1   rsa_fixed    cifar10       rsa          200  0.5 fixed   R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_fixed    cifar100      rsa          200  0.5 fixed   R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_fixed    stl10         rsa          200  0.5 fixed   R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_fixed    tinyimagenet  rsa          200  0.5 fixed   R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_fixed    imagenet100   rsa          100  0.5 fixed   R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table1   rsa_decay    cifar10       rsa          200  0.5 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_decay    cifar100      rsa          200  0.5 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_decay    stl10         rsa          200  0.5 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_decay    tinyimagenet  rsa          200  0.5 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table1   rsa_decay    imagenet100   rsa          100  0.5 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table2   simclr       cifar10       simclr       200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   simclr       cifar10       simclr       800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   simclr       cifar100      simclr       200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   simclr       cifar100      simclr       800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   simclr       stl10         simclr       200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   simclr       stl10         simclr       800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   simclr       tinyimagenet  simclr       200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   simclr       tinyimagenet  simclr       800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 -        256 off
table2   moco         cifar10       moco         200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   moco         cifar10       moco         800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   moco         cifar100      moco         200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   moco         cifar100      moco         800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   moco         stl10         moco         200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   moco         stl10         moco         800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   moco         tinyimagenet  moco         200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   moco         tinyimagenet  moco         800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99     256 off
table2   simsiam      cifar10       simsiam      200    - -       R18  32 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   simsiam      cifar10       simsiam      800    - -       R18  32 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   simsiam      cifar100      simsiam      200    - -       R18  32 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   simsiam      cifar100      simsiam      800    - -       R18  32 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   simsiam      stl10         simsiam      200    - -       R18  64 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   simsiam      stl10         simsiam      800    - -       R18  64 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   simsiam      tinyimagenet  simsiam      200    - -       R18  64 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   simsiam      tinyimagenet  simsiam      800    - -       R18  64 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table2   byol         cifar10       byol         200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   byol         cifar10       byol         800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   byol         cifar100      byol         200    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   byol         cifar100      byol         800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   byol         stl10         byol         200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   byol         stl10         byol         800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   byol         tinyimagenet  byol         200    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   byol         tinyimagenet  byol         800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          cifar10       rsa          200  0.3 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          cifar10       rsa          800  0.3 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          cifar100      rsa          200  0.3 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          cifar100      rsa          800  0.3 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          stl10         rsa          200  0.4 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          stl10         rsa          800  0.4 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          tinyimagenet  rsa          200  0.4 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table2   rsa          tinyimagenet  rsa          800  0.4 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table3   simclr       imagenet100   simclr       100    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 -         64 fp16
table3   simclr       imagenet100   simclr       200    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 -         64 fp16
table3   moco         imagenet100   moco         100    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99     256 fp16
table3   moco         imagenet100   moco         200    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99     256 fp16
table3   simsiam      imagenet100   simsiam      100    - -       R50 224 sgd  0.2 1e-4  256  0 2048 2048 -         64 fp16
table3   simsiam      imagenet100   simsiam      200    - -       R50 224 sgd  0.2 1e-4  256  0 2048 2048 -         64 fp16
table3   byol         imagenet100   byol         100    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table3   byol         imagenet100   byol         200    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table3   rsa          imagenet100   rsa          100  0.4 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table3   rsa          imagenet100   rsa          200  0.4 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table4   rsa_100      imagenet      rsa          100  0.4 cosine  R50 224 lars 0.9 1e-6 2048 10 4096  256 0.99>1  2048 fp16
table4   rsa_200      imagenet      rsa          200  0.4 cosine  R50 224 lars 0.6 1e-6 2048 10 4096  256 0.99>1  2048 fp16
table7   byol         cifar100      byol         800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table7   byol         stl10         byol         800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table7   byol         imagenet100   byol         200    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table7   rsa          cifar100      rsa          800  0.3 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table7   rsa          stl10         rsa          800  0.4 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
table7   rsa          imagenet100   rsa          200  0.4 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
table8   simsiam      cifar100      simsiam      200    - -       R18  32 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table8   simsiam      stl10         simsiam      200    - -       R18  64 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table8   simsiam      imagenet100   simsiam      200    - -       R50 224 sgd  0.2 1e-4  256  0 2048 2048 -         64 fp16
table8   simsiam_rsa  cifar100      simsiam_rsa  200  0.3 cosine  R18  32 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table8   simsiam_rsa  stl10         simsiam_rsa  200  0.4 cosine  R18  64 sgd  0.1 5e-4  256  0 2048 2048 -        256 off
table8   simsiam_rsa  imagenet100   simsiam_rsa  200  0.4 cosine  R50 224 sgd  0.2 1e-4  256  0 2048 2048 -         64 fp16
figure3  byol         cifar100      byol         800    - -       R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  byol         stl10         byol         800    - -       R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  byol         imagenet100   byol         100    - -       R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
figure3  beta_0.0     cifar100      rsa          800  0.0 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.0     stl10         rsa          800  0.0 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.0     imagenet100   rsa          100  0.0 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
figure3  beta_0.1     cifar100      rsa          800  0.1 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.1     stl10         rsa          800  0.1 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.1     imagenet100   rsa          100  0.1 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
figure3  beta_0.2     cifar100      rsa          800  0.2 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.2     stl10         rsa          800  0.2 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.2     imagenet100   rsa          100  0.2 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
figure3  beta_0.3     cifar100      rsa          800  0.3 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.3     stl10         rsa          800  0.3 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.3     imagenet100   rsa          100  0.3 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
figure3  beta_0.4     cifar100      rsa          800  0.4 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.4     stl10         rsa          800  0.4 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.4     imagenet100   rsa          100  0.4 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
figure3  beta_0.5     cifar100      rsa          800  0.5 cosine  R18  32 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.5     stl10         rsa          800  0.5 cosine  R18  64 sgd  0.1 5e-4  256  0 1024  128 0.99>1   256 off
figure3  beta_0.5     imagenet100   rsa          100  0.5 cosine  R50 224 sgd  0.2 1e-4  256  0 4096  256 0.99>1    64 fp16
""".strip().splitlines()
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
GPUS = {
    "cifar10": 1,
    "cifar100": 1,
    "stl10": 1,
    "tinyimagenet": 1,
    "imagenet100": 4,
    "imagenet": 8,
}  # the paper's


def resolve(training):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / training.recipe))
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


def test_every_row_is_in_the_table_above():
    cells = [
        cell
        for table, content in paper.load()["tables"].items()
        if content["shows"] in ("top1", "hours")
        for cell in paper.cells(table)
        if cell.training
    ]
    assert len(ROWS) == len(cells)


def test_one_recipe_for_each_data_set_and_method():
    used = {
        cell.training.recipe
        for table, content in paper.load()["tables"].items()
        if content["shows"] in ("top1", "hours")
        for cell in paper.cells(table)
        if cell.training
    }
    assert used == {f"pretrain/{name}.yaml" for name in OF_PAPER}
    files = [path for path in FOLDER.rglob("*") if path.suffix == ".yaml"]
    assert len(files) == len(RECIPES)  # none in folders below, which --config-file would take as well


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
            lines.append(
                f"#   {label:<10} {table}, {row}, {cell.training.settings['SOLVER.EPOCHS']} epochs: {figure}\n"
            )
            label = ""
    return "".join(lines)


@pytest.mark.parametrize("name", RECIPES)
def test_header_is_a_command_that_takes_this_file(name):
    text = re.match(r"(#.*\n)+", (FOLDER / f"{name}.yaml").read_text()).group()
    cfg = get_cfg()
    cfg.merge_from_file(str(FOLDER / f"{name}.yaml"))
    check(cfg)
    if name.startswith("quickstart"):
        assert "command    tools/quickstart.py\n" in text
        return
    assert f"#   command    tools/pretrain.py --config-file pretrain/{name}.yaml\n" in text
    assert re.search(r"^#   data       \S", text, re.M)
    assert name not in OF_PAPER or header(f"pretrain/{name}.yaml") in text


@pytest.mark.parametrize(
    "name",
    [f"cifar100_{method}_R18" for method in METHODS] + [f"imagenet100_{method}_R50" for method in METHODS],
)
def test_networks_of_each_backbone_and_method(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(FOLDER / f"{name}.yaml"))
    cfg.merge_from_list(["MODEL.HIDDEN_DIM", 16, "MODEL.OUT_DIM", 8, "MODEL.QUEUE", 32])
    networks = build_networks(cfg, OBJECTIVES[cfg.METHOD])
    assert networks.online.backbone.num_features == (512 if "R18" in name else 2048)
    assert networks.online.backbone.conv1.stride == ((1, 1) if "R18" in name else (2, 2))
    assert (
        networks.objective is OBJECTIVES[cfg.METHOD].objective
        and networks.temperature == cfg.MODEL.TEMPERATURE
    )
