"""What every interpreter test does to a kernel: guard bands round its tensors, and programs in both orders.

The interpreter runs a kernel's programs one after another, so a race shows only as a result that depends
on their order; and it reads and writes through raw pointers, so a tile that leaves its tensor shows
only by what lies beside it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.ops.contract import interpreting

BAND = 64  # elements on either side; a multiple of 16 bytes in every dtype, as torch's own allocations are aligned
CANARY = 0x5A

_empty = torch.empty


def need_interpreter() -> None:
    """Skip the module unless this process interprets Triton."""
    pytest.importorskip("triton", reason="interpreter tests need triton")
    if not interpreting():
        pytest.skip("interpreter tests are a run of their own, with TRITON_INTERPRET=1", allow_module_level=True)
    _round_to_bf16_as_a_gpu_does()


@functools.cache
def _round_to_bf16_as_a_gpu_does() -> None:
    """The interpreter of Triton 3.7 truncates fp32 to bf16; a GPU rounds to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        values = torch.from_numpy(source.data.astype("float32", copy=True))
        return interpreter.TensorHandle(values.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    builder.cast_impl = rounded


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy inside NaN bands: what a kernel reads beyond it poisons its result."""
    buffer = _empty(tensor.numel() + 2 * BAND, dtype=tensor.dtype)
    buffer.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    inside = buffer[BAND : BAND + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@contextlib.contextmanager
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every torch.empty lies between canaries and holds NaN; the canaries are looked at on the way out.

    Yields the list of buffers, so that a test can tell that there were any.
    """
    buffers: list[Tensor] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        assert device is None or torch.device(device).type == "cpu"
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or torch.get_default_dtype()
        buffer = _empty(shape.numel() * dtype.itemsize + 2 * BAND * 8, dtype=torch.uint8).fill_(CANARY)
        buffers.append(buffer)
        inside = buffer[BAND * 8 : buffer.numel() - BAND * 8].view(dtype).view(shape)
        return inside.fill_(float("nan")) if dtype.is_floating_point else inside

    def like(tensor: Tensor, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return empty(tensor.shape, dtype=dtype or tensor.dtype)

    def new(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        # the interpreter makes its own views with new_empty(0); those it re-points at once
        return empty(*size, dtype=dtype or tensor.dtype) if size != (0,) else _empty(0, dtype=dtype or tensor.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", like)
        patch.setattr(Tensor, "new_empty", new)
        yield buffers
    for buffer in buffers:
        for band in (buffer[: BAND * 8], buffer[-BAND * 8 :]):
            assert bool((band == CANARY).all()), "a kernel wrote outside its output"


@contextlib.contextmanager
def in_bounds(monkeypatch: pytest.MonkeyPatch, tensors: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Every address that a kernel touches, even one whose value it then drops, lies in one of the tensors.

    A buffer of `canaries` counts with its bands, which look after themselves.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    def check(pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data].astype("int64")
        if not addresses.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors() if t.numel())
        starts = torch.tensor([a for a, _ in spans])
        ends = torch.tensor([b for _, b in spans])
        touched = torch.from_numpy(addresses)
        owner = torch.searchsorted(starts, touched, right=True) - 1
        stray = (owner < 0) | (touched + size > ends[owner.clamp(min=0)])
        assert not stray.any(), f"{int(stray.sum())} of {touched.numel()} addresses lie in no tensor of the launch"

    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


@contextlib.contextmanager
def reversed_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches run their programs from the last to the first."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx

    def backwards(*index: int) -> None:
        forwards(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    with monkeypatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", backwards)
        yield


def launch(monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    """Run a launcher on guarded inputs, in both orders, between canaries; the two results must be the same bits."""
    args = tuple(guarded(a) if isinstance(a, Tensor) else a for a in args)
    with canaries(monkeypatch) as buffers:
        inputs = [a for a in args if isinstance(a, Tensor)]
        with in_bounds(monkeypatch, lambda: [*inputs, *buffers]):
            result = call(*args)
        assert buffers, "the launcher allocates by other means than torch.empty: teach `canaries` about them"
        with reversed_programs(monkeypatch):
            again = call(*args)
    for i, (a, b) in enumerate(zip(result, again, strict=True)):
        assert not a.isnan().any(), f"output {i} holds NaN: not all of it was written, or a read left its tensor"
        assert torch.equal(a, b), f"output {i} depends on the order of programs"
    return result
