"""norm_linear: RMS norm, a projection and its rotation or activation in one kernel.

    pytest benchmarks/bench_norm_linear.py --benchmark-only

Arms: "eager", one kernel an operation as layers are written; "torch", the op's reference; "triton" and "cublas" (CUDA
only).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.ops.linear_residual import square_sums
from loopmdm.ops.norm_linear import Heads, norm_linear

from .frame import CUDA, DEVICE, race, rotated, within

OPERAND = torch.bfloat16 if CUDA else torch.float32
SIZES = [(256, 512), (4096, 768), (65536, 768), (4096, 1024)] if CUDA else [(256, 512)]
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
ARMS = ["eager", "torch", *(pytest.param(impl, marks=NEEDS_CUDA) for impl in ("triton", "cublas"))]
HEAD = 64


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


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("what", ["qkv", "up"])
@pytest.mark.parametrize("rows, dim", SIZES)
def test_norm_linear(benchmark: Any, rows: int, dim: int, what: str, name: str) -> None:
    benchmark.group = f"norm_linear, {what}: {rows} rows, d {dim}"
    benchmark.name = name
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE)

    def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        stream = 2 * draw(rows, dim) + 1
        return stream, stream.to(OPERAND), square_sums(stream)

    width = 3 * dim if what == "qkv" else 2 * round(dim * 8 / 3 / 64) * 64
    angle = 7 * draw(rows, HEAD // 2)
    heads = Heads(dim // HEAD, dim // HEAD, HEAD, angle.cos(), angle.sin()) if what == "qkv" else None
    weight = (draw(width, dim) / dim**0.5).to(OPERAND)
    act = "none" if heads else "swiglu"

    def run(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return norm_linear(*given[1:], weight, act=act, heads=heads, impl=name)

    def reference(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return eager(given[0], weight, heads)

    with torch.no_grad():
        race(
            benchmark,
            reference if name == "eager" else run,
            None if name == "eager" else reference,
            rotated(problem, rows * dim * 6),
            within(3e-2 if CUDA else 1e-5),
            dtype=OPERAND,
            tokens=rows,
            flops=2.0 * rows * dim * width,
        )
