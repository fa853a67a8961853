"""A training with Detectron2, after its tools/plain_train_net.py and its DefaultTrainer.

What differs: an iteration may be several forward and backward passes (accumulation); a resumed run goes on
in the data where it stopped; precise BatchNorm statistics are the same on all processes; several processes
work on a CPU too; and training starts only if every tensor of the backbone has arrived.
"""

import itertools
import weakref
from collections.abc import Iterator
from typing import NoReturn

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import CommonMetricPrinter

from rsa_detectron2.common import distributed, workers
from rsa_detectron2.common.distributed import OWN_BUFFERS
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.loggers import Rows
from rsa_detectron2.common.signals import StopSignals
from rsa_detectron2.transfer.convert.detectors import is_detector, load_detector
from rsa_detectron2.transfer.convert.writers import load_model
from rsa_detectron2.transfer.d2.accumulation import AccumulatingTrainer
from rsa_detectron2.transfer.d2.data import NUM_WORKERS, Mapper, Order, Places
from rsa_detectron2.transfer.d2.hooks import (
    Checkpoints,
    Evaluation,
    OutOfPatience,
    PreciseBN,
    ProgressBar,
    RowWriter,
)
from rsa_detectron2.transfer.d2.model import build_model
from rsa_detectron2.transfer.d2.weights import (
    ZOO,
    Checkpointer,
    assert_backbone_arrived,
    load_backbone,
    unwrap,
)
from rsa_detectron2.transfer.precise_bn import norm_layers
from rsa_detectron2.transfer.report.run_folder import AGAIN_WITH_RESUME, leave

if not hasattr(SimpleTrainer, "_data_loader_iter"):
    raise ImportError("Detectron2 0.6 and older cannot resume their data loader: install its main branch")


class Record(dict):
    """The run's record, in a form that checkpoints can hold."""

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, state: dict) -> None:
        self.update(state)


