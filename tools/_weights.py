"""A pre-trained backbone from any checkpoint, for the tools that look at features."""

import json
import os
from pathlib import Path

import torch
import yaml
from fvcore.common.config import CfgNode

from rsa_detectron2.common.config import find_config, merge_config
from rsa_detectron2.common.distributed import amp_dtype, device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.progress import say
from rsa_detectron2.common.record import is_sound
from rsa_detectron2.pretrain.config import check, get_cfg
from rsa_detectron2.pretrain.data.datasets import images_of
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.evaluate.cache import FeatureCache
from rsa_detectron2.pretrain.evaluate.features import Features, Labeled
from rsa_detectron2.pretrain.method import networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.transfer.convert import readers
from rsa_detectron2.transfer.convert.files import local_file, open_checkpoint
from rsa_detectron2.transfer.convert.provenance import sha256


def load_features(path: str | Path, branch: str | None = None) -> tuple[Features, CfgNode, dict]:
    """The Features of a checkpoint's backbone, its configuration, and its provenance.

    ``path`` and ``branch`` as in :func:`read_networks`. Raises InputError.
    """
    tensors, cfg, provenance = read_networks(path, branch)
    backbone = networks.build_backbone(cfg.MODEL.BACKBONE, cfg.MODEL.SMALL_STEM)
    networks.load_backbone(backbone, tensors["backbone"], str(path))
    cache = FeatureCache(os.path.expanduser(path), provenance["sha256"] + provenance["branch"])
    projector = None
    if tensors["projector"]:
        projector = build_projector(provenance["method"], tensors["projector"])
    amp = amp_dtype(cfg.SOLVER.AMP)
    return Features(backbone.to(device()).eval(), cfg.DATA, amp, cache, projector), cfg, provenance


def build_projector(method: str, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The projector of a method with the tensors of a checkpoint, which tell its widths."""
    weights = [tensor for tensor in state.values() if tensor.ndim == 2]
    projector, _ = METHODS[method].heads(weights[0].shape[1], len(weights[0]), len(weights[-1]))
    projector.load_state_dict(state)
    return projector.to(device()).eval()


def read_networks(
    path: str | Path, branch: str | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], CfgNode, dict]:
    """The tensors of a checkpoint's "backbone" and "projector", its configuration, and its provenance, with
    the record of its run, if known, as ``pretrain``.

    A checkpoint of tools/pretrain.py may have any backbone of this project, and brings its configuration.
    One of another project must be readable by tools/convert_to_d2.py. It gets the normalization of its
    authors, ImageNet's configuration otherwise, and no projector.

    branch: "online" or "target"; None: online, or the one that a converted file holds. Raises InputError.
    """
    path = local_file(path, f"no checkpoint {path}: give the file, or pre-train first (tools/pretrain.py)")
    cfg, before = get_cfg(), os.stat(path)
    with open_checkpoint(path) as contents:  # torch.load never gets a file of another project
        ours = isinstance(contents, dict) and contents.get("format") == checkpoint.FORMAT
    if not ours:
        state, provenance = readers.read_checkpoint(path, branch)
        provenance["pretrain"] = json.loads(provenance.pop("run", "null"))
        tensors = {"backbone": state, "projector": {}}
        cfg.MODEL.BACKBONE = provenance["architecture"]
        cfg.DATA.MEAN, cfg.DATA.STD = (
            tuple(value / 255 for value in provenance[key]) for key in ("pixel_mean", "pixel_std")
        )
    else:
        branch = branch or "online"
        saved = checkpoint.load(path)
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(saved["config"])))
        tensors = {part: below(f"{branch}.{part}.", saved["model"]) for part in ("backbone", "projector")}
        if not tensors["backbone"]:
            raise InputError(
                f"{path} has no {branch} network: {saved['method']} trains without one, so leave --branch out"
            )
        provenance = {
            "source": Path(path).name,
            "sha256": sha256(path),
            "branch": branch,
            "method": saved["method"],
            "step": saved["step"],
            "architecture": cfg.MODEL.BACKBONE,
            "pretrain": saved.get("run"),
        }
    after = os.stat(path)
    if (before.st_ino, before.st_mtime_ns, before.st_size) != (
        after.st_ino,
        after.st_mtime_ns,
        after.st_size,
    ):
        raise InputError(f"{path} was replaced while it was read: run the same command again")
    return tensors, cfg, provenance


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_initial(path: str) -> tuple[dict[str, torch.Tensor], CfgNode, dict]:
    """What a run needs of the checkpoint that it starts from: tensors, configuration, and provenance.

    The provenance has no record of the checkpoint's own run, but what that run started from, as ``init``.
    Raises InputError.
    """
    tensors, cfg, provenance = read_networks(path)
    run = provenance.pop("pretrain")
    init = run.get("init") if is_sound(run) else None
    return tensors["backbone"], cfg, {**provenance, "init": init if isinstance(init, dict) else None}


def untrained_features(recipe: str, seed: int) -> tuple[Features, CfgNode, dict]:
    """The same of a recipe's network before its training. Raises InputError."""
    cfg = merge_config(get_cfg(), find_config(recipe), ["SEED", seed])
    check(cfg)
    provenance = {"source": recipe, "branch": "online", "method": "untrained", "step": 0}
    return features_before(cfg), cfg, provenance


def features_before(cfg: CfgNode, sha256: str | None = None) -> Features:
    """The Features of the online network with which a pre-training of this configuration starts.

    ``sha256``: of MODEL.INIT when the run began. Raises InputError where that file is gone or another.
    """
    torch.manual_seed(cfg.SEED)
    online = networks.build_networks(cfg, METHODS[cfg.METHOD]).online
    if cfg.MODEL.INIT:
        state, _, initial = read_initial(cfg.MODEL.INIT)
        if sha256 not in (None, initial["sha256"]):
            raise InputError(f"{cfg.MODEL.INIT} is no longer the file that the run started from: restore it")
        networks.load_backbone(online.backbone, state, cfg.MODEL.INIT)
    online.to(device()).eval()
    return Features(online.backbone, cfg.DATA, amp_dtype(cfg.SOLVER.AMP), projector=online.projector)


def before_and_after(
    features: Features, cfg: CfgNode, provenance: dict, images: Source
) -> dict[str, Labeled]:
    """Features of images and their labels by title: with the weights that pre-training started from, where
    those are known, and after it.

    The first three arguments are those that load_features gives. The next image stands in for one that cannot
    be decoded.
    """
    known = {"nearest after pre-training": features}
    if features.projector:  # a checkpoint of tools/pretrain.py, not of another project or converted
        initial = (provenance["pretrain"] or {}).get("init") or {}
        try:
            known = {"nearest before pre-training": features_before(cfg, initial.get("sha256")), **known}
        except InputError as error:
            say(f"features before pre-training are left out: {error}")
    return {title: each.of(images, title, replace=True) for title, each in known.items()}


def open_for(cfg: CfgNode, path: str = "", limit: int = 0) -> Source:
    """The images of ``path``, or those of the pre-training, with its range of values.

    ``cfg``: a checkpoint's configuration. At most ``limit`` images, evenly spaced; 0: all. Raises InputError.
    """
    data = cfg.DATA.clone()
    if path:
        data.PATH, data.CLASSES, data.LIMIT = path, "", limit
    else:
        data.LIMIT = min(filter(None, (limit, data.LIMIT)), default=0)
    return images_of(data)
