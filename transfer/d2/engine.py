"""Fine-tuning with Detectron2: checks, processes, training, and the AP of the saved file, read back."""

import contextlib
import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, default_setup

from rsa_detectron2.common import distributed, loggers
from rsa_detectron2.common.errors import InputError, Interrupted, is_out_of_memory, one_line
from rsa_detectron2.common.launch import Processes, launch
from rsa_detectron2.common.loggers import Rows
from rsa_detectron2.common.record import Origin
from rsa_detectron2.common.signals import Stopped, StopSignals
from rsa_detectron2.transfer.config import BYTES_PER_IMAGE, CLASSES_KEYS, REFERENCE_GPUS, check_possible
from rsa_detectron2.transfer.convert import detectors
from rsa_detectron2.transfer.convert.needs import check_weights
from rsa_detectron2.transfer.convert.writers import load_model
from rsa_detectron2.transfer.d2.data import categories_of, register_datasets, sound_annotations
from rsa_detectron2.transfer.d2.evaluation import evaluate
from rsa_detectron2.transfer.d2.hooks import OutOfPatience
from rsa_detectron2.transfer.d2.model import build_model
from rsa_detectron2.transfer.d2.trainer import Trainer
from rsa_detectron2.transfer.d2.weights import ZOO, read_provenance
from rsa_detectron2.transfer.data.annotations import forget_datasets, load_datasets
from rsa_detectron2.transfer.data.average_precision import METRICS
from rsa_detectron2.transfer.data.checks import check_datasets
from rsa_detectron2.transfer.data.keypoints import check_keypoints
from rsa_detectron2.transfer.report.best import is_complete, keep_final_if_best
from rsa_detectron2.transfer.report.quality import judge
from rsa_detectron2.transfer.report.run_folder import (
    AGAIN_WITH_RESUME,
    find_start,
    iterations_of,
    trained_model,
)
from rsa_detectron2.transfer.report.runs import (
    Outcome,
    Setup,
    begin_training,
    bn_batch_size,
    check_network,
    check_unchanged,
    load_results,
    open_rows,
    own_training,
    read_training,
    settings,
    write_results,
)

# Key: the values with which a pre-trained ResNet can be fine-tuned on boxes, masks and keypoints.
POSSIBLE = {
    "MODEL.META_ARCHITECTURE": list(CLASSES_KEYS),
    "MODEL.PROPOSAL_GENERATOR.NAME": ["RPN"],
    "MODEL.LOAD_PROPOSALS": [False],
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": [False],
    "MODEL.ROI_HEADS.NAME": ["StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads"],
    "TEST.BEST_METRIC": METRICS,
}
# What ends as one line, besides errors of memory.
ONE_LINE = (InputError, Interrupted, FloatingPointError, OutOfPatience)


