"""Mask and Faster R-CNN R50-FPN from torchvision's parts: fine-tuning on one device, where
Detectron2 is not installed.

The same YAML gives the same layers, initialization, schedule, files and metric; what cannot be
honored is refused. Tables 5 and 6 still need Detectron2, because torchvision differs in
details: box losses are smooth L1 with beta 1/9 (Detectron2: L1); RoIAlign has no half-pixel
shift; anchors are rounded to whole pixels; mask targets are cut from the resized bitmap, not from
polygons; images are resized without antialiasing; SyncBN is BatchNorm.
"""

import contextlib
import logging
import time
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from rsa_detectron2.common import loggers
from rsa_detectron2.common.errors import Interrupted
from rsa_detectron2.common.record import Origin
from rsa_detectron2.common.signals import Stopped, StopSignals
from rsa_detectron2.transfer.convert.writers import load_model
from rsa_detectron2.transfer.data.annotations import load_datasets
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.coco import CocoInstances
from rsa_detectron2.transfer.report import best
from rsa_detectron2.transfer.report.quality import judge
from rsa_detectron2.transfer.report.run_folder import AGAIN_WITH_RESUME, FINAL, find_start, iterations_of
from rsa_detectron2.transfer.report.runs import (
    Outcome,
    Setup,
    check_network,
    check_unchanged,
    own_training,
    write_results,
)
from rsa_detectron2.transfer.tv.evaluation import evaluate
from rsa_detectron2.transfer.tv.model import bfloat16_inside, build_model, check
from rsa_detectron2.transfer.tv.trainer import Trainer, fit

log = logging.getLogger(__name__)


def train(cfg: CfgNode, resume: bool = False, eval_only: bool = False, origin: Origin = Origin()) -> dict:
    """Fine-tune and evaluate; returns the content of OUTPUT_DIR/results.json. Raises InputError.

    resume: go on from the last checkpoint in OUTPUT_DIR, if there is one.
    eval_only: do not train. With ``resume`` evaluate OUTPUT_DIR/model_final.pth, else MODEL.WEIGHTS,
    which must then be a whole model of this engine. The model is read back from its file before it is
    evaluated. After one of the stop signals (common/signals.py) it saves what there is to save, and raises
    Interrupted.
    """
    try:
        with StopSignals(AGAIN_WITH_RESUME) as stop:
            return _train(cfg, resume, eval_only, origin, stop)
    except Stopped as stopped:
        raise Interrupted(str(stopped)) from None


def _train(cfg: CfgNode, resume: bool, eval_only: bool, origin: Origin, stop: StopSignals) -> dict:
    began, folder = time.time(), Path(cfg.OUTPUT_DIR)
    start = None if eval_only else find_start(folder, resume)
    check(cfg)
    loggers.check(cfg)
    check_datasets(cfg, eval_only)
    if start:
        check_unchanged(cfg, done=iterations_of(start))
    if eval_only:
        check_network(cfg, folder if resume else Path(cfg.MODEL.WEIGHTS).parent)
    datasets = load_datasets(cfg, eval_only)
    val_set = CocoInstances(datasets[cfg.DATASETS.TEST[0]], training=False, masks=cfg.MODEL.MASK_ON)
    if not eval_only:
        train_set = CocoInstances(
            datasets[cfg.DATASETS.TRAIN[0]],
            training=True,
            masks=cfg.MODEL.MASK_ON,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )
    torch.manual_seed(max(cfg.SEED, 0))
    model = build_on_device(cfg)
    (folder / "inference").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    trainer = None if eval_only else Trainer(cfg, model, train_set, val_set, start)
    with trainer.rows if trainer else contextlib.nullcontext() as rows:
        if trainer:
            fit(trainer, origin, stop)
        final = cfg.MODEL.WEIGHTS if eval_only and not resume else folder / FINAL
        state, iterations, weights = load_model(final, model.state_dict())
        model.load_state_dict(state)
        ap = evaluate(cfg, model, val_set)
        other_model = eval_only and not (resume and own_training(cfg))
        finest = None if eval_only else best.keep_final_if_best(cfg, ap, iterations)
        outcome = Outcome(ap, iterations, time.time() - began, other_model, judge(cfg), finest)
        return write_results(cfg, Setup("torchvision", weights, origin=origin), outcome, rows)


def build_on_device(cfg: CfgNode) -> nn.Module:
    """The model on MODEL.DEVICE, in bfloat16 with SOLVER.AMP.ENABLED."""
    device = torch.device("cuda" if cfg.MODEL.DEVICE == "cuda" and torch.cuda.is_available() else "cpu")
    model = build_model(cfg).to(device)
    if cfg.SOLVER.AMP.ENABLED:
        heads = model.roi_heads
        for part in (model.backbone, model.rpn.head, heads.box_head, heads.mask_head, heads.mask_predictor):
            if part is not None:
                bfloat16_inside(part, device)
    log.info("one %s device: SyncBN is BatchNorm over its batch", device.type)
    return model
