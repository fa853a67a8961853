"""This process among the others: its rank, its device, and what the processes agree on.

Everything here also works in a single process.
"""

import inspect
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# Each process keeps its own running statistics of BatchNorm between steps. torch 2.14 renamed the option,
# and warns about the old name.
SYNC_OPTION = "forward_sync_buffers"
if SYNC_OPTION not in inspect.signature(DistributedDataParallel).parameters:
    SYNC_OPTION = "broadcast_buffers"
OWN_BUFFERS = {SYNC_OPTION: False}

T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ


def is_first_process() -> bool:
    """True in the process that should print, also before the process group starts and after it ends."""
    return int(os.environ.get("RANK", 0)) == 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores() -> int:
    """How many cores this process should use. srun may have bound the task to some of the machine's."""
    mine = len(os.sched_getaffinity(0))
    # Under torchrun the task is torchrun itself, and its processes share the task's cores.
    by_srun = "TORCHELASTIC_RUN_ID" not in os.environ
    bound = by_srun and mine < int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) * local_world_size()
    return mine if bound else max(1, mine // local_world_size())


def device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def device_name() -> str:
    """The name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def amp_dtype(name: str) -> torch.dtype | None:
    """torch's dtype for autocast, or None. On a CPU float16 is slow, so bfloat16 replaces it."""
    if name == "off":
        return None
    return torch.float16 if name == "fp16" and torch.cuda.is_available() else torch.bfloat16


def precision(amp: torch.dtype | None) -> str:
    """In what a run computes with autocast to ``amp``, in words."""
    if amp:
        return str(amp)
    tf32 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "float32, convolutions in TF32" if tf32 and torch.backends.cudnn.allow_tf32 else "float32"


def any_rank(flag: bool) -> bool:
    """True on every rank if ``flag`` is true on one of them; also a barrier."""
    return -least(-int(flag)) > 0


def any_rank_later(flag: Callable[[], bool]) -> Callable[[], bool]:
    """Like any_rank(flag()), but the ranks exchange their flags while the caller works: the function that is
    returned waits for the answer. A single process is asked only then."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag()))
    exchange = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> bool:
        exchange.wait()
        return bool(flags)

    return answer


def least(number: int) -> int:
    """The smallest of the ranks' integers, on every rank."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
    return numbers.item()


def mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over the ranks of a tensor on the device, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world_size()
    return values


def from_first(value: T) -> T:
    """Rank 0's ``value`` (anything that pickles) on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]
