"""Mask and Faster R-CNN R50-FPN from torchvision's parts: fine-tuning on one device, where
Detectron2 is not installed.

The same YAML gives the same layers, initialization, schedule, files and metric; what cannot be
honored is refused. Tables 5 and 6 still need Detectron2, because torchvision differs in
details: box losses are smooth L1 with beta 1/9 (Detectron2: L1); RoIAlign has no half-pixel
shift; anchors are rounded to whole pixels; mask targets are cut from the resized bitmap, not from
polygons; images are resized without antialiasing; SyncBN is BatchNorm.

Randomness is derived, never stored: images, flips, image sizes and samples of iteration i are a
pure function of (SEED, i). So a resumed run equals an uninterrupted one: on a CPU bit for bit, on a GPU
up to the order of its atomic sums. Iterations count from 0, as in Detectron2: the checkpoint after
5000 of them is model_0004999.pth.
"""

import contextlib
import copy
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models.detection import transform
from tqdm import tqdm

from rsa_detectron2.common import workers
from rsa_detectron2.common.errors import InputError, Interrupted, is_out_of_memory
from rsa_detectron2.common.record import Origin
from rsa_detectron2.common.signals import Stopped, StopSignals
from rsa_detectron2.transfer.convert import detectors
from rsa_detectron2.transfer.convert.needs import check_weights
from rsa_detectron2.transfer.convert.writers import load_model, load_weights
from rsa_detectron2.transfer.data.annotations import load_datasets
from rsa_detectron2.transfer.data.average_precision import coco_ap
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.coco import CocoInstances
from rsa_detectron2.transfer.precise_bn import norm_layers, update_statistics
from rsa_detectron2.transfer.report import best
from rsa_detectron2.transfer.report.quality import judge
from rsa_detectron2.transfer.report.run_folder import (
    AGAIN_WITH_RESUME,
    FINAL,
    find_start,
    iterations_of,
    leave,
    save_checkpoint,
)
from rsa_detectron2.transfer.report.runs import (
    Outcome,
    Setup,
    begin_training,
    check_network,
    check_unchanged,
    own_training,
    write_results,
)
from rsa_detectron2.transfer.tv import layout
from rsa_detectron2.transfer.tv.model import bfloat16_inside, build_model, check
from rsa_detectron2.transfer.tv.paste import paste_rles

log = logging.getLogger(__name__)

# torchvision's name of a loss: Detectron2's.
LOSSES = {
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
}
BOX_FIELDS = ("boxes", "scores", "labels")
NO_SIGNALS = StopSignals(AGAIN_WITH_RESUME)  # of which none arrives


def training_batches(
    cfg: CfgNode, dataset: CocoInstances, start: int, stop: int, device: torch.device | str
) -> Iterator[tuple[list[torch.Tensor], list[dict]]]:
    """Yield (images, targets) of iterations ``start`` to ``stop - 1``, with torch's random state
    set for each.

    images: list of float32 [3, H, W] from 0 to 1. Every epoch takes all images once, in a new order.
    """
    seed, size = max(cfg.SEED, 0), cfg.SOLVER.IMS_PER_BATCH
    probability = 0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0

    @functools.lru_cache(2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, epoch)).permutation(len(dataset.ids))

    def keys(i: int) -> list[tuple[int, bool]]:
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


def learning_rate(solver: CfgNode, i: int) -> float:
    """Detectron2's WarmupMultiStepLR: linear warm-up, then BASE_LR times GAMMA for each of STEPS
    that has passed."""
    progress = min(i / min(solver.WARMUP_ITERS, solver.MAX_ITER), 1) if solver.WARMUP_ITERS else 1
    warmup = solver.WARMUP_FACTOR * (1 - progress) + progress
    return solver.BASE_LR * warmup * solver.GAMMA ** sum(i >= step for step in solver.STEPS)


