"""Fine-tuning with Detectron2: its own trainer, fail-closed weights, and one results.json at the end.

The files of this folder alone import detectron2. What differs from Detectron2's DefaultTrainer: an
iteration may be several forward and backward passes (accumulation), a pass may have no object,
precise-BN statistics are the same on all ranks, several processes also work on a CPU, the backbone
is known to have arrived, an image that cannot be read is named, and the final AP is that of the
saved file, read back.
"""

import logging
import os
import re
import time
import traceback
import weakref
from pathlib import Path

import detectron2.utils.comm as comm
import torch
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import DefaultTrainer, SimpleTrainer, default_setup, hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.env import seed_all_rng

from rsa_detectron2.common import workers
from rsa_detectron2.common.distributed import OWN_BUFFERS
from rsa_detectron2.common.errors import InputError, one_line
from rsa_detectron2.common.record import Origin
from rsa_detectron2.transfer.config import (
    BYTES_PER_IMAGE,
    CLASSES_KEYS,
    REFERENCE_GPUS,
    check_possible,
)
from rsa_detectron2.transfer.convert.needs import check_weights
from rsa_detectron2.transfer.convert.writers import load_model
from rsa_detectron2.transfer.d2.accumulation import AccumulatingTrainer
from rsa_detectron2.transfer.d2.data import Mapper, SkipFirst, register_datasets, sound_annotations
from rsa_detectron2.transfer.d2.hooks import PreciseBN, ProgressBar
from rsa_detectron2.transfer.d2.weights import (
    ZOO,
    Checkpointer,
    assert_backbone_arrived,
    load_backbone,
    read_provenance,
    unwrap,
)
from rsa_detectron2.transfer.data.annotations import forget_datasets, load_datasets
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.keypoints import check_keypoints
from rsa_detectron2.transfer.precise_bn import norm_layers
from rsa_detectron2.transfer.report.run_folder import find_start, trained_model
from rsa_detectron2.transfer.report.runs import (
    begin_training,
    check_network,
    check_unchanged,
    load_results,
    own_training,
    read_training,
    settings,
    write_results,
)

WORKERS = "DATALOADER.NUM_WORKERS"
POSSIBLE = {  # key: what can be trained on boxes, masks and keypoints, from a pre-trained ResNet
    "MODEL.META_ARCHITECTURE": list(CLASSES_KEYS),
    "MODEL.PROPOSAL_GENERATOR.NAME": ["RPN"],
    "MODEL.LOAD_PROPOSALS": [False],
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": [False],
    "MODEL.ROI_HEADS.NAME": ["StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads"],
}
ONE_LINE = (InputError, FloatingPointError, torch.OutOfMemoryError)  # errors that end as one line


if not hasattr(SimpleTrainer, "_data_loader_iter"):
    raise ImportError(
        "older than June 2022, its release 0.6 among them: a resumed run could not go on in the data"
    )


class Record(dict):
    """The run's record, which its checkpoints hold as well."""

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, state):
        self.update(state)


