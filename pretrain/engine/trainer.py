"""Composes the pre-training: data, networks, objective, optimizer and schedules into the loop over global batches."""

import contextlib
import os
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from rsa_detectron2.common import distributed, files, record
from rsa_detectron2.common.distributed import OWN_BUFFERS
from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.bad_images import BadImages
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.loader import MultiStageViews, StepBatches, build_loader
from rsa_detectron2.pretrain.data.pixels import check_pixels
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.engine import memory as micro_batch
from rsa_detectron2.pretrain.engine.metrics import Alarms, Log, Meter, Stopped, StopSignals, assert_finite
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.pretrain.evaluate.knn import NoValidation, evaluate_knn, find_labelled
from rsa_detectron2.pretrain.method import schedules
from rsa_detectron2.pretrain.method.augment import aggressive, normalize, to_float
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr

REQUEUE = 75  # EX_TEMPFAIL: saved and left at a signal; run the same command again


def train(cfg, origin=record.Origin()):
    """Pre-train as ``cfg`` says, which came from ``origin``, from the last checkpoint in ``cfg.OUTPUT_DIR`` if there is
    one.

    Leaves ``model_final.pth`` and returns its path. Raises InputError, or Interrupted after one of the
    stop signals (common/signals.py) once the state is saved, if there is any yet.
    """
    main = distributed.rank() == 0
    lock = files.locked(cfg.OUTPUT_DIR, "--output-dir") if main else contextlib.nullcontext()
    try:
        with lock, StopSignals() as stop:
            return _train(cfg, origin, stop)
    except Stopped as stopped:
        raise Interrupted(str(stopped)) from None


