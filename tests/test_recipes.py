"""Each file of configs/pretrain against the table of settings in the design, written down here a second time."""

import re

import pytest
import yaml

from pretrain.config import METHODS, check, get_cfg
from pretrain.networks import build_networks
from pretrain.objectives import METHODS as OBJECTIVES
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "pretrain"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAPER = [name for name in RECIPES if not name.startswith(("quickstart", "shapes"))]
CIFAR = {"DATA.IMAGE_SIZE": 32, "DATA.EVAL_RESIZE": 32, "DATA.MEAN": (0.4914, 0.4822, 0.4465),
         "DATA.STD": (0.2023, 0.1994, 0.2010)}
SMALL = {"MODEL.BACKBONE": "resnet18", "MODEL.SMALL_STEM": True, "SOLVER.OPTIMIZER": "sgd", "SOLVER.MOMENTUM": 0.9,
         "SOLVER.WEIGHT_DECAY": 5e-4, "SOLVER.BATCH_SIZE": 256, "SOLVER.WARMUP_EPOCHS": 0, "SOLVER.AMP": "off"}
LARGE = {"DATA.IMAGE_SIZE": 224, "DATA.EVAL_RESIZE": 256, "DATA.MEAN": (0.485, 0.456, 0.406),
         "DATA.STD": (0.229, 0.224, 0.225), "MODEL.BACKBONE": "resnet50", "MODEL.SMALL_STEM": False,
         "SOLVER.MOMENTUM": 0.9, "SOLVER.AMP": "fp16"}
# What holds for a data set whatever the method.
DATASETS = {
    "cifar10": {**SMALL, **CIFAR, "DATA.PATH": "datasets/cifar10"},
    "cifar100": {**SMALL, **CIFAR, "DATA.PATH": "datasets/cifar100"},
    "stl10": {**SMALL, "DATA.PATH": "datasets/stl10", "DATA.IMAGE_SIZE": 64, "DATA.EVAL_RESIZE": 96,
              "DATA.MEAN": (0.4408, 0.4279, 0.3867), "DATA.STD": (0.2682, 0.2610, 0.2686)},
    "tinyimagenet": {**SMALL, "DATA.PATH": "datasets/tiny-imagenet-200", "DATA.IMAGE_SIZE": 64, "DATA.EVAL_RESIZE": 64,
                     "DATA.MEAN": (0.4802, 0.4481, 0.3975), "DATA.STD": (0.2302, 0.2265, 0.2262)},
    "imagenet100": {**LARGE, "DATA.PATH": "datasets/imagenet/train", "DATA.CLASSES": "pretrain/imagenet100_classes.txt",
                    "SOLVER.OPTIMIZER": "sgd", "SOLVER.WEIGHT_DECAY": 1e-4, "SOLVER.BATCH_SIZE": 256,
                    "SOLVER.WARMUP_EPOCHS": 0},
    "imagenet": {**LARGE, "DATA.PATH": "datasets/imagenet/train", "DATA.CLASSES": ""},
}
# RSA's and BYOL's.
BYOL_18 = {"MODEL.HIDDEN_DIM": 1024, "MODEL.OUT_DIM": 128, "MODEL.TAU": 0.99, "MODEL.TAU_SCHEDULE": "cosine",
           "SOLVER.BASE_LR": 0.1}
BYOL_50 = {**BYOL_18, "MODEL.HIDDEN_DIM": 4096, "MODEL.OUT_DIM": 256}
LARS = {**BYOL_50, "SOLVER.OPTIMIZER": "lars", "SOLVER.TRUST_COEFFICIENT": 0.001, "SOLVER.WEIGHT_DECAY": 1e-6,
        "SOLVER.BATCH_SIZE": 2048, "SOLVER.WARMUP_EPOCHS": 10, "MODEL.SYNC_BN": True}
RSA = {"cifar10": BYOL_18, "cifar100": BYOL_18, "stl10": BYOL_18, "tinyimagenet": BYOL_18,
       "imagenet100": {**BYOL_50, "SOLVER.BASE_LR": 0.2, "MODEL.SYNC_BN": False},
       "imagenet": {**LARS, "SOLVER.BASE_LR": 0.6}}
