"""Checkpoint files as inert data: dicts, lists, strings, numbers, and tensors that are read when asked for.

A pickle is a program for a small stack machine. This module steps through it with the standard library's
disassembler and only builds containers: a class or function that the file names stays a :class:`Name`, and
what the file wants done with it becomes a :class:`Call`, a record. Nothing that a file names is imported,
called or given state, so opening a file never runs its code, and neither sizes that it claims nor its nesting
cost memory beyond a multiple of its length.

torch.load(weights_only=True) is not enough for files of strangers: it calls ``bytearray(n)`` for a file of
355 bytes (n bytes of memory), overflows the C stack on a nested tuple as a key, does not compare the
archive's checksums, and refuses old files that hold foreign objects beside their tensors.
"""

import io
import json
import mmap
import os
import pickletools
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from rsa_detectron2.common.errors import InputError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file of torch.save before version 1.6
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

OTHER_FILES = {  # first bytes: what is often downloaded in place of a checkpoint
    b"version h": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page, not a file of weights",
    b"\x1f\x8b": "compressed: unpack it with gunzip first",
}


class Name(str):
    """``"module name"`` of a class or function: only its name."""


@dataclass(eq=False)
class Call:
    """What a file wants ``function`` called with. Never done."""

    function: Any
    args: Any
    state: Any = None


@dataclass(eq=False)
class Tensor:
    """``shape`` of a stored tensor; ``read()`` -> torch.Tensor on the CPU, which may share memory."""

    shape: tuple
    read: Callable


def local_file(path, absent):
    """``path`` with ~ expanded, of a file that is there. Raises InputError: ``absent`` where it is not."""
    if "://" in str(path):
        raise InputError(
            f"no weights {path}: URLs are not fetched; download the file, and convert it with "
            "tools/convert_to_d2.py"
        )
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: give a checkpoint file in it")
    if not os.path.isfile(path):
        raise InputError(absent)
    return path


@contextmanager
def open_checkpoint(path):
    """Context manager: a file of torch.save (zip archive or legacy), pickle or safetensors -> its content as
    inert data.

    Tensors are :class:`Tensor`, to be read inside the context. Raises InputError, one line that names the
    file, whatever is wrong with it.
    """
    try:
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            start, size = file.read(9), os.fstat(file.fileno()).st_size
            if start[:4] == b"PK\x03\x04":
                contents = _read_zip(stack.enter_context(zipfile.ZipFile(file)))
            # Before pickle: a header of 640 bytes, say, has a length that begins like one
            elif start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
                contents = _read_safetensors(stack.enter_context(safetensors.safe_open(path, "pt")))
            elif start[:1] == b"\x80":
                mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                contents = _read_file(mapped)
            else:
                raise ValueError(
                    next(
                        (what for start_of, what in OTHER_FILES.items() if start.startswith(start_of)),
                        "it is neither of torch.save nor safetensors nor a pickle",
                    )
                )
            yield contents
    except InputError:
        raise
    except Exception as error:  # a broken file can fail in any way, in any of the libraries
        raise InputError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {printable(error)}"
        ) from None


def printable(text, most=150):
    """The start of what may come from a file, fit for one line of a terminal."""
    line = " ".join(str(text)[: 10 * most].split())
    return "".join(c if c.isprintable() else "?" for c in line)[:most]


def _read_zip(archive):
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("a zip archive, but not one of torch.save")
    root = roots[0]
    if root + "constants.pkl" in archive.namelist():
        raise ValueError("a TorchScript module, whose code is never run: save its state_dict() instead")
    if root + "byteorder" in archive.namelist() and _member(archive, root + "byteorder") != b"little":
        raise ValueError("written on a big-endian machine")

    def storage(key, dtype):
        return _member(archive, f"{root}data/{key}")

    return read_pickle(io.BytesIO(_member(archive, root + "data.pkl")), storage)


def _member(archive, name):
    """Bytes of one member, whose checksum zipfile compares. torch.save never compresses, so none can grow."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > Path(archive.filename).stat().st_size:
        raise ValueError(f"{name} is compressed, or claims to be larger than the file")
    return archive.read(info)


def _read_file(file):
    """One pickle, or a file of torch.save before 1.6: five pickles, then each storage's length and bytes."""
    offsets, dtypes = {}, {}

    def storage(key, dtype):
        start, count = offsets[key]
        return file[start : start + count * dtype.itemsize]

    first = read_pickle(file)
    if first != LEGACY_MAGIC:
        return first
    read_pickle(file)  # version of the protocol
    if read_pickle(file).get("little_endian") is not True:
        raise ValueError("written on a big-endian machine")
    contents = read_pickle(file, storage, dtypes)
    for key in read_pickle(file):
        if type(key) is not str:
            raise ValueError("a storage whose key is no string")
        offsets[key] = file.tell() + 8, int.from_bytes(file.read(8), "little")
        file.seek(offsets[key][0] + offsets[key][1] * dtypes[key].itemsize)
    return contents


