"""Reading torch and Lightning checkpoint files without running anything that they say.

A pickle is a program: it names functions and calls them. The machine here has no instruction that imports or calls.
A global is a `Stub` that holds its name, and what is built from it a `Stub` that holds the arguments; the exceptions
are tensors, which become records of where their numbers lie, and dictionaries. Nothing is read or allocated for a
tensor before its record has been checked against the file.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

MAX_PICKLE = 64 << 20
"""Bytes of the pickle inside a checkpoint: names, shapes and settings; the weights lie elsewhere in the file."""
MAX_DIRECTORY = 64 << 20
"""Bytes of a zip file's directory."""
MAX_STEPS = 4_000_000
"""Instructions of a pickle; each may make an object of some hundred bytes."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")


@dataclass(eq=False)
class Stub:
    """Something that a pickle names or wants built; inert.

    Attributes:
        name: "module.name" of the global, or of what was called.
        args: what it was called with; None for the global itself.
        state, entries, items: what the pickle would have put into it afterwards.
    """

    name: str
    args: object = None
    state: object = None
    entries: list[object] = field(default_factory=list)
    items: dict[Any, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of numbers in the file: its entry's key, dtype and count."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class Record:
    """A tensor that has not been read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


class _Mark:
    pass


def unpickle(data: bytes, name: str) -> object:
    """What a pickle describes, in plain values, `Stub`s and `Record`s; nothing is imported and nothing is called.

    Args:
        data: the whole pickle.
        name: of the file, for messages.

    Raises:
        InputError: damaged, truncated or using instructions that no torch file has; a tensor beyond its storage.
    """
    machine = _Machine()
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count == MAX_STEPS:
                raise InputError(f"its pickle has more than {MAX_STEPS} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, arg)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise InputError(f"{name} is damaged: its pickle does not read ({type(error).__name__}: {error})") from None
    raise InputError(f"{name} is damaged: its pickle has no end")


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, op: str, arg: Any) -> None:
        push, stack = self.stack.append, self.stack
        if op in _VALUES:
            push(arg)
        elif op in _CONSTANTS:
            push(_CONSTANTS[op]())
        elif op == "MARK":
            push(_Mark)
        elif op in ("PROTO", "FRAME"):
            pass
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[arg])
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op == "POP":
            stack.pop()
        elif op == "DUP":
            push(stack[-1])
        elif op == "POP_MARK":
            self.marked()
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            if len(stack) < count:
                raise IndexError("stack")
            stack[-count:] = [tuple(stack[-count:])]
        elif op in ("LIST", "FROZENSET"):
            push(self.marked())
        elif op == "TUPLE":
            push(tuple(self.marked()))
        elif op == "DICT":
            pairs = self.marked()
            push({})
            self.fill(pairs)
        elif op in ("APPEND", "APPENDS", "ADDITEMS"):
            more = [stack.pop()] if op == "APPEND" else self.marked()
            target = stack[-1]
            (target.entries if isinstance(target, Stub) else _a(list, target)).extend(more)
        elif op in ("SETITEM", "SETITEMS"):
            self.fill(self.last(2) if op == "SETITEM" else self.marked())
        elif op == "GLOBAL":
            push(Stub(arg.replace(" ", ".", 1)))
        elif op == "STACK_GLOBAL":
            module, name = self.last(2)
            push(Stub(f"{_a(str, module)}.{_a(str, name)}"))
        elif op in ("REDUCE", "NEWOBJ"):
            function, args = self.last(2)
            push(build(function, args))
        elif op == "NEWOBJ_EX":
            function, args, _ = self.last(3)
            push(build(function, args))
        elif op == "OBJ":
            function, *rest = self.marked()
            push(build(function, tuple(rest)))
        elif op == "INST":
            push(build(Stub(arg.replace(" ", ".", 1)), tuple(self.marked())))
        elif op == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Stub):
                stack[-1].state = state
        elif op == "BINPERSID":
            push(_storage(stack.pop()))
        else:
            raise InputError(f"the pickle instruction {op} has no place in a checkpoint")

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def marked(self) -> list[Any]:
        """Everything above the topmost mark; both leave the stack."""
        place = next(i for i in range(len(self.stack) - 1, -2, -1) if i < 0 or self.stack[i] is _Mark)
        if place < 0:
            raise IndexError("mark")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def fill(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Stub) else _a(dict, target)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # other keys (tuples of tuples of ...) can take for ever to hash, and no checkpoint needs them
            if isinstance(key, (str, float, bytes, type(None))) or small(key):
                items[key] = value


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


def _a(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} must be")
    return value