class Trainer(DefaultTrainer):
    """DefaultTrainer with the differences that this file's first lines name."""

    def __init__(self, cfg, accumulate=1):
        TrainerBase.__init__(self)
        on_gpu = cfg.MODEL.DEVICE != "cpu"
        self.start_iter, self.max_iter, self.cfg, self.accumulate = 0, cfg.SOLVER.MAX_ITER, cfg, accumulate
        # Serialised, as Detectron2 does it: COCO's annotations as Python's objects would take
        # gigabytes in each process.
        self.images = DatasetFromList(
            get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
                if cfg.MODEL.KEYPOINT_ON
                else 0,
            ),
            copy=False,
        )
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = create_ddp_model(model, **OWN_BUFFERS, device_ids=[comm.get_local_rank()] if on_gpu else None)
        self._trainer = AccumulatingTrainer(
            model, self.build_loader(cfg), optimizer, accumulate, cfg.SOLVER.AMP.ENABLED and on_gpu
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.about = Record()
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), run=self.about)
        self.register_hooks(self.build_hooks())

    def build_loader(self, cfg, start=0):
        """The loader of a pass's images from iteration ``start`` on. Detectron2's would begin anew
        whenever a run goes on, in the same order: one that is stopped often would never see the
        other images."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH //= self.accumulate
        sampler = None
        if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
            seen = start * self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
            sampler = SkipFirst(TrainingSampler(len(self.images), seed=cfg.SEED), seen)
        mapper = workers.Reader(Mapper(cfg, True), WORKERS)
        loader = build_detection_train_loader(cfg, mapper=mapper, dataset=self.images, sampler=sampler)
        if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            return workers.Loader(loader, WORKERS)
        loader.dataset = workers.Loader(loader.dataset, WORKERS)
        return loader

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = workers.Reader(Mapper(cfg, False), WORKERS)
        return workers.Loader(build_detection_test_loader(cfg, dataset_name, mapper=mapper), WORKERS)

    @classmethod
    def build_model(cls, cfg):
        try:
            model = super().build_model(with_empty_passes(cfg))
        except (
            AssertionError,
            AttributeError,
            KeyError,
            NotImplementedError,
            TypeError,
            ValueError,
        ) as error:
            reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # the assertion itself
            raise InputError(
                "Detectron2 cannot build the network of these MODEL settings "
                f"({type(error).__name__}: {reason})"
            ) from error
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":  # evaluation too: a CPU has time to lose
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return model

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    def build_hooks(self):
        cfg, first = self.cfg, comm.is_main_process()
        result = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.TEST.PRECISE_BN.ENABLED and norm_layers(self.model):
            quiet = cfg.clone()
            quiet.defrost()
            quiet.DATALOADER.NUM_WORKERS = 0  # beside the training loader's
            result.append(
                PreciseBN(
                    cfg.TEST.EVAL_PERIOD,
                    self.model,
                    self.build_loader(quiet),
                    cfg.TEST.PRECISE_BN.NUM_ITER * self.accumulate,
                )
            )
        if first:
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        if cfg.TEST.EVAL_PERIOD:  # the evaluation at the end is that of the saved file (_train below)
            result.append(
                hooks.EvalHook(
                    cfg.TEST.EVAL_PERIOD, lambda: self.test(cfg, self.model), eval_after_train=False
                )
            )
        return (
            result + [hooks.PeriodicWriter(self.build_writers(), period=20), ProgressBar()]
            if first
            else result
        )

    def resume_or_load(self, resume=True):
        weights = self.cfg.MODEL.WEIGHTS
        if resume and self.checkpointer.has_checkpoint():
            # Detectron2 only warns
            load_model(self.checkpointer.get_checkpoint_file(), unwrap(self.model).state_dict())
            try:
                super().resume_or_load(True)
            except ValueError as error:  # the optimizer's
                raise InputError(
                    f"the checkpoint in {self.cfg.OUTPUT_DIR} is of other settings ({error}): restore them, "
                    "or give another OUTPUT_DIR"
                ) from None
            self._trainer.data_loader = self.build_loader(self.cfg, self.start_iter)
            # or else the same random numbers as in its first iterations would be drawn again
            if self.cfg.SEED >= 0:
                seed_all_rng(self.cfg.SEED + comm.get_rank() + self.start_iter)
        elif weights in ZOO:
            super().resume_or_load(False)
            self.checkpointer.assert_backbone_arrived(ZOO[weights].get("statistics", True))
        elif weights:
            load_backbone(self.model, weights)
            assert_backbone_arrived(self.model, weights)


def with_empty_passes(cfg):
    """``cfg`` whose heads have a synchronized norm that takes a pass without any object.

    With torch's SyncBatchNorm Detectron2 refuses such a pass, and where no rank has an object, the
    running statistics of torch's would decay. Detectron2's naiveSyncBN_N takes part in the
    collective even with no region, and weights the ranks by their regions.
    """
    cfg = cfg.clone()
    cfg.defrost()
    for head in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        if head.NORM == "SyncBN":
            head.NORM = "naiveSyncBN_N"
    return cfg


def train(cfg, processes=1, resume=False, eval_only=False, accumulate=None, origin=Origin()):
    """Fine-tune and evaluate in ``processes`` processes, one per GPU, or on the CPU; writes results.json.

    resume: go on from the last checkpoint in OUTPUT_DIR, if there is one. accumulate: passes that an
    iteration's images are split into, by memory if None. Returns the content of results.json. Raises
    InputError.
    """
    check_possible(cfg, POSSIBLE, "the detectron2 engine")
    start = None if eval_only else find_start(cfg.OUTPUT_DIR, resume)
    found = check_datasets(cfg, eval_only)
    if cfg.MODEL.KEYPOINT_ON:
        check_keypoints(cfg, eval_only)
    gpus = torch.cuda.device_count()
    if not gpus:
        cfg.MODEL.DEVICE = "cpu"
    elif processes > gpus or processes > 1 and cfg.MODEL.DEVICE == "cpu":
        raise InputError(f"{processes} processes on {cfg.MODEL.DEVICE}, but this machine shows {gpus} GPUs")
    if eval_only:
        if not resume and not Path(cfg.MODEL.WEIGHTS).is_file():
            raise InputError(
                f"--eval-only needs a fine-tuned model, and there is no MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}"
            )
        check_network(cfg, cfg.OUTPUT_DIR if resume else Path(cfg.MODEL.WEIGHTS).parent)
    provenance, reference, trained_on = None, cfg.SOLVER.REFERENCE_WORLD_SIZE, processes
    if eval_only and resume and (training := read_training(cfg.OUTPUT_DIR)):
        trained_on = training["processes"]
        # by the training set, see below
        cfg.INPUT.MASK_FORMAT = settings(training["config"])["INPUT.MASK_FORMAT"]
    if reference and (not eval_only or resume):
        if cfg.SOLVER.IMS_PER_BATCH % reference:
            raise InputError(
                f"the schedule is scaled from {reference} GPUs, among which "
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide: leave out --scale-schedule"
            )
        cfg = DefaultTrainer.auto_scale_workers(cfg, trained_on)
        # precise BatchNorm needs as many images as ever
        cfg.TEST.PRECISE_BN.NUM_ITER = cfg.TEST.PRECISE_BN.NUM_ITER * reference // trained_on
    if not eval_only:
        accumulate = plan_passes(cfg, processes, accumulate)
        if cfg.INPUT.MASK_FORMAT == "polygon" and any(dataset.has_rle() for dataset in found):
            cfg.INPUT.MASK_FORMAT = "bitmask"
            print("the training set has run-length encoded masks: INPUT.MASK_FORMAT is bitmask", flush=True)
        if cfg.MODEL.WEIGHTS and not start:
            provenance = read_provenance(cfg.MODEL.WEIGHTS)
            check_weights(cfg, provenance)
        elif not start:
            print("MODEL.WEIGHTS is empty: training starts from random weights", flush=True)
    if cfg.MODEL.DEVICE == "cpu" and processes > 1:
        for part in cfg.MODEL.values():
            if isinstance(part, dict) and part.get("NORM") == "SyncBN":
                part["NORM"] = "BN"
        print("SyncBN needs GPUs: on the CPU each process has a BatchNorm of its own", flush=True)
    accumulate = accumulate or 1
    if start:
        check_unchanged(cfg, processes, accumulate)
    resume = resume if eval_only else bool(start)
    # not which processes it terminates
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    datasets = load_datasets(cfg, eval_only, own_only=True)
    if cfg.DATASETS.TEST[0] in datasets:
        datasets[cfg.DATASETS.TEST[0]].save(sound_annotations(cfg))
    del datasets, found  # or clearing the cache below would free nothing
    if processes > 1:
        forget_datasets()  # they load their own
    try:
        launch(
            train_process,
            processes,
            dist_url="auto",
            args=(cfg, resume, eval_only, provenance, accumulate, origin),
        )
    except (*ONE_LINE, torch.multiprocessing.ProcessRaisedException) as error:
        # An error of another process is a traceback, which ends in the exception's name and message.
        text = (
            str(error)
            if isinstance(error, torch.multiprocessing.ProcessRaisedException)
            else (f"{type(error).__name__}: {error}")
        )
        said = re.search(
            r".*^[\w.]*(InputError|FloatingPointError|OutOfMemoryError): (.*)", text, re.M | re.DOTALL
        )
        if not said:
            raise
        hint = {
            "FloatingPointError": f": lower SOLVER.BASE_LR ({cfg.SOLVER.BASE_LR})",
            "OutOfMemoryError": f": give --accumulate {2 * accumulate}",
        }.get(said[1], "")
        raise InputError(said[2].strip() + hint) from None
    except torch.multiprocessing.ProcessExitedException as error:
        raise InputError(
            f"process {error.error_index} of {processes} ended by itself "
            f"({error.signal_name or error.exit_code}"
            + ", most likely because memory ran out" * (error.signal_name == "SIGKILL")
            + "): the same command with --resume goes on"
        ) from None
    return load_results(cfg.OUTPUT_DIR)


def plan_passes(cfg, processes, accumulate=None):
    """How many passes each process splits its share of SOLVER.IMS_PER_BATCH into; prints it. Raises
    InputError.

    By default as few as fit the GPU by :data:`BYTES_PER_IMAGE`, since BatchNorm sees the images of one pass.
    """
    images, scaled = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if accumulate is not None and accumulate < 1:
        raise InputError(f"--accumulate is {accumulate}: it must be at least 1")
    if scaled and accumulate:
        raise InputError("--accumulate keeps the schedule and --scale-schedule adapts it: choose one")
    if accumulate is None:
        accumulate = 1
        if cfg.MODEL.DEVICE != "cpu" and not scaled and images % processes == 0:
            room = max(1, int(0.8 * torch.cuda.get_device_properties(0).total_memory / BYTES_PER_IMAGE))
            share = images // processes
            accumulate = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= room)
    if images % (processes * accumulate):
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {images} does not divide among {processes} processes x {accumulate} passes"
        )
    each = images // (processes * accumulate)
    print(
        f"an iteration: {images} images = {processes} {cfg.MODEL.DEVICE} "
        f"x {accumulate} accumulated x {each}; "
        f"BatchNorm sees {each * (1 if cfg.MODEL.DEVICE == 'cpu' else processes)} at once"
        + f"; schedule and learning rate scaled from {REFERENCE_GPUS} GPUs"
        * bool(scaled),
        flush=True,
    )
    return accumulate


def without_traceback(record):
    """A filter of Detectron2's log: no traceback of what ends as one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], ONE_LINE))


