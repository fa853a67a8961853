"""RSA self-supervised pre-training, and transfer of its backbone to Detectron2: the Python API.

Heavy libraries are imported when a function is called, so that ``import rsa_detectron2`` is quick.
Every function raises :class:`InputError`, whose message is one line that names the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rsa_detectron2.common.errors import InputError

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode

__version__ = "0.3.0.dev0"
__all__ = [
    "InputError",
    "add_rsa_config",
    "convert_backbone",
    "extract_features",
    "pretrain_backbone",
    "read_results",
]


def pretrain_backbone(recipe: str, overrides: Sequence = ()) -> Path:
    """Pre-train as ``tools/pretrain.py --config-file RECIPE KEY VALUE ...`` does.

    Args:
        recipe: a YAML file, looked up here and under ``configs/``, e.g. ``pretrain/cifar10_rsa_R18.yaml``.
        overrides: ``[KEY, VALUE, ...]`` of pretrain/config.py, on top of the recipe.

    Returns the path of ``model_final.pth``. It runs in this process, on one GPU or the CPU. Call it
    again with the same arguments, and an interrupted run goes on.
    """
    from rsa_detectron2.pretrain.engine.trainer import train
    from rsa_detectron2.tools._recipe import load_recipe
    from rsa_detectron2.tools._weights import read_initial

    cfg, came_from, note = load_recipe(recipe, overrides)
    if note:
        print(note)
    return Path(train(cfg, came_from, read_initial))


def convert_backbone(
    checkpoint: str | Path, output: str | Path, to: str = "detectron2", branch: str | None = None
) -> dict:
    """Convert any checkpoint that ``tools/convert_to_d2.py`` reads, in the same way.

    Args:
        checkpoint: a file of this project or of another; no code in it runs.
        output: the file to write.
        to: "detectron2" (.pkl), "torchvision" (.pth) or "timm" (.safetensors).
        branch: "online" or "target"; None takes the online network, or the only one.

    Returns the provenance: source, sha256, method, step, branch, architecture, pixel statistics.
    """
    from rsa_detectron2.transfer.convert.writers import ReadOptions, convert

    return convert(str(checkpoint), output, to, ReadOptions(branch))[1]


def extract_features(
    checkpoint: str | Path, images: str | Path, limit: int | None = None
) -> tuple[list[str], torch.Tensor]:
    """Features of center crops by a pre-trained backbone in eval mode.

    Args:
        checkpoint: any file that ``tools/convert_to_d2.py`` reads.
        images: a folder of images, or another data set that ``tools/pretrain.py --data`` takes.
        limit: use at most this many images, evenly spaced.

    Returns the names of the images, and their features in the same order: float32 [N, D] on the CPU.
    """
    from rsa_detectron2.tools._weights import load_features, open_for

    features, cfg, _ = load_features(str(checkpoint))
    source = open_for(cfg, str(images), limit or 0)
    values, _ = features.of(source, "features")
    return [source.name(index) for index in range(len(source))], values.cpu()


def read_results(folder: str | Path) -> dict:
    """The content of a fine-tuning run's ``results.json``: AP, weights, settings, iterations, seconds."""
    from rsa_detectron2.transfer.report.runs import load_results

    return load_results(folder)


def add_rsa_config(cfg: CfgNode) -> None:
    """Set in Detectron2's ``get_cfg()`` the network and the pixel statistics of converted weights.

    After this a stock Detectron2 model loads a file of ``tools/convert_to_d2.py`` as it is: torchvision's
    stride, RGB, ImageNet's mean and std. It also sets SyncBN, and freezes nothing. The whole protocol of
    the paper's Tables 5 and 6 is configs/transfer/mask_rcnn_R50_FPN_1x.yaml.
    """
    from rsa_detectron2.transfer.d2.config import add_rsa_config

    add_rsa_config(cfg)
