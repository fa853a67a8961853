"""One process per GPU, by torch.distributed.elastic; everything here also works in a single process."""

import logging
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError, Interrupted, one_line
from rsa_detectron2.common.progress import close_bars
from rsa_detectron2.common.signals import AGAIN, stop_signals

TIMEOUT = timedelta(minutes=30)  # the others wait for rank 0 while it evaluates
PATIENCE = 10  # seconds that a process waits before it reports a lost peer
HANDED_ON = InputError, Interrupted  # the launcher raises them again when a process did

T, R = TypeVar("T"), TypeVar("R")


def num_processes(wanted: int | None = None) -> int:
    """How many processes to start on this machine: ``wanted``, else one per GPU, or one on the CPU.

    Raises InputError where ``wanted`` is less than 1, or more than there are GPUs.
    """
    available = torch.cuda.device_count()
    if wanted is not None and (wanted < 1 or available and wanted > available):
        raise InputError(
            f"--num-processes {wanted}: "
            + (f"this machine shows {available} GPUs" if available else "it must be at least 1")
        )
    return wanted or max(1, available)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, those of each machine started by a command of its own."""

    here: int = 1  # on this machine: one per GPU, or several on the CPU
    machines: int = 1
    machine: int = 0  # the number of this machine
    address: str = ""  # HOST:PORT of machine 0, where there are several

    @property
    def all(self) -> int:
        return self.here * self.machines


def launch(train: Callable[[T], R], job: T, processes: Processes, again: str = AGAIN) -> R:
    """Run ``train(job)`` in the processes of this machine; returns what it returned on the first of them.

    Under torchrun, or as a task of srun (:func:`adopt_slurm`), the processes have been started already, and
    this one only joins them. ``again``: what goes on after an interruption, for messages. Raises InputError
    or Interrupted when a process did.
    """
    if distributed.launched() or processes.all == 1:
        return join_and_run(train, job)
    config = LaunchConfig(
        min_nodes=processes.machines,
        max_nodes=processes.machines,
        nproc_per_node=processes.here,
        run_id="rsa",
        max_restarts=0,
        **rendezvous(processes),
    )
    # The signals that elastic passes on to the processes. Before torch 2.10 it knows a list of its own, which
    # lacks SIGUSR1: the handler that it leaves in place does the same.
    config.signals_to_handle = ",".join(number.name for number in stop_signals())
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there are handlers allowed
    handlers = {n: signal.signal(n, pass_on) for n in stop_signals()} if in_main_thread else {}
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(is_a_crash)
    # It would log that it ends the other processes.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        results = elastic_launch(config, join_and_run)(train, job)  # those of this machine, by their ranks
        return results[min(results)]
    except SignalException as stopped:
        raise Interrupted(f"stopped by {stopped.sigval.name}; {again} goes on from there") from None
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode < 0:
            killed = first.exitcode == -signal.SIGKILL
            cause = ", most likely because memory ran out" if killed else ""
            raise InputError(
                f"process {rank} of {processes.all} died of {signal.Signals(-first.exitcode).name}{cause}: "
                f"{again} goes on from the last checkpoint"
            ) from None
        message = first.message
        name, _, text = (message["message"] if isinstance(message, dict) else message).partition(": ")
        for kind in HANDED_ON:
            if name == kind.__name__:
                raise kind(text) from None
        raise
    finally:  # elastic leaves its own handlers behind
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def rendezvous(processes: Processes) -> dict:
    """How the launchers of the machines find each other, in LaunchConfig's words."""
    if processes.machines == 1:
        # local_addr: this machine's own name need not resolve.
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": processes.address,
        "rdzv_configs": {"rank": processes.machine, "timeout": TIMEOUT.seconds},
    }


def pass_on(number: int, frame: FrameType | None) -> None:
    """A handler that makes elastic end its processes by the signal."""
    raise SignalException(f"stopped by {signal.Signals(number).name}", signal.Signals(number))


def is_a_crash(record: logging.LogRecord) -> bool:
    """A filter of elastic's log. InputError and Interrupted are left out, since the tool prints them; so are
    signals that are passed on."""
    error = str(record.exc_info[1]) if record.exc_info else ""
    return not record.msg.startswith("Closing process") and not any(
        f"{kind.__module__}.{kind.__name__}: " in error for kind in HANDED_ON
    )


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Describe a task of srun in torchrun's words, so that ``srun tools/pretrain.py`` needs no launcher.

    Only srun sets SLURM_STEP_NUM_TASKS. A batch script or a salloc shell that calls the tool directly is a
    single process, whatever the size of its allocation.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environment or tasks == 1:
        return
    host, number = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"]).groups()
    # "4(x2),3" means 4 tasks on each of two nodes, then 3.
    on_this_node = environment["SLURM_STEP_TASKS_PER_NODE"].split(",")[0].split("(")[0]
    environment.update(
        {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": on_this_node,
            "MASTER_ADDR": host + (number or ""),
            "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 20000),
        }
    )


def join_and_run(train: Callable[[T], R], job: T) -> R:
    """Join the process group that the launcher's environment describes, if any, and run."""
    if not distributed.launched():
        return train(job)
    if torch.cuda.is_available():
        # srun may show each task only its own GPU.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(distributed.cores())
    # gloo beside NCCL: what the processes agree on between steps then costs the GPU no synchronization.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    # Take the group down only where all processes have come to the end: one that leaves early, with an
    # error, must not wait for the others.
    try:
        result = train(job)
    except Interrupted as interruption:  # all leave at the same step
        # Free DistributedDataParallel first, with the frames that hold it. If it were the last to hold
        # the group, it would end the group's threads while it holds Python's lock, for which one of
        # them may be waiting.
        traceback.clear_frames(interruption.__traceback__)
        dist.destroy_process_group()
        raise
    except (InputError, OSError, MemoryError) as error:  # the launcher knows InputError by its name
        close_bars()
        raise InputError(one_line(error)) from None
    except RuntimeError:
        # Most often a lost peer. The launcher reports only the first error, so wait for the peer's own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends the wait with it
        time.sleep(PATIENCE)
        raise
    dist.destroy_process_group()
    return result
