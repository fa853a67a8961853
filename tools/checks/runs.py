"""Checks of whole runs: one that was stopped and resumed, one of two processes."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from rsa_detectron2.common import launch
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.signals import held_back
from rsa_detectron2.pretrain.engine import checkpoint, parallel
from rsa_detectron2.pretrain.engine.step import TrainState, train_step
from rsa_detectron2.pretrain.method.networks import Networks
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr
from rsa_detectron2.tools._steps import Step, command_line
from rsa_detectron2.tools.checks import numerics
from rsa_detectron2.tools.checks.figure import Figure
from rsa_detectron2.transfer.data import drawn

# Four epochs of two steps; the second one leaves a checkpoint to go on from.
RUN = (
    "--epochs 4 --micro-batch 9 --workers 1 SOLVER.WARMUP_EPOCHS 1 SOLVER.DETERMINISTIC True "
    "CHECKPOINT.KEEP_PERIOD 2"
).split()
MIDDLE = "checkpoint_0000004.pth"


def check_resume() -> list[Figure]:
    """A run on all GPUs of the machine, whole, against one that goes on from its middle."""
    processes = launch.num_processes()
    with tempfile.TemporaryDirectory() as folder:
        images, whole, resumed = (Path(folder, name) for name in ("images", "whole", "resumed"))
        drawn.write_image_folder(images, 2 * processes, 40, 0)
        arguments = ["--data", str(images), *RUN, *numerics.SMALL]
        arguments += ["SOLVER.BATCH_SIZE", str(len(drawn.TOYS.classes) * processes)]
        pretrain([*arguments, "OUTPUT_DIR", str(whole)])
        resumed.mkdir()
        shutil.copy(whole / MIDDLE, resumed / checkpoint.LAST)
        pretrain([*arguments, "OUTPUT_DIR", str(resumed)])
        pairs = zip(tensors_of(whole), tensors_of(resumed), strict=True)
        differ = sum(not torch.equal(*pair) for pair in pairs)
    where = f"of {processes} process{'es' * (processes > 1)}"
    if torch.cuda.device_count() > 1:
        where += f" (NCCL_ALGO {os.environ.get('NCCL_ALGO', 'is not set')}, see docs/recipes.md)"
    return [Figure(f"tensors that differ after a resume {where}:", differ, 0)]


def pretrain(arguments: Sequence[str]) -> None:
    """Run tools/pretrain.py. Raises RuntimeError with the last line that it printed."""
    command = command_line(Step(Path(checkpoint.FINAL), ["tools/pretrain.py", *arguments]))
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        printed = process.communicate()[0]
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"tools/pretrain.py ended with status {process.returncode}: {last_line(printed)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def tensors_of(folder: Path) -> list[torch.Tensor]:
    """Everything that a run has learned: networks, momentum, loss scale."""
    saved = checkpoint.load(folder / checkpoint.LAST)
    values = tree_leaves([saved[part] for part in ("model", "optimizer", "scaler")])
    return [torch.as_tensor(value) for value in values if value is not None]


def check_processes() -> list[Figure]:
    """Two steps of two processes against those of one.

    On GPUs with SyncBatchNorm: one process sees the whole batch at once. On a CPU each process has its own
    BatchNorm, and one process accumulates the two halves.
    """
    with tempfile.TemporaryDirectory() as folder:
        with held_back():
            group = torch.multiprocessing.spawn(train_half, (folder,), nprocs=2, join=False)
        try:
            while not group.join():
                pass
        finally:
            for process in group.processes:
                process.kill()
        together = torch.load(Path(folder, "trained.pth"))
    on_gpu = device().type == "cuda"
    alone = train(new_networks(), [views()] if on_gpu else [half(0), half(1)])
    what = "with SyncBatchNorm" if on_gpu else "without SyncBatchNorm, which needs a GPU,"
    return [Figure(f"weights of two processes {what} are off by", numerics.distance(together, alone), 1e-8)]


def train_half(rank: int, folder: str) -> None:
    """Train on one half of the batch, as one of two processes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo greets
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(rank % gpus)
    # NCCL refuses two processes on one GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus > 1 else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=1),
    )
    networks, _ = parallel.convert_batch_norm(new_networks(), wanted=gpus > 0)
    trained = train(networks, [half(rank)])
    if rank == 0:
        torch.save(trained, Path(folder, "trained.pth"))
    dist.destroy_process_group()


def new_networks() -> Networks:
    return numerics.small_networks("rsa", device(), torch.float64)


def views() -> list[torch.Tensor]:
    return numerics.random_views(device(), torch.float64)


def half(rank: int) -> list[torch.Tensor]:
    return [view.chunk(2)[rank] for view in views()]


def train(networks: Networks, micro_batches: list) -> torch.Tensor:
    """The weights after two steps, in one vector on the CPU; on a GPU with BatchNorm's statistics."""
    solver = numerics.small_cfg().SOLVER
    solver.OPTIMIZER = "sgd"  # LARS would hide gradients of the wrong length
    optimizer = build_optimizer(networks, solver)
    set_lr(optimizer, 0.1, 0.1)
    scaler = torch.amp.GradScaler(device().type, enabled=False)
    state = TrainState(parallel.wrap(networks), optimizer, scaler, None)
    for _ in range(2):
        train_step(state, micro_batches, len(micro_batches), beta=0.4, tau=0.9)
    tensors = networks.state_dict().values() if device().type == "cuda" else networks.parameters()
    return numerics.flat(tensors).cpu()
