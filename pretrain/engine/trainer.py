"""The pre-training loop: data, networks, objective, optimizer and schedules, over the global batches."""

import contextlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common import distributed, files, record
from rsa_detectron2.common.errors import InputError, Interrupted, is_out_of_memory, one_line
from rsa_detectron2.common.signals import Stopped, StopSignals
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.bad_images import BadImages
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.loader import LocalBatch, MultiStageViews, StepBatches, build_loader
from rsa_detectron2.pretrain.data.pixels import check_pixels
from rsa_detectron2.pretrain.engine import checkpoint, memory, parallel
from rsa_detectron2.pretrain.engine.guards import Alarms, assert_finite
from rsa_detectron2.pretrain.engine.initial import Reader, in_words
from rsa_detectron2.pretrain.engine.metrics import Log, Meter
from rsa_detectron2.pretrain.engine.past import Past, find_past, open_data
from rsa_detectron2.pretrain.engine.step import TrainState, normalized_views, prefetch, train_step
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.pretrain.evaluate.health import measure_health
from rsa_detectron2.pretrain.evaluate.knn import NoValidation, evaluate_knn, find_labeled
from rsa_detectron2.pretrain.method import schedules
from rsa_detectron2.pretrain.method.augment import Output
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr


def train(cfg: CfgNode, origin: record.Origin = record.Origin(), reader: Reader | None = None) -> str:
    """Pre-train as ``cfg`` says; ``origin`` is where ``cfg`` came from, and ``reader`` reads MODEL.INIT.

    Goes on from the last checkpoint in ``cfg.OUTPUT_DIR``, if there is one. Leaves ``model_final.pth``
    there and returns its path. Raises InputError. After one of the stop signals (common/signals.py) it saves
    the state, if there is any yet, and raises Interrupted.
    """
    first = distributed.rank() == 0
    lock = files.locked(cfg.OUTPUT_DIR, "--output-dir") if first else contextlib.nullcontext()
    try:
        with lock, StopSignals() as stop:
            return _train(cfg, origin, reader, stop)
    except Stopped as stopped:
        raise Interrupted(str(stopped)) from None


def _train(cfg: CfgNode, origin: record.Origin, reader: Reader | None, stop: StopSignals) -> str:
    if cfg.SOLVER.DETERMINISTIC:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # No kernel here reads memory that it has not written, so filling it first would only take time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.allow_tf32 = cfg.SOLVER.TF32
    torch.backends.cudnn.benchmark = not cfg.SOLVER.DETERMINISTIC
    past = find_past(cfg, reader)
    if not (past.complete and past.same_path):
        bad_images = open_data(cfg, past)
    if past.complete:
        final = Path(cfg.OUTPUT_DIR, checkpoint.FINAL)
        if distributed.rank() == 0:
            print(f"{final} is already there: this run is complete")
        return str(final)
    return Trainer(cfg, origin, past, bad_images, stop).fit()


