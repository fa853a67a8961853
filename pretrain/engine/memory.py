"""The micro-batch: how many images go through the networks at once. The rest is accumulated."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError

# The part of the free memory that the estimate may fill: it ignores kernels' workspaces and fragmentation.
FILL = 0.8


def per_process(batch_size: int, world_size: int) -> int:
    """The local batch size. Raises InputError, with the nearest sizes that divide, where ``batch_size`` does
    not."""
    if batch_size % world_size:
        below = batch_size - batch_size % world_size
        near = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise InputError(
            f"a global batch of {batch_size} does not divide among {world_size} processes: "
            f"use --batch-size {near}"
        )
    return batch_size // world_size


def resolve(wanted: int, images: int, memory: Callable[[], int]) -> int:
    """The micro-batch of a process with a local batch of ``images``.

    It is ``wanted``; where that is 0, the largest divisor of ``images`` that is at most ``memory()``. Raises
    InputError, with the nearest sizes that divide, where ``wanted`` does not.
    """
    divisors = [n for n in range(1, images + 1) if images % n == 0]
    if not wanted:
        available = memory()
        return max([n for n in divisors if n <= available], default=1)
    if wanted not in divisors:
        below, above = ([n for n in divisors if n < wanted][-1:], [n for n in divisors if n > wanted][:1])
        raise InputError(
            f"a micro-batch of {wanted} does not divide the {images} images of each process: "
            f"use --micro-batch {' or '.join(map(str, below + above))}"
        )
    return wanted


def max_batch_size(networks: nn.Module, size: int, amp: torch.dtype | None) -> int:
    """How many ``size`` x ``size`` images fit on the device in a training step: at least 1, and the same
    number in all processes.

    ``networks`` are on the CPU, as they were built.
    """
    held, image = costs(networks, size, amp)
    return max(1, distributed.least(int((FILL * free_memory() - held) / image)))


def needed(networks: nn.Module, size: int, amp: torch.dtype | None, count: int) -> float:
    """Bytes that a process should have free to train with ``count`` images at once."""
    held, image = costs(networks, size, amp)
    return (held + count * image) / FILL


def costs(networks: nn.Module, size: int, amp: torch.dtype | None) -> tuple[int, float]:
    """Bytes of a training step: (those that do not depend on its images, those of each image)."""
    weights = sum(t.nbytes for t in networks.state_dict().values())
    gradients = sum(p.nbytes for p in networks.parameters() if p.requires_grad)
    views = 4 * 3 * size * size * torch.float32.itemsize  # two weak, two aggressive
    # Three times the gradients: themselves, DDP's buckets, the momentum. Twice the views, for the
    # augmentation. A quarter more activations than are saved, for the gradients of those in use.
    return weights + 3 * gradients, 2 * views + 1.25 * activations(networks, size, amp)


def activations(networks: nn.Module, size: int, amp: torch.dtype | None) -> int:
    """Bytes that the forward pass of one image leaves for the backward pass.

    It is the difference of a pass of three images and one of two, so that what does not grow with the batch
    drops out. Nothing is computed: the passes run on fake CPU tensors, which have a shape and a dtype only.
    """
    networks = copy.deepcopy(networks).train()  # a pass leaves keys in MoCo's queue
    return _saved_bytes(networks, size, amp, 3) - _saved_bytes(networks, size, amp, 2)


def _saved_bytes(networks, size, amp, count):
    """Bytes that the forward pass of ``count`` images saves; tensors that share a storage count once."""
    saved = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    fake = FakeTensorMode()
    tensors = {**dict(networks.named_parameters()), **dict(networks.named_buffers())}
    tensors = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
    with (
        fake,
        saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", amp and torch.bfloat16, enabled=amp is not None),
    ):
        views = torch.zeros(count, 2, 3, size, size)
        functional_call(networks, tensors, (views, views, 0.5))
    return sum(storage.nbytes() for storage in saved)


def free_memory() -> int:
    """Bytes that this process may take on its device."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        kilobytes = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return 1024 * kilobytes // distributed.local_world_size()
