"""The training loop of the embedded engine: data, optimizer, schedule, checkpoints.

Randomness is derived, never stored: images, flips, image sizes and samples of iteration i are a
pure function of (SEED, i). So a resumed run equals an uninterrupted one: on a CPU bit for bit, on a GPU
up to the order of its atomic sums. Iterations count from 0, as in Detectron2: the checkpoint after
5000 of them is model_0004999.pth.
"""

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn
from tqdm import tqdm

from rsa_detectron2.common import workers
from rsa_detectron2.common.errors import InputError, is_out_of_memory
from rsa_detectron2.common.progress import long_bar
from rsa_detectron2.common.record import Origin
from rsa_detectron2.common.signals import Stopped, StopSignals
from rsa_detectron2.transfer.data.coco import CocoInstances
from rsa_detectron2.transfer.precise_bn import update_statistics
from rsa_detectron2.transfer.report import best
from rsa_detectron2.transfer.report.run_folder import FINAL, leave, save_checkpoint
from rsa_detectron2.transfer.report.runs import Setup, begin_training, open_rows
from rsa_detectron2.transfer.tv.evaluation import LOSSES, NO_SIGNALS, evaluate, validation_losses
from rsa_detectron2.transfer.tv.weights import load_checkpoint, load_start

log = logging.getLogger(__name__)


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
        if checkpoint:
            self.load(checkpoint)
        else:
            self.provenance = load_start(cfg, model)
        self.rows = open_rows(cfg, self.start)

    def load(self, checkpoint: Path) -> None:
        saved = load_checkpoint(checkpoint, self.model)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.start, self.provenance = saved["iteration"] + 1, saved["weights"]
        self.about = saved.get("run")  # an older version wrote a checkpoint without it
        log.info("%s: resuming at iteration %d of %d", checkpoint.name, self.start, self.cfg.SOLVER.MAX_ITER)

    def fit(self, origin: Origin) -> None:
        """Train to MAX_ITER, then save model_final.pth. Raises Interrupted when a signal has stopped it."""
        solver, last = self.cfg.SOLVER, self.start - 1
        if not self.start:
            setup = Setup("torchvision", self.provenance, origin=origin)
            categories = self.dataset.dataset.categories
            self.about = begin_training(self.cfg, setup, categories, len(self.dataset.ids))
        self.model.train()
        recent = []  # losses since the last row
        with long_bar("fine-tuning", solver.MAX_ITER, self.start, "it") as bar:
            self.stop.stepping = True
            # The run may have been killed before it had evaluated.
            end = self.start if self.start and self.evaluate_after(last) else solver.MAX_ITER
            for i, batch in enumerate(self.batches(self.start, end), self.start):
                recent.append(self.step(i, *batch))
                last = i
                bar.set_postfix(loss=f"{recent[-1]['total_loss']:.3f}", refresh=False)
                bar.update()
                if (i + 1) % 20 == 0 or i + 1 == solver.MAX_ITER:
                    means = {name: np.mean([losses[name] for losses in recent]) for name in recent[0]}
                    self.rows.write(i, {**means, "lr": learning_rate(solver, i)})
                    recent.clear()
                if self.stop.asked:
                    self.leave(i)
                if (i + 1) % solver.CHECKPOINT_PERIOD == 0:
                    self.save(f"model_{i:07d}.pth", i)
                if self.evaluate_after(i):
                    log.info("no better model until iteration %d: training ends", i + 1)
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

    def evaluate_after(self, i: int) -> bool:
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
        self.rows.write(i, row)
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
