"""Files that would run code, claim absurd sizes or are damaged: nothing runs, memory stays small, and the
error is one clear line.

The files are small: twelve tensors of a ResNet-50 stand for the 265.
"""

import collections
import functools
import gzip
import io
import json
import os
import pickle
import random
import re
import runpy
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert import architectures, readers
from rsa_detectron2.transfer.convert import writers as convert
from rsa_detectron2.transfer.convert.inspect import inspect

SHAPES = {
    name: torch.Size([2] * len(shape)) for name, shape in list(architectures.tensor_shapes().items())[:12]
}
STATE = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for i, (name, shape) in enumerate(SHAPES.items())
}
LIMIT = 64 << 20  # bytes of memory that a file of some KB may cost


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(architectures, "tensor_shapes", lambda name="resnet50": SHAPES)
    for name in architectures.ARCHITECTURES.keys() - {"resnet50"}:
        monkeypatch.delitem(architectures.ARCHITECTURES, name)


@pytest.fixture
def canary(tmp_path):
    """A path that the code in a hostile file would create."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


def outcome(path, read=readers.read_checkpoint):
    """ "right" if ``path`` is read with exactly the numbers of :data:`STATE`, "other" if with others, else
    "refused"."""
    try:
        state, provenance = read(path)
    except InputError as error:
        message = str(error)
        assert message.startswith((str(path), f"no checkpoint {path}", f"no weights {path}"))
        assert message.isprintable() and len(message) < len(str(path)) + 700
        return "refused"
    assert {name: tensor.shape for name, tensor in state.items()} == SHAPES
    assert all(tensor.isfinite().all() for tensor in state.values())
    json.dumps(provenance)
    return "right" if all(torch.equal(state[name], STATE[name]) for name in SHAPES) else "other"


def written(path, content):
    path.write_bytes(content)
    return path


# Objects that make pickle.loads create a path.


class Reduce:
    """Pickled as ``function(*args)``, with ``state`` to set."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def script(canary):
    return str(written(canary.with_name("script.py"), f"open({str(canary)!r}, 'w')".encode()))


