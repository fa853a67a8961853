"""Hooks of the training loop: checkpoints, precise BatchNorm over all processes, evaluation, a progress bar.

What is due after an iteration is due again when a run goes on from there: it may have been stopped before.
"""

from collections import defaultdict

import detectron2.utils.comm as comm
import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from rsa_detectron2.common import distributed
from rsa_detectron2.common.loggers import Rows
from rsa_detectron2.common.progress import long_bar
from rsa_detectron2.common.signals import Stopped
from rsa_detectron2.transfer.d2.data import seed_of
from rsa_detectron2.transfer.d2.evaluation import evaluate, validation_losses
from rsa_detectron2.transfer.precise_bn import update_statistics
from rsa_detectron2.transfer.report import best


class OutOfPatience(Exception):
    """TEST.PATIENCE evaluations have brought no better model."""

    def __init__(self, iterations: int) -> None:
        super().__init__(f"no better model until iteration {iterations}: training ends")
        self.iterations = iterations


class Checkpoints(HookBase):
    """Saves every SOLVER.CHECKPOINT_PERIOD iterations, and when a signal asks the training to stop."""

    def before_step(self) -> None:
        self.stopping = distributed.any_rank_later(lambda: self.trainer.stop.asked)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.stopping():  # all leave after the same iteration
            self.trainer.leave(done)
        if done % self.trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0:
            self.trainer.save(done)


class Due(HookBase):
    """What is due every TEST.EVAL_PERIOD iterations."""

    def before_train(self) -> None:
        if self.trainer.start_iter:
            self.work(self.trainer.start_iter)

    def after_step(self) -> None:
        self.work(self.trainer.iter + 1)

    def is_due(self, done: int) -> bool:
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        return period > 0 and done % period == 0

    def work(self, done: int) -> None:
        raise NotImplementedError


class PreciseBN(Due):
    """BatchNorm's statistics over the batches that follow, of all processes, before each evaluation and at
    the end. By Detectron2's hook each process has its own."""

    def work(self, done: int) -> None:
        trainer = self.trainer
        if not (self.is_due(done) or done == trainer.max_iter):
            return
        if trainer.cfg.SEED >= 0:
            torch.manual_seed(seed_of(trainer.cfg.SEED, comm.get_rank(), done))
        try:
            with EventStorage():  # the layers log here, not into the training's storage
                update_statistics(trainer.model, trainer.stop.watch(trainer.following_batches(done)))
        except Stopped:
            trainer.leave(done)


class Evaluation(Due):
    """AP and losses on DATASETS.TEST. The last evaluation is engine.py's, of the saved file."""

    def work(self, done: int) -> None:
        trainer = self.trainer
        if not self.is_due(done) or done == trainer.max_iter:
            return
        try:
            ap = evaluate(trainer.cfg, trainer.model, trainer.stop)
            losses = validation_losses(trainer.cfg, trainer.model, trainer.stop)
        except Stopped:
            trainer.leave(done)
        if comm.is_main_process():
            figures = flatten_results_dict({**ap, "validation": losses})
            # A run that goes on here is in the iteration after it.
            trainer.storage.put_scalars(**figures, smoothing_hint=False, cur_iter=done - 1)
            best.keep_if_best(trainer.cfg, ap, done, lambda: trainer.content(done))
        if distributed.any_rank(comm.is_main_process() and best.out_of_patience(trainer.cfg, done)):
            raise OutOfPatience(done)


class RowWriter(EventWriter):
    """Writes what is new in Detectron2's storage as rows; medians over 20 iterations, as its JSONWriter."""

    def __init__(self, rows: Rows):
        self.rows, self.last = rows, -1

    def write(self) -> None:
        storage, new, images = get_event_storage(), defaultdict(dict), defaultdict(dict)
        for name, (value, i) in storage.latest_with_smoothing_hint(20).items():
            if i > self.last:
                new[i][name] = value
        for name, image, i in storage._vis_data:  # those of VIS_PERIOD, as Detectron2's writer takes them
            images[i][name] = image
        storage.clear_images()
        for i in sorted({*new, *images}):
            for name, image in images[i].items():
                self.rows.draw(i, name, image)
            if new[i]:
                self.rows.write(i, new[i])
        self.last = max(new, default=self.last)


class ProgressBar(HookBase):
    """Iterations done, loss and time left, beside Detectron2's own lines."""

    bar = None

    def before_train(self) -> None:
        self.bar = long_bar("fine-tuning", self.trainer.max_iter, self.trainer.start_iter, "it")

    def after_step(self) -> None:
        losses = self.trainer.storage.histories().get("total_loss")
        if losses:
            self.bar.set_postfix(loss=f"{losses.median(20):.3f}", refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        if self.bar is not None:  # None when another hook failed before training began
            self.bar.close()
