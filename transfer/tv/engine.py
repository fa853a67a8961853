"""Mask and Faster R-CNN R50-FPN from torchvision's parts: fine-tuning on one device, where
Detectron2 is not installed.

The same YAML gives the same layers, initialisation, schedule, files and metric; what cannot be
honoured is refused. Tables 5 and 6 are Detectron2's all the same, because torchvision differs in
the small print: box losses are smooth L1 with beta 1/9 (Detectron2: L1); RoIAlign has no half-pixel
shift; anchors are rounded to whole pixels; mask targets are cut from the resized bitmap, not from
polygons; images are resized without antialiasing; SyncBN is BatchNorm.

Randomness is derived, never stored: images, flips, sides and samples of iteration i are a pure
function of (SEED, i). So a resumed run equals an uninterrupted one: on a CPU bit for bit, on a GPU
up to the order of its atomic sums. Iterations count from 0, as in Detectron2: the checkpoint after
5000 of them is model_0004999.pth.
"""

import functools
import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import nn
from torchvision.models.detection import roi_heads, transform
from tqdm import tqdm

from rsa_detectron2.common import workers
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.record import Origin
from rsa_detectron2.transfer.convert.needs import check_weights
from rsa_detectron2.transfer.convert.writers import load_model, load_weights
from rsa_detectron2.transfer.data.annotations import load_datasets
from rsa_detectron2.transfer.data.average_precision import coco_ap
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.coco import CocoInstances
from rsa_detectron2.transfer.precise_bn import update_statistics
from rsa_detectron2.transfer.report.run_folder import FINAL, find_start, save_checkpoint
from rsa_detectron2.transfer.report.runs import (
    begin_training,
    check_network,
    check_unchanged,
    own_training,
    write_results,
)
from rsa_detectron2.transfer.tv.model import bfloat16_inside, build_model, check

log = logging.getLogger(__name__)

# torchvision's name: Detectron2's
LOSSES = {
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
}
BOX_FIELDS = ("boxes", "scores", "labels")


def training_batches(cfg, dataset, start, stop, device):
    """Yield (images, targets) of iterations ``start`` to ``stop - 1``, with torch's random state
    set for each.

    images: list of float32 [3, H, W] from 0 to 1. Every epoch takes all images once, in an order of its own.
    """
    seed, size, probability = (
        max(cfg.SEED, 0),
        cfg.SOLVER.IMS_PER_BATCH,
        0.5 * (cfg.INPUT.RANDOM_FLIP == "horizontal"),
    )

    @functools.lru_cache(2)
    def order(epoch):
        return np.random.default_rng((seed, 0, epoch)).permutation(len(dataset.ids))

    def keys(i):
        places = (divmod(i * size + n, len(dataset.ids)) for n in range(size))
        flips = np.random.default_rng((seed, 1, i)).random(size) < probability
        return [(order(epoch)[place], flip) for (epoch, place), flip in zip(places, flips)]

    loader = workers.load(
        dataset, map(keys, range(start, stop)), cfg.DATALOADER.NUM_WORKERS, "DATALOADER.NUM_WORKERS", list
    )
    for i, batch in enumerate(loader, start):
        torch.manual_seed(int(np.random.default_rng((seed, 2, i)).integers(2**32)))
        yield (
            [image.to(device).float() / 255 for image, _ in batch],
            [{key: value.to(device) for key, value in target.items()} for _, target in batch],
        )


def learning_rate(solver, i):
    """Detectron2's WarmupMultiStepLR: linear warm-up, then BASE_LR times GAMMA for each of STEPS
    that has passed."""
    progress = min(i / min(solver.WARMUP_ITERS, solver.MAX_ITER), 1) if solver.WARMUP_ITERS else 1
    warmup = solver.WARMUP_FACTOR * (1 - progress) + progress
    return solver.BASE_LR * warmup * solver.GAMMA ** sum(i >= step for step in solver.STEPS)


