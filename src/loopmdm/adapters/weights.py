"""Where a checkpoint's tensors lie: shapes and dtypes first, numbers when they are asked for.

    model.safetensors, *.safetensors.index.json (shards), *.bin, *.pt, *.pth, *.ckpt, or the folder of one of them

Everything that a file declares is checked against its size before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from .unpickle import Record, Stub, TorchFile, small

MAX_HEADER = 64 << 20
"""Bytes of a safetensors header, an index or a configuration."""
MAX_TENSORS = 200_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Lazy:
    """A tensor of a file: shape, dtype, and `read` for its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """An opened checkpoint.

    Attributes:
        folder: where it lies.
        tensors: by name, in the file's order.
        shadow: the moving average of a Lightning file, in parameter order; None without one.
        settings: the hyper-parameters of a Lightning file as plain values.
    """

    folder: Path
    tensors: dict[str, Lazy]
    shadow: tuple[Lazy, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def open_weights(path: str | Path) -> Weights:
    """Open a checkpoint: a file, an index of shards, or a folder that holds one.

    Raises:
        InputError: nothing there, or a file that is damaged, hostile or of an unknown kind; one sentence.
    """
    path = Path(path)
    if path.is_dir():
        path = _inside(path)
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}")
    if path.suffix == ".json":
        return Weights(path.parent, _sharded(path))
    if path.suffix == ".safetensors":
        return Weights(path.parent, safetensors_file(path))
    if path.suffix in SUFFIXES:
        return torch_file(path)
    raise InputError(f"{path} is of no kind read here: {', '.join(SUFFIXES)} or an index .json")


def _inside(folder: Path) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) != 1:
        what = f"{len(found)} weight files, {found[0].name} first" if found else "no weights"
        raise InputError(f"{folder} holds {what}; name the file to convert")
    return found[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of limited size; a key that is there twice is refused."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    if len(text) > MAX_HEADER:
        raise InputError(f"{path} is larger than {MAX_HEADER} bytes")
    return _json(text, path)


def _json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            raise InputError(f"{path} names {next(n for n in names if names.count(n) > 1)!r} twice")
        return found

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}, not a JSON object")
    return data


