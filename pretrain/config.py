"""The configuration of a pre-training run: its keys, their defaults and the values that they take.

The defaults are the ImageNet-1K recipe at 200 epochs (paper, 4.1).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from fvcore.common.config import CfgNode as CN

from rsa_detectron2.common import loggers
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.record import flatten

# A new method takes a name here, a row of objectives.METHODS and a recipe in configs/pretrain.
METHODS = ("rsa", "byol", "byol_aw", "simsiam", "simsiam_rsa", "simclr", "moco")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# A rule takes a value and returns what is wrong with it; "" where it is right.
Rule = Callable[[Any], str]


def one_of(*choices: str) -> Rule:
    return lambda value: "" if value in choices else f"choose one of {', '.join(choices)}"


def at_least(least: int) -> Rule:
    return lambda value: "" if value >= least else f"it must be at least {least}"


def fraction(value: float) -> str:
    return "" if 0 <= value <= 1 else "it must lie between 0 and 1"


def positive(value: float) -> str:
    return "" if value > 0 else "it must be positive"


OF_RGB = "of red, green and blue: divide those of 0 to 255 by 255"


def mean_of_rgb(values: Sequence[float]) -> str:
    if len(values) == 3 and all(0 <= value <= 1 for value in values):
        return ""
    return f"it takes three numbers from 0 to 1, {OF_RGB}"


def std_of_rgb(values: Sequence[float]) -> str:
    if len(values) == 3 and all(0 < value <= 1 for value in values):
        return ""
    return f"it takes three numbers above 0, up to 1, {OF_RGB}"


def black_and_white(values: Sequence[float]) -> str:
    if len(values) == 0 or (len(values) == 2 and values[0] < values[1]):
        return ""
    return "it takes the values that become black and white, as in (0, 4095), the smaller first, or ()"


def images_to_compare(value: int) -> str:
    return "" if value in (-1, 0) or value >= 2 else "it takes two or more, 0 for none, or -1 to choose"


def utf8(path: str) -> str:
    if any("\udc80" <= letter <= "\udcff" for letter in path):
        return "TensorBoard takes names in UTF-8 only, give another"
    return ""


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    ``free``: it may differ when a run is resumed, because it changes how fast or where the run computes,
    not what.
    """

    name: str
    default: Any
    rule: Rule | None = None
    free: bool = False


