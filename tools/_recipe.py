"""The configuration of a pre-training, from a recipe and overrides: the same on every way in."""

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from rsa_detectron2.common.config import CONFIGS, find_config, merge_config, origin, with_bases
from rsa_detectron2.common.record import Origin, flatten
from rsa_detectron2.pretrain.config import check, expand_paths, get_cfg
from rsa_detectron2.transfer.report import paper

RATE = "SOLVER.BASE_LR"
# What a learning rate was chosen for, besides the length of a run.
RATE_FITS = (
    "METHOD",
    "SOLVER.OPTIMIZER",
    "SOLVER.MOMENTUM",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.TRUST_COEFFICIENT",
)


def load_recipe(recipe: str, overrides: Sequence) -> tuple[CfgNode, Origin, str]:
    """The checked configuration of a recipe with ``[KEY, VALUE, ...]`` on top, and where it came from.

    The third value is a line for the user, or "". Raises InputError.
    """
    file, overrides = find_config(recipe), list(overrides)
    cfg = merge_config(get_cfg(), file, overrides)
    note = ""
    if RATE not in overrides[::2] and not sets_rate(file):
        rate, note = published_rate(cfg)
        if rate != cfg.SOLVER.BASE_LR:
            overrides += [RATE, rate]
            cfg.SOLVER.BASE_LR = rate
    check(cfg)
    expand_paths(cfg)
    return cfg, origin(file, overrides, get_cfg()), note


def sets_rate(file: str) -> bool:
    """Whether the user's own recipe, or one of the user's that it inherits from, sets the learning rate."""
    return any(
        RATE in flatten(content) for path, content in with_bases(file) if not path.is_relative_to(CONFIGS)
    )


def published_rate(cfg: CfgNode) -> tuple[float, str]:
    """The learning rate for the length of ``cfg``, and a line that says so where it is not that of ``cfg``.

    On ImageNet-1K the paper trains with another rate for each length (Table 4). Of a length without a
    published rate it is that of the nearest one. Other recipes have one rate for all lengths.
    """
    defaults, now = flatten(get_cfg()), flatten(cfg)
    runs = [defaults | cell.training.settings for cell in paper.cells("table4") if cell.training]
    runs = [run for run in runs if all(run[key] == now[key] for key in RATE_FITS)]
    if now[RATE] not in [run[RATE] for run in runs]:
        return now[RATE], ""
    epochs = now["SOLVER.EPOCHS"]
    nearest = min(runs, key=lambda run: abs(run["SOLVER.EPOCHS"] - epochs))
    rate, known = nearest[RATE], ", ".join(f"{run[RATE]} for {run['SOLVER.EPOCHS']}" for run in runs)
    if epochs != nearest["SOLVER.EPOCHS"]:
        note = f"no learning rate is published for {epochs} epochs ({known}): taking {rate}"
    elif rate != now[RATE]:
        note = f"the learning rate is the one published for {epochs} epochs ({known})"
    else:
        return rate, ""
    return rate, f"{note}; {RATE} sets another"