def _train(cfg, origin, stop):
    folder, device = Path(cfg.OUTPUT_DIR), distributed.device()
    ranks, main = distributed.world_size(), distributed.rank() == 0
    if cfg.SOLVER.DETERMINISTIC:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not cfg.SOLVER.DETERMINISTIC
    amp = distributed.amp_dtype(cfg.SOLVER.AMP)

    # ---- what the run goes on from ----
    path = distributed.from_first(checkpoint.newest(folder) if main else None)
    saved = checkpoint.load(path) if path else None
    final = folder / checkpoint.FINAL
    complete = distributed.from_first(final.is_file())
    known = saved or checkpoint.finished(folder)
    kept, same_path = checkpoint.take_up(cfg, known)
    if not (complete and same_path):
        images = open_images(cfg.DATA.PATH, "pretrain", cfg.DATA.CLASSES, cfg.DATA.LIMIT)
        identity.check_same_everywhere(images)
        bad_images = BadImages(folder / "bad_images.txt", images, cfg.DATA.MAX_BAD)
        if known:
            bad_images.removed = identity.recognise(images, known, bad_images.listed(), folder)
    if complete:
        if main:
            print(f"{final} is already there: this run is complete")
        return str(final)
    data = identity.describe(images)
    images.value_range = tuple(cfg.DATA.RANGE)
    notes = check_pixels(images)
    try:
        bank, val = find_labelled(cfg, images)
    except NoValidation as reason:
        bank = val = None
        if main:
            print(f"kNN top-1 is left out: {reason}")

    share = micro_batch.per_process(cfg.SOLVER.BATCH_SIZE, ranks)
    networks, model, optimizer, scaler, normalised = build(cfg, amp, share, kept, saved)
    size, start = cfg.SOLVER.MICRO_BATCH, saved["step"] if saved else 0

    # ---- data and schedules ----
    steps_per_epoch = len(images) // cfg.SOLVER.BATCH_SIZE
    K = cfg.SOLVER.EPOCHS * steps_per_epoch
    parts = StepBatches(
        len(images), cfg.SOLVER.BATCH_SIZE, K, cfg.SEED, start, distributed.rank(), ranks, size
    )
    loader = build_loader(MultiStageViews(images, cfg.DATA.IMAGE_SIZE, cfg.SEED), parts, cfg.DATA.NUM_WORKERS)
    bad_images.start()
    peak_lr = cfg.SOLVER.BASE_LR * cfg.SOLVER.BATCH_SIZE / 256
    features = Features(networks.online.backbone, cfg.DATA, amp)
    mean, std = (torch.tensor(values, device=device) for values in (cfg.DATA.MEAN, cfg.DATA.STD))
    about = record.describe(
        "pretrain",
        cfg,
        origin,
        method=cfg.METHOD,
        seed=cfg.SEED,
        steps=K,
        processes=ranks,
        device=distributed.device_name(),
        bn_batch_size=normalised,
        data=identity.summary(images),
    )
    before = (saved or {}).get("run", {})  # a checkpoint without it is of an older version
    meter, alarms = Meter(cfg.SOLVER.BATCH_SIZE, before.get("seconds", 0.0)), Alarms(cfg.ALARM)
    log = None

    def so_far(step):
        return {**about, "step": step, "seconds": meter.seconds()}

    def prepare(batch):
        if batch["skipped"].any():
            bad_images.add(
                [
                    (index + i) % len(images)
                    for index, skipped in zip(batch["index"].tolist(), batch["skipped"].tolist())
                    for i in range(skipped)
                ]
            )
        return normalised_views(batch, mean, std)

    def save(path, step, whole=True, previous=None):
        """Returns whether it was written. A full disk is no error: the run goes on, and tries again at the next
        interval."""
        assert_finite(networks, step)
        state = {
            "format": checkpoint.FORMAT,
            "method": cfg.METHOD,
            "step": step,
            "num_images": len(images),
            "processes": ranks,
            "normalised": normalised,
            "config": cfg.dump(),
            "run": so_far(step),
            "model": networks.state_dict(),
        }
        if whole:
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "data": data}
        else:  # what is passed on names no images
            state["data"] = {"sha256": data["sha256"]}
        try:
            files.save_tensors(path, state, previous)
            return True
        except OSError as error:
            log.say(
                f"warning: cannot write {path} ({error.strerror or error}); the run goes on, "
                f"with the checkpoint before, and tries again"
            )
            return False

    def save_last(step):
        return save(folder / checkpoint.LAST, step, previous=folder / checkpoint.PREVIOUS)

    def watch_knn(step):
        meter.pause()
        assert_finite(networks, step)
        log.row({"step": step, "knn_top1": evaluate_knn(features, bank, val, cfg.KNN.BANK, replace=True)})
        networks.train()
        meter.reset()

    if main:
        print(
            f"{cfg.METHOD}, {cfg.MODEL.BACKBONE}, {len(images)} images of {printable(images.root)}: {cfg.SOLVER.EPOCHS} epochs, "
            f"{K} steps of {cfg.SOLVER.BATCH_SIZE} = {ranks} {device.type} x {share // size} accumulated x {size}, "
            f"{amp or 'float32'}, peak lr {peak_lr:g}" + (f"; goes on after step {start}" if start else ""),
            flush=True,
        )
        if bad_images.removed:
            print(
                f"{bad_images.removed} images of {bad_images.path} are gone: others stand in for them, as before"
            )
        for note in notes:
            print(f"warning: {note}")
        if saved and saved["normalised"] != normalised:
            print(
                f"warning: BatchNorm now sees {normalised} images at once instead of {saved['normalised']}: the run "
                "goes on with the same samples, but not bit for bit"
            )
        elif saved and saved.get("processes", ranks) != ranks:
            print(
                f"warning: {ranks} instead of {saved['processes']} processes change the order of sums: the "
                "run goes on with the same samples, but not bit for bit"
            )
        if cfg.METHOD == "simclr" and size < share:
            print("warning: SimCLR's negatives are those of a micro-batch: accumulating leaves it fewer")
        log = Log(folder, K, start)
        if val and not start:
            watch_knn(0)
        checkpoint.write_config(cfg)
        record.write(folder, so_far(start))

    # ---- the loop over global batches ----
    networks.train()
    views = map(prepare, meter.timed(ahead(loader, device)))
    meter.reset()
    stop.stepping = True
    for k in range(start + 1, K + 1):
        lr = schedules.learning_rate(k, K, peak_lr, cfg.SOLVER.WARMUP_EPOCHS * steps_per_epoch)
        beta = schedules.beta(k, K, cfg.MODEL.BETA, cfg.MODEL.BETA_SCHEDULE)
        tau = schedules.tau(k, K, cfg.MODEL.TAU, cfg.MODEL.TAU_SCHEDULE)
        set_lr(optimizer, lr, peak_lr)
        count = share // size
        try:
            meter.add(train_step(model, optimizer, scaler, amp, islice(views, count), count, beta, tau))
        except torch.OutOfMemoryError:
            raise InputError(
                f"{size} images of {cfg.DATA.IMAGE_SIZE} px at once do not fit into the memory of {device}: "
                f"give --micro-batch {max(1, size // 2)}"
            ) from None

        if main:
            log.progress.update()
        if k % cfg.LOG_PERIOD == 0 or k == K:
            steps, row = meter.steps, meter.read()
            if main:
                log.row({"step": k, "lr": lr, "beta": beta, "tau": tau, "bad_images": len(bad_images), **row})
                alarms.check(k, row, steps)
        asked = distributed.any_rank(stop.asked)  # all leave at the same step
        epoch, ends_epoch = k // steps_per_epoch, k % steps_per_epoch == 0
        if (
            main and ends_epoch
        ):  # saved first: a launcher grants seconds after a signal, and kNN may take minutes
            # Features that have collapsed may recover; they must not push out the checkpoint from before.
            if k == K or epoch % cfg.CHECKPOINT.PERIOD == 0 and not alarms.collapsed and not asked:
                save_last(k)
            if (
                cfg.CHECKPOINT.KEEP_PERIOD
                and epoch % cfg.CHECKPOINT.KEEP_PERIOD == 0
                and not alarms.collapsed
            ):
                save(folder / f"checkpoint_{k:07d}.pth", k)
            if val and k < K and cfg.KNN.PERIOD and epoch % cfg.KNN.PERIOD == 0 and not asked:
                watch_knn(k)
        if asked and k < K:
            written = main and save_last(k)
            if main:
                log.close()
            # All wait for it: the launcher takes the first process that leaves for the end of all.
            outcome = (
                "saved"
                if distributed.any_rank(written)
                else "NOT saved, the steps since the last checkpoint will be repeated"
            )
            raise Interrupted(f"stopped at step {k} of {K}, {outcome}; the same command goes on from there")
    if main:
        if val:
            watch_knn(K)
        written = save(final, K, whole=False)
        record.write(folder, so_far(K))
        log.close()
        if not written:
            raise InputError(f"{final} could not be written: make room, and run the same command again")
    distributed.any_rank(False)
    return str(final)


