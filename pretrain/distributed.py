"""One process per GPU, by torch.distributed.elastic; everything here also works in a single process."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pretrain.config import InputError, Interrupted


def num_processes(num_gpus=None):
    """One process per GPU: ``num_gpus`` of them, by default all that this machine shows, or one on its CPU."""
    available = torch.cuda.device_count()
    if num_gpus is not None and not 1 <= num_gpus <= available:
        raise InputError(f"--num-gpus {num_gpus}, but this machine shows {available}"
                         + ("; leave the option out to train on the CPU" if not available else ""))
    return num_gpus or max(1, available)


def launch(train, cfg, processes):
    """Run ``train(cfg)`` in that many processes of this machine; returns what rank 0's returned.

    Under torchrun the processes are there already, and this one only joins them. Raises InputError or Interrupted
    when a process did.
    """
    if launched() or processes == 1:
        return join_and_run(train, cfg)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", run_id="pretrain", max_restarts=0)
    try:
        return elastic_launch(config, join_and_run)(train, cfg)[0]
    except SignalException as stopped:
        raise Interrupted(f"stopped by {stopped.sigval.name}; the same command goes on from there") from None
    except ChildFailedError as failure:
        message = failure.get_first_failure()[1].message
        name, _, text = (message["message"] if isinstance(message, dict) else message).partition(": ")
        for kind in (InputError, Interrupted):
            if name == kind.__name__:
                raise kind(text) from None
        raise


def join_and_run(train, cfg):
    """Join the process group that the launcher's environment describes, if any, and run."""
    if not launched():
        return train(cfg)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    try:
        return train(cfg)
    finally:
        dist.destroy_process_group()


def launched():
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ


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


def amp_dtype(name):
    """torch's dtype for autocast, or None; float16 on a CPU is slow and becomes bfloat16."""
    if name == "off":
        return None
    return torch.float16 if name == "fp16" and torch.cuda.is_available() else torch.bfloat16


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
