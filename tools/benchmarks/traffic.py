"""Bytes that operators move, counted from the shapes of their arguments: on any device, meta included."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Read as many elements of their first argument as they return.
GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding}
# Write as many elements of their first argument as their last tensor has.
SCATTERS = {aten.index_put_, aten._index_put_impl_, aten.index_copy_, aten.scatter_}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}  # do not read what they write
# Touch no element.
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}


@dataclass
class Traffic:
    """Bytes that operators read and wrote, and how many of them touched data: about a kernel each."""

    bytes: int = 0
    operators: int = 0


class TrafficCounter(TorchDispatchMode):
    """Counts the operators on ``device`` that run inside of it, by parts: ``parts`` is {name: Traffic}.

    Each operator reads its arguments and writes its results once; caches are ignored. Views are free. What
    an expanded tensor repeats counts once. Kernels of torch.compile are not seen.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.parts, self.current = device, {}, Traffic()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        moved = count(func, args, kwargs or {}, result)
        if moved and any(tensor.device.type == self.device for tensor in tensors_in((args, result))):
            self.current.bytes += moved
            self.current.operators += 1
        return result

    def end_part(self, name: str) -> None:
        """What ran since the last part belongs to part ``name``."""
        part = self.parts.setdefault(name, Traffic())
        part.bytes += self.current.bytes
        part.operators += self.current.operators
        self.current = Traffic()


def measure_traffic(work: Callable[[None], object], device: str) -> Traffic:
    """What ``work(None)`` moves on ``device``."""
    with TrafficCounter(device) as counter:
        work(None)
    return counter.current


def count(func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> int:
    """Bytes that one call reads and writes; 0 for a view."""
    kind, schema = func.overloadpacket, func._schema
    if kind in FREE or is_view(schema):
        return 0
    tensors = tensors_in(args)
    if kind in GATHERS:
        return sum(map(size, tensors[1:])) + 2 * sum(map(size, tensors_in(result)))
    if kind in SCATTERS:
        return sum(map(size, tensors[1:])) + size(tensors[-1])
    written = tensors_in(result) or [
        tensor
        for argument, value in zip(schema.arguments, args)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(value)
    ]
    outs = {argument.name for argument in schema.arguments if argument.is_out}
    read = tensors[1:] if kind in OVERWRITES else tensors
    read = read + tensors_in([value for name, value in kwargs.items() if name not in outs])
    return sum(map(size, read)) + sum(map(size, written))


def tensors_in(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def size(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor that differ in their address."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride()):
        elements *= length if stride else min(length, 1)
    return elements * tensor.element_size()


def is_view(schema: torch._C.FunctionSchema) -> bool:
    """Whether results share memory with an argument that is not written."""
    aliases = [returned.alias_info for returned in schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
