"""linear_residual: a projection, the residual add and the next norm's sums in one kernel.

    pytest benchmarks/bench_linear_residual.py --benchmark-only

Arms: "eager", what a layer does without it (projection, add, cast and RMS statistics, one kernel each); "torch", the
op's reference; "triton" and "cublas" (CUDA only).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.ops.linear_residual import linear_residual, square_sums

from .frame import CUDA, DEVICE, race, rotated, within

OPERAND = torch.bfloat16 if CUDA else torch.float32
SIZES = [(256, 512, 512), (4096, 768, 768), (4096, 3072, 768), (65536, 768, 768)] if CUDA else [(256, 512, 512)]
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
ARMS = ["eager", "torch", *(pytest.param(impl, marks=NEEDS_CUDA) for impl in ("triton", "cublas"))]


def eager(given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    h, weight, bias, x, gain = given
    out = x + F.linear(h, weight, bias.to(h.dtype))
    return out, (out * gain).to(h.dtype), square_sums(out)


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("rows, depth, dim", SIZES)
def test_linear_residual(benchmark: Any, rows: int, depth: int, dim: int, name: str) -> None:
    benchmark.group = f"linear_residual: {rows} rows, {depth} to {dim}"
    benchmark.name = name
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE)

    weight, bias, gain = (draw(dim, depth) / depth**0.5).to(OPERAND), draw(dim), draw(dim) + 1

    def run(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return linear_residual(*given[:4], copy_gain=given[4], impl=name)

    with torch.no_grad():
        race(
            benchmark,
            eager if name == "eager" else run,
            None if name == "eager" else eager,
            rotated(
                lambda _: (draw(rows, depth).to(OPERAND), weight, bias, draw(rows, dim), gain),
                rows * (2 * depth + 4 * dim),
            ),
            within(2e-2 if CUDA else 1e-5),
            dtype=OPERAND,
            tokens=rows,
            flops=2.0 * rows * depth * dim,
        )
