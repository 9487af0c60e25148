"""select_topk: C++ (CPU) and CUDA against the torch reference on the same device, equal before timed, on one thread.

    pytest benchmarks/bench_select_topk.py --benchmark-only
    loopmdm bench --select select_topk --out benchmarks/results/cpu-select_topk.json

The second command writes the file that the op's table refers to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.ops.select_topk import select_topk

from .frame import DEVICE, OURS, race, same

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(1, 64), (1, 1024), (8, 256), (64, 1024), (16, 4096), (64, 4096), (256, 16384)]


def problem(rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    keys = torch.rand(rows, cols, generator=rng)
    eligible = torch.rand(rows, cols, generator=rng) < 0.7
    k = torch.randint(0, cols // 4, (rows,), generator=rng)
    return keys.to(DEVICE), eligible.to(DEVICE), k.to(DEVICE)


@pytest.mark.parametrize("impl", ["torch", OURS])
@pytest.mark.parametrize("rows, cols", SIZES, ids=str)
def test_select_topk(benchmark: Any, rows: int, cols: int, impl: str) -> None:
    benchmark.group = f"select_topk, one thread: {rows} x {cols}"
    benchmark.name = impl
    race(
        benchmark,
        lambda given: select_topk(*given, impl=impl),
        None if impl == "torch" else lambda given: select_topk(*given, impl="torch"),
        [problem(rows, cols, seed) for seed in range(4)],
        same,
    )
