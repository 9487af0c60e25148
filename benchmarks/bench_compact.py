"""compact: C++ (CPU) and CUDA against the torch reference on the same device, equal before timed.

    pytest benchmarks/bench_compact.py --benchmark-only
    LOOPMDM_RESULTS=benchmarks/results pytest benchmarks/bench_compact.py -k interleaved

The second command alternates the two on one thread and writes the ratios that the op's table refers to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.ops.compact import compact

from .bench_select_scatter import OURS, interleave, write
from .frame import CUDA, DEVICE

SIZES = [(1, 64), (8, 256), (64, 1024), (16, 4096), (64, 16384)]


def problem(rows: int, cols: int, seed: int = 0) -> Tensor:
    return (torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.5).to(DEVICE)


def agree(mask: Tensor) -> None:
    for a, b in zip(compact(mask, impl=OURS), compact(mask, impl="torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["torch", OURS])
@pytest.mark.parametrize(("rows", "cols"), SIZES[1:3], ids=str)
def test_compact(benchmark: Any, rows: int, cols: int, impl: str) -> None:
    mask = problem(rows, cols)
    agree(mask)

    def run() -> None:
        compact(mask, impl=impl)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"compact {rows}x{cols} on {DEVICE.type}"
    benchmark(run)


def test_interleaved() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        write("compact", [{"shape": [rows, cols], **ratio(rows, cols)} for rows, cols in SIZES])
    finally:
        torch.set_num_threads(before)


def ratio(rows: int, cols: int) -> dict[str, Any]:
    masks = [problem(rows, cols, seed) for seed in range(4)]
    for mask in masks:
        agree(mask)

    def arm(impl: str) -> Callable[[int], Callable[[], object]]:
        return lambda turn: lambda: compact(masks[turn % 4], impl=impl)

    return interleave({impl: arm(impl) for impl in ("torch", OURS)})
