"""linear_residual: a projection, the residual add and the next norm's sums in one kernel.

    pytest benchmarks/bench_linear_residual.py --benchmark-only

Arms: "eager", what a layer does without it (projection, add, cast and RMS statistics, one kernel each); "torch", the
op's reference; "triton" and "cublas" (CUDA only). Arms must agree before one is timed; inputs rotate through copies
that exceed the L2 cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.ops.linear_residual import linear_residual, square_sums

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OPERAND = torch.bfloat16 if CUDA else torch.float32
SIZES = [(256, 512, 512), (4096, 768, 768), (4096, 3072, 768), (65536, 768, 768)] if CUDA else [(256, 512, 512)]
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
L2 = 128 << 20


def eager(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = x + F.linear(h, weight, bias.to(h.dtype))
    return out, (out * gain).to(h.dtype), square_sums(out)


@pytest.mark.parametrize(
    "name", ["eager", "torch", *(pytest.param(impl, marks=NEEDS_CUDA) for impl in ("triton", "cublas"))]
)
@pytest.mark.parametrize("rows, depth, dim", SIZES)
def test_linear_residual(benchmark: Any, rows: int, depth: int, dim: int, name: str) -> None:
    benchmark.group = f"linear_residual {rows}x{depth}x{dim}"
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE)

    weight, bias, gain = (draw(dim, depth) / depth**0.5).to(OPERAND), draw(dim), draw(dim) + 1
    copies = min(16, max(2, L2 // (rows * (depth + 4 * dim)))) if CUDA else 2
    problems = [(draw(rows, depth).to(OPERAND), weight, bias, draw(rows, dim), gain) for _ in range(copies)]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return eager(*inputs) if name == "eager" else linear_residual(*inputs[:4], copy_gain=inputs[4], impl=name)

    with torch.no_grad():
        for a, b in zip(run(*problems[0]), eager(*problems[0]), strict=True):
            assert (a.double() - b.double()).abs().max() <= 2e-2 * b.double().abs().max(), "arms disagree"
    turn = itertools.cycle(problems)

    def once() -> None:
        with torch.no_grad():
            run(*next(turn))
        if CUDA:
            torch.cuda.synchronize()

    once()
    benchmark.pedantic(once, rounds=100 if CUDA else 20, warmup_rounds=10 if CUDA else 2)
    benchmark.extra_info["flops"] = 2 * rows * depth * dim
    if benchmark.stats:
        benchmark.extra_info["TFLOP/s"] = round(2 * rows * depth * dim / benchmark.stats["median"] / 1e12, 3)