def saved(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


OBJECTS = {
    "os.system": lambda canary: Reduce(os.system, f"touch {canary}"),
    "os.mkdir": lambda canary: Reduce(os.mkdir, str(canary)),
    "exec": lambda canary: Reduce(exec, f"open({str(canary)!r}, 'w')"),
    "eval": lambda canary: Reduce(eval, f"getattr(__import__('os'), 'mkdir')({str(canary)!r})"),
    "open": lambda canary: Reduce(open, str(canary), "w"),
    "subprocess": lambda canary: Reduce(subprocess.check_call, ["touch", str(canary)]),
    "runpy": lambda canary: Reduce(runpy.run_path, script(canary)),
    "pathlib": lambda canary: Reduce(type(canary).touch, canary),
    "in arguments": lambda canary: Reduce(len, [Reduce(os.mkdir, str(canary))]),
    "pickle in a pickle": lambda canary: Reduce(pickle.loads, pickle.dumps(Reduce(os.mkdir, str(canary)))),
    "map": lambda canary: Reduce(list, Reduce(map, os.mkdir, [str(canary)])),
    "reduce": lambda canary: Reduce(functools.reduce, os.makedirs, [str(canary), 0o755]),
    "in state": lambda canary: Reduce(collections.OrderedDict, state={"x": Reduce(os.mkdir, str(canary))}),
    "in an ordered dict": lambda canary: Reduce(
        collections.OrderedDict, [["x", Reduce(os.mkdir, str(canary))]]
    ),
    "torch.load": lambda canary: Reduce(
        torch.storage._load_from_bytes, saved([Reduce(os.mkdir, str(canary))])
    ),
    "torch's rebuild": lambda canary: Reduce(
        torch._tensor._rebuild_from_type_v2, os.mkdir, int, (str(canary),), {}
    ),
    "a tensor's hooks": lambda canary: Reduce(
        torch._utils._rebuild_tensor_v2,
        torch.FloatStorage(0),
        0,
        (0,),
        (1,),
        False,
        Reduce(os.mkdir, str(canary)),
    ),
    "a parameter's data": lambda canary: Reduce(
        torch._utils._rebuild_parameter, Reduce(os.mkdir, str(canary)), False, {}
    ),
    "an array of objects": lambda canary: np.array([Reduce(os.mkdir, str(canary)), None], dtype=object),
}


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def stack_global(module, name):
    return b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"


def lazy_map(path):
    """Makes map(os.mkdir, [path]) by NEWOBJ; a tuple made of that calls os.mkdir."""
    return b"cbuiltins\nmap\ncos\nmkdir\n](" + text(path) + b"e\x86\x81"


def fine_tuned(path):
    """A model that is evaluated or resumed."""
    state, iterations, weights = convert.load_model(path, STATE)
    assert iterations == 90
    return state, weights


MKDIR = b"cos\nmkdir\n"
RAW = {  # pickles that Python's own pickler does not write; PROTO and STOP are added
    "GLOBAL": lambda path: MKDIR + text(path) + b"\x85R",
    "GLOBAL of posix": lambda path: b"cposix\nmkdir\n" + text(path) + b"\x85R",
    "a dotted name in torch.serialization": lambda path: (
        stack_global("torch.serialization", "os.mkdir") + text(path) + b"\x85R"
    ),
    "a dotted name in torch.hub": lambda path: stack_global("torch.hub", "os.mkdir") + text(path) + b"\x85R",
    "through a module's attributes": lambda path: (
        b"cbuiltins\ngetattr\n"
        + stack_global("collections", "_sys.modules.get")
        + text("os")
        + b"\x85R"
        + text("mkdir")
        + b"\x86R"
        + text(path)
        + b"\x85R"
    ),
    "INST": lambda path: b"(" + text(path) + b"ios\nmkdir\n",
    "OBJ": lambda path: b"(" + b"cbuiltins\ntuple\n" + lazy_map(path) + b"o",
    "NEWOBJ": lambda path: b"cbuiltins\ntuple\n" + lazy_map(path) + b"\x85\x81",
    "NEWOBJ_EX": lambda path: b"cbuiltins\ntuple\n" + lazy_map(path) + b"\x85}\x92",
    "BUILD": lambda path: b"cfunctools\npartial\ncbuiltins\nlen\n\x85R(" + MKDIR + text(path) + b"\x85}}tb)R",
    "APPENDS": lambda path: b"ccollections\ndeque\n)R(" + MKDIR + text(path) + b"\x85Re",
    "memo": lambda path: MKDIR + b"q\x070h\x07" + text(path) + b"\x85R",
    "in a dict of marks": lambda path: b"(" + text("a") + MKDIR + text(path) + b"\x85Rd",
}


@pytest.mark.parametrize("kind", [*OBJECTS, *RAW])
def test_the_objects_are_dangerous(tmp_path, kind):
    """The control: Python's unpickler runs each of them."""
    canary = tmp_path / "runs"
    pickled = (
        pickle.dumps(OBJECTS[kind](canary))
        if kind in OBJECTS
        else b"\x80\x04" + RAW[kind](str(canary)) + b"."
    )
    try:
        pickle.loads(pickled)
    except Exception:
        pass  # after the path was created
    assert canary.exists()


PLACES = {  # place of an object in a file: the outcome for the file
    "all of it": (lambda thing: thing, "refused"),
    "the state dict": (lambda thing: {"state_dict": thing}, "refused"),
    "a tensor": (lambda thing: STATE | {"conv1.weight": thing}, "refused"),
    "a further tensor": (lambda thing: STATE | {"conv9.weight": thing}, "refused"),
    "beside the state dict": (
        lambda thing: {"state_dict": STATE, "args": thing, "method": thing, "step": thing},
        "right",
    ),
    "deep beside it": (
        lambda thing: {"state_dict": STATE, "a": [({"b": (thing,)},)], "optimizer": {0: thing}},
        "right",
    ),
    "a key": (lambda thing: STATE | {(1, thing): 1}, "right"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", OBJECTS)
def test_nothing_runs_in_torch_files(tmp_path, canary, kind, legacy):
    for place, expected in PLACES.values():
        try:
            content = saved(place(OBJECTS[kind](canary)), _use_new_zipfile_serialization=not legacy)
        except TypeError:
            continue  # an array is no key
        assert outcome(written(tmp_path / "hostile.pth", content)) == expected


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", OBJECTS)
def test_nothing_runs_in_fine_tuned_models(tmp_path, canary, kind, legacy):
    thing, good = OBJECTS[kind](canary), {"model": STATE, "iteration": 89}
    for contents, expected in (
        (good, "right"),
        (thing, "refused"),
        (good | {"model": thing}, "refused"),
        (good | {"model": STATE | {"conv1.weight": thing}}, "refused"),
        (good | {"iteration": thing}, "refused"),
        # that one becomes an empty dict
        (good | {"weights": thing}, "right" if kind == "in state" else "refused"),
        (good | {"weights": {"method": thing}}, "refused"),
        (good | {"optimizer": thing, "trainer": [thing]}, "right"),
    ):
        content = saved(contents, _use_new_zipfile_serialization=not legacy)
        assert outcome(written(tmp_path / "hostile.pth", content), fine_tuned) == expected


@pytest.mark.parametrize("kind", OBJECTS)
def test_nothing_runs_in_converted_files(tmp_path, canary, kind):
    good = pickle.loads(convert.encode_detectron2(STATE, {"method": "rsa"}))
    thing = OBJECTS[kind](canary)
    for protocol in range(6):
        for contents, expected in (
            (thing, "refused"),
            ({"model": thing, "provenance": {}}, "refused"),
            (good | {"provenance": thing}, "refused"),
            (good | {"provenance": {"a": thing}}, "refused"),
            (good | {"model": good["model"] | {"stem.conv1.weight": thing}}, "refused"),
            (good | {"__author__": thing}, "right" if protocol >= 2 else "refused"),
        ):
            path = written(tmp_path / "hostile.pkl", pickle.dumps(contents, protocol))
            assert outcome(path, convert.load_weights) == expected
            assert outcome(path) == expected


# Raw pickles, inside each part of each kind of file.


def in_zip(pickled, members=()):
    """The zip file that torch.save would write, with the storages of :data:`STATE`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for i, tensor in enumerate(STATE.values()):
            archive.writestr(f"archive/data/{i}", tensor.numpy().tobytes())
        for name, content in dict(members).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def in_legacy(pickled, place=3):
    """The five pickles of torch.save before 1.6, of which ``pickled`` replaces one."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, dict.fromkeys(SHAPES), []]
    return b"".join(pickled if i == place else pickle.dumps(part, 2) for i, part in enumerate(parts))


CARRIERS = {"zip": in_zip, "plain": bytes} | {
    f"legacy {i}": functools.partial(in_legacy, place=i) for i in range(5)
}


def pickled(body):
    return b"\x80\x04" + body + b"."


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("kind", RAW)
def test_nothing_runs_in_raw_pickles(tmp_path, canary, kind, carrier):
    path = written(tmp_path / "hostile.pth", CARRIERS[carrier](pickled(RAW[kind](str(canary)))))
    assert outcome(path) == "refused" and outcome(path, convert.load_weights) == "refused"


KEY = text("0")


def storage(key=KEY, kind=b"ctorch\nFloatStorage\n", count=b"K\x02"):
    return b"(" + text("storage") + kind + key + text("cpu") + count + b"tQ"


STORAGE = storage()


def tensor(
    storage=STORAGE,
    offset=b"K\x00",
    shape=b"(K\x02K\x02K\x02K\x02t",
    stride=b"(K\x08K\x04K\x02K\x01t",
    function=b"ctorch._utils\n_rebuild_tensor_v2\n",
):
    return function + b"(" + storage + offset + shape + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def state_dict(first):
    """A pickle of :data:`STATE` whose first tensor is the pickled ``first``."""
    body = b"}("
    for i, name in enumerate(SHAPES):
        shape = SHAPES[name]
        sizes = b"(" + b"K\x02" * len(shape) + b"t"
        strides = (
            b"(" + b"".join(b"K" + bytes([2 ** (len(shape) - 1 - axis)]) for axis in range(len(shape))) + b"t"
        )
        body += text(name) + (first if i == 0 else tensor(storage(text(str(i))), shape=sizes, stride=strides))
    return pickled(body + b"u")


HUGE = b"\x8a\x08" + struct.pack("<q", 10**13)
NEGATIVE = b"J" + struct.pack("<i", -1)
BAD_TENSORS = {
    "a giant shape": tensor(shape=b"(" + HUGE * 4 + b"t"),
    "a giant expanded shape": tensor(shape=b"(" + HUGE * 4 + b"t", stride=b"(K\x00K\x00K\x00K\x00t"),
    "a giant stride": tensor(stride=b"(" + HUGE * 4 + b"t"),
    "a giant offset": tensor(offset=HUGE),
    "a negative offset": tensor(offset=NEGATIVE),
    "a negative stride": tensor(stride=b"(K\x08K\x04K\x02" + NEGATIVE + b"t"),
    "a negative shape": tensor(shape=b"(" + NEGATIVE * 4 + b"t"),
    "an offset just too large": tensor(offset=b"K\x01"),
    "fewer strides": tensor(stride=b"(K\x01t"),
    "a boolean shape": tensor(shape=b"(\x88\x88\x88\x88t"),
    "strings for numbers": tensor(offset=text("0")),
    "another storage's length": tensor(storage(kind=b"ctorch\nDoubleStorage\n")),
    "integers": tensor(storage(kind=b"ctorch\nIntStorage\n")),
    "quantized": tensor(storage(kind=b"ctorch\nQInt32Storage\n")),
    "an unknown storage": tensor(storage(kind=b"cos\nmkdir\n")),
    "a storage of another file": tensor(storage(key=text("../../../../etc/passwd"))),
    "a member that is no storage": tensor(storage(key=text("../data.pkl"))),
    "a number as key": tensor(storage(key=b"K\x00")),
    "a dict as key": tensor(storage(key=b"}")),
    "no storage": tensor(b"K\x00"),
    "a persistent id in text": b"Pstorage\n",
    "a persistent id of rubbish": b"(K\x01}]tQ",
    "one argument": b"ctorch._utils\n_rebuild_tensor_v2\n" + storage() + b"\x85R",
    "arguments in a dict": b"ctorch._utils\n_rebuild_tensor_v2\n}R",
    "another function": tensor(function=b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n"),
    "torch.Tensor": b"ctorch\nTensor\n" + HUGE + b"\x85R",
    "torch.zeros": b"ctorch\nzeros\n" + HUGE + b"\x85R",
    "a tensor with state": tensor() + b"(" + tensor() + b"K\x00)}tb" + b"0N",
    "a parameter of rubbish": b"ctorch._utils\n_rebuild_parameter\n)R",
    "an array that is not one": b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01NNNNtb",
    "an array of a giant shape, protocol 5": (
        b"cnumpy._core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n" + text("f4") + b"\x85R"
        b"(K\x03" + text("<") + b"tb(" + HUGE * 4 + b"t" + text("C") + b"tR"
    ),
    "an array in Fortran's order": (
        b"cnumpy._core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n" + text("f4") + b"\x85R"
        b"(K\x03" + text("<") + b"tb(K\x02K\x02K\x02K\x02t" + text("X") + b"tR"
    ),
    "an array of another codec": (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(K\x02K\x02K\x02K\x02tcnumpy\ndtype\n"
        + text("f4")
        + b"\x85R(K\x03"
        + text("<")
        + b"tb\x89c_codecs\nencode\n("
        + text("a" * 64)
        + text("zip")
        + b"tRtb"
    ),
    "an array of a giant shape": (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + b"(" + HUGE * 4 + b"t"
        b"cnumpy\ndtype\n" + text("f4") + b"\x85R(K\x03" + text("<") + b"tb\x89C\x00tb"
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors(tmp_path, kind):
    assert outcome(written(tmp_path / "good.pth", in_zip(state_dict(tensor())))) == "right"
    path = written(tmp_path / "bad.pth", in_zip(state_dict(BAD_TENSORS[kind])))
    assert cheap(outcome, path) == "refused"


# Sizes.


def cheap(function, *args):
    """Call ``function(*args)`` and check that the process's memory grows by less than :data:`LIMIT`
    (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    result = function(*args)
    assert peak_memory() - before < LIMIT
    return result


def peak_memory():
    """The peak memory of this process in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


TEN_GB = struct.pack("<Q", 10 * 2**30)
NEST = 100_000  # levels; each would be a call on the C stack
SHARED = b"]" + b"".join(
    b"q" + bytes([i]) + b"](" + b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"e" for i in range(100)
)
BOMBS = {
    "BINBYTES8": b"\x8e" + TEN_GB,
    "BINUNICODE8": b"\x8d" + TEN_GB,
    "BYTEARRAY8": b"\x96" + TEN_GB,
    "FRAME": b"\x95" + TEN_GB + b"N",
    "BINBYTES": b"B\xff\xff\xff\xff",
    "BINUNICODE": b"X\xff\xff\xff\xff",
    "BINSTRING": b"T\xff\xff\xff\x7f",
    "LONG4": b"\x8b\xff\xff\xff\x7f",
    "negative LONG4": b"\x8b\xff\xff\xff\xff",
    "a long in text": b"L" + b"9" * 100_000 + b"L\n",
    "an int in text": b"I" + b"9" * 100_000 + b"\n",
    "a place in the memo": b"Nr\xff\xff\xff\xff",
    "bytearray": b"cbuiltins\nbytearray\n" + HUGE + b"\x85R",
    "repetition": b"coperator\nmul\n" + text("a") + HUGE + b"\x86R",
    "range": b"cbuiltins\nlist\ncbuiltins\nrange\n" + HUGE + b"\x85R\x85R",
    "nested tuples as a key": b"})" + b"\x85" * NEST + b"Ns",
    "nested tuples in a set": b"\x8f()" + b"\x85" * NEST + b"\x90",
    "nested tuples in a frozenset": b"()" + b"\x85" * NEST + b"\x91",
    "nested lists": b"]" * NEST + b"a" * (NEST - 1),
    "nested dicts": b"}" + (text("a") + b"}") * 20_000 + b"s" * 20_000,
    "nested calls": b"cos\nmkdir\n" * 20_000 + b")" + b"R" * 20_000,
    "lists of lists, shared": SHARED,
    "an endless list": b"]q\x00h\x00a",
    "a dict of itself": b"}q\x00" + text("a") + b"h\x00s",
    "an extension": b"\x84\xff\xff\xff\x7f",
    "an empty stack": b"R",
    "a lost mark": b"t",
    "a lost memo": b"h\x01",
    "no end": b"",
    "buffers": b"\x97",
    "a pickle in a pickle": pickle.dumps([1]),
    "marks": b"(" * 100_000 + b"1" * 100_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs(tmp_path, kind):
    """Small ones in every part of a legacy file, large ones in that of the state dict."""
    bomb = BOMBS[kind]
    carriers = CARRIERS if len(bomb) < 50_000 else ("zip", "plain", "legacy 3")
    for carrier in carriers:
        path = written(tmp_path / "bomb.pth", CARRIERS[carrier](pickled(bomb)))
        assert cheap(outcome, path) == "refused"
        assert cheap(outcome, path, fine_tuned) == "refused"
    assert cheap(outcome, path, convert.load_weights) == "refused"


@pytest.mark.parametrize(
    "kind",
    [
        "nested tuples as a key",
        "nested lists",
        "nested dicts",
        "lists of lists, shared",
        "an endless list",
        "a dict of itself",
        "nested calls",
    ],
)
def test_bombs_where_values_are_shown(tmp_path, kind):
    bomb = BOMBS[kind]
    for name in ("method", "step", "config", "format", "global_step"):
        contents = b"}(" + text("model") + state_dict(tensor())[2:-1] + text(name) + bomb + b"u"
        assert cheap(outcome, written(tmp_path / "bomb.pth", in_zip(pickled(contents)))) == "right"
    path = written(tmp_path / "bomb.pth", in_zip(state_dict(bomb)))
    assert cheap(outcome, path) == "refused"
    good = convert.encode_detectron2(STATE, {"method": "rsa"})[:-1]
    for value in (bomb, b"}" + text("a") + bomb + b"s"):
        path = written(tmp_path / "bomb.pkl", good + text("provenance") + value + b"s.")
        assert cheap(outcome, path, convert.load_weights) == "refused"


NESTED = "[" * 50_000 + "]" * 50_000
BAD_PROVENANCES = [
    "[]",
    "7",
    "{",
    NESTED,
    '{"a": ' + NESTED + "}",
    '{"method": 7}',
    '{"pixel_mean": [1, 2]}',
    "{}" + "x",
    '{"pixel_mean": [1, 2, NaN]}',
    '{"branch": "both"}',
    '{"architecture": "vgg16"}',
    '{"step": true}',
    '{"stride_in_1x1": "no"}',
    '{"input_format": "HSV"}',
    '{"sha256": null}',
    '{"run": "{"}',
    '{"run": 7}',
    '{"a": {"b": 1}}',
]


@pytest.mark.parametrize("place", range(len(BAD_PROVENANCES)))
def test_bad_provenances(tmp_path, place):
    """In each format that the converter writes; what json cannot write occurs only in safetensors."""
    text = BAD_PROVENANCES[place]
    path = written(tmp_path / "w.safetensors", safetensors.torch.save(STATE, {"provenance": text}))
    assert cheap(outcome, path) == "refused"
    try:
        provenance = json.loads(text)
    except (ValueError, RecursionError):
        return
    for content in (
        saved({"state_dict": STATE, "provenance": provenance}),
        converter_file({"provenance": provenance}),
    ):
        assert cheap(outcome, written(tmp_path / "w.pth", content)) == "refused"


def converter_file(more):
    return pickle.dumps(pickle.loads(convert.encode_detectron2(STATE, {"method": "rsa"})) | more, protocol=4)


def test_dicts_that_hold_one_another(tmp_path):
    """Each dict is searched once, however many paths lead to it."""
    for body in (
        b"}q\x00" + b"".join(text(f"a{i}") + b"h\x00s" for i in range(200)),
        b"}q\x00("
        + b"".join(
            text(f"a{i}")
            + b"}q"
            + bytes([i + 1])
            + b"("
            + b"".join(text(f"b{j}") + b"h\x00" for j in range(50))
            + b"u"
            for i in range(50)
        )
        + b"u",
    ):
        path = written(tmp_path / "web.pth", in_zip(pickled(body)))
        assert cheap(outcome, path) == "refused"
        assert cheap(inspect, path)


@pytest.mark.parametrize("kind", OBJECTS)
def test_nothing_runs_when_inspected(tmp_path, canary, kind):
    for place, _ in PLACES.values():
        try:
            content = saved(place(OBJECTS[kind](canary)))
        except TypeError:
            continue
        assert all(line.isprintable() for line in inspect(written(tmp_path / "hostile.pth", content)))


def test_a_config_beside_a_file_is_data(tmp_path):
    path = written(tmp_path / "model.safetensors", safetensors.torch.save(STATE))
    for content in (
        NESTED.encode(),
        b"{" * 10,
        b"\xff\xfe",
        b"7" * 5000,
        b'{"architecture": {"a": 1}, "pretrained_cfg": 7}',
        b'{"pretrained_cfg": {"mean": "abc", "std": [1, 2]}}',
        b"[]",
        b"x" * (2 << 20),
    ):
        (tmp_path / "config.json").write_bytes(content)
        assert cheap(outcome, path) in ("refused", "right")


def safetensors_file(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def zip_claiming(size):
    """A complete zip checkpoint whose directory claims that the first storage has ``size`` bytes."""
    content = bytearray(in_zip(state_dict(tensor())))
    entry = content.index(b"archive/data/0", content.index(b"PK\x01\x02")) - 46
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    return bytes(content)


def compressed(member):
    """A zip checkpoint with a member of 200 MB of zeros, compressed to 200 KB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state_dict(tensor()))
        archive.writestr(member, bytes(200 << 20))
    return buffer.getvalue()


def script_module():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def tar_of(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def plain_zip(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


VALID = in_zip(state_dict(tensor()))
WRONG_FILES = {
    "a header of 10 GB": safetensors_file(b"{", length=10 * 2**30),
    "a header of 2**63": safetensors_file(b"{", length=2**63),
    "a header of 2**64 - 1": safetensors_file(b"{}", length=2**64 - 1),
    "no header": safetensors_file(b"{}"),
    "a header of rubbish": safetensors_file(b'{"a": nan}'),
    "a nested header": safetensors_file(b'{"a":' * 50_000),
    "a header of lists": safetensors_file(b'{"a":' + b"[" * 50_000 + b"}"),
    "a giant tensor": safetensors_file(
        {"conv1.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ),
    "a tensor of overflowing size": safetensors_file(
        {"conv1.weight": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "an unknown dtype": safetensors_file(
        {"conv1.weight": {"dtype": "X9", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "a zip that claims 4 GB": zip_claiming(0xFFFFFFF0),
    "a zip that claims more": zip_claiming(2**31),
    "a compressed storage": compressed("archive/data/0"),
    "a compressed archive": compressed("archive/data/9"),
    "a zip of nothing": plain_zip(),
    "a zip of pictures": plain_zip(**{"a.png": b"\x89PNG"}),
    "two checkpoints in one": plain_zip(**{"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}),
    "big-endian": plain_zip(**{"a/data.pkl": state_dict(tensor()), "a/byteorder": "big"}),
    "no storages": plain_zip(**{"a/data.pkl": state_dict(tensor())}),
    "TorchScript": script_module(),
    "gzip": gzip.compress(VALID),
    "tar": tar_of(VALID),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 102400000\n",
    "HTML": b"<!DOCTYPE html><html>",
    "JSON": b'{"state_dict": {}}',
    "PNG": b"\x89PNG\r\n\x1a\n",
    "empty": b"",
    "one byte": b"\x80",
    "zeros": bytes(1000),
    "a start of a zip": b"PK\x03\x04",
    "an end of a zip": b"PK\x05\x06" + bytes(18),
    "a legacy file of the other order": in_legacy(pickle.dumps({"little_endian": False}), 2),
    "a legacy file of giant storages": in_legacy(state_dict(tensor()))[: -len(pickle.dumps([], 2))]
    + pickle.dumps(["0"], 2)
    + b"\xff" * 7
    + b"\x7f",
    "a legacy file of unknown storages": in_legacy(pickle.dumps(["a"], 2), 4),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_files(tmp_path, kind):
    path = written(tmp_path / "wrong.pth", WRONG_FILES[kind])
    assert cheap(outcome, path) == "refused" and cheap(outcome, path, convert.load_weights) == "refused"


@pytest.mark.parametrize(
    "kind, message",
    [
        ("TorchScript", "a TorchScript module, .*save its state_dict"),
        ("text", "as a checkpoint: a pointer of Git LFS.*git lfs pull"),
        ("HTML", "a web page"),
        ("gzip", "compressed: unpack it with gunzip"),
        ("a header of 2**63", "neither of torch.save"),
        (
            "zeros",
            "as a checkpoint: it is neither of torch.save nor safetensors nor a pickle: "
            r"give the file that the training saved \(.pth, .pt, .ckpt, .safetensors, .pkl\)$",
        ),
    ],
)
def test_what_a_wrong_file_is(tmp_path, kind, message):
    with pytest.raises(InputError, match=message):
        readers.read_checkpoint(written(tmp_path / "wrong.pth", WRONG_FILES[kind]))


def test_a_sparse_file_of_10_gb(tmp_path):
    """Its header is as long as the file: that a length fits the file is no reason to allocate it."""
    path = written(tmp_path / "sparse.safetensors", safetensors_file(b'{"a": 1', length=10 * 2**30 - 8))
    os.truncate(path, 10 * 2**30)
    assert cheap(outcome, path) == "refused"


def test_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", "/dev/zero"):
        assert outcome(path) == "refused" and outcome(path, convert.load_weights) == "refused"


@pytest.mark.parametrize(
    "contents",
    [
        dict.fromkeys(SHAPES, "text"),
        dict.fromkeys(SHAPES, 1.5),
        dict.fromkeys(SHAPES),
        dict.fromkeys(SHAPES, b"1234"),
        {name: {"weight": tensor} for name, tensor in STATE.items()},
        {name: [tensor] for name, tensor in STATE.items()},
        {"model": "text"},
        {"state_dict": 7},
        {"state_dict": {"state_dict": STATE}},
        {"state_dict": {}},
        {},
        [],
        "text",
        7,
        None,
        STATE["conv1.weight"],
        {"a\nb\x1b[31m" * 1000: 1},
        {"\u202e": STATE, "": 1},
        {"conv1.weight\n": STATE["conv1.weight"]},
        {f"{i}.weight": 1 for i in range(20_000)},
    ],
    ids=lambda contents: type(contents).__name__,
)
def test_state_dicts_of_other_things(tmp_path, contents):
    for legacy in (False, True):
        path = written(tmp_path / "other.pth", saved(contents, _use_new_zipfile_serialization=not legacy))
        assert cheap(outcome, path) == "refused" and outcome(path, convert.load_weights) == "refused"


# Damage.

CONVERTED = convert.encode_detectron2(
    STATE, {"method": "rsa", "step": 7, "pixel_mean": [123.675, 116.28, 103.53]}
)
# content, reader, and whether the format has checksums, without which a changed number cannot be seen
FILES = {
    "zip": (
        saved({"state_dict": STATE, "optimizer": {"state": {0: torch.zeros(50)}}, "epoch": 3}),
        readers.read_checkpoint,
        True,
    ),
    "legacy": (
        saved({"state_dict": STATE}, _use_new_zipfile_serialization=False),
        readers.read_checkpoint,
        False,
    ),
    "safetensors": (safetensors.torch.save(STATE, {"format": "pt"}), readers.read_checkpoint, False),
    "converted": (CONVERTED, convert.load_weights, True),
}


@pytest.mark.parametrize("kind", FILES)
def test_truncated(tmp_path, kind):
    content, read, _ = FILES[kind]
    assert outcome(written(tmp_path / "whole.pth", content), read) == "right"
    draw = random.Random(0)
    for length in {*range(0, 40), *(draw.randrange(len(content)) for _ in range(60)), len(content) - 1}:
        assert cheap(outcome, written(tmp_path / "cut.pth", content[:length]), read) == "refused"


@pytest.mark.parametrize("kind", FILES)
def test_changed_bytes(tmp_path, kind):
    content, read, checksums = FILES[kind]
    draw, found = random.Random(1), collections.Counter()
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 3))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        found[cheap(outcome, written(tmp_path / "changed.pth", changed), read)] += 1
    assert found["refused"] > 20 and (found["other"] == 0 or not checksums), found


@pytest.mark.parametrize("kind", ["legacy", "safetensors", "converted"])
def test_noise_after_a_good_start(tmp_path, canary, kind):
    """Random opcodes and lengths in the place of the structure."""
    content, read, _ = FILES[kind]
    draw = random.Random(2)
    for _ in range(100):
        at = draw.randrange(9, 1500)
        noise = bytes(
            draw.choices(
                b"cos\nmkdirR.(tb}]uae\x93\x81\x85\x86\x8c\x94h\x00\x01q0" + b"K" * 4, k=draw.randrange(1, 30)
            )
        )
        path = written(
            tmp_path / "noise.pth", content[:at] + noise + content[at + draw.choice((0, len(noise))) :]
        )
        assert cheap(outcome, path, read) in ("refused", "other", "right")
