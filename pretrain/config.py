"""The configuration of a pre-training run. The defaults are the ImageNet-1K recipe at 200 epochs (paper, 4.1)."""

import os

import yaml
from fvcore.common.config import CfgNode as CN

from rsa_detectron2.common.errors import InputError

METHODS = ("rsa", "byol", "byol_aw", "simsiam", "simsiam_rsa", "simclr", "moco")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Keys that change how fast or where a run goes, not what it computes: they may differ when it is resumed.
# SOLVER.MICRO_BATCH does move BatchNorm's statistics, but must follow the GPUs at hand: the loop warns of it.
FREE_KEYS = (
    "OUTPUT_DIR",
    "DATA.NUM_WORKERS",
    "DATA.VAL",
    "DATA.MAX_BAD",
    "LOG_PERIOD",
    "CHECKPOINT.PERIOD",
    "CHECKPOINT.KEEP_PERIOD",
    "KNN.PERIOD",
    "KNN.BANK",
    "SOLVER.MICRO_BATCH",
    "ALARM.NONFINITE_STEPS",
    "ALARM.FEATURE_STD",
    "ALARM.COLLAPSE_STEPS",
)
DATA_KEYS = ("DATA.PATH", "DATA.CLASSES")  # may differ too where identity.py knows the images


def get_cfg():
    cfg = CN()
    cfg.METHOD = "rsa"  # one of METHODS
    cfg.SEED = 0
    cfg.OUTPUT_DIR = "output/pretrain"
    cfg.LOG_PERIOD = 10  # steps between two rows of metrics.jsonl

    cfg.DATA = CN()
    cfg.DATA.PATH = "datasets/imagenet/train"  # whatever pretrain/datasets.py knows; of a folder, the first-level folders are classes
    cfg.DATA.CLASSES = ""  # file with the class folders to keep, one a line; "" keeps all
    cfg.DATA.LIMIT = 0  # use at most so many images of each source, evenly spaced; 0: all
    cfg.DATA.VAL = ""  # labelled folder for kNN top-1; "" looks for val/ or test/ beside PATH
    cfg.DATA.IMAGE_SIZE = 224
    cfg.DATA.EVAL_RESIZE = 256  # short side before the centre crop of evaluation
    cfg.DATA.MEAN = IMAGENET_MEAN
    cfg.DATA.STD = IMAGENET_STD
    cfg.DATA.RANGE = ()  # (black, white): values of channels with more than 8 bits; (): the range of their format
    cfg.DATA.MAX_BAD = 0.001  # share of images that may be unreadable, 0 to 1; 5 always may, unless it is 0
    cfg.DATA.NUM_WORKERS = -1  # per process; -1: from the number of cores

    cfg.MODEL = CN()
    cfg.MODEL.BACKBONE = "resnet50"  # a timm ResNet
    cfg.MODEL.SMALL_STEM = False  # 3x3 stride-1 stem without max-pool, for images of 32 or 64 pixels
    cfg.MODEL.HIDDEN_DIM = 4096  # projector and predictor
    cfg.MODEL.OUT_DIM = 256  # of the projection
    cfg.MODEL.SYNC_BN = True  # with more than one GPU
    cfg.MODEL.BETA = 0.4  # beta_base, weight of the aggressive-aggressive part; rsa and simsiam_rsa
    cfg.MODEL.BETA_SCHEDULE = "cosine"  # cosine: from BETA down to 0; fixed: BETA throughout
    cfg.MODEL.TAU = 0.99  # tau_base of the target's EMA
    cfg.MODEL.TAU_SCHEDULE = "cosine"  # cosine: from TAU up to 1; fixed: TAU throughout, as in MoCo
    cfg.MODEL.TEMPERATURE = 0.2  # of the softmax over positives and negatives; simclr and moco
    cfg.MODEL.QUEUE = 65536  # keys of earlier steps that serve as negatives; moco

    cfg.SOLVER = CN()
    cfg.SOLVER.OPTIMIZER = "lars"  # lars or sgd
    cfg.SOLVER.BASE_LR = 0.6  # for a batch of 256; scaled linearly
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.WEIGHT_DECAY = 1e-6
    cfg.SOLVER.TRUST_COEFFICIENT = 0.001
    cfg.SOLVER.BATCH_SIZE = 2048  # global
    cfg.SOLVER.MICRO_BATCH = (
        0  # images of a process that go through at once; 0: as many as its free memory takes
    )
    cfg.SOLVER.EPOCHS = 200
    cfg.SOLVER.WARMUP_EPOCHS = 10
    cfg.SOLVER.AMP = "fp16"  # fp16, bf16 or off; on CPU fp16 becomes bf16
    cfg.SOLVER.COMPILE = False  # torch.compile the backbones
    cfg.SOLVER.DETERMINISTIC = (
        False  # on a GPU: only deterministic kernels, so that resuming is exact to the bit
    )

    cfg.CHECKPOINT = CN()
    cfg.CHECKPOINT.PERIOD = 1  # epochs between two writes of checkpoint_last.pth
    cfg.CHECKPOINT.KEEP_PERIOD = 50  # epochs between two checkpoint_<step>.pth; 0: none

    cfg.ALARM = CN()  # what stops a run that has failed, with its last good checkpoint kept
    cfg.ALARM.NONFINITE_STEPS = 5  # steps in a row with a loss of NaN or infinity
    cfg.ALARM.FEATURE_STD = 0.02  # features vary less than that (1: evenly spread) ...
    cfg.ALARM.COLLAPSE_STEPS = 1000  # ... for that many steps in a row: collapse

    cfg.KNN = CN()
    cfg.KNN.PERIOD = 10  # epochs between two kNN evaluations; always before the first step and at the end
    cfg.KNN.BANK = 100_000  # training images in the bank at most, evenly spaced; 0: all
    return cfg