class Trainer:
    """A run of the pre-training, from where ``past`` left it."""

    def __init__(
        self, cfg: CfgNode, origin: record.Origin, past: Past, bad_images: BadImages, stop: StopSignals
    ):
        self.cfg, self.stop, self.saved = cfg, stop, past.saved
        self.bad_images, self.images = bad_images, bad_images.images
        self.folder, self.device = Path(cfg.OUTPUT_DIR), distributed.device()
        self.num_processes, self.is_first = distributed.world_size(), distributed.rank() == 0
        self.data = identity.describe(self.images)
        self.pixel_notes = check_pixels(self.images)
        self.find_validation()
        self.local_batch_size = memory.per_process(cfg.SOLVER.BATCH_SIZE, self.num_processes)
        self.init = past.initial.about
        self.build_networks(past.micro_batch_size, past.initial.backbone)
        self.build_state()
        self.build_loader()
        self.peak_lr = cfg.SOLVER.BASE_LR * cfg.SOLVER.BATCH_SIZE / 256
        online = self.networks.online
        self.features = Features(online.backbone, cfg.DATA, self.state.amp, projector=online.projector)
        # A checkpoint of an early version has no record.
        seconds = (past.saved or {}).get("run", {}).get("seconds", 0.0)
        self.meter, self.alarms = Meter(cfg.SOLVER.BATCH_SIZE, seconds), Alarms(cfg.ALARM)
        self.log = None  # the first process has one, once it trains
        self.about = self.describe(origin)

    # ---- what a run consists of ----

    def find_validation(self) -> None:
        """Set ``bank`` and ``val``, the labeled images of kNN; None where there are none."""
        self.bank = self.val = None
        try:
            self.bank, self.val = find_labeled(self.cfg, self.images)
        except NoValidation as reason:
            if self.is_first:
                print(f"kNN top-1 is left out: {reason}")

    def build_networks(self, kept: int, backbone: dict[str, torch.Tensor] | None) -> None:
        """Build the networks, ``backbone`` in them if given, and choose the micro-batch. Raises InputError.

        SOLVER.MICRO_BATCH becomes its size: the one that was given, else ``kept``, which the run had
        before, else what fits the free memory.
        """
        cfg = self.cfg
        torch.manual_seed(cfg.SEED)
        networks = build_networks(cfg, METHODS[cfg.METHOD])
        if backbone:
            networks.load_backbones(backbone, cfg.MODEL.INIT)
        amp = distributed.amp_dtype(cfg.SOLVER.AMP)
        self.micro_batch_size = cfg.SOLVER.MICRO_BATCH = memory.resolve(
            cfg.SOLVER.MICRO_BATCH,
            self.local_batch_size,
            lambda: kept or memory.max_batch_size(networks, cfg.DATA.IMAGE_SIZE, amp),
        )
        self.accumulate = self.local_batch_size // self.micro_batch_size
        self.networks, shared_by = parallel.convert_batch_norm(networks.to(self.device), cfg.MODEL.SYNC_BN)
        self.bn_batch_size = self.micro_batch_size * shared_by
        if self.bn_batch_size == 1:
            raise InputError(
                "BatchNorm would see one image at a time, and needs two: raise --micro-batch or --batch-size"
            )
        if cfg.SOLVER.COMPILE:
            if shared_by > 1 and self.is_first:
                print(
                    "warning: torch.compile stops at every SyncBatchNorm and gains little: "
                    "try MODEL.SYNC_BN False"
                )
            self.networks.compile_backbones()

    def build_state(self) -> None:
        """Optimizer, scaler and DistributedDataParallel, with the state of the checkpoint if there is one."""
        amp, method = distributed.amp_dtype(self.cfg.SOLVER.AMP), METHODS[self.cfg.METHOD]
        optimizer = build_optimizer(self.networks, self.cfg.SOLVER, method.fix_predictor_lr)
        scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)
        if self.saved:
            self.networks.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
            if self.saved["scaler"]:  # empty where the run was without fp16 until now, on a CPU
                scaler.load_state_dict(self.saved["scaler"])
        self.state = TrainState(parallel.wrap(self.networks), optimizer, scaler, amp)

    def build_loader(self) -> None:
        cfg = self.cfg
        self.start = self.saved["step"] if self.saved else 0
        self.steps_per_epoch = len(self.images) // cfg.SOLVER.BATCH_SIZE
        self.num_steps = cfg.SOLVER.EPOCHS * self.steps_per_epoch
        steps = range(self.start, self.num_steps)
        local = LocalBatch(distributed.rank(), self.num_processes, self.micro_batch_size)
        order = StepBatches(len(self.images), cfg.SOLVER.BATCH_SIZE, steps, cfg.SEED, local)
        views = MultiStageViews(self.images, cfg.DATA.IMAGE_SIZE, cfg.SEED)
        self.loader = build_loader(views, order, cfg.DATA.NUM_WORKERS)
        self.bad_images.start()
        mean, std = (torch.tensor(values, device=self.device) for values in (cfg.DATA.MEAN, cfg.DATA.STD))
        self.output = Output(mean, std, self.state.amp or torch.float32)

    def describe(self, origin: record.Origin) -> dict:
        return record.describe(
            "pretrain",
            self.cfg,
            origin,
            method=self.cfg.METHOD,
            seed=self.cfg.SEED,
            steps=self.num_steps,
            processes=self.num_processes,
            device=distributed.device_name(),
            bn_batch_size=self.bn_batch_size,
            init=self.init,
            data=identity.summary(self.images),
        )

    # ---- the loop over global batches ----

    def fit(self) -> str:
        """Train to the last step; returns the path of the final weights. Raises InputError, Interrupted."""
        if self.is_first:
            self.open()
        self.networks.train()
        views = map(self.prepare, self.meter.timed(prefetch(self.loader, self.device)))
        self.meter.reset()
        self.stop.stepping = True
        for step in range(self.start + 1, self.num_steps + 1):
            stop = distributed.any_rank_later(lambda: self.stop.asked)
            settings = self.train_step(step, views)
            self.report(step, settings)
            stopping = stop()  # all leave at the same step
            if self.is_first and step % self.steps_per_epoch == 0:
                self.end_epoch(step, stopping)
            if stopping and step < self.num_steps:
                self.leave(step)
        if self.is_first:
            self.finish()
        distributed.any_rank(False)  # all wait until the first process has written
        return str(self.folder / checkpoint.FINAL)

    def open(self) -> None:
        """Announce the run, and begin its files. The figures of the untrained network are the first row.

        An evaluation that a signal or a kill has left out is made up for.
        """
        self.announce()
        self.log = Log(self.cfg, self.num_steps, self.start)
        checkpoint.write_config(self.cfg)
        record.write(self.folder, self.record(self.start))
        if not self.start or self.evaluates_after(self.start) and not self.log.evaluated:
            self.evaluate(self.start)

    def prepare(self, batch: dict) -> tuple[torch.Tensor | None, torch.Tensor]:
        """A batch's normalized_views. Lists the images that could not be decoded; raises InputError when they
        are too many."""
        if batch["skipped"].any():
            self.bad_images.add(
                [
                    (index + i) % len(self.images)
                    for index, skipped in zip(batch["index"].tolist(), batch["skipped"].tolist())
                    for i in range(skipped)
                ]
            )
        return normalized_views(batch, self.output, METHODS[self.cfg.METHOD].weak)

    def train_step(self, step: int, views: Iterator) -> dict[str, float]:
        """One step on the next ``views``; returns its learning rate, beta and tau. Raises InputError."""
        model, warmup = self.cfg.MODEL, self.cfg.SOLVER.WARMUP_EPOCHS * self.steps_per_epoch
        lr = schedules.learning_rate(step, self.num_steps, self.peak_lr, warmup)
        beta = schedules.beta(step, self.num_steps, model.BETA, model.BETA_SCHEDULE)
        tau = schedules.tau(step, self.num_steps, model.TAU, model.TAU_SCHEDULE)
        set_lr(self.state.optimizer, lr, self.peak_lr)
        micro_batches = islice(views, self.accumulate)
        try:
            self.meter.add(train_step(self.state, micro_batches, self.accumulate, beta, tau))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size, local = self.micro_batch_size, self.local_batch_size
            smaller = max((n for n in range(1, size // 2 + 1) if local % n == 0), default=0)
            # BatchNorm needs two images at once.
            enough = smaller * self.bn_batch_size // size >= 2
            fix = f"give --micro-batch {smaller}" if enough else "lower DATA.IMAGE_SIZE"
            raise InputError(
                f"{size} images of {self.cfg.DATA.IMAGE_SIZE} px at once do not fit into "
                f"the memory of {self.device} ({one_line(error)[:100]}): {fix}"
            ) from None
        return {"lr": lr, "beta": beta, "tau": tau}

    def report(self, step: int, settings: dict[str, float]) -> None:
        """Log the figures every LOG_PERIOD steps. Raises InputError where they show a failed run."""
        if self.is_first:
            self.log.progress.update()
        if step % self.cfg.LOG_PERIOD and step < self.num_steps:
            return
        steps, row = self.meter.steps, self.meter.read()
        if self.is_first:
            row |= self.state.scaling()
            self.log.row({"step": step, **settings, "bad_images": len(self.bad_images), **row})
            self.alarms.check(step, row, steps)

    def end_epoch(self, step: int, stopping: bool) -> None:
        """Save, then evaluate.

        In that order, because a launcher grants seconds after a signal, and an evaluation may take minutes.
        """
        epoch, last = step // self.steps_per_epoch, step == self.num_steps
        keep_period = self.cfg.CHECKPOINT.KEEP_PERIOD
        # Collapsed features may recover. Until they do, they must not replace the good checkpoint.
        collapsed = self.alarms.collapsed
        if last or epoch % self.cfg.CHECKPOINT.PERIOD == 0 and not collapsed and not stopping:
            self.save_last(step)
        if keep_period and epoch % keep_period == 0 and not collapsed:
            self.save(self.folder / f"checkpoint_{step:07d}.pth", step)
        if self.evaluates_after(step) and not stopping:
            self.evaluate(step)

    def evaluates_after(self, step: int) -> bool:
        """Whether KNN.PERIOD asks for an evaluation after this step; that of the last is :meth:`finish`'s."""
        steps = self.cfg.KNN.PERIOD * self.steps_per_epoch
        return bool(steps) and step % steps == 0 and step < self.num_steps

    def leave(self, step: int) -> NoReturn:
        """Save and raise Interrupted."""
        written = self.is_first and self.save_last(step)
        if self.is_first:
            self.log.close()
        # All wait for the first process: when one leaves, the launcher ends the others.
        if distributed.any_rank(written):
            outcome = "saved"
        else:
            outcome = "NOT saved, the steps since the last checkpoint will be repeated"
        raise Interrupted(
            f"stopped at step {step} of {self.num_steps}, {outcome}; the same command goes on from there"
        )

    def finish(self) -> None:
        """Evaluate, and write the final weights. Raises InputError."""
        self.evaluate(self.num_steps)
        final = self.folder / checkpoint.FINAL
        written = self.save(final, self.num_steps, whole=False)
        record.write(self.folder, self.record(self.num_steps))
        self.log.close()
        if not written:
            raise InputError(f"{final} could not be written: make room, and run the same command again")

    # ---- what a run leaves ----

    def evaluate(self, step: int) -> None:
        """Log a row with kNN top-1, where there are labels, and the health of the features.

        The time that it takes does not count as training.
        """
        health = self.cfg.HEALTH.IMAGES
        if not (self.val or health):
            return
        self.meter.pause()
        assert_finite(self.networks, step)
        # Not compiled: the last batches are smaller, and torch.compile would make the training graphs anew,
        # with a batch of any size.
        with torch.compiler.set_stance("force_eager"):
            row = {"step": step}
            if self.val:
                bank, val, size = self.bank, self.val, self.cfg.KNN.BANK
                row["knn_top1"] = evaluate_knn(self.features, bank, val, size, replace=True)
            if health:
                row |= measure_health(self.features, self.images, health)
        self.log.row(row)
        self.networks.train()
        self.meter.resume()

    def record(self, step: int) -> dict:
        return {**self.about, "step": step, "seconds": self.meter.seconds()}

    def save_last(self, step: int) -> bool:
        """Replace the last checkpoint and keep the one before."""
        return self.save(self.folder / checkpoint.LAST, step, previous=self.folder / checkpoint.PREVIOUS)

    def save(self, path: Path, step: int, whole: bool = True, previous: Path | None = None) -> bool:
        """Write a checkpoint, or the final weights where not ``whole``; returns whether it was written.

        A full disk is no error: the run goes on, and the next save tries again. Raises InputError when a
        weight is not finite.
        """
        assert_finite(self.networks, step)
        content = {
            "format": checkpoint.FORMAT,
            "method": self.cfg.METHOD,
            "step": step,
            "num_images": len(self.images),
            "processes": self.num_processes,
            "normalised": self.bn_batch_size,
            "config": self.cfg.dump(),
            "run": self.record(step),
            "model": self.networks.state_dict(),
        }
        if whole:
            content["optimizer"] = self.state.optimizer.state_dict()
            content["scaler"] = self.state.scaler.state_dict()
            content["data"] = self.data
        else:  # a file that people pass on does not name the images
            content["data"] = {"sha256": self.data["sha256"]}
        try:
            files.save_tensors(path, content, previous)
            return True
        except OSError as error:
            self.log.say(
                f"warning: cannot write {path} ({error.strerror or error}); the run goes on, "
                "keeps the previous checkpoint, and tries again at the next save"
            )
            return False

    def announce(self) -> None:
        solver, bad_images = self.cfg.SOLVER, self.bad_images
        resumes = f"; goes on after step {self.start}" if self.start else ""
        print(
            f"{self.cfg.METHOD}, {self.cfg.MODEL.BACKBONE}, {len(self.images)} images of "
            f"{printable(self.images.root)}: {solver.EPOCHS} epochs, "
            f"{self.num_steps} steps of {solver.BATCH_SIZE} = {self.num_processes} {self.device.type} "
            f"x {self.accumulate} accumulated x {self.micro_batch_size}, "
            f"BatchNorm sees {self.bn_batch_size} at once, "
            f"{distributed.precision(self.state.amp)}, peak lr {self.peak_lr:g}{resumes}",
            flush=True,
        )
        if self.init and not self.start:
            print(f"the backbone is that of {self.cfg.MODEL.INIT}: {in_words(self.init)}")
        if bad_images.removed:
            print(
                f"{bad_images.removed} images of {bad_images.path} are gone: "
                "others stand in for them, as before"
            )
        for warning in self.warnings():
            print(f"warning: {warning}")

    def warnings(self) -> Iterator[str]:
        """What may surprise: unusual pixels, and what has changed since the run was stopped."""
        yield from self.pixel_notes
        saved, processes = self.saved, self.num_processes
        inexact = "the run goes on with the same samples, but not bit for bit"
        if saved and saved["normalised"] != self.bn_batch_size:
            yield (
                f"BatchNorm now sees {self.bn_batch_size} images at once instead of "
                f"{saved['normalised']}: {inexact}"
            )
        elif saved and saved.get("processes", processes) != processes:
            yield f"{processes} instead of {saved['processes']} processes change the order of sums: {inexact}"
        if self.cfg.METHOD == "simclr" and self.accumulate > 1:
            yield "SimCLR's negatives are those of a micro-batch: accumulating leaves it fewer"