def build(function: object, args: object) -> object:
    """What a call stands for: a `Record`, a dictionary, a tuple (torch.Size), or an inert `Stub`."""
    name = function.name if isinstance(function, Stub) and function.args is None else "?"
    given = args if isinstance(args, tuple) else ()
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        storage, offset, shape, stride = given[:4]
        return _record(storage, offset, shape, stride)
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return given[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        inner = given[0]
        if isinstance(inner, Stub) and inner.name != name:  # one level: a chain of them is no checkpoint
            return build(inner, given[2])
    if name in DICTIONARIES:
        return Stub(name, args) if given and isinstance(given[0], (list, tuple, dict)) else {}  # a copy costs memory
    if name == "torch.Size" and given and isinstance(given[0], tuple):
        return given[0]
    return Stub(name, args)


def _storage(pid: Any) -> object:
    """A persistent id of torch.save: ("storage", type, key, location, count)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Stub):
        return Stub("persistent id", pid)
    kind = pid[1].name.rpartition(".")[2]
    if kind not in STORAGES:
        return Stub(pid[1].name, pid)
    key, count = pid[2], pid[4]
    if not isinstance(key, str) or not _natural(count):
        raise InputError("a storage's key is no text, or its size no number")
    return Storage(key, STORAGES[kind], count)


def small(value: object) -> bool:
    """Whether it is an integer that prints and hashes quickly."""
    return isinstance(value, int) and -(1 << 62) < value < 1 << 62


def _natural(value: object) -> bool:
    return small(value) and not isinstance(value, bool) and value >= 0  # type: ignore[operator]


def _record(storage: Any, offset: Any, shape: Any, stride: Any) -> object:
    if not isinstance(storage, Storage):
        return Stub("torch.Tensor", storage)  # of a kind that is not read here; named if it is asked for
    fits = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 8
    if not fits or not all(map(_natural, (offset, *shape, *stride))):
        raise InputError("the shape, stride or offset of a tensor is not made of natural numbers")
    count = prod(shape)
    end = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if count else 0
    if max(count, end) > storage.count:
        raise InputError(f"a tensor of {list(shape)} does not fit its storage of {storage.count} numbers")
    return Record(storage, offset, shape, stride)


class TorchFile:
    """A file that `torch.save` wrote: `root` is what it holds, `read` gives a tensor.

    Raises:
        InputError: not such a file, one from before torch 1.6, compressed or overlapping entries, entries of other
            sizes than their storages, a directory or a pickle over the limits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_directory(path)
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{path} is damaged ({error})") from None
        self.entries: dict[str, zipfile.ZipInfo] = {}
        total = 0
        for entry in self.zip.infolist():
            if entry.filename in self.entries:
                raise InputError(f"{path} holds {entry.filename} twice")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise InputError(f"{path} holds the compressed entry {entry.filename}; torch.save compresses nothing")
            total += entry.file_size
            self.entries[entry.filename] = entry
        size = path.stat().st_size
        if total > size:
            raise InputError(f"{path} declares {total} bytes in a file of {size}")
        heads = [name for name in self.entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(heads) != 1:
            raise InputError(f"{path} is a zip file, but not one that torch.save made")
        self.prefix = heads[0].removesuffix("data.pkl")
        if self.entries[heads[0]].file_size > MAX_PICKLE:
            raise InputError(f"{path} has a pickle of {self.entries[heads[0]].file_size} bytes; at most {MAX_PICKLE}")
        order = self.prefix + "byteorder"
        if order in self.entries and self._bytes(order, limit=16) != b"little":
            raise InputError(f"{path} was not written on a little-endian machine")
        self.root = unpickle(self._bytes(heads[0], limit=MAX_PICKLE), str(path))
        self._read: dict[str, Tensor] = {}

    def _bytes(self, name: str, limit: int) -> bytes:
        if self.entries[name].file_size > limit:
            raise InputError(f"{self.path}: {name} has {self.entries[name].file_size} bytes; at most {limit}")
        try:
            return self.zip.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{self.path} is damaged at {name} ({error})") from None

    def check(self, record: Record) -> None:
        """Refuse a tensor whose storage is not there as declared."""
        storage, name = record.storage, f"{self.prefix}data/{record.storage.key}"
        if name not in self.entries:
            raise InputError(f"{self.path} lacks {name}, the numbers of one of its tensors")
        want = storage.count * storage.dtype.itemsize
        if self.entries[name].file_size != want:
            raise InputError(f"{self.path}: {name} has {self.entries[name].file_size} bytes, its tensor needs {want}")

    def read(self, record: Record) -> Tensor:
        """The tensor; those that share a storage in the file share it here."""
        self.check(record)
        storage = record.storage
        if storage.key not in self._read:
            name = f"{self.prefix}data/{storage.key}"
            data = bytearray(self._bytes(name, self.entries[name].file_size))
            flat = torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
            self._read[storage.key] = flat
        flat = self._read[storage.key]
        if flat.dtype != storage.dtype:
            raise InputError(f"{self.path}: storage {storage.key} is read as {flat.dtype} and as {storage.dtype}")
        return torch.as_strided(flat, record.shape, record.stride, record.offset)


def _check_directory(path: Path) -> None:
    """The zip file's end record, at the very end as torch writes it, and the directory's size before it is read."""
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\x80\x02":
                raise InputError(f"{path} is a pickle, as torch before 1.6 saved; load it there and save it again")
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 42))
            tail = file.read(42).rjust(42, b"\0")
            if tail[20:24] != b"PK\5\6":
                raise InputError(f"{path} is not a file that torch.save made, or is truncated")
            directory = struct.unpack("<I", tail[32:36])[0]
            if tail[:4] == b"PK\6\7":
                file.seek(max(0, size - 42 - 56))
                record, place = file.read(56), struct.unpack("<Q", tail[8:16])[0]
                if record[:4] != b"PK\6\6" or place != size - 42 - 56:
                    raise InputError(f"{path} is damaged: its zip directory is not where it says")
                directory = struct.unpack("<Q", record[40:48])[0]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    if directory > min(MAX_DIRECTORY, size):
        raise InputError(f"{path} declares a zip directory of {directory} bytes in a file of {size}")
