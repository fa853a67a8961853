#!/usr/bin/env python3
"""Train a ResNet by supervised classification on a recipe's images: a row of the test in miniature.

    tools/_supervised.py --config-file pretrain/miniature_rsa_R18.yaml --data PATH --output-dir DIR --seed 0

Images, weak views, network, optimizer, schedule, steps and batch are the recipe's, and the labels are the
folders' names. Leaves model_final.pth with torchvision's names, which tools/convert_to_d2.py reads with
--method supervised, and run.json. A run takes minutes: stopped, it starts again.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

from rsa_detectron2.common import record
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.distributed import amp_dtype, device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import locked, save_tensors
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.datasets import images_of
from rsa_detectron2.pretrain.data.loader import MultiStageViews, StepBatches, build_loader
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.engine.checkpoint import FINAL
from rsa_detectron2.pretrain.method import augment, schedules
from rsa_detectron2.pretrain.method.networks import build_backbone
from rsa_detectron2.tools._recipe import load_recipe


def main() -> None:
    args = parse()
    given = ["DATA.PATH", args.data, "OUTPUT_DIR", args.output_dir, "SEED", args.seed]
    given += [] if args.workers is None else ["DATA.NUM_WORKERS", args.workers]
    cfg, origin, _ = load_recipe(args.config_file, given + args.overrides)
    if cfg.SOLVER.OPTIMIZER != "sgd":
        raise InputError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER}: supervised training takes sgd alone")
    images = images_of(cfg.DATA)
    if len(images.classes) < 2 or min(images.labels) < 0:
        raise InputError(f"{cfg.DATA.PATH} has no labels: it must hold a folder of images for each class")
    with locked(cfg.OUTPUT_DIR, "--output-dir"):
        state, steps = train(cfg, images)
        about = record.describe(
            "pretrain",
            cfg,
            origin,
            method="supervised",
            seed=cfg.SEED,
            steps=steps,
            step=steps,
            bn_batch_size=cfg.SOLVER.BATCH_SIZE,
            data=identity.summary(images),
        )
        record.write(cfg.OUTPUT_DIR, about)
        save_tensors(Path(cfg.OUTPUT_DIR, FINAL), {"state_dict": state})
    print(f"done: {cfg.OUTPUT_DIR}/{FINAL}")


def train(cfg: CfgNode, images: Source) -> tuple[dict[str, torch.Tensor], int]:
    """The state dict of the trained network on the CPU, and its number of steps. Raises InputError."""
    solver, place = cfg.SOLVER, device()
    torch.manual_seed(cfg.SEED)
    backbone = build_backbone(cfg.MODEL.BACKBONE, cfg.MODEL.SMALL_STEM)
    fc = nn.Linear(backbone.num_features, len(images.classes))
    model = nn.Sequential(backbone, fc).to(place)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY
    )
    per_epoch = len(images) // solver.BATCH_SIZE
    steps, peak = solver.EPOCHS * per_epoch, solver.BASE_LR * solver.BATCH_SIZE / 256
    order = StepBatches(len(images), solver.BATCH_SIZE, range(steps), cfg.SEED)
    loader = build_loader(MultiStageViews(images, cfg.DATA.IMAGE_SIZE, cfg.SEED), order, cfg.DATA.NUM_WORKERS)
    labels = torch.as_tensor(images.labels)
    mean, std = (torch.tensor(values, device=place) for values in (cfg.DATA.MEAN, cfg.DATA.STD))
    for step, batch in enumerate(loader, 1):
        views = augment.normalize(augment.to_float(batch["views"][:, 0].to(place)), mean, std)
        wanted = labels[(batch["index"] + batch["skipped"]) % len(images)].to(place)
        amp = amp_dtype(solver.AMP) is not None
        with torch.autocast(place.type, torch.bfloat16, enabled=amp):  # needs no scaler, unlike float16
            outputs = model(views)
        loss = F.cross_entropy(outputs.float(), wanted)
        rate = schedules.learning_rate(step, steps, peak, solver.WARMUP_EPOCHS * per_epoch)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % per_epoch == 0:
            right = 100 * (outputs.argmax(1) == wanted).float().mean().item()
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {right:.0f} % right", flush=True)
            if not math.isfinite(loss.item()):
                raise InputError(f"the loss is {loss.item()} at step {step}: lower SOLVER.BASE_LR")
    state = backbone.state_dict() | {f"fc.{name}": tensor for name, tensor in fc.state_dict().items()}
    return {name: tensor.cpu() for name, tensor in state.items()}, steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="recipe, looked up here and under configs/")
    parser.add_argument("--data", required=True, help="folder that holds a folder of images for each class")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
