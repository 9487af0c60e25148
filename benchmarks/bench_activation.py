"""activation on a CPU: what an MLP does between its products, forward and with backward; equal before timed.

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
@pytest.mark.parametrize("rows, dim, step", [(256, 1408, "forward"), (256, 3072, "forward"), (256, 1408, "training")])
def test_activation(benchmark: Any, rows: int, dim: int, step: str, act: str, dtype: torch.dtype, impl: str) -> None:
    if step == "training" and dtype != torch.float32:
        pytest.skip("training on a CPU is in fp32")
    benchmark.group = f"activation, {act}, {str(dtype).removeprefix('torch.')}, {step}, one thread: {rows} rows, {dim}"
    benchmark.name = impl
    width = dim * (2 if act == "swiglu" else 1)
    inputs = [torch.randn(rows, width, generator=torch.Generator().manual_seed(s)).to(DEVICE, dtype) for s in range(4)]
    grad = torch.randn(rows, dim, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)

    def run(which: str) -> Any:
        def training(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = activation(x.requires_grad_(), act, impl=which)
            return out.detach(), *torch.autograd.grad(out, x, grad)

        return training if step == "training" else torch.no_grad()(lambda x: activation(x, act, impl=which))

    race(
        benchmark,
        run(impl),
        None if impl == "torch" else run("torch"),
        inputs,
        within(OP.tolerance[dtype]),
        dtype=dtype,
        tokens=rows,
        bytes=rows * (width + dim) * dtype.itemsize * (1 if step == "forward" else 3),
    )
