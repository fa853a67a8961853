"""Pickles as inert data: dicts, lists, strings, numbers, and tensors that are read on demand.

A pickle is a program for a small stack machine. The machine here takes its steps from the standard
library's disassembler and only builds containers: a class or function that the file names stays a
:class:`Name`, and a call that it asks for becomes a :class:`Call`, a record. Nothing that a file names is
imported, called or given state, so reading a file never runs its code. Memory stays within a multiple of
the file's length, whatever sizes the file claims and however deeply it nests.

torch.load(weights_only=True) is not enough for untrusted files. It calls ``bytearray(n)`` for a file of 355
bytes, which takes n bytes of memory. It overflows the C stack on a nested tuple as a key. It does not
compare the archive's checksums, and it refuses old files that hold foreign objects beside their tensors.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from rsa_detectron2.transfer.convert.stored import Call, Name, build, storage_of


def read_pickle(file: BinaryIO, load: Callable | None = None, dtypes: dict | None = None) -> Any:
    """Read one pickle as inert data; the file is left at its end.

    load: ``load(key, dtype)`` returns the bytes of a stored array; None where the file has none.
    dtypes: a dict that receives the dtype of each key.
    A broken pickle raises ValueError or any other Exception.
    """
    return PickleMachine(load, dtypes).run(file)


class PickleMachine:
    """The stack machine of one pickle; :data:`STEPS` says what it does at each opcode.

    Only strings and whole numbers are kept as keys of dicts: hashing anything else may recurse without bound.
    """

    def __init__(self, load: Callable | None = None, dtypes: dict | None = None):
        self.load = load
        self.dtypes = dtypes
        self.stack = []
        self.marks = []  # lengths of the stack
        self.memo = {}

    def run(self, file: BinaryIO) -> Any:
        """Take the steps of one pickle; returns its content."""
        for opcode, value, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name not in STEPS:
                raise ValueError(f"holds {name}, which no checkpoint needs")
            STEPS[name](self, value)
        raise ValueError("the pickle does not end")

    def skip(self, _: object) -> None:
        pass

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, _: object) -> None:
        self.stack.pop()

    def duplicate(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def pop_mark(self, _: object = None) -> list:
        """Remove and return what was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def push_dict(self, _: object) -> None:
        self.stack.append({})

    def push_list(self, _: object) -> None:
        self.stack.append([])

    def tuple_of_1(self, _: object) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def tuple_of_2(self, _: object) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def tuple_of_3(self, _: object) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def marked_tuple(self, _: object) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def marked_list(self, _: object) -> None:
        self.stack.append(self.pop_mark())

    def marked_dict(self, _: object) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._update(items)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_items(self, _: object) -> None:
        self._update(self.pop_mark())

    def _update(self, items):
        target = self.stack[-1]
        if type(target) is dict:
            pairs = zip(items[::2], items[1::2])
            target.update((key, value) for key, value in pairs if type(key) in (str, int))

    def append(self, _: object) -> None:
        item = self.stack.pop()
        self._extend([item])

    def append_items(self, _: object) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items):
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)

    def name(self, text: str) -> None:
        self.stack.append(Name(text))

    def name_of_stack(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        are_texts = type(module) is type(name) is str
        self.stack.append(Name(f"{module} {name}" if are_texts else "?"))

    def extension(self, code: int) -> None:
        self.stack.append(Name(f"copyreg extension{code}"))

    def named_instance(self, text: str) -> None:
        self.stack.append(Call(Name(text), self.pop_mark()))

    def marked_instance(self, _: object) -> None:
        function, *args = self.pop_mark()
        self.stack.append(Call(function, args))

    def call(self, _: object) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(build(function, args))

    def call_with_keywords(self, _: object) -> None:
        _, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(Call(function, args))

    def set_state(self, _: object) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is Call:
            self.stack[-1].state = state

    def text_id(self, text: str) -> None:
        self.stack.append(Call("persistent id", text))

    def storage_id(self, _: object) -> None:
        self.stack.append(storage_of(self.stack.pop(), self.load, self.dtypes))


# Opcode: method that gets the machine and the opcode's argument. Any other opcode is refused.
STEPS = {
    # An opcode with an argument pushes it, a number, text or bytes. Those that do something else follow.
    **{opcode.name: PickleMachine.push for opcode in pickletools.opcodes if opcode.arg},
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "PROTO": PickleMachine.skip,
    "FRAME": PickleMachine.skip,
    "MARK": PickleMachine.mark,
    "POP": PickleMachine.pop,
    "POP_MARK": PickleMachine.pop_mark,
    "DUP": PickleMachine.duplicate,
    "PUT": PickleMachine.put,
    "BINPUT": PickleMachine.put,
    "LONG_BINPUT": PickleMachine.put,
    "MEMOIZE": PickleMachine.memoize,
    "GET": PickleMachine.get,
    "BINGET": PickleMachine.get,
    "LONG_BINGET": PickleMachine.get,
    "EMPTY_DICT": PickleMachine.push_dict,
    "EMPTY_LIST": PickleMachine.push_list,
    "EMPTY_SET": PickleMachine.push_list,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": PickleMachine.tuple_of_1,
    "TUPLE2": PickleMachine.tuple_of_2,
    "TUPLE3": PickleMachine.tuple_of_3,
    "TUPLE": PickleMachine.marked_tuple,
    "LIST": PickleMachine.marked_list,
    "FROZENSET": PickleMachine.marked_list,
    "DICT": PickleMachine.marked_dict,
    "SETITEM": PickleMachine.set_item,
    "SETITEMS": PickleMachine.set_items,
    "APPEND": PickleMachine.append,
    "APPENDS": PickleMachine.append_items,
    "ADDITEMS": PickleMachine.append_items,
    "GLOBAL": PickleMachine.name,
    "STACK_GLOBAL": PickleMachine.name_of_stack,
    "EXT1": PickleMachine.extension,
    "EXT2": PickleMachine.extension,
    "EXT4": PickleMachine.extension,
    "INST": PickleMachine.named_instance,
    "OBJ": PickleMachine.marked_instance,
    "REDUCE": PickleMachine.call,
    "NEWOBJ": PickleMachine.call,
    "NEWOBJ_EX": PickleMachine.call_with_keywords,
    "BUILD": PickleMachine.set_state,
    "PERSID": PickleMachine.text_id,
    "BINPERSID": PickleMachine.storage_id,
}
