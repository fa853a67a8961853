"""Composes the pre-training: data, networks, objective, optimizer and schedules into the loop over global batches."""

import json
import math
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pretrain import checkpoint, distributed, schedules
from pretrain.augment import aggressive, normalize, to_float
from pretrain.config import InputError, Interrupted
from pretrain.datasets import ImageFolder
from pretrain.evaluate import Features, evaluate_knn, find_val
from pretrain.loader import MultiStageViews, StepBatches, build_loader
from pretrain.networks import build_networks
from pretrain.objectives import METHODS
from pretrain.optim import build_optimizer

REQUEUE = 75  # EX_TEMPFAIL: saved and left at a signal; run the same command again


def train(cfg):
    """Pre-train as ``cfg`` says, from the last checkpoint in ``cfg.OUTPUT_DIR`` if there is one.

    Leaves ``model_final.pth`` and returns its path. Raises InputError, or Interrupted after SIGTERM, SIGUSR1 or
    SIGINT once the state is saved.
    """
    device, main = distributed.device(), distributed.rank() == 0
    torch.backends.cudnn.benchmark = True
    images = ImageFolder(cfg.DATA.PATH)
    val = find_val(cfg, images)
    steps_per_epoch = len(images) // cfg.SOLVER.BATCH_SIZE
    K = cfg.SOLVER.EPOCHS * steps_per_epoch
    batch_slices = StepBatches(len(images), cfg.SOLVER.BATCH_SIZE, K, cfg.SEED,
                               rank=distributed.rank(), world_size=distributed.world_size())

    folder = Path(cfg.OUTPUT_DIR)
    saved = checkpoint.start_folder(cfg) if main else None
    distributed.barrier()
    if not main:
        saved = checkpoint.start_folder(cfg)
    final = folder / checkpoint.FINAL
    if final.is_file():
        if main:
            print(f"{final} is already there: this run is complete")
        return str(final)

    torch.manual_seed(cfg.SEED)
    networks = build_networks(cfg, METHODS[cfg.METHOD]).to(device)
    if cfg.MODEL.SYNC_BN and distributed.world_size() > 1 and device.type == "cuda":
        networks = torch.nn.SyncBatchNorm.convert_sync_batchnorm(networks)
    optimizer = build_optimizer(networks, cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY,
                                cfg.SOLVER.TRUST_COEFFICIENT)
    amp = distributed.amp_dtype(cfg.SOLVER.AMP)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    start = 0
    if saved:
        if saved["num_images"] != len(images):
            raise InputError(f"{folder} holds a run on {saved['num_images']} images, "
                             f"but {images.root} has {len(images)}: restore the data set, or give another --output-dir")
        networks.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty after a part of the run without fp16, on a CPU
            scaler.load_state_dict(saved["scaler"])
        start = batch_slices.start = saved["step"]
    model = networks
    if distributed.world_size() > 1:
        model = DistributedDataParallel(networks, device_ids=[device.index] if device.type == "cuda" else None)

    loader = build_loader(MultiStageViews(images, cfg.DATA.IMAGE_SIZE, cfg.SEED), batch_slices, cfg.DATA.NUM_WORKERS)
    features = Features(networks.online.backbone, cfg.DATA, amp)
    peak_lr = cfg.SOLVER.BASE_LR * cfg.SOLVER.BATCH_SIZE / 256
    log = Log(folder, K, start, cfg) if main else None
    if main:
        batch = f"{cfg.SOLVER.BATCH_SIZE // distributed.world_size()} x {distributed.world_size()} on {device.type}"
        print(f"{cfg.METHOD}, {cfg.MODEL.BACKBONE}, {len(images)} images of {images.root}: {cfg.SOLVER.EPOCHS} epochs, "
              f"{K} steps of {cfg.SOLVER.BATCH_SIZE} ({batch}, {amp or 'float32'}), peak lr {peak_lr:g}"
              + (f"; goes on after step {start}" if start else ""))
        if val and not start:
            log.row({"step": 0, "knn_top1": evaluate_knn(features, images, val, cfg.KNN.BANK)})

    def save(path, step, whole=True):
        state = {"format": "rsa-pretraining", "method": cfg.METHOD, "step": step, "num_images": len(images),
                 "config": cfg.dump(), "model": networks.state_dict()}
        if whole:
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        checkpoint.save(path, state)

    stop = StopSignals()
    networks.train()
    before = time.perf_counter()
    for k, batch in enumerate(loader, start=start + 1):
        waited = time.perf_counter() - before
        lr = schedules.learning_rate(k, K, peak_lr, cfg.SOLVER.WARMUP_EPOCHS * steps_per_epoch)
        beta, tau = schedules.beta(k, K, cfg.MODEL.BETA), schedules.tau(k, K, cfg.MODEL.TAU)
        for group in optimizer.param_groups:
            group["lr"] = lr

        views = batch["views"].to(device, non_blocking=True)
        weak = normalize(to_float(views), cfg.DATA.MEAN, cfg.DATA.STD)
        strong = normalize(aggressive(views, batch["params"]), cfg.DATA.MEAN, cfg.DATA.STD)
        try:
            figures = train_step(model, networks, optimizer, scaler, amp, weak, strong, beta, tau)
        except torch.OutOfMemoryError:
            raise InputError(f"{len(views)} images of {cfg.DATA.IMAGE_SIZE} px a process do not fit into the memory of "
                             f"{device}: use more GPUs, or lower --batch-size") from None

        if main:
            log.step(k, figures, waited, len(views) * distributed.world_size(), lr=lr, beta=beta, tau=tau)
        epoch, ends_epoch = k // steps_per_epoch, k % steps_per_epoch == 0
        asked = stop.asked
        if distributed.world_size() > 1:  # all must leave at the same step; agreeing costs a synchronisation
            asked = k % cfg.LOG_PERIOD == 0 and distributed.any_rank(stop.asked)
        if main and (asked or ends_epoch):
            assert_finite(figures["loss"], k)  # before it is saved over a good checkpoint
            if val and (k == K or ends_epoch and cfg.KNN.PERIOD and epoch % cfg.KNN.PERIOD == 0):
                log.row({"step": k, "knn_top1": evaluate_knn(features, images, val, cfg.KNN.BANK)})
                networks.train()
            if asked or ends_epoch and (k == K or epoch % cfg.CHECKPOINT.PERIOD == 0):
                save(folder / checkpoint.LAST, k)
            if ends_epoch and cfg.CHECKPOINT.KEEP_PERIOD and epoch % cfg.CHECKPOINT.KEEP_PERIOD == 0:
                save(folder / f"checkpoint_{k:07d}.pth", k)
        if asked and k < K:
            stop.uninstall()
            if main:
                log.close()
            distributed.barrier()  # the launcher takes the first process that leaves for the end of all
            raise Interrupted(f"stopped at step {k} of {K}, saved; the same command goes on from there")
        before = time.perf_counter()
    stop.uninstall()
    if main:
        save(final, K, whole=False)
        log.close()
    distributed.barrier()
    return str(final)