@dataclass(frozen=True)
class Passes:
    """How the images of an iteration are split: among processes, and into several passes of each."""

    processes: Processes = Processes()
    accumulate: int | None = None  # passes of each process; None: by memory


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`train`."""

    cfg: CfgNode
    passes: Passes
    resume: bool
    eval_only: bool
    origin: Origin


@dataclass
class Job:
    """What each process of a fine-tuning does."""

    cfg: CfgNode
    setup: Setup
    start: Path | None  # the checkpoint that training goes on from
    resume: bool  # evaluation: of the model of OUTPUT_DIR
    eval_only: bool


def train(
    cfg: CfgNode,
    passes: Passes = Passes(),
    resume: bool = False,
    eval_only: bool = False,
    origin: Origin = Origin(),
) -> dict:
    """Fine-tune and evaluate; returns the content of results.json. Raises InputError.

    resume: go on from the last checkpoint in OUTPUT_DIR, if there is one; with ``eval_only``, evaluate the
    model there. origin: where ``cfg`` came from, for the run's record.
    """
    request = Request(cfg, passes, resume, eval_only, origin)
    launch(run_process, request, passes.processes, AGAIN_WITH_RESUME)
    return load_results(cfg.OUTPUT_DIR)


def plan(request: Request) -> Job:
    """Check a fine-tuning, and settle what is left open. Raises InputError."""
    cfg, passes, resume, eval_only = request.cfg, request.passes, request.resume, request.eval_only
    processes, accumulate = passes.processes.all, passes.accumulate
    check_possible(cfg, POSSIBLE, "the detectron2 engine")
    loggers.check(cfg)
    start = None if eval_only else find_start(cfg.OUTPUT_DIR, resume)
    datasets = check_datasets(cfg, eval_only)
    if cfg.MODEL.KEYPOINT_ON:
        check_keypoints(cfg, eval_only)
    choose_device(cfg, passes.processes.here)
    if eval_only:
        check_model(cfg, resume)
    if not eval_only or resume:
        cfg = scale_from_reference(cfg, processes, eval_only)
    provenance = None
    if not eval_only:
        accumulate = plan_passes(cfg, processes, accumulate)
        choose_mask_format(cfg, datasets)
        if not start:
            provenance = check_start(cfg)
    use_local_batch_norm(cfg, processes)
    setup = Setup("detectron2", provenance, processes, accumulate or 1, request.origin)
    if start:
        check_unchanged(cfg, processes, setup.accumulate, iterations_of(start))
    save_annotations(cfg, eval_only)
    return Job(cfg, setup, start, resume, eval_only)


def choose_device(cfg: CfgNode, processes: int) -> None:
    """Set MODEL.DEVICE to the CPU on a machine without GPUs. Raises InputError for too many processes."""
    gpus = torch.cuda.device_count()
    if not gpus:
        cfg.MODEL.DEVICE = "cpu"
    elif processes > gpus or processes > 1 and cfg.MODEL.DEVICE == "cpu":
        raise InputError(
            f"{processes} processes on {cfg.MODEL.DEVICE}, but this machine shows {gpus} GPUs: give fewer"
        )


def check_model(cfg: CfgNode, resume: bool) -> None:
    """Raises InputError unless there is a model to evaluate, and it was trained as ``cfg`` builds it."""
    if not resume and not Path(cfg.MODEL.WEIGHTS).is_file():
        raise InputError(
            f"--eval-only needs a fine-tuned model, and there is no MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}"
        )
    check_network(cfg, cfg.OUTPUT_DIR if resume else Path(cfg.MODEL.WEIGHTS).parent)


def scale_from_reference(cfg: CfgNode, processes: int, eval_only: bool) -> CfgNode:
    """``cfg`` with its schedule for this number of GPUs, where SOLVER.REFERENCE_WORLD_SIZE asks for it.

    An evaluation takes the number of GPUs and the mask format of the training. Raises InputError.
    """
    if eval_only and (training := read_training(cfg.OUTPUT_DIR)):
        processes = training["processes"]
        cfg.INPUT.MASK_FORMAT = settings(training["config"])["INPUT.MASK_FORMAT"]
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if not reference:
        return cfg
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise InputError(
            f"the schedule is scaled from {reference} GPUs, among which "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide: leave out --scale-schedule"
        )
    cfg = DefaultTrainer.auto_scale_workers(cfg, processes)
    # Precise BatchNorm still needs as many images.
    cfg.TEST.PRECISE_BN.NUM_ITER = cfg.TEST.PRECISE_BN.NUM_ITER * reference // processes
    return cfg


def choose_mask_format(cfg: CfgNode, datasets: list) -> None:
    if cfg.INPUT.MASK_FORMAT == "polygon" and any(dataset.has_rle() for dataset in datasets):
        cfg.INPUT.MASK_FORMAT = "bitmask"
        print("the training set has run-length encoded masks: INPUT.MASK_FORMAT is bitmask", flush=True)


def check_start(cfg: CfgNode) -> dict | None:
    """The provenance of MODEL.WEIGHTS. Raises InputError where they do not fit the configuration."""
    if not cfg.MODEL.WEIGHTS:
        print("MODEL.WEIGHTS is empty: training starts from random weights", flush=True)
        return None
    if cfg.MODEL.WEIGHTS not in ZOO and detectors.is_detector(cfg.MODEL.WEIGHTS):
        check_network(cfg, Path(cfg.MODEL.WEIGHTS).parent)
        return detectors.describe_detector(cfg.MODEL.WEIGHTS)
    provenance = read_provenance(cfg.MODEL.WEIGHTS)
    check_weights(cfg, provenance)
    return provenance


def use_local_batch_norm(cfg: CfgNode, processes: int) -> None:
    """Replace SyncBN by BatchNorm where there are several processes on a CPU."""
    if cfg.MODEL.DEVICE != "cpu" or processes == 1:
        return
    for part in cfg.MODEL.values():
        if isinstance(part, dict) and part.get("NORM") == "SyncBN":
            part["NORM"] = "BN"
    print("SyncBN needs GPUs: on the CPU each process has a BatchNorm of its own", flush=True)


def save_annotations(cfg: CfgNode, eval_only: bool) -> None:
    """Write the annotations of the test set as they are evaluated, unless the set is Detectron2's own."""
    datasets = load_datasets(cfg, eval_only, own_only=True)
    sound_annotations(cfg).unlink(missing_ok=True)  # of an evaluation on another set
    if cfg.DATASETS.TEST[0] in datasets:
        datasets[cfg.DATASETS.TEST[0]].save(sound_annotations(cfg))