def _read_safetensors(file):
    """{name: Tensor}, beside which stands what tools/convert_to_d2.py wrote into the header."""
    tensors = {
        name: Tensor(tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))
        for name in file.keys()
    }
    said = {
        name: json.loads(text)
        for name, text in (file.metadata() or {}).items()
        if name in ("provenance", "crc32")
    }
    return {"state_dict": tensors, **said} if "provenance" in said else tensors


def read_pickle(file, storage=None, dtypes=None):
    """One pickle from a file object -> inert data; the file is left behind it.

    ``storage(key, dtype)`` -> bytes of a stored array; ``dtypes`` (dict) receives the dtype of each key. Only
    strings and whole numbers are kept as keys of dicts: to hash anything else may recurse without bound.
    """
    stack, marks, memo = [], [], {}

    def pop_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(target, items):
        if type(target) is dict:
            target.update((k, v) for k, v in zip(items[::2], items[1::2]) if type(k) in (str, int))

    def extend(target, items):
        if type(target) is list:
            target.extend(items)

    for opcode, value, _ in pickletools.genops(file):
        match opcode.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "LIST" | "FROZENSET":
                stack.append(pop_mark())
            case "DICT":
                items = pop_mark()
                stack.append({})
                set_items(stack[-1], items)
            case "SETITEM":
                items = [stack.pop(), stack.pop()][::-1]
                set_items(stack[-1], items)
            case "SETITEMS":
                items = pop_mark()
                set_items(stack[-1], items)
            case "APPEND":
                item = stack.pop()
                extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = pop_mark()
                extend(stack[-1], items)
            case "GLOBAL":
                stack.append(Name(value))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Name(f"{module} {name}" if type(module) is type(name) is str else "?"))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Name(f"copyreg extension{value}"))
            case "INST":
                stack.append(Call(Name(value), pop_mark()))
            case "OBJ":
                function, *args = pop_mark()
                stack.append(Call(function, args))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(_build(function, args))
            case "NEWOBJ_EX":
                _, args, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(Call(function, args))
            case "BUILD":
                state = stack.pop()
                if type(stack[-1]) is Call:
                    stack[-1].state = state
            case "PERSID":
                stack.append(Call("persistent id", value))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storage, dtypes))
            case name if opcode.arg is not None or name in ("NONE", "NEWTRUE", "NEWFALSE"):
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}.get(name, value))
            case name:
                raise ValueError(f"holds {name}, which no checkpoint needs")
    raise ValueError("the pickle does not end")


def _storage(args, storage, dtypes):
    """torch.save's id ("storage", type, key, location, length[, view]) -> a Call that names a storage."""
    match args:
        case ("storage", Name() as kind, str(key), _, int(), *views) if not any(views):
            dtype = STORAGE_DTYPES.get(kind.split()[-1])
            if dtype and storage and (dtypes is None or dtypes.setdefault(key, dtype) == dtype):
                return Call("storage", (key, dtype, storage))
    return Call("persistent id", args)


def _build(function, args):
    """The few things that a state dict is made of, built by this module; any other call stays a record."""
    match function, args:
        case "collections OrderedDict", (() | ([*_],)):
            pairs = args[0] if args else []
            return {pair[0]: pair[1] for pair in pairs if type(pair[0]) in (str, int)}
        case "torch._utils _rebuild_parameter", (Tensor() as tensor, *_):
            return tensor
        case (
            ("torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor"),
            (Call("storage", (key, dtype, storage)), int(offset), tuple(shape), tuple(stride), *_),
        ):
            numbers = (offset, *shape, *stride)
            if len(shape) == len(stride) and all(type(n) is int and n >= 0 for n in numbers):
                return Tensor(shape, lambda: _strided(storage(key, dtype), dtype, offset, shape, stride))
    return Call(function, args)


def _strided(data, dtype, offset, shape, stride):
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    if offset + sum((n - 1) * step for n, step in zip(shape, stride)) >= len(flat):
        raise ValueError("a tensor reaches beyond its storage")
    return flat.as_strided(shape, stride, offset)


def as_tensor(value):
    """A :class:`Tensor`, also of a pickled numpy array of floats; None for anything else."""
    match value:
        case Tensor():
            return value
        case Call(
            ("numpy.core.multiarray _reconstruct" | "numpy._core.multiarray _reconstruct"),
            _,
            (1, tuple(shape), dtype, bool(fortran), data),
        ):
            return _array(data, dtype, shape, "F" if fortran else "C")
        case Call(
            ("numpy.core.numeric _frombuffer" | "numpy._core.numeric _frombuffer"),
            (data, dtype, tuple(shape), ("C" | "F") as order),
        ):  # from protocol 5 on
            return _array(data, dtype, shape, order)


def _array(data, dtype, shape, order):
    match data:
        case Call("_codecs encode", (str(text), "latin1")):  # before protocol 3
            data = text.encode("latin1")
    match dtype:
        case Call("numpy dtype", (("f2" | "f4" | "f8") as kind, *_), (3, "<", *_)) if type(data) in (
            bytes,
            bytearray,
        ) and all(type(n) is int and n >= 0 for n in shape):
            return Tensor(
                shape,
                lambda: torch.from_numpy(np.frombuffer(bytearray(data), kind).reshape(shape, order=order)),
            )