def load_checkpoint(path: Path, model: nn.Module) -> dict:
    """Load one of this run's checkpoints into ``model``; returns its content. Raises InputError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        return saved
    except Exception as error:  # a broken file can fail in any way
        raise InputError(
            f"{path} does not hold a model of the torchvision engine with this config's MODEL settings "
            f"({type(error).__name__})"
        ) from None


def load_start(cfg: CfgNode, model: nn.Module) -> dict | None:
    """Copy MODEL.WEIGHTS, a backbone or a detector, into ``model``; returns their provenance. Raises
    InputError."""
    if not cfg.MODEL.WEIGHTS:
        log.info("MODEL.WEIGHTS is empty: training starts from random weights")
        return None
    if detectors.is_detector(cfg.MODEL.WEIGHTS):
        check_network(cfg, Path(cfg.MODEL.WEIGHTS).parent)
        log.info(detectors.load_detector(cfg.MODEL.WEIGHTS, model, layout.to_ours))
        return detectors.describe_detector(cfg.MODEL.WEIGHTS)
    state, provenance = load_weights(cfg.MODEL.WEIGHTS)
    check_weights(cfg, provenance)
    body = model.backbone.body.state_dict()
    if differ := sorted({name for name in body if not name.endswith("num_batches_tracked")} ^ set(state)):
        raise InputError(
            f"{cfg.MODEL.WEIGHTS} is not the network of MODEL.RESNETS (it lacks or adds {differ[:4]}): "
            "set MODEL.RESNETS to the network of these weights"
        )
    model.backbone.body.load_state_dict(state, strict=False)
    log.info("%s: all %d backbone tensors loaded", cfg.MODEL.WEIGHTS, len(state))
    return provenance


def build_optimizer(model: nn.Module, solver: CfgNode) -> torch.optim.SGD:
    """Detectron2's SGD: BatchNorm's parameters have their own weight decay."""
    norms = [p for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) for p in layer.parameters()]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    return torch.optim.SGD(
        [{"params": others}, {"params": norms, "weight_decay": solver.WEIGHT_DECAY_NORM}],
        solver.BASE_LR,
        solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
    )


class Trainer:
    """A training from its weights, or from ``checkpoint`` on, to model_final.pth. Raises InputError.

    ``val_set`` is what TEST.EVAL_PERIOD evaluates on.
    """

    stop = NO_SIGNALS

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        dataset: CocoInstances,
        val_set: CocoInstances | None = None,
        checkpoint: Path | None = None,
    ):
        self.cfg, self.model, self.dataset, self.val_set = cfg, model, dataset, val_set
        self.folder, self.device = Path(cfg.OUTPUT_DIR), next(model.parameters()).device
        self.optimizer = build_optimizer(model, cfg.SOLVER)
        self.start, self.about, self.complete = 0, None, best.is_complete(cfg, checkpoint)
        if not checkpoint:
            self.provenance = load_start(cfg, model)
            return
        saved = load_checkpoint(checkpoint, model)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.start, self.provenance = saved["iteration"] + 1, saved["weights"]
        self.about = saved.get("run")  # an older version wrote a checkpoint without it
        log.info("%s: resuming at iteration %d of %d", checkpoint.name, self.start, cfg.SOLVER.MAX_ITER)

    def fit(self, origin: Origin) -> None:
        """Train to MAX_ITER, then save model_final.pth. Raises Interrupted when a signal has stopped it."""
        solver, last = self.cfg.SOLVER, self.start - 1
        if not self.start:
            setup = Setup("torchvision", self.provenance, origin=origin)
            categories = self.dataset.dataset.categories
            self.about = begin_training(self.cfg, setup, categories, len(self.dataset.ids))
        self.model.train()
        recent = []  # losses since the last row of metrics.json
        with (
            open(self.folder / "metrics.json", "a" if self.start else "w", buffering=1) as metrics,
            tqdm(
                total=solver.MAX_ITER,
                initial=self.start,
                desc="fine-tuning",
                unit="it",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10,
            ) as bar,
        ):
            self.stop.stepping = True
            # The run may have been killed before it had evaluated.
            end = self.start if self.start and self.evaluate_after(last, metrics) else solver.MAX_ITER
            for i, batch in enumerate(self.batches(self.start, end), self.start):
                recent.append(self.step(i, *batch))
                last = i
                bar.set_postfix(loss=f"{recent[-1]['total_loss']:.3f}", refresh=False)
                bar.update()
                if (i + 1) % 20 == 0 or i + 1 == solver.MAX_ITER:
                    means = {name: np.mean([losses[name] for losses in recent]) for name in recent[0]}
                    metrics.write(
                        json.dumps({"iteration": i, **means, "lr": learning_rate(solver, i)}) + "\n"
                    )
                    recent.clear()
                if self.stop.asked:
                    self.leave(i)
                if (i + 1) % solver.CHECKPOINT_PERIOD == 0:
                    self.save(f"model_{i:07d}.pth", i)
                if self.evaluate_after(i, metrics):
                    break
        try:
            self.make_statistics_precise(last + 1)
        except Stopped:
            self.leave(last)
        self.save(FINAL, last)
        self.stop.stepping = False

    def batches(self, start: int, stop: int) -> Iterator:
        return training_batches(self.cfg, self.dataset, start, stop, self.device)

    def step(self, i: int, images: list[torch.Tensor], targets: list[dict]) -> dict[str, float]:
        """Iteration ``i``: one optimizer step; returns its losses under Detectron2's names."""
        losses = self.model(images, targets)
        total = sum(losses.values())
        # One synchronization for all figures.
        figures = torch.stack([total, *losses.values()]).tolist()
        if not math.isfinite(figures[0]):
            raise InputError(
                f"the loss is {figures[0]:f} at iteration {i}: "
                f"lower SOLVER.BASE_LR ({self.cfg.SOLVER.BASE_LR})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg.SOLVER, i)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return dict(zip(("total_loss", *map(LOSSES.get, losses)), figures))

    def evaluate_after(self, i: int, metrics: TextIO) -> bool:
        """Evaluate after iteration ``i`` if TEST.EVAL_PERIOD asks for it, and keep the best model.

        The last evaluation is that of the saved model. Training goes on as if there had been none, unless
        True is returned: then TEST.PATIENCE has run out.
        """
        period = self.cfg.TEST.EVAL_PERIOD
        if period <= 0 or (i + 1) % period or i + 1 == self.cfg.SOLVER.MAX_ITER:
            return False
        try:
            with self.as_it_was():
                self.make_statistics_precise(i + 1)
                ap = evaluate(self.cfg, self.model, self.val_set, self.stop)
                losses = validation_losses(self.model, self.val_set, self.stop)
                best.keep_if_best(self.cfg, ap, i + 1, lambda: self.content(i))
        except Stopped:
            self.leave(i)
        row = {f"{task}/{key}": value for task, values in ap.items() for key, value in values.items()}
        row |= {f"validation/{name}": loss for name, loss in losses.items()}
        metrics.write(json.dumps({"iteration": i, **row}) + "\n")
        return best.out_of_patience(self.cfg, i + 1)

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """A context after which the model is again what it is now."""
        state = copy.deepcopy(self.model.state_dict())
        sides = self.model.transform.min_size, self.model.transform.max_size
        try:
            yield
        finally:
            self.model.load_state_dict(state)
            self.model.transform.min_size, self.model.transform.max_size = sides
            self.model.train()

    def leave(self, i: int) -> NoReturn:
        """Save after iteration ``i`` and raise Interrupted."""
        leave(i + 1, self.cfg.SOLVER.MAX_ITER, self.save(f"model_{i:07d}.pth", i))

    def make_statistics_precise(self, start: int) -> None:
        """BatchNorm's running statistics over TEST.PRECISE_BN.NUM_ITER batches, those of ``start`` on."""
        if not self.cfg.TEST.PRECISE_BN.ENABLED:
            return
        batches = self.stop.watch(self.batches(start, start + self.cfg.TEST.PRECISE_BN.NUM_ITER))
        # update_statistics calls model(batch), and the model takes (images, targets).
        unpack = self.model.register_forward_pre_hook(lambda _, inputs: inputs[0])
        bar = tqdm(
            batches, "precise BatchNorm", self.cfg.TEST.PRECISE_BN.NUM_ITER, dynamic_ncols=True, disable=None
        )
        update_statistics(self.model, bar)
        unpack.remove()

    def save(self, name: str, i: int) -> bool:
        """Write a checkpoint after iteration ``i``; returns whether the disk had room."""
        content = {**self.content(i), "optimizer": self.optimizer.state_dict()}
        return save_checkpoint(self.folder, name, content)

    def content(self, i: int) -> dict:
        """The model after iteration ``i``, and what led to it."""
        return {
            "model": self.model.state_dict(),
            "iteration": i,
            "weights": self.provenance,
            "run": self.about,
        }


def fit(trainer: Trainer, origin: Origin = Origin(), stop: StopSignals = NO_SIGNALS) -> None:
    """Train to MAX_ITER and write model_final.pth, unless the trainer has started from that file."""
    if trainer.complete:
        return
    trainer.stop = stop
    try:
        trainer.fit(origin)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"{trainer.cfg.SOLVER.IMS_PER_BATCH} images at once do not fit into the memory of "
            f"{trainer.device}: lower SOLVER.IMS_PER_BATCH and, in proportion, SOLVER.BASE_LR"
        ) from None


