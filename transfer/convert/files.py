"""Opening files as inert data: torch.save's archives, their legacy form, pickles, safetensors.

No file can run code, see pickles.py. Whatever is wrong with a file, the error is one line that names it.
"""

import io
import json
import mmap
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert.pickles import read_pickle
from rsa_detectron2.transfer.convert.stored import Tensor

# First pickle of a file of torch.save before PyTorch 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# {first bytes of a file that was downloaded in place of a checkpoint: what it is}
OTHER_FILES = {
    b"version h": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page, not a file of weights",
    b"\x1f\x8b": "compressed: unpack it with gunzip first",
}


def local_file(path: str | Path, absent: str) -> str:
    """``path`` with ~ expanded.

    Raises InputError for a URL or a folder, and with the message ``absent`` where there is no file.
    """
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
def open_checkpoint(path: str | Path) -> Iterator[Any]:
    """Context manager: the content of a checkpoint file as inert data.

    Tensors are :class:`Tensor`, to be read inside the context. Raises InputError, one line that names the
    file, whatever is wrong with it.
    """
    try:
        with ExitStack() as stack:
            yield _read(path, stack)
    except InputError:
        raise
    except Exception as error:  # a broken file can fail in any way, in any of the libraries
        raise InputError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {printable(error)}"
        ) from None


def _read(path, stack):
    """The content of a file, by its first bytes; ``stack`` closes what stays open for tensors."""
    file = stack.enter_context(open(path, "rb"))
    start, size = file.read(9), os.fstat(file.fileno()).st_size
    if start[:4] == b"PK\x03\x04":
        return _read_zip(stack.enter_context(zipfile.ZipFile(file)))
    # Test this before pickle: a safetensors header of 640 bytes begins with the byte of a pickle.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(stack.enter_context(safetensors.safe_open(path, "pt")))
    if start[:1] == b"\x80":
        return _read_pickles(stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    what = next(
        (what for beginning, what in OTHER_FILES.items() if start.startswith(beginning)),
        "it is neither of torch.save nor safetensors nor a pickle: give the file that the training saved "
        "(.pth, .pt, .ckpt, .safetensors, .pkl)",
    )
    raise InputError(f"{path} cannot be read as a checkpoint: {what}")


def printable(text: Any, most: int = 150) -> str:
    """The first ``most`` characters of untrusted text, safe for one line of a terminal."""
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

    load = partial(_read_storage, archive, root)
    return read_pickle(io.BytesIO(_member(archive, root + "data.pkl")), load)


def _read_storage(archive, root, key, dtype):
    """Bytes of the storage ``key``, of whichever ``dtype``."""
    return _member(archive, f"{root}data/{key}")


def _member(archive, name):
    """Bytes of one member; zipfile compares its checksum.

    Raises ValueError where it would take more memory than the file: torch.save does not compress.
    """
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > Path(archive.filename).stat().st_size:
        raise ValueError(f"{name} is compressed, or claims to be larger than the file")
    return archive.read(info)


def _read_pickles(file):
    """Content of a file of one pickle, or of torch.save before PyTorch 1.6.

    The latter has five pickles, then the length and bytes of each storage.
    """
    offsets, dtypes = {}, {}  # of each storage: (start, number of elements), dtype
    first = read_pickle(file)
    if first != LEGACY_MAGIC:
        return first
    read_pickle(file)  # version of the protocol
    if read_pickle(file).get("little_endian") is not True:
        raise ValueError("written on a big-endian machine")
    contents = read_pickle(file, partial(_read_legacy_storage, file, offsets), dtypes)
    for key in read_pickle(file):
        if type(key) is not str:
            raise ValueError("a storage whose key is no string")
        offsets[key] = file.tell() + 8, int.from_bytes(file.read(8), "little")
        file.seek(offsets[key][0] + offsets[key][1] * dtypes[key].itemsize)
    return contents


def _read_legacy_storage(file, offsets, key, dtype):
    start, count = offsets[key]
    return file[start : start + count * dtype.itemsize]


def _read_safetensors(file):
    """{name: Tensor}; of a file of tools/convert_to_d2.py, {"state_dict": that, ...} with what its header
    says."""
    tensors = {
        name: Tensor(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
        for name in file.keys()
    }
    said = {
        name: json.loads(text)
        for name, text in (file.metadata() or {}).items()
        if name in ("provenance", "crc32")
    }
    return {"state_dict": tensors, **said} if "provenance" in said else tensors
