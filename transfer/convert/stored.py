"""The types in an opened checkpoint besides Python's own: names, calls, storages and tensors.

Nothing here trusts the file: a value that is not exactly what torch or numpy writes stays a record, and a
tensor is checked against its storage before it is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class Name(str):
    """``"module name"`` of a class or function, which is never imported."""


@dataclass(eq=False)
class Call:
    """A call of ``function`` that a file asks for. It is never made."""

    function: Any
    args: Any
    state: Any = None


@dataclass(eq=False)
class Storage:
    """An array of numbers in a file: ``load(key, dtype)`` returns its bytes."""

    key: str
    dtype: torch.dtype
    load: Callable[[str, torch.dtype], bytes]


@dataclass(eq=False)
class Tensor:
    """A stored tensor. ``read()`` returns it on the CPU; it may share memory with other tensors."""

    shape: tuple
    read: Callable[[], torch.Tensor]


def storage_of(args: Any, load: Callable | None, dtypes: dict | None) -> Storage | Call:
    """The storage that an id of torch.save names; any other id stays a record.

    args: ("storage", type, key, location, length[, view]).
    dtypes: None, or a dict that receives the dtype of each key, which must be the same each time.
    """
    match args:
        case ("storage", Name() as kind, str(key), _, int(), *views) if not any(views):
            dtype = STORAGE_DTYPES.get(kind.split()[-1])
            if dtype and load and (dtypes is None or dtypes.setdefault(key, dtype) == dtype):
                return Storage(key, dtype, load)
    return Call("persistent id", args)


def build(function: Any, args: Any) -> dict | Tensor | Call:
    """The dict or tensor that a call would return; a call of anything else stays a record."""
    match function, args:
        case "collections OrderedDict", (() | ([*_],)):
            pairs = args[0] if args else []
            return {pair[0]: pair[1] for pair in pairs if type(pair[0]) in (str, int)}
        case "torch._utils _rebuild_parameter", (Tensor() as tensor, *_):
            return tensor
        case (
            ("torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor"),
            (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_),
        ):
            if len(shape) == len(stride) and _are_sizes((offset, *shape, *stride)):
                return Tensor(shape, partial(_read_strided, storage, offset, shape, stride))
    return Call(function, args)


def _are_sizes(numbers):
    return all(type(n) is int and n >= 0 for n in numbers)


def _read_strided(storage, offset, shape, stride):
    data = storage.load(storage.key, storage.dtype)
    flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(shape, stride)) >= len(flat):
        raise ValueError("a tensor reaches beyond its storage")
    return flat.as_strided(shape, stride, offset)


def as_tensor(value: Any) -> Tensor | None:
    """The tensor of a stored value, which may be a pickled numpy array of floats; else None."""
    match value:
        case Tensor():
            return value
        case Call(
            ("numpy.core.multiarray _reconstruct" | "numpy._core.multiarray _reconstruct"),
            _,
            (1, tuple(shape), dtype, bool(fortran), data),
        ):
            return _array(data, dtype, shape, "F" if fortran else "C")
        # pickle protocol 5
        case Call(
            ("numpy.core.numeric _frombuffer" | "numpy._core.numeric _frombuffer"),
            (data, dtype, tuple(shape), ("C" | "F") as order),
        ):
            return _array(data, dtype, shape, order)
    return None


def _array(data, dtype, shape, order):
    match data:
        case Call("_codecs encode", (str(text), "latin1")):  # pickle protocols 0 to 2
            data = text.encode("latin1")
    if type(data) not in (bytes, bytearray) or not _are_sizes(shape):
        return None
    match dtype:
        case Call("numpy dtype", (("f2" | "f4" | "f8") as kind, *_), (3, "<", *_)):
            return Tensor(shape, partial(_read_array, data, kind, shape, order))
    return None


def _read_array(data, kind, shape, order):
    array = np.frombuffer(bytearray(data), kind)
    return torch.from_numpy(array.reshape(shape, order=order))