def _sharded(index: Path) -> dict[str, Lazy]:
    """The tensors of an index; each shard lies beside it under a plain name."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map; it is not an index of shards")
    if len(places) > MAX_TENSORS:
        raise InputError(f"{index} lists {len(places)} tensors; at most {MAX_TENSORS}")
    shards: dict[str, dict[str, Lazy]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set("/\\\0:") & set(shard):
            raise InputError(f"{index} puts {name} into {shard!r}; a shard is a file beside it, without a path")
        if shard not in shards:
            file = index.parent / shard
            if not file.is_file():
                raise InputError(f"{index} names the shard {shard}, which is not there")
            shards[shard] = safetensors_file(file) if file.suffix == ".safetensors" else torch_file(file).tensors
        if name not in shards[shard]:
            raise InputError(f"{index} puts {name} into {shard}, which does not hold it")
    for shard, tensors in shards.items():
        for name in tensors:
            if places.get(name) != shard:
                where = f"puts into {places[name]}" if name in places else "does not list"
                raise InputError(f"{shard} holds {name}, which {index.name} {where}")
    return {name: shards[shard][name] for name, shard in places.items()}


def safetensors_file(path: Path) -> dict[str, Lazy]:
    """The tensors of a safetensors file; its header is checked here before the library maps the file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER:
                raise InputError(f"{path} declares a header of {length} bytes in a file of {size}")
            header = _json(file.read(length), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InputError(f"{path} declares {len(header)} tensors; at most {MAX_TENSORS}")
    tensors, ends = {}, []
    for name, entry in header.items():
        lazy, span = _entry(path, name, entry)
        tensors[name] = lazy
        ends.append(span)
    place = 0
    for begin, end in sorted(ends):
        if begin != place:
            raise InputError(f"{path} is damaged: its tensors overlap or leave a gap at byte {place}")
        place = end
    if place != size - 8 - length:
        raise InputError(f"{path} declares {place} bytes of tensors and holds {size - 8 - length}")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[Lazy, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        sound = all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (*shape, begin, end)) and len(shape) <= 8
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged: its entry {name!r} lacks a dtype, shape or place") from None
    if dtype is None:
        raise InputError(f"{path}: {name} is {entry['dtype']}, which is not read here; known: {', '.join(DTYPES)}")
    if not sound or prod(shape) * dtype.itemsize != end - begin:
        raise InputError(f"{path}: {name} is {shape} in {entry['dtype']} but lies in bytes {begin} to {end}")
    return Lazy(tuple(shape), dtype, partial(_read_safetensors, path, name)), (begin, end)


def _read_safetensors(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged at {name} ({error})") from None


def torch_file(path: Path) -> Weights:
    """A `torch.save` file: a state dict, or one under "state_dict" (Lightning), "model" or "module"."""
    file = TorchFile(path)
    root = _items(file.root)
    if root is None:
        raise InputError(f"{path} holds no state dict")
    state = next((_items(root[k]) for k in ("state_dict", "model", "module") if _items(root.get(k))), None) or root
    tensors = {k: _lazy(file, v) for k, v in state.items() if isinstance(k, str) and isinstance(v, Record)}
    if not tensors:
        raise InputError(
            f"{path} holds no state dict; its keys begin with {[k[:40] for k in root if isinstance(k, str)][:4]}"
        )
    unread = [k for k, v in state.items() if isinstance(v, Stub)] if state is not root else []
    if unread:
        raise InputError(f"{path}: {unread[0]} is no plain tensor and cannot be read")
    shadow: tuple[Lazy, ...] | None = None
    average = (_items(root.get("ema")) or {}).get("shadow_params")
    if isinstance(average, (list, tuple)):
        if not all(isinstance(v, Record) for v in average):
            raise InputError(f"{path}: its moving average holds something that is no tensor")
        shadow = tuple(_lazy(file, v) for v in average)
    for group in (tensors.values(), shadow or ()):
        _bounded(path, group)
    settings = plain(root.get("hyper_parameters"))
    return Weights(path.parent, tensors, shadow, settings if isinstance(settings, dict) else {})


def _lazy(file: TorchFile, record: Record) -> Lazy:
    file.check(record)
    return Lazy(record.shape, record.dtype, partial(file.read, record))


def _bounded(path: Path, tensors: Iterable[Lazy]) -> None:
    """Tensors may share storages (tied heads), but not so that a small file becomes large."""
    declared, size = sum(t.nbytes for t in tensors), path.stat().st_size
    if declared > 2 * size:
        raise InputError(f"{path} declares tensors of {declared} bytes in a file of {size}")


def _items(value: object) -> dict[Any, Any] | None:
    if isinstance(value, Stub):
        value = value.items
    return value if isinstance(value, dict) else None


def plain(value: object) -> Any:
    """Settings as plain values: OmegaConf's containers and nodes opened, whatever else was an object left out (None).

    Raises:
        InputError: nested deeper than 20 or more than 20 000 values.
    """
    left = 20_000

    def walk(value: object, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 20:
            raise InputError("the hyper-parameters are nested too deeply to be settings")
        if isinstance(value, Stub):
            state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
            state = state if isinstance(state, dict) else {}
            kind = value.name.rpartition(".")[2]
            if kind in ("DictConfig", "ListConfig"):
                return walk(state.get("_content"), depth + 1)
            if "_val" in state:
                return walk(state["_val"], depth + 1)
            if kind == "Namespace":
                return walk(state, depth + 1)
            return walk(value.items, depth + 1) if value.items else None
        if isinstance(value, Mapping):
            return {str(key): walk(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
            return [walk(entry, depth + 1) for entry in value]
        return value if isinstance(value, (str, float)) or small(value) else None

    return walk(value, 0)