KEYS = (
    Key("METHOD", "rsa", one_of(*METHODS)),
    Key("SEED", 0, at_least(0)),
    Key("OUTPUT_DIR", "output/pretrain", utf8, free=True),
    # Steps between two rows of metrics.jsonl.
    Key("LOG_PERIOD", 10, at_least(1), free=True),
    # Where these rows go as well: "tensorboard", "wandb".
    Key("LOGGERS", ("tensorboard",), loggers.problem, free=True),
    #
    # Whatever data/datasets.py can open. In a folder, the first-level folders are the classes.
    Key("DATA.PATH", "datasets/imagenet/train"),
    # File with the class folders to keep, one per line. "": all.
    Key("DATA.CLASSES", ""),
    # At most so many images of each source, evenly spaced. 0: all.
    Key("DATA.LIMIT", 0, at_least(0)),
    # Labeled folder for kNN top-1. "": look for val/ or test/ beside DATA.PATH.
    Key("DATA.VAL", "", free=True),
    # In pixels. At least 7, because the blur reflects 6 pixels at the border.
    Key("DATA.IMAGE_SIZE", 224, at_least(7)),
    # Short side in pixels before the center crop of evaluation; at least IMAGE_SIZE.
    Key("DATA.EVAL_RESIZE", 256),
    Key("DATA.MEAN", IMAGENET_MEAN, mean_of_rgb),
    Key("DATA.STD", IMAGENET_STD, std_of_rgb),
    # (black, white) of channels with more than 8 bits. (): the range of their format.
    Key("DATA.RANGE", (), black_and_white),
    # Decode large JPEGs at 1/2, 1/4 or 1/8, where the crops keep enough pixels (data/reduced.py).
    Key("DATA.REDUCED_DECODE", True),
    # Fraction of images that may be unreadable. Five always may, unless it is 0.
    Key("DATA.MAX_BAD", 0.001, fraction, free=True),
    # Per process. -1: from the number of cores.
    Key("DATA.NUM_WORKERS", -1, at_least(-1), free=True),
    #
    # A timm ResNet.
    Key("MODEL.BACKBONE", "resnet50"),
    # 3x3 stride-1 stem without max-pool, for images of 32 or 64 pixels.
    Key("MODEL.SMALL_STEM", False),
    # Checkpoint whose backbone the run starts from, online and target alike. "": random weights.
    Key("MODEL.INIT", ""),
    # Width of the hidden layers of projector and predictor.
    Key("MODEL.HIDDEN_DIM", 4096, at_least(1)),
    # Width of the projection.
    Key("MODEL.OUT_DIM", 256, at_least(2)),
    # Synchronize BatchNorm over the GPUs, where there are several.
    Key("MODEL.SYNC_BN", True),
    # beta_base, the weight of the aggressive-aggressive part; rsa and simsiam_rsa.
    Key("MODEL.BETA", 0.4, fraction),
    # cosine: from BETA down to 0. fixed: BETA throughout.
    Key("MODEL.BETA_SCHEDULE", "cosine", one_of("cosine", "fixed")),
    # tau_base of the target's EMA.
    Key("MODEL.TAU", 0.99, fraction),
    # cosine: from TAU up to 1. fixed: TAU throughout, as in MoCo.
    Key("MODEL.TAU_SCHEDULE", "cosine", one_of("cosine", "fixed")),
    # Temperature of the softmax over positives and negatives; simclr and moco.
    Key("MODEL.TEMPERATURE", 0.2, positive),
    # Number of keys of earlier steps that serve as negatives; moco. At least the keys of one step.
    Key("MODEL.QUEUE", 65536),
    #
    Key("SOLVER.OPTIMIZER", "lars", one_of("lars", "sgd")),
    # For a batch of 256; scaled linearly.
    Key("SOLVER.BASE_LR", 0.6, positive),
    Key("SOLVER.MOMENTUM", 0.9, fraction),
    Key("SOLVER.WEIGHT_DECAY", 1e-6, at_least(0)),
    Key("SOLVER.TRUST_COEFFICIENT", 0.001, positive),
    # Over all processes.
    Key("SOLVER.BATCH_SIZE", 2048, at_least(1)),
    # Images of a process that go through the networks at once. 0: as many as fit its free memory.
    # It changes BatchNorm's statistics, but must fit the GPUs at hand: a run that goes on with another warns.
    Key("SOLVER.MICRO_BATCH", 0, at_least(0), free=True),
    Key("SOLVER.EPOCHS", 200, at_least(1)),
    # Fewer than EPOCHS.
    Key("SOLVER.WARMUP_EPOCHS", 10, at_least(0)),
    # On a CPU fp16 becomes bf16.
    Key("SOLVER.AMP", "fp16", one_of("fp16", "bf16", "off")),
    # Convolutions of float32 on a GPU round their inputs to TF32, 10 bits of mantissa, which is faster.
    Key("SOLVER.TF32", True),
    # torch.compile the backbones.
    Key("SOLVER.COMPILE", False),
    # Use only deterministic GPU kernels, so that resuming is exact to the bit.
    Key("SOLVER.DETERMINISTIC", False),
    #
    # Epochs between two writes of checkpoint_last.pth.
    Key("CHECKPOINT.PERIOD", 1, at_least(1), free=True),
    # Epochs between two checkpoint_<step>.pth. 0: none.
    Key("CHECKPOINT.KEEP_PERIOD", 50, at_least(0), free=True),
    #
    # A run stops as failed, and keeps its last good checkpoint, after so many steps in a row with a loss of
    # NaN or infinity, ...
    Key("ALARM.NONFINITE_STEPS", 5, at_least(1), free=True),
    # ... or where feature_std (1: evenly spread, 0: collapsed) stays below this ...
    Key("ALARM.FEATURE_STD", 0.02, fraction, free=True),
    # ... for so many steps in a row.
    Key("ALARM.COLLAPSE_STEPS", 1000, at_least(1), free=True),
    #
    # Epochs between two evaluations: kNN top-1, and HEALTH. There is always one before the first step and at
    # the end.
    Key("KNN.PERIOD", 10, at_least(0), free=True),
    # At most so many training images in the bank, evenly spaced. 0: all.
    Key("KNN.BANK", 100_000, at_least(0), free=True),
    # Images whose features tell without labels whether pre-training works (evaluate/health.py): at most so
    # many, evenly spaced. 0: none. -1: 10,000 on a GPU, 1,000 on a CPU.
    Key("HEALTH.IMAGES", -1, images_to_compare, free=True),
)
FREE_KEYS = tuple(key.name for key in KEYS if key.free)
# What a backbone needs as it was trained with.
BACKBONE_KEYS = ("MODEL.BACKBONE", "MODEL.SMALL_STEM", "DATA.MEAN", "DATA.STD")
# A run that began before these keys were there may go on with any value of them.
ADDED_KEYS = ("DATA.REDUCED_DECODE",)
DATA_KEYS = ("DATA.PATH", "DATA.CLASSES")  # free as well where the checkpoint tells the images (identity.py)