class Trainer(TrainerBase):
    """Trains the model of ``cfg``, until ``stop`` asks it to save and end.

    accumulate: the passes of each process in an iteration. rows: where the main process writes its figures.
    """

    def __init__(
        self, cfg: CfgNode, accumulate: int = 1, stop: StopSignals | None = None, rows: Rows | None = None
    ):
        super().__init__()
        self.cfg, self.accumulate, self.stop = cfg, accumulate, stop or StopSignals(AGAIN_WITH_RESUME)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        images = load_images(cfg)
        self.wide = [image["width"] > image["height"] for image in images]
        # Serialized: as Python objects, COCO's annotations would take gigabytes in each process.
        self.images = DatasetFromList(images, copy=False)
        model = build_model(cfg)
        self.optimizer = build_optimizer(cfg, model)
        on_gpu = cfg.MODEL.DEVICE != "cpu"
        devices = [comm.get_local_rank()] if on_gpu else None
        self.model = create_ddp_model(model, **OWN_BUFFERS, device_ids=devices)
        amp = cfg.SOLVER.AMP.ENABLED and on_gpu
        loader = self.build_loader(cfg)
        self._trainer = AccumulatingTrainer(self.model, loader, self.optimizer, accumulate, amp)
        self._trainer.seed = cfg.SEED
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.about = Record()
        trainer = weakref.proxy(self)
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=trainer, run=self.about)
        self.register_hooks(self.build_hooks(rows))

    def train(self) -> None:
        """Train to SOLVER.MAX_ITER, or until TEST.PATIENCE runs out. Raises Interrupted."""
        done = self.max_iter
        try:
            super().train(self.start_iter, self.max_iter)
        except OutOfPatience as reason:
            done = reason.iterations
            if comm.is_main_process():
                print(reason, flush=True)
        self.iter = done - 1  # super().train leaves it one higher, and a longer training would skip one
        self.checkpointer.save("model_final", iteration=self.iter)

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def save(self, done: int) -> bool:
        """Write a checkpoint after ``done`` iterations; returns whether this process has written it."""
        self.iter = done - 1  # before the first step of a resumed run it is one higher
        return self.checkpointer.save(f"model_{done - 1:07d}", iteration=done - 1)

    def leave(self, done: int) -> NoReturn:
        """Save after ``done`` iterations and raise Interrupted."""
        leave(done, self.max_iter, distributed.any_rank(self.save(done)))

    def content(self, done: int) -> dict:
        """The model after ``done`` iterations, and what led to it."""
        return {"model": unwrap(self.model).state_dict(), "iteration": done - 1, "run": dict(self.about)}

    def following_batches(self, done: int) -> Iterator[list[dict]]:
        """The TEST.PRECISE_BN.NUM_ITER batches that come after ``done`` iterations."""
        without_workers = self.cfg.clone()  # those of training keep running
        without_workers.defrost()
        without_workers.DATALOADER.NUM_WORKERS = 0
        passes = self.cfg.TEST.PRECISE_BN.NUM_ITER * self.accumulate
        return itertools.islice(self.build_loader(without_workers, done), passes)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    def build_loader(self, cfg: CfgNode, start: int = 0) -> workers.Loader:
        """The images of each pass, from iteration ``start`` on.

        Detectron2's own loader starts the epoch again whenever a run resumes, so that a run which is
        stopped often would never see the later images.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH //= self.accumulate
        mapper, images, sampler = workers.Reader(Mapper(cfg, True), NUM_WORKERS), self.images, None
        if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
            sampler = TrainingSampler(len(images), seed=cfg.SEED)
            kinds = self.wide if cfg.DATALOADER.ASPECT_RATIO_GROUPING else [False] * len(images)
            batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
            images, sampler = Places(images), Order(sampler, kinds, batch_size, start * self.accumulate)
            cfg.DATALOADER.ASPECT_RATIO_GROUPING = False  # it is in the order already
        loader = build_detection_train_loader(cfg, mapper=mapper, dataset=images, sampler=sampler)
        if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            return workers.Loader(loader, NUM_WORKERS)
        loader.dataset = workers.Loader(loader.dataset, NUM_WORKERS)
        return loader

    def build_hooks(self, rows: Rows | None) -> list[HookBase]:
        cfg = self.cfg
        result = [hooks.IterationTimer(), hooks.LRScheduler(), Checkpoints()]
        if cfg.TEST.PRECISE_BN.ENABLED and norm_layers(self.model):
            result.append(PreciseBN())
        if cfg.TEST.EVAL_PERIOD:
            result.append(Evaluation())
        if rows:
            writers = [CommonMetricPrinter(self.max_iter), RowWriter(rows)]
            result += [hooks.PeriodicWriter(writers, period=20), ProgressBar()]
        return result

    def resume_or_load(self, resume: bool = True) -> None:
        """With ``resume``, go on from the last checkpoint if there is one; else load MODEL.WEIGHTS.

        Raises InputError unless every tensor arrives.
        """
        weights = self.cfg.MODEL.WEIGHTS
        if resume and self.checkpointer.has_checkpoint():
            self.resume()
        elif weights in ZOO:
            self.checkpointer.resume_or_load(weights, resume=False)
            self.checkpointer.assert_backbone_arrived(ZOO[weights].get("statistics", True))
        elif weights and is_detector(weights):
            print(load_detector(weights, unwrap(self.model)), flush=True)
        elif weights:
            load_backbone(self.model, weights)
            assert_backbone_arrived(self.model, weights)

    def resume(self) -> None:
        # Check first: Detectron2 only warns about tensors that do not fit.
        load_model(self.checkpointer.get_checkpoint_file(), unwrap(self.model).state_dict())
        try:
            self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=True)
        except ValueError as error:  # the optimizer's
            raise InputError(
                f"the checkpoint in {self.cfg.OUTPUT_DIR} is of other settings ({error}): restore them, "
                "or give another OUTPUT_DIR"
            ) from None
        self.start_iter = self.iter + 1
        self._trainer.data_loader = self.build_loader(self.cfg, self.start_iter)


def load_images(cfg: CfgNode) -> list[dict]:
    """Detectron2's dicts of the training set."""
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, min_keypoints=least
    )
