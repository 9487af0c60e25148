"""loop_boundary: what lies between two visits of the looped block, in one kernel.

    pytest benchmarks/bench_loop_boundary.py --benchmark-only

Arms: "eager", one kernel an operation; "torch", the op's reference; "triton" (CUDA only). Arms must agree before one is
timed; inputs rotate through copies that exceed the L2 cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.ops.linear_residual import square_sums
from loopmdm.ops.loop_boundary import loop_boundary

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COPY = torch.bfloat16 if CUDA else torch.float32
SIZES = [(256, 512), (4096, 768), (65536, 768)] if CUDA else [(256, 768)]
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="impl=triton needs a CUDA device")
L2 = 128 << 20


def eager(x: Tensor, x0: Tensor, gain: Tensor, previous: Tensor, copy_gain: Tensor) -> tuple[Tensor, ...]:
    out = F.rms_norm(x + x0, x.shape[-1:], gain, 1e-5)
    change = torch.stack(((x - previous).square().sum(-1), x.square().sum(-1)), dim=-1)
    return out, (out * copy_gain).to(COPY), square_sums(out), change


@pytest.mark.parametrize("name", ["eager", "torch", pytest.param("triton", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("rows, dim", SIZES)
def test_loop_boundary(benchmark: Any, rows: int, dim: int, name: str) -> None:
    benchmark.group = f"loop_boundary {rows}x{dim}"
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE)

    gain, copy_gain, copies = draw(dim) + 1, draw(dim) + 1, min(16, max(2, L2 // (rows * dim * 12))) if CUDA else 2
    problems = [(draw(rows, dim), draw(rows, dim), gain, draw(rows, dim), copy_gain) for _ in range(copies)]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        if name == "eager":
            return eager(*inputs)
        return loop_boundary(*inputs[:4], copy_gain=inputs[4], dtype=COPY, impl=name)

    with torch.no_grad():
        for a, b in zip(run(*problems[0]), eager(*problems[0]), strict=True):
            assert (a.double() - b.double()).abs().max() <= 1e-2 * b.double().abs().max(), "arms disagree"
    turn = itertools.cycle(problems)

    def once() -> None:
        with torch.no_grad():
            run(*next(turn))
        if CUDA:
            torch.cuda.synchronize()

    once()
    benchmark.pedantic(once, rounds=100 if CUDA else 20, warmup_rounds=10 if CUDA else 2)
    moved = rows * dim * (4 * 4 + COPY.itemsize)
    benchmark.extra_info["bytes"] = moved
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats["median"] / 1e9, 2)