def build(cfg, amp, share, kept, saved):
    """Networks, their DistributedDataParallel (or themselves), optimizer, scaler, and how many images BatchNorm sees at
    once, all in the state of the checkpoint ``saved``, if any.

    Sets SOLVER.MICRO_BATCH to what goes through at once of this process's ``share``: ``kept``, the run's own from
    before, or by free memory where it is 0. Raises InputError.
    """
    device, ranks, main = distributed.device(), distributed.world_size(), distributed.rank() == 0
    torch.manual_seed(cfg.SEED)
    method = METHODS[cfg.METHOD]
    networks = build_networks(cfg, method)
    size = cfg.SOLVER.MICRO_BATCH = micro_batch.resolve(
        cfg.SOLVER.MICRO_BATCH, share, lambda: kept or micro_batch.room(networks, cfg.DATA.IMAGE_SIZE, amp)
    )
    networks = networks.to(device)
    sync_bn = cfg.MODEL.SYNC_BN and ranks > 1 and device.type == "cuda"
    if sync_bn:
        networks = torch.nn.SyncBatchNorm.convert_sync_batchnorm(networks)
    elif main and cfg.MODEL.SYNC_BN and ranks > 1:
        print("warning: SyncBatchNorm needs GPUs; each process normalises over its own micro-batch")
    normalised = size * ranks if sync_bn else size
    if normalised == 1:
        raise InputError(
            "BatchNorm would see one image at a time, and needs two: raise --micro-batch or --batch-size"
        )
    if cfg.SOLVER.COMPILE:
        if sync_bn and main:
            print(
                "warning: torch.compile stops at every SyncBatchNorm and gains little: try MODEL.SYNC_BN False"
            )
        networks.compile_backbones()
    optimizer = build_optimizer(networks, cfg.SOLVER, method.fix_predictor_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    if saved:
        networks.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty after a part of the run without fp16, on a CPU
            scaler.load_state_dict(saved["scaler"])
    model = networks
    if ranks > 1:  # BatchNorm's running statistics are rank 0's: they are not needed before evaluation
        model = DistributedDataParallel(
            networks,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **OWN_BUFFERS,
        )
        settle_buckets(model)
    return networks, model, optimizer, scaler, normalised


def settle_buckets(model):
    """Give the buckets of DistributedDataParallel the layout that they keep, before the first step.

    It lays them out anew after the first backward pass, in the order in which gradients arrived. A
    gradient's place in a bucket decides in which order all-reduce adds the processes' parts: from
    three processes on, the first step of a resumed run would round otherwise than that step of an
    uninterrupted run. So the first backward pass is this one, in which every parameter gets a gradient
    of zero, the last parameter first, much as in a real one. The network and the random state take no
    part in it. ``find_unused_parameters=True`` keeps the first layout, but walks the graph in each step.
    """
    networks = model.module
    networks.forward = lambda _: sum(p.sum() * 0 for p in networks.parameters() if p.requires_grad)
    model(None).backward()
    del networks.forward
    networks.zero_grad(set_to_none=True)


def normalised_views(batch, mean, std):
    """A micro-batch's weak and aggressive views, float32 [B, 2, 3, S, S] each, normalised, on the device. ``mean`` and
    ``std`` float32 [3] lie there, which spares it a synchronisation."""
    views = batch["views"]
    return normalize(to_float(views), mean, std), normalize(aggressive(views, batch["params"]), mean, std)


def train_step(model, optimizer, scaler, amp, micro_batches, count, beta, tau):
    """One optimizer step on ``count`` ``micro_batches``, pairs of normalised views float32 [B, 2, 3, S, S]; returns the
    objective's figures, averaged over them.

    ``model`` is Networks or its DistributedDataParallel, whose processes exchange gradients after the last micro-batch
    only. A step that the scaler skips because a gradient overflowed leaves the target untouched as well.
    """
    networks = getattr(model, "module", model)
    figures = {}
    optimizer.zero_grad(set_to_none=True)
    for i, (weak, strong) in enumerate(micro_batches, start=1):
        with contextlib.nullcontext() if i == count or model is networks else model.no_sync():
            with torch.autocast(weak.device.type, amp or torch.bfloat16, enabled=amp is not None):
                part = model(weak, strong, beta)
            scaler.scale(part["loss"] / count).backward()
        for name, value in part.items():
            figures[name] = figures.get(name, 0) + value.detach() / count
    stepped = []
    hook = optimizer.register_step_post_hook(
        lambda *_: stepped.append(True)
    )  # comparing the scales would synchronise
    scaler.step(optimizer)
    hook.remove()
    scaler.update()
    networks.end_step(tau, skipped=not stepped)
    return figures


def ahead(loader, device):
    """The loader's batches with ``views`` on the device, contiguous. On a GPU a side stream copies them while the step
    before runs."""
    if device.type == "cpu":
        yield from ({**batch, "views": batch["views"].contiguous()} for batch in loader)
        return
    stream, compute = torch.cuda.Stream(), torch.cuda.current_stream()
    batches = iter(loader)

    def copied():
        batch = next(batches, None)
        if batch:
            with torch.cuda.stream(stream):
                batch["views"] = batch["views"].to(device, non_blocking=True).contiguous()
        return batch

    batch = copied()
    while batch:
        compute.wait_stream(stream)
        batch["views"].record_stream(
            compute
        )  # its memory is the side stream's, which must not reuse it too soon
        following = copied()
        yield batch
        batch = following
