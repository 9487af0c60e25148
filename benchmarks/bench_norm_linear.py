"""norm_linear: RMS norm, a projection and its rotation or activation in one kernel.

    pytest benchmarks/bench_norm_linear.py --benchmark-only

Arms: "eager", one kernel an operation as layers are written; "torch", the op's reference; "triton" and "cublas" (CUDA
only). Arms must agree before one is timed; inputs rotate through copies that exceed the L2 cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.ops.linear_residual import square_sums
from loopmdm.ops.norm_linear import Heads, norm_linear

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OPERAND = torch.bfloat16 if CUDA else torch.float32
SIZES = [(256, 512), (4096, 768), (65536, 768), (4096, 1024)] if CUDA else [(256, 512)]
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
HEAD = 64
L2 = 128 << 20


def eager(stream: Tensor, weight: Tensor, heads: Heads | None) -> Tensor:
    y = F.linear(F.rms_norm(stream, stream.shape[-1:], eps=1e-5).to(OPERAND), weight)
    if heads is None:
        gate, up = y[..., 0::2], y[..., 1::2]
        return F.silu(gate) * up
    qk, v = y.split(((heads.query + heads.key) * HEAD, heads.key * HEAD), dim=-1)
    a, b = qk.view(len(y), -1, HEAD // 2, 2).float().unbind(-1)
    cos, sin = heads.cos[:, None], heads.sin[:, None]  # type: ignore[index]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).view(len(y), -1)
    return torch.cat((turned.to(OPERAND), v), dim=-1)


@pytest.mark.parametrize(
    "name", ["eager", "torch", *(pytest.param(impl, marks=NEEDS_CUDA) for impl in ("triton", "cublas"))]
)
@pytest.mark.parametrize("what", ["qkv", "up"])
@pytest.mark.parametrize("rows, dim", SIZES)
def test_norm_linear(benchmark: Any, rows: int, dim: int, what: str, name: str) -> None:
    benchmark.group = f"norm_linear {what} {rows}x{dim}"
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE)

    width = 3 * dim if what == "qkv" else 2 * round(dim * 8 / 3 / 64) * 64
    angle = 7 * draw(rows, HEAD // 2)
    heads = Heads(dim // HEAD, dim // HEAD, HEAD, angle.cos(), angle.sin()) if what == "qkv" else None
    weight = (draw(width, dim) / dim**0.5).to(OPERAND)
    copies = min(16, max(2, L2 // (rows * dim * 6))) if CUDA else 2
    streams = [2 * draw(rows, dim) + 1 for _ in range(copies)]
    problems = [(s, s.to(OPERAND), square_sums(s)) for s in streams]

    def run(stream: Tensor, copy: Tensor, squares: Tensor) -> Tensor:
        if name == "eager":
            return eager(stream, weight, heads)
        return norm_linear(copy, squares, weight, act="none" if heads else "swiglu", heads=heads, impl=name)

    with torch.no_grad():
        got, want = run(*problems[0]).double(), eager(streams[0], weight, heads).double()
        assert (got - want).abs().max() <= 3e-2 * want.abs().max(), "arms disagree"
    turn = itertools.cycle(problems)

    def once() -> None:
        with torch.no_grad():
            run(*next(turn))
        if CUDA:
            torch.cuda.synchronize()

    once()
    benchmark.pedantic(once, rounds=100 if CUDA else 20, warmup_rounds=10 if CUDA else 2)
    benchmark.extra_info["flops"] = 2 * rows * dim * width
    if benchmark.stats:
        benchmark.extra_info["TFLOP/s"] = round(2 * rows * dim * width / benchmark.stats["median"] / 1e12, 3)