def train_process(*arguments):
    """What each process runs: _train, whose errors that a user can mend become InputError, which
    the launcher knows."""
    try:
        _train(*arguments)
    except (InputError, OSError, MemoryError) as error:
        raise InputError(one_line(error)) from None


def _train(cfg, resume, eval_only, provenance, accumulate, origin):
    start = time.perf_counter()
    logging.getLogger("detectron2.engine.train_loop").addFilter(without_traceback)
    # Detectron2 calls a deprecated function
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    if comm.get_world_size() > 1 and cfg.MODEL.DEVICE == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.get_world_size()))
    register_datasets(cfg, eval_only)  # a process that launch has started knows of none
    cfg.freeze()
    default_setup(cfg, None)
    if not eval_only:
        trainer = Trainer(cfg, accumulate)
        forget_datasets()  # the trainer has its own, serialized
        trainer.resume_or_load(resume)
        if comm.is_main_process() and trainer.start_iter == 0:
            trainer.about.update(
                begin_training(
                    cfg,
                    provenance,
                    comm.get_world_size(),
                    accumulate,
                    "detectron2",
                    origin,
                    len(trainer.images),
                )
            )
        if trainer.start_iter < trainer.max_iter:
            trainer.train()
        comm.synchronize()  # only the main process writes the file that all read now
    model = Trainer.build_model(cfg)
    final = cfg.MODEL.WEIGHTS if eval_only and not resume else trained_model(cfg.OUTPUT_DIR)
    state, iterations, _ = load_model(final, model.state_dict())
    model.load_state_dict(state, strict=False)  # a frozen layer's counter is in neither
    ap = Trainer.test(cfg, model)
    if comm.is_main_process():
        if cfg.MODEL.KEYPOINT_ON:
            ap.setdefault("keypoints", {})  # Detectron2 leaves it out where nothing was detected
        training = read_training(Path(final).parent)
        # then these are the training's results once more
        own = own_training(cfg) if eval_only and resume else None
        processes, accumulate = (
            (own["processes"], own["accumulate"]) if own else (comm.get_world_size(), accumulate)
        )
        write_results(
            cfg,
            "detectron2",
            ap,
            training["weights"] if training else {"source": str(final)},
            iterations,
            time.perf_counter() - start,
            eval_only and not own,
            processes,
            accumulate,
            origin,
        )
    comm.synchronize()  # nobody takes the group down while another still reads
