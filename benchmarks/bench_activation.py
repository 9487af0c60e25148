"""activation on a CPU: what an MLP does between its products; equal before timed.

pytest benchmarks/bench_activation.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm.ops.activation import CPP, OP, activation

from .frame import CUDA, DEVICE, race, within

pytestmark = pytest.mark.skipif(CUDA, reason="impl=cpp runs on a CPU")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("impl", OP.impls)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", CPP)
@pytest.mark.parametrize("rows, dim", [(256, 1408), (256, 3072)])
def test_activation(benchmark: Any, rows: int, dim: int, act: str, dtype: torch.dtype, impl: str) -> None:
    benchmark.group = f"activation, {act}, {str(dtype).removeprefix('torch.')}, one thread: {rows} rows, {dim}"
    benchmark.name = impl
    width = dim * (2 if act == "swiglu" else 1)
    inputs = [torch.randn(rows, width, generator=torch.Generator().manual_seed(s)).to(DEVICE, dtype) for s in range(4)]

    def run(which: str) -> Any:
        return torch.no_grad()(lambda x: activation(x, act, impl=which))

    race(
        benchmark,
        run(impl),
        None if impl == "torch" else run("torch"),
        inputs,
        within(OP.tolerance[dtype]),
        dtype=dtype,
        tokens=rows,
        bytes=rows * (width + dim) * dtype.itemsize,
    )