@torch.no_grad()
def validation_losses(
    model: nn.Module, dataset: CocoInstances, stop: StopSignals = NO_SIGNALS
) -> dict[str, float]:
    """The mean losses of the images of ``dataset``, one by one, under Detectron2's names.

    BatchNorm normalizes by its running statistics, as in :func:`detect`, which has set the images' size.
    """
    model.train()
    for layer in norm_layers(model):
        layer.eval()
    device, rows = next(model.parameters()).device, []
    indices = tqdm(range(len(dataset.ids)), "validation loss", dynamic_ncols=True, disable=None)
    for index in stop.watch(indices):
        torch.manual_seed(index)  # of the samples among the proposals
        image, target = dataset[index, False]
        target = {key: value.to(device) for key, value in target.items()}
        losses = model([image.to(device).float() / 255], [target])
        rows.append(torch.stack([sum(losses.values()), *losses.values()]))
    names = "total_loss", *map(LOSSES.get, losses)
    return dict(zip(names, torch.stack(rows).mean(0).tolist()))


@torch.no_grad()
def detect(
    cfg: CfgNode, model: nn.Module, dataset: CocoInstances, stop: StopSignals = NO_SIGNALS
) -> list[dict]:
    """Detections in COCO's format, with the annotation file's own category ids.

    bbox is [x, y, w, h] in pixels; a model with masks adds segmentation as compressed RLE.
    """
    test_mode(cfg, model)
    device = next(model.parameters()).device
    detections = []
    for image_id in stop.watch(tqdm(dataset.ids, "evaluating", dynamic_ncols=True, disable=None)):
        image = dataset.image(image_id).to(device).float() / 255
        instances = detect_one(model, image)
        for detection in detections_of(instances, image.shape[1:]):
            category_id = dataset.categories[detection["category_id"]]
            detections.append({"image_id": image_id, **detection, "category_id": category_id})
    return detections


