"""One process per GPU, by torch.distributed.elastic; everything here also works in a single process."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pretrain.config import InputError


def launch(train, cfg, num_gpus=None):
    """Run ``train(cfg)`` on ``num_gpus`` GPUs of this machine (default: all of them).

    Under torchrun the processes are there already, and this one only joins them. Otherwise more than one GPU means
    that this process starts one worker per GPU and waits. Returns what ``train`` returned (rank 0's).
    """
    available = torch.cuda.device_count()
    if num_gpus is not None and num_gpus > available:
        raise InputError(f"--num-gpus {num_gpus}, but this machine shows {available}")
    wanted = available if num_gpus is None else num_gpus
    if "RANK" in os.environ or wanted <= 1:
        return join_and_run(train, cfg)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=wanted, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", run_id="pretrain", max_restarts=0)
    return elastic_launch(config, join_and_run)(train, cfg)[0]


def join_and_run(train, cfg):
    """Join the process group that the launcher's environment describes, if any, and run."""
    if "RANK" not in os.environ:
        return train(cfg)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    try:
        return train(cfg)
    finally:
        dist.destroy_process_group()


def is_first_process():
    """True in the process that should print, also before and after the process group lives."""
    return int(os.environ.get("RANK", 0)) == 0


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def any_rank(flag):
    """True on every rank if ``flag`` is true on one of them."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.item() > 0


def barrier():
    if dist.is_initialized():
        dist.barrier()