def get_cfg() -> CN:
    """A new configuration with the defaults of ``KEYS``."""
    cfg = CN()
    for key in KEYS:
        section, _, name = key.name.rpartition(".")
        if not section:
            cfg[name] = key.default
            continue
        if section not in cfg:
            cfg[section] = CN()
        cfg[section][name] = key.default
    return cfg


def expand_paths(cfg: CN) -> None:
    """Replace ``~`` by the home folder in the keys that hold paths."""
    for section, key in (
        (cfg.DATA, "PATH"),
        (cfg.DATA, "VAL"),
        (cfg.DATA, "CLASSES"),
        (cfg.MODEL, "INIT"),
        (cfg, "OUTPUT_DIR"),
    ):
        section[key] = os.path.expanduser(section[key])


def check(cfg: CN) -> None:
    """Refuse values that no run could use. Raises InputError naming the key and what it takes."""
    values = flatten(cfg)
    for key in KEYS:
        if key.rule and (problem := key.rule(values[key.name])):
            raise InputError(f"{key.name} is {values[key.name]!r}: {problem}")
    _check_together(cfg)


def _check_together(cfg):
    """Refuse values that do not fit each other."""
    if cfg.DATA.EVAL_RESIZE < cfg.DATA.IMAGE_SIZE:
        raise InputError(
            f"DATA.EVAL_RESIZE is {cfg.DATA.EVAL_RESIZE}: it must be at least {cfg.DATA.IMAGE_SIZE}"
        )
    if cfg.METHOD == "moco" and cfg.MODEL.QUEUE < 2 * cfg.SOLVER.BATCH_SIZE:
        raise InputError(
            f"MODEL.QUEUE is {cfg.MODEL.QUEUE}: it must hold the {2 * cfg.SOLVER.BATCH_SIZE} keys of a "
            "step, two for each image of the global batch"
        )
    if cfg.SOLVER.WARMUP_EPOCHS >= cfg.SOLVER.EPOCHS:
        raise InputError(
            f"the warm-up of {cfg.SOLVER.WARMUP_EPOCHS} epochs leaves nothing of {cfg.SOLVER.EPOCHS}: "
            f"give SOLVER.WARMUP_EPOCHS 0, or at least {cfg.SOLVER.WARMUP_EPOCHS + 1} epochs"
        )


def differences(
    saved_yaml: str, cfg: CN, source: str | os.PathLike, free: Sequence[str] = FREE_KEYS
) -> tuple[dict[str, Any], list[str]]:
    """Compare ``cfg`` with a saved configuration, the YAML text of ``source``.

    Returns the saved one as {key: value}, and the keys that differ, as ``KEY: saved -> now``. A key that it
    lacks counts as its default; the keys of ``free`` may differ, and those of ADDED_KEYS where it lacks them.
    Raises InputError where the text is no configuration.
    """
    now = flatten(cfg)
    try:
        added = {key: now[key] for key in ADDED_KEYS}
        saved = {**flatten(get_cfg()), **added, **flatten(yaml.safe_load(saved_yaml))}
    except (yaml.YAMLError, AttributeError):
        raise InputError(
            f"{source} cannot be read as a configuration: restore it, or give another --output-dir"
        ) from None
    return saved, [
        f"{key}: {saved.get(key)} -> {now.get(key)}"
        for key in sorted({*saved, *now})
        if key not in free and not same(key, saved.get(key), now.get(key))
    ]


def same(key: str, one: Any, other: Any) -> bool:
    """Whether two values of a key mean the same. Two paths of MODEL.INIT do if they lead to one file."""
    if key == "MODEL.INIT" and one and other:
        return os.path.realpath(one) == os.path.realpath(other)
    return one == other