def plan_passes(cfg: CfgNode, processes: int, accumulate: int | None = None) -> int:
    """How many passes each process splits its images of an iteration into; prints it.

    By default as few as fit the GPU by :data:`BYTES_PER_IMAGE`, because BatchNorm sees only the images of one
    pass. Raises InputError.
    """
    images, scaled = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if accumulate is not None and accumulate < 1:
        raise InputError(f"--accumulate is {accumulate}: it must be at least 1")
    if scaled and accumulate:
        raise InputError("--accumulate keeps the schedule and --scale-schedule adapts it: choose one")
    if accumulate is None:
        accumulate = 1
        if cfg.MODEL.DEVICE != "cpu" and not scaled and images % processes == 0:
            most = max(1, int(0.8 * torch.cuda.get_device_properties(0).total_memory / BYTES_PER_IMAGE))
            local = images // processes
            accumulate = next(n for n in range(1, local + 1) if local % n == 0 and local // n <= most)
    if images % (processes * accumulate):
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {images} does not divide among {processes} processes x {accumulate} "
            "passes: give another number of either"
        )
    each = images // (processes * accumulate)
    note = f"; schedule and learning rate scaled from {REFERENCE_GPUS} GPUs" if scaled else ""
    print(
        f"an iteration: {images} images = {processes} {cfg.MODEL.DEVICE} "
        f"x {accumulate} accumulated x {each}; "
        f"BatchNorm sees {bn_batch_size(cfg, processes, accumulate)} at once{note}",
        flush=True,
    )
    return accumulate


def run_process(request: Request) -> None:
    """What each process runs. Raises InputError for errors that the user can mend, or Interrupted."""
    if distributed.launched():
        comm.create_local_process_group(distributed.local_world_size())
    job = None
    try:
        with StopSignals(AGAIN_WITH_RESUME) as stop:
            job = distributed.from_first(plan(request) if comm.is_main_process() else None)
            run(job, stop)
    except Stopped as stopped:
        raise Interrupted(str(stopped)) from None
    except FloatingPointError as error:
        raise InputError(f"{one_line(error)}: lower SOLVER.BASE_LR ({request.cfg.SOLVER.BASE_LR})") from None
    except (InputError, OSError, MemoryError) as error:
        raise InputError(one_line(error)) from None
    except RuntimeError as error:
        if job is None or not is_out_of_memory(error):
            raise
        raise InputError(f"{one_line(error)}: give --accumulate {2 * job.setup.accumulate}") from None


