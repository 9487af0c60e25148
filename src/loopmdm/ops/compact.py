"""compact: the positions where a mask is set, as a list of fixed length and a total that stays on the device."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, whole
from .contract import Op


class Compacted(NamedTuple):
    """rows: int64 [C], flat indices b * T + t where the mask is set, rising, then -1; total: int64 [1], how many."""

    rows: Tensor
    total: Tensor


def compact(mask: Tensor, capacity: int | None = None, *, impl: str = "auto") -> Compacted:
    """List the set positions of a mask without the host ever learning how many there are.

    So the head can run on masked rows alone inside a CUDA graph: the list has a fixed length and what reads it also
    reads the total.

    Args:
        mask: [B, T] bool.
        capacity: C >= 1, the length of the list; None is B * T, at which nothing is left out. Of more set positions
            the first C are listed and counted.
        impl: "auto", "torch", "cpp" (CPU) or "cuda".

    Returns:
        Compacted(rows int64 [C], total int64 [1]).

    Raises:
        InputError: a mask that is not bool [B, T], a capacity below 1, or an `impl` that cannot run here.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool:
        found = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        raise InputError(f"mask is {found}; compact takes a bool tensor [B, T]")
    room = max(mask.numel(), 1) if capacity is None else whole("capacity", capacity)
    if impl == "torch":
        return Compacted(*_reference(mask, room))
    return Compacted(*_compact(mask, room, impl))


def _reference(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    flat = mask.flatten()
    place = flat.cumsum(0) - 1
    place = torch.where(flat & (place < capacity), place, capacity)  # the last slot takes what is not listed
    at = torch.arange(flat.numel(), device=mask.device)
    rows = torch.full((capacity + 1,), -1, dtype=torch.int64, device=mask.device).scatter(0, place, at)
    return rows[:capacity].clone(), flat.sum().clamp(max=capacity).view(1)


@torch.library.custom_op("loopmdm::compact", mutates_args=())
def _compact(mask: Tensor, capacity: int, impl: str) -> tuple[Tensor, Tensor]:
    chosen = OP.choose(impl, mask.device, mask.dtype, rows=mask.shape[0], cols=mask.shape[1]).impl
    if chosen == "torch" or mask.numel() == 0:
        return _reference(mask, capacity)
    native = importlib.import_module("loopmdm._C")

    mask = mask.contiguous()
    rows, count = mask.new_empty(capacity, dtype=torch.int64), mask.new_empty(1, dtype=torch.int64)
    if chosen == "cpp":
        native.compact_cpu(mask.data_ptr(), rows.data_ptr(), count.data_ptr(), *mask.shape, capacity)
    else:
        partial = mask.new_empty(mask.shape[0], dtype=torch.int64)
        where = (mask.data_ptr(), partial.data_ptr(), rows.data_ptr(), count.data_ptr(), *mask.shape, capacity)
        native.compact_cuda(*where, mask.device.index, torch.cuda.current_stream(mask.device).cuda_stream)
    return rows, count


@_compact.register_fake
def _(mask: Tensor, capacity: int, impl: str) -> tuple[Tensor, Tensor]:
    return mask.new_empty(capacity, dtype=torch.int64), mask.new_empty(1, dtype=torch.int64)


def _example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """Rows longer than a block of threads, an empty and a full one."""
    mask = torch.rand(5, 1237, generator=rng) < 0.4
    mask[1], mask[3] = False, True
    return {"mask": mask.to(device), "capacity": 5 * 1237}


def _short(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """A list too short for what is set."""
    return {"mask": (torch.rand(7, 33, generator=rng) < 0.8).to(device), "capacity": 100}


def _masks(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 256, cols: int = 4096
) -> dict[str, Any]:
    """Half of the positions masked."""
    return {"mask": (torch.rand(rows, cols, generator=rng) < 0.5).to(device)}


_SIZES = ((1, 256), (8, 256), (8, 1024), (64, 1024), (64, 4096))

OP = Op(
    name="compact",
    call=compact,
    examples=(_example, _short),
    impls=("torch", "cpp", "cuda"),
    dtypes=(torch.bool,),
    tolerance={torch.bool: 0.0},
    problems=(_masks,),
    sizes=dict.fromkeys(("cpu", "cuda"), tuple({"rows": rows, "cols": cols} for rows, cols in _SIZES)),
)