def test_mode(cfg: CfgNode, model: nn.Module) -> None:
    """Let ``model`` detect, in images of the size for tests."""
    model.eval()
    model.transform.min_size, model.transform.max_size = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST


def detect_one(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes in pixels of the image, scores, labels and 28 x 28 masks of float32 [3, H, W], on the CPU.

    It takes the steps of model.forward one by one, because forward itself pastes a hundred masks at once:
    gigabytes for a large photograph.
    """
    images, _ = model.transform([image])
    features = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, features)
    (instances,), _ = model.roi_heads(features, proposals, images.image_sizes)
    size = images.image_sizes[0]
    instances["boxes"] = transform.resize_boxes(instances["boxes"], size, image.shape[1:])
    return {key: values.cpu() for key, values in instances.items()}


def detections_of(instances: dict[str, torch.Tensor], size: tuple[int, int]) -> list[dict]:
    """What :func:`detect_one` found in an image of ``size`` (H, W), in COCO's format.

    category_id is the index of the class, from 0; segmentation, where there are masks, is compressed RLE.
    """
    detections = [
        {"category_id": label - 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for (x0, y0, x1, y1), score, label in zip(*(instances[key].tolist() for key in BOX_FIELDS))
    ]
    if "masks" in instances:
        for detection, code in zip(detections, paste_rles(instances["masks"], instances["boxes"], size)):
            detection["segmentation"] = code
    return detections


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
    if not eval_only:
        fit(Trainer(cfg, model, train_set, val_set, start), origin, stop)
    final = cfg.MODEL.WEIGHTS if eval_only and not resume else folder / FINAL
    state, iterations, weights = load_model(final, model.state_dict())
    model.load_state_dict(state)
    ap = evaluate(cfg, model, val_set)
    other_model = eval_only and not (resume and own_training(cfg))
    finest = None if eval_only else best.keep_final_if_best(cfg, ap, iterations)
    outcome = Outcome(ap, iterations, time.time() - began, other_model, judge(cfg), finest)
    return write_results(cfg, Setup("torchvision", weights, origin=origin), outcome)


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


def evaluate(cfg: CfgNode, model: nn.Module, val_set: CocoInstances, stop: StopSignals = NO_SIGNALS) -> dict:
    """AP of the model's detections, which are written to OUTPUT_DIR/inference."""
    folder = Path(cfg.OUTPUT_DIR, "inference")
    detections = detect(cfg, model, val_set, stop)
    (folder / "coco_instances_results.json").write_text(json.dumps(detections))
    val_set.dataset.save(folder / "annotations.json")  # it has the ids that the detections refer to
    return coco_ap(val_set.dataset, detections, ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",))