def expand_paths(cfg):
    """Write the home folder for ``~`` in the keys that hold paths."""
    for section, key in (("DATA", "PATH"), ("DATA", "VAL"), ("DATA", "CLASSES"), ("", "OUTPUT_DIR")):
        node = cfg[section] if section else cfg
        node[key] = os.path.expanduser(node[key])


def check(cfg):
    """Refuse values that no run could use. Raises InputError naming the key and what it takes."""
    for key, value, choices in (
        ("METHOD", cfg.METHOD, METHODS),
        ("MODEL.BETA_SCHEDULE", cfg.MODEL.BETA_SCHEDULE, ("cosine", "fixed")),
        ("MODEL.TAU_SCHEDULE", cfg.MODEL.TAU_SCHEDULE, ("cosine", "fixed")),
        ("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, ("lars", "sgd")),
        ("SOLVER.AMP", cfg.SOLVER.AMP, ("fp16", "bf16", "off")),
    ):
        if value not in choices:
            raise InputError(f"{key} is {value!r}: choose one of {', '.join(choices)}")
    for key, value, least in (
        ("SOLVER.BATCH_SIZE", cfg.SOLVER.BATCH_SIZE, 1),
        ("SOLVER.EPOCHS", cfg.SOLVER.EPOCHS, 1),
        ("SOLVER.MICRO_BATCH", cfg.SOLVER.MICRO_BATCH, 0),
        ("DATA.IMAGE_SIZE", cfg.DATA.IMAGE_SIZE, 7),  # the blur reflects 6 pixels
        ("DATA.EVAL_RESIZE", cfg.DATA.EVAL_RESIZE, cfg.DATA.IMAGE_SIZE),
        ("LOG_PERIOD", cfg.LOG_PERIOD, 1),
        ("CHECKPOINT.PERIOD", cfg.CHECKPOINT.PERIOD, 1),
        ("CHECKPOINT.KEEP_PERIOD", cfg.CHECKPOINT.KEEP_PERIOD, 0),
        ("KNN.PERIOD", cfg.KNN.PERIOD, 0),
        ("KNN.BANK", cfg.KNN.BANK, 0),
        ("SOLVER.WARMUP_EPOCHS", cfg.SOLVER.WARMUP_EPOCHS, 0),
        ("SOLVER.WEIGHT_DECAY", cfg.SOLVER.WEIGHT_DECAY, 0),
        ("MODEL.HIDDEN_DIM", cfg.MODEL.HIDDEN_DIM, 1),
        ("MODEL.OUT_DIM", cfg.MODEL.OUT_DIM, 2),
        ("DATA.NUM_WORKERS", cfg.DATA.NUM_WORKERS, -1),
        ("DATA.LIMIT", cfg.DATA.LIMIT, 0),
        ("SEED", cfg.SEED, 0),
    ):
        if value < least:
            raise InputError(f"{key} is {value}: it must be at least {least}")
    for key, value in (
        ("MODEL.BETA", cfg.MODEL.BETA),
        ("MODEL.TAU", cfg.MODEL.TAU),
        ("DATA.MAX_BAD", cfg.DATA.MAX_BAD),
        ("SOLVER.MOMENTUM", cfg.SOLVER.MOMENTUM),
    ):
        if not 0 <= value <= 1:
            raise InputError(f"{key} is {value}: it must lie between 0 and 1")
    for key, value in (
        ("MODEL.TEMPERATURE", cfg.MODEL.TEMPERATURE),
        ("SOLVER.BASE_LR", cfg.SOLVER.BASE_LR),
        ("SOLVER.TRUST_COEFFICIENT", cfg.SOLVER.TRUST_COEFFICIENT),
    ):
        if not value > 0:
            raise InputError(f"{key} is {value}: it must be positive")
    for key, values, least in (("DATA.MEAN", cfg.DATA.MEAN, -1), ("DATA.STD", cfg.DATA.STD, 0)):
        if len(values) != 3 or not all(value > least for value in values):
            raise InputError(
                f"{key} is {tuple(values)}: it takes three numbers, of red, green and blue"
                + ", each above 0" * (least == 0)
            )
    if len(cfg.DATA.RANGE) not in (0, 2) or tuple(cfg.DATA.RANGE) != tuple(sorted(set(cfg.DATA.RANGE))):
        raise InputError(
            f"DATA.RANGE is {cfg.DATA.RANGE}: it takes the values that become black and white, as in "
            "(0, 4095), the smaller first, or ()"
        )
    if any("\udc80" <= letter <= "\udcff" for letter in cfg.OUTPUT_DIR):
        raise InputError(
            f"OUTPUT_DIR is {cfg.OUTPUT_DIR!a}: TensorBoard takes names in UTF-8 only, give another"
        )
    if cfg.METHOD == "moco" and cfg.MODEL.QUEUE < 2 * cfg.SOLVER.BATCH_SIZE:
        raise InputError(
            f"MODEL.QUEUE is {cfg.MODEL.QUEUE}: it must hold the {2 * cfg.SOLVER.BATCH_SIZE} keys of a "
            "step, two for each image of the global batch"
        )
    if cfg.SOLVER.WARMUP_EPOCHS >= cfg.SOLVER.EPOCHS:
        raise InputError(
            f"the warm-up of {cfg.SOLVER.WARMUP_EPOCHS} epochs leaves nothing of {cfg.SOLVER.EPOCHS}: "
            "shorten it with SOLVER.WARMUP_EPOCHS 0, or train longer"
        )


def differences(saved_yaml, cfg, source, free=FREE_KEYS):
    """A saved configuration (YAML text of ``source``) as {key: value}, and the keys on which ``cfg`` disagrees with it,
    as ``KEY: saved -> now``. Keys that it lacks had their default; ``free`` ones may differ."""
    try:
        saved = {**_flatten(get_cfg()), **_flatten(yaml.safe_load(saved_yaml))}
    except (yaml.YAMLError, AttributeError):
        raise InputError(
            f"{source} cannot be read as a configuration: restore it, or give another --output-dir"
        ) from None
    now = _flatten(cfg)
    return saved, [
        f"{key}: {saved.get(key)} -> {now.get(key)}"
        for key in sorted({*saved, *now})
        if key not in free and _plain(saved.get(key)) != _plain(now.get(key))
    ]


def _plain(value):
    return list(value) if isinstance(value, tuple) else value  # YAML has no tuples


def _flatten(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
