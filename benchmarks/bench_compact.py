"""compact: C++ (CPU) and CUDA against the torch reference on the same device, equal before timed, on one thread.

    pytest benchmarks/bench_compact.py --benchmark-only
    loopmdm bench --select compact --out benchmarks/results/cpu-compact.json

The second command writes the file that the op's table refers to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.ops.compact import compact

from .frame import DEVICE, OURS, race, same

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(1, 64), (8, 256), (64, 1024), (16, 4096), (64, 16384)]


def problem(rows: int, cols: int, seed: int) -> Tensor:
    return (torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.5).to(DEVICE)


@pytest.mark.parametrize("impl", ["torch", OURS])
@pytest.mark.parametrize("rows, cols", SIZES, ids=str)
def test_compact(benchmark: Any, rows: int, cols: int, impl: str) -> None:
    benchmark.group = f"compact, one thread: {rows} x {cols}"
    benchmark.name = impl
    race(
        benchmark,
        lambda mask: compact(mask, impl=impl),
        None if impl == "torch" else lambda mask: compact(mask, impl="torch"),
        [problem(rows, cols, seed) for seed in range(4)],
        same,
    )
