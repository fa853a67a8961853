"""A training with Detectron2, after its tools/plain_train_net.py and its DefaultTrainer.

What differs: an iteration may be several forward and backward passes (accumulation); a resumed run goes on
in the data where it stopped; precise BatchNorm statistics are the same on all processes; several processes
work on a CPU too; and training starts only if every tensor of the backbone has arrived.
"""

import weakref

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model, default_writers
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.env import seed_all_rng

from rsa_detectron2.common import workers
from rsa_detectron2.common.distributed import OWN_BUFFERS
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert.writers import load_model
from rsa_detectron2.transfer.d2.accumulation import AccumulatingTrainer
from rsa_detectron2.transfer.d2.data import NUM_WORKERS, Mapper, SkipFirst
from rsa_detectron2.transfer.d2.evaluation import evaluate
from rsa_detectron2.transfer.d2.hooks import PreciseBN, ProgressBar
from rsa_detectron2.transfer.d2.model import build_model
from rsa_detectron2.transfer.d2.weights import (
    ZOO,
    Checkpointer,
    assert_backbone_arrived,
    load_backbone,
    unwrap,
)
from rsa_detectron2.transfer.precise_bn import norm_layers

if not hasattr(SimpleTrainer, "_data_loader_iter"):
    raise ImportError("Detectron2 0.6 and older cannot resume their data loader: install its main branch")


class Record(dict):
    """The run's record, in a form that checkpoints can hold."""

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, state: dict) -> None:
        self.update(state)


class Trainer(TrainerBase):
    """Trains the model of ``cfg``. ``accumulate``: the passes of each process in an iteration."""

    def __init__(self, cfg: CfgNode, accumulate: int = 1):
        super().__init__()
        self.cfg, self.accumulate = cfg, accumulate
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.images = load_images(cfg)
        model = build_model(cfg)
        self.optimizer = build_optimizer(cfg, model)
        on_gpu = cfg.MODEL.DEVICE != "cpu"
        devices = [comm.get_local_rank()] if on_gpu else None
        self.model = create_ddp_model(model, **OWN_BUFFERS, device_ids=devices)
        amp = cfg.SOLVER.AMP.ENABLED and on_gpu
        loader = self.build_loader(cfg)
        self._trainer = AccumulatingTrainer(self.model, loader, self.optimizer, accumulate, amp)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.about = Record()
        trainer = weakref.proxy(self)
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=trainer, run=self.about)
        self.register_hooks(self.build_hooks())

    def train(self) -> None:
        super().train(self.start_iter, self.max_iter)

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

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
        sampler = None
        if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
            seen = start * self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
            sampler = SkipFirst(TrainingSampler(len(self.images), seed=cfg.SEED), seen)
        mapper = workers.Reader(Mapper(cfg, True), NUM_WORKERS)
        loader = build_detection_train_loader(cfg, mapper=mapper, dataset=self.images, sampler=sampler)
        if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            return workers.Loader(loader, NUM_WORKERS)
        loader.dataset = workers.Loader(loader.dataset, NUM_WORKERS)
        return loader

    def build_hooks(self) -> list[HookBase]:
        cfg = self.cfg
        result = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.TEST.PRECISE_BN.ENABLED and norm_layers(self.model):
            without_workers = cfg.clone()  # those of training keep running
            without_workers.defrost()
            without_workers.DATALOADER.NUM_WORKERS = 0
            passes = cfg.TEST.PRECISE_BN.NUM_ITER * self.accumulate
            loader = self.build_loader(without_workers)
            result.append(PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, passes))
        if comm.is_main_process():
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        if cfg.TEST.EVAL_PERIOD:
            # engine.py makes the last evaluation, of the saved file.
            result.append(
                hooks.EvalHook(
                    cfg.TEST.EVAL_PERIOD, lambda: evaluate(cfg, self.model), eval_after_train=False
                )
            )
        if comm.is_main_process():
            writers = default_writers(cfg.OUTPUT_DIR, self.max_iter)
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
        # Without this the random numbers of the first iterations would be drawn again.
        if self.cfg.SEED >= 0:
            seed_all_rng(self.cfg.SEED + comm.get_rank() + self.start_iter)


def load_images(cfg: CfgNode) -> DatasetFromList:
    """The training set, serialized as by Detectron2.

    As Python objects, COCO's annotations would take gigabytes in each process.
    """
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    images = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, min_keypoints=least
    )
    return DatasetFromList(images, copy=False)