BETA = {"cifar10": 0.3, "cifar100": 0.3, "stl10": 0.4, "tinyimagenet": 0.4, "imagenet100": 0.4, "imagenet": 0.4}
# The others' own: R-18 on the small sets, R-50 on the large ones.
BASELINES = {
    ("simsiam", 18): {"MODEL.HIDDEN_DIM": 2048, "MODEL.OUT_DIM": 2048, "SOLVER.BASE_LR": 0.03},
    ("simsiam", 50): {"MODEL.HIDDEN_DIM": 2048, "MODEL.OUT_DIM": 2048, "SOLVER.BASE_LR": 0.05, "MODEL.SYNC_BN": True,
                      "SOLVER.OPTIMIZER": "sgd", "SOLVER.WEIGHT_DECAY": 1e-4, "SOLVER.WARMUP_EPOCHS": 0},
    ("simclr", 18): {"MODEL.HIDDEN_DIM": 512, "MODEL.OUT_DIM": 128, "SOLVER.BASE_LR": 0.1, "MODEL.TEMPERATURE": 0.5},
    ("simclr", 50): {"MODEL.HIDDEN_DIM": 2048, "MODEL.OUT_DIM": 128, "MODEL.TEMPERATURE": 0.1, "MODEL.SYNC_BN": True},
    ("moco", 18): {"MODEL.HIDDEN_DIM": 512, "MODEL.OUT_DIM": 128, "SOLVER.BASE_LR": 0.03, "MODEL.TEMPERATURE": 0.1,
                   "MODEL.QUEUE": 4096, "MODEL.TAU": 0.99, "MODEL.TAU_SCHEDULE": "fixed"},
    ("moco", 50): {"MODEL.HIDDEN_DIM": 2048, "MODEL.OUT_DIM": 128, "SOLVER.BASE_LR": 0.03, "MODEL.TEMPERATURE": 0.2,
                   "MODEL.QUEUE": 65536, "MODEL.TAU": 0.999, "MODEL.TAU_SCHEDULE": "fixed", "MODEL.SYNC_BN": True,
                   "SOLVER.OPTIMIZER": "sgd", "SOLVER.WEIGHT_DECAY": 1e-4, "SOLVER.WARMUP_EPOCHS": 0},
}
IMAGENET = {"simsiam": {"SOLVER.BATCH_SIZE": 512}, "moco": {"SOLVER.BATCH_SIZE": 256},
            "simclr": {"SOLVER.BATCH_SIZE": 4096, "SOLVER.BASE_LR": 0.3, "SOLVER.OPTIMIZER": "lars",
                       "SOLVER.WEIGHT_DECAY": 1e-6, "SOLVER.WARMUP_EPOCHS": 10}}
VARIANTS = {"rsa_fixed_beta": ("rsa", {"MODEL.BETA_SCHEDULE": "fixed"}), "rsa_beta_0": ("rsa", {"MODEL.BETA": 0.0})}


def read(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(FOLDER / f"{name}.yaml"))
    return cfg


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def expected(name):
    """{key: value} of a recipe's name: <data set>_<method or variant>_R<depth>[_<epochs>ep]."""
    dataset, variant, depth, epochs = re.fullmatch(r"([a-z]+\d*)_(\w+?)_R(18|50)(?:_(\d+)ep)?", name).groups()
    method, change = VARIANTS.get(variant, (variant, {}))
    settings = {**DATASETS[dataset], "METHOD": method, "SOLVER.EPOCHS": int(epochs or 200), "SEED": 0,
                "OUTPUT_DIR": "output/pretrain" if name.startswith("imagenet_rsa") else f"output/{name}"}
    if method in ("rsa", "simsiam_rsa"):
        settings |= {"MODEL.BETA": BETA[dataset], "MODEL.BETA_SCHEDULE": "cosine"}
    if method in ("rsa", "byol", "byol_aw"):
        settings |= RSA[dataset]
        settings |= {"SOLVER.BASE_LR": 0.9} if epochs == "100" else {}
    else:
        own = method.removesuffix("_rsa")
        settings |= BASELINES[own, int(depth)]
        settings |= IMAGENET[own] if dataset == "imagenet" else {}
    return settings | change


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_those_of_the_table(name):
    cfg = read(name)
    check(cfg)
    found = {key: value(cfg, key) for key in expected(name)}
    assert found == expected(name)


@pytest.mark.parametrize("name", RECIPES)
def test_header_is_a_command_that_takes_this_file(name):
    header = re.match(r"(#.*\n)+", (FOLDER / f"{name}.yaml").read_text()).group()
    check(read(name))
    if name.startswith("quickstart"):
        assert "command    tools/quickstart.py\n" in header
        return
    assert f"#   command    tools/pretrain.py --config-file pretrain/{name}.yaml\n" in header
    assert re.search(r"^#   cost       \S", header, re.M) and re.search(r"^#   data       \S", header, re.M)


def test_every_row_of_the_tables_has_a_recipe():
    rows = [(dataset, method) for dataset in DATASETS for method in ("rsa", "byol", "simsiam", "simclr", "moco")]
    rows += [(dataset, method) for dataset in ("cifar10", "imagenet100")
             for method in ("rsa_fixed_beta", "rsa_beta_0", "byol_aw", "simsiam_rsa")]
    suffix = {"imagenet100": "_R50", "imagenet": "_R50_200ep"}
    names = {f"{dataset}_{method}{suffix.get(dataset, '_R18')}" for dataset, method in rows}
    assert names | {"imagenet_rsa_R50_100ep", "imagenet_byol_R50_100ep"} == set(PAPER)


def test_inherited_files_hold_no_keys_that_are_unknown():
    """The parts that recipes inherit are merged over the defaults by themselves, too."""
    for path in (FOLDER / "methods").glob("*.yaml"):
        get_cfg().merge_from_file(str(path))
        assert yaml.safe_load(path.read_text())["METHOD"] in METHODS and path.read_text().startswith("# ")


@pytest.mark.parametrize("name", [f"cifar10_{method}_R18" for method in METHODS]
                         + [f"imagenet100_{method}_R50" for method in METHODS])
def test_networks_of_each_backbone_and_method(name):
    cfg = read(name)
    cfg.merge_from_list(["MODEL.HIDDEN_DIM", 16, "MODEL.OUT_DIM", 8, "MODEL.QUEUE", 32])
    networks = build_networks(cfg, OBJECTIVES[cfg.METHOD])
    assert networks.online.backbone.num_features == (512 if "R18" in name else 2048)
    assert networks.online.backbone.conv1.stride == ((1, 1) if "R18" in name else (2, 2))
    assert networks.objective is OBJECTIVES[cfg.METHOD].objective and networks.temperature == cfg.MODEL.TEMPERATURE