def train_step(model, networks, optimizer, scaler, amp, weak, strong, beta, tau):
    """One optimizer step on a batch of normalised views float32 [B, 2, 3, S, S]; returns the objective's figures.

    ``model`` is ``networks`` or its DistributedDataParallel. A step that the scaler skips because a gradient
    overflowed leaves the target untouched as well.
    """
    with torch.autocast(weak.device.type, amp or torch.bfloat16, enabled=amp is not None):
        figures = model(weak, strong, beta)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(figures["loss"]).backward()
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:
        networks.update_target(tau)
    return {name: value.detach() for name, value in figures.items()}


def assert_finite(loss, step):
    """Raises InputError for a loss of NaN or infinity, before anything is made of it."""
    if not math.isfinite(loss):
        raise InputError(f"the loss is {float(loss)} at step {step}: lower SOLVER.BASE_LR, or try --amp bf16 or off; "
                         "the last checkpoint is kept")


class StopSignals:
    """``asked`` becomes true at SIGTERM, SIGUSR1 or SIGINT; the loop then ends after its step. A second SIGINT kills,
    except under a launcher, which hands one Ctrl-C on twice."""

    def __init__(self):
        self.asked = False
        self.previous = {number: signal.signal(number, self.handle)
                         for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def handle(self, number, frame):
        if number == signal.SIGINT and self.asked and not distributed.launched():
            raise KeyboardInterrupt
        self.asked = True

    def uninstall(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Log:
    """Rows to metrics.jsonl and TensorBoard, and the progress bar. Rows of steps after ``start``, which a killed run
    wrote and the resumed one will write again, are dropped."""

    def __init__(self, folder, total, start, cfg):
        path = folder / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.is_file() and start else []
        rows = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= start]
        checkpoint.write_atomically(path, lambda file: file.writelines(row.encode() for row in rows))
        self.file = open(path, "a", buffering=1)
        self.tensorboard = SummaryWriter(folder, purge_step=start + 1)
        self.period, self.total = cfg.LOG_PERIOD, total
        self.progress = tqdm(total=total, initial=start, desc="pre-training", unit="step", dynamic_ncols=True,
                             mininterval=0.1 if sys.stderr.isatty() else 10)
        self.reset()

    def reset(self):
        self.sums, self.count, self.images, self.waited = defaultdict(float), 0, 0, 0.0
        self.since = time.perf_counter()

    def step(self, k, figures, waited, images, **schedule):
        """Add a step's figures (0-dim tensors); every LOG_PERIOD steps their means make a row. Reading them only then
        spares the device a synchronisation per step."""
        for name, value in figures.items():
            self.sums[name] += value
        self.count, self.images, self.waited = self.count + 1, self.images + images, self.waited + waited
        self.progress.update()
        if k % self.period and k != self.total:
            return
        means = {name: value.item() / self.count for name, value in self.sums.items()}
        assert_finite(means["loss"], k)
        seconds = time.perf_counter() - self.since
        speed = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.row({"step": k, **means, **schedule, **speed})
        self.progress.set_postfix_str(f"loss {means['loss']:.3f} std {means['feature_std']:.2f} "
                                      f"{speed['images_per_s']:.0f} img/s wait {speed['data_wait']:.0%}")
        self.reset()

    def row(self, row):
        """One row {"step": k, name: number}."""
        self.file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self.tensorboard.add_scalar(name, value, row["step"])
        if "knn_top1" in row:
            self.progress.write(f"step {row['step']}: kNN top-1 {row['knn_top1']:.2f} %")
            self.progress.unpause()  # the time left is that of the steps
            self.reset()

    def close(self):
        self.progress.close()
        self.tensorboard.close()
        self.file.close()