def load_checkpoint(path, model):
    """Load one of this run's own checkpoints into ``model`` and return all of its content. Raises
    InputError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        return saved
    except Exception as error:  # a broken file can fail in any way
        raise InputError(
            f"{path} does not hold a model of the torchvision engine with this config's MODEL settings "
            f"({type(error).__name__})"
        ) from None


def fit(cfg, model, dataset, checkpoint=None, origin=Origin()):
    """Train to MAX_ITER and write model_final.pth; from ``checkpoint`` on, if given. Raises InputError."""
    solver, folder, device = cfg.SOLVER, Path(cfg.OUTPUT_DIR), next(model.parameters()).device
    norms = [p for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) for p in layer.parameters()]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    optimizer = torch.optim.SGD(
        [{"params": others}, {"params": norms, "weight_decay": solver.WEIGHT_DECAY_NORM}],
        solver.BASE_LR,
        solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
    )

    def save(name, i):
        save_checkpoint(
            folder,
            name,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "iteration": i,
                "weights": provenance,
                "run": about,
            },
        )

    start, provenance, about = 0, None, None
    if checkpoint:
        saved = load_checkpoint(checkpoint, model)
        optimizer.load_state_dict(saved["optimizer"])
        start, provenance = saved["iteration"] + 1, saved["weights"]
        about = saved.get("run")  # a checkpoint without it is of an older version
        log.info("%s: resuming at iteration %d of %d", checkpoint.name, start, solver.MAX_ITER)
        if checkpoint.name == FINAL:
            return
    elif cfg.MODEL.WEIGHTS:
        state, provenance = load_weights(cfg.MODEL.WEIGHTS)
        check_weights(cfg, provenance)
        body = model.backbone.body.state_dict()
        if differ := sorted({name for name in body if not name.endswith("num_batches_tracked")} ^ set(state)):
            raise InputError(
                f"{cfg.MODEL.WEIGHTS} is not the network of MODEL.RESNETS, for it lacks or adds {differ[:4]}"
            )
        model.backbone.body.load_state_dict(state, strict=False)
        log.info("%s: all %d backbone tensors loaded", cfg.MODEL.WEIGHTS, len(state))
    else:
        log.info("MODEL.WEIGHTS is empty: training starts from random weights")
    if not start:
        about = begin_training(cfg, provenance, origin=origin, num_images=len(dataset.ids))

    model.train()
    recent = []
    with (
        open(folder / "metrics.json", "a" if start else "w", buffering=1) as metrics,
        tqdm(
            total=solver.MAX_ITER,
            initial=start,
            desc="fine-tuning",
            unit="it",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        ) as bar,
    ):
        for i, (images, targets) in enumerate(
            training_batches(cfg, dataset, start, solver.MAX_ITER, device), start
        ):
            losses = model(images, targets)
            total = sum(losses.values())
            figures = torch.stack([total, *losses.values()]).tolist()  # one synchronisation
            if not math.isfinite(figures[0]):
                raise InputError(
                    f"the loss is {figures[0]:f} at iteration {i}: lower SOLVER.BASE_LR ({solver.BASE_LR})"
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(solver, i)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

            recent.append(figures)
            bar.set_postfix(loss=f"{recent[-1][0]:.3f}", refresh=False)
            bar.update()
            if (i + 1) % 20 == 0 or i + 1 == solver.MAX_ITER:
                means = dict(zip(("total_loss", *map(LOSSES.get, losses)), np.mean(recent, 0)))
                metrics.write(json.dumps({"iteration": i, **means, "lr": learning_rate(solver, i)}) + "\n")
                recent.clear()
            if (i + 1) % solver.CHECKPOINT_PERIOD == 0:
                save(f"model_{i:07d}.pth", i)

    if cfg.TEST.PRECISE_BN.ENABLED:
        stop = solver.MAX_ITER + cfg.TEST.PRECISE_BN.NUM_ITER
        batches = training_batches(cfg, dataset, solver.MAX_ITER, stop, device)
        # model(batch) -> model(images, targets)
        unpack = model.register_forward_pre_hook(lambda _, inputs: inputs[0])
        update_statistics(
            model,
            tqdm(
                batches, "precise BatchNorm", cfg.TEST.PRECISE_BN.NUM_ITER, dynamic_ncols=True, disable=None
            ),
        )
        unpack.remove()
    save(FINAL, solver.MAX_ITER - 1)


@torch.no_grad()
def detect(cfg, model, dataset):
    """-> COCO-format detections: original category_id, bbox [x, y, w, h] in pixels, score and,
    where the model has masks, segmentation as compressed RLE."""
    model.eval()
    model.transform.min_size, model.transform.max_size = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST
    detections = []
    for image_id in tqdm(dataset.ids, "evaluating", dynamic_ncols=True, disable=None):
        image = dataset.image(image_id).to(next(model.parameters()).device).float() / 255
        # The steps of model.forward, which would paste a hundred masks at once: gigabytes for a
        # large photograph.
        images, _ = model.transform([image])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        (found,), _ = model.roi_heads(features, proposals, images.image_sizes)
        found["boxes"] = transform.resize_boxes(found["boxes"], images.image_sizes[0], image.shape[1:])
        found = {key: values.cpu() for key, values in found.items()}
        for n, ((x0, y0, x1, y1), score, label) in enumerate(
            zip(*(found[key].tolist() for key in BOX_FIELDS))
        ):
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": dataset.categories[label - 1],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                }
            )
            if cfg.MODEL.MASK_ON:
                mask = (
                    roi_heads.paste_masks_in_image(found["masks"][[n]], found["boxes"][[n]], image.shape[1:])[
                        0, 0
                    ]
                    >= 0.5
                )
                code = rle.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
                detections[-1]["segmentation"] = {
                    "size": code["size"],
                    "counts": code["counts"].decode("ascii"),
                }
    return detections


def train(cfg, resume=False, eval_only=False, origin=Origin()):
    """Fine-tune and evaluate; returns the content of OUTPUT_DIR/results.json. Raises InputError.

    resume: go on from the last checkpoint in OUTPUT_DIR, if there is one. eval_only: evaluate
    OUTPUT_DIR/model_final.pth with ``resume``, else MODEL.WEIGHTS, then a whole model of this engine.
    The AP is that of the saved file, read back.
    """
    began, folder = time.time(), Path(cfg.OUTPUT_DIR)
    start = None if eval_only else find_start(folder, resume)
    check(cfg)
    check_datasets(cfg, eval_only)
    if start:
        check_unchanged(cfg)
    if eval_only:
        check_network(cfg, folder if resume else Path(cfg.MODEL.WEIGHTS).parent)
    masks, datasets = cfg.MODEL.MASK_ON, load_datasets(cfg, eval_only)
    val_set = CocoInstances(datasets[cfg.DATASETS.TEST[0]], training=False, masks=masks)
    if not eval_only:
        train_set = CocoInstances(
            datasets[cfg.DATASETS.TRAIN[0]],
            training=True,
            masks=masks,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )
    torch.manual_seed(max(cfg.SEED, 0))
    device = torch.device("cuda" if cfg.MODEL.DEVICE == "cuda" and torch.cuda.is_available() else "cpu")
    model = build_model(cfg).to(device)
    if cfg.SOLVER.AMP.ENABLED:
        heads = model.roi_heads
        for part in (model.backbone, model.rpn.head, heads.box_head, heads.mask_head, heads.mask_predictor):
            if part is not None:
                bfloat16_inside(part, device)
    log.info("one %s device: SyncBN is BatchNorm over its batch", device.type)
    (folder / "inference").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    if not eval_only:
        try:
            fit(cfg, model, train_set, start, origin)
        except torch.OutOfMemoryError:
            raise InputError(
                f"{cfg.SOLVER.IMS_PER_BATCH} images at once do not fit into the memory of {device}: lower "
                "SOLVER.IMS_PER_BATCH and, in proportion, SOLVER.BASE_LR"
            ) from None
    final = cfg.MODEL.WEIGHTS if eval_only and not resume else folder / FINAL
    state, iterations, weights = load_model(final, model.state_dict())
    model.load_state_dict(state)
    detections = detect(cfg, model, val_set)
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
    val_set.dataset.save(folder / "inference" / "annotations.json")  # of the detections' ids
    ap = coco_ap(val_set.dataset, detections, ("bbox", "segm") if masks else ("bbox",))
    return write_results(
        cfg,
        engine="torchvision",
        ap=ap,
        weights=weights,
        iterations=iterations,
        seconds=time.time() - began,
        eval_only=eval_only and not (resume and own_training(cfg)),
        origin=origin,
    )