def run(job: Job, stop: StopSignals) -> None:
    """Train, unless ``eval_only``, then evaluate the saved model and write its results."""
    start, cfg = time.perf_counter(), job.cfg
    logging.getLogger("detectron2.engine.train_loop").addFilter(without_traceback)
    register_datasets(cfg, job.eval_only)
    cfg.freeze()
    default_setup(cfg, None)
    with training_rows(job) as rows:
        if not job.eval_only:
            fit(job, stop, rows)
        evaluate_saved_model(job, start, stop, rows)
    comm.synchronize()  # no process may take the group down while another still reads
    # DistributedDataParallel, which reference cycles of the trainer hold, must go before the group.
    gc.collect()


def without_traceback(log: logging.LogRecord) -> bool:
    """A filter of Detectron2's log: no traceback of errors that end as one line."""
    error = log.exc_info and log.exc_info[1]
    return not (error and (isinstance(error, ONE_LINE) or is_out_of_memory(error)))


def training_rows(job: Job) -> contextlib.AbstractContextManager[Rows | None]:
    """The rows of a training, which the main process writes; None in the others, and of an evaluation."""
    if job.eval_only or not comm.is_main_process():
        return contextlib.nullcontext()
    return open_rows(job.cfg, iterations_of(job.start) if job.start else 0)


def fit(job: Job, stop: StopSignals, rows: Rows | None) -> None:
    """Train to SOLVER.MAX_ITER. Raises Interrupted when a signal has stopped it."""
    trainer = Trainer(job.cfg, job.setup.accumulate, stop, rows)
    forget_datasets()  # the trainer has its own copy, serialized
    trainer.resume_or_load(bool(job.start))
    if comm.is_main_process() and trainer.start_iter == 0:
        categories = categories_of(job.cfg.DATASETS.TRAIN[0])
        trainer.about.update(begin_training(job.cfg, job.setup, categories, len(trainer.images)))
    stop.stepping = True
    if not is_complete(job.cfg, job.start):
        trainer.train()
    stop.stepping = False
    comm.synchronize()  # only the main process writes the file that all read now


def evaluate_saved_model(job: Job, start: float, stop: StopSignals, rows: Rows | None) -> None:
    """Read the saved model, evaluate it, and write results.json. ``start``: when the run began, by
    time.perf_counter."""
    cfg, setup = job.cfg, job.setup
    model = build_model(cfg)
    final = trained_model(cfg.OUTPUT_DIR) if job.resume or not job.eval_only else cfg.MODEL.WEIGHTS
    state, iterations, _ = load_model(final, model.state_dict())
    model.load_state_dict(state, strict=False)  # num_batches_tracked of a frozen layer is in neither
    ap = evaluate(cfg, model, stop)
    if not comm.is_main_process():
        return
    if cfg.MODEL.KEYPOINT_ON:
        ap.setdefault("keypoints", {})  # Detectron2 leaves it out where nothing was detected
    training = read_training(Path(final).parent)
    weights = training["weights"] if training else {"source": str(final)}
    # If the settings are those of the training, these are the results of that training again.
    own = own_training(cfg) if job.eval_only and job.resume else None
    processes, accumulate = setup.processes, setup.accumulate
    if own:
        processes, accumulate = own["processes"], own["accumulate"]
    setup = Setup("detectron2", weights, processes, accumulate, setup.origin)
    finest = None if job.eval_only else keep_final_if_best(cfg, ap, iterations)
    seconds = time.perf_counter() - start
    outcome = Outcome(ap, iterations, seconds, job.eval_only and not own, judge(cfg), finest)
    write_results(cfg, setup, outcome, rows)
