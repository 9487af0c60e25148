"""loop_boundary: what lies between two visits of the looped block, in one kernel.

    pytest benchmarks/bench_loop_boundary.py --benchmark-only

Arms: "eager", one kernel an operation; "torch", the op's reference; "triton" (CUDA only). `bytes` is what the fused
operation must move.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.ops.linear_residual import square_sums
from loopmdm.ops.loop_boundary import loop_boundary

from .frame import CUDA, DEVICE, race, rotated, within

COPY = torch.bfloat16 if CUDA else torch.float32
SIZES = [(256, 512), (4096, 768), (65536, 768)] if CUDA else [(256, 768)]
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="impl=triton needs a CUDA device")


def eager(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, x0, gain, previous, copy_gain = given
    out = F.rms_norm(x + x0, x.shape[-1:], gain, 1e-5)
    change = torch.stack(((x - previous).square().sum(-1), x.square().sum(-1)), dim=-1)
    return out, (out * copy_gain).to(COPY), square_sums(out), change


@pytest.mark.parametrize("name", ["eager", "torch", pytest.param("triton", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("rows, dim", SIZES)
def test_loop_boundary(benchmark: Any, rows: int, dim: int, name: str) -> None:
    benchmark.group = f"loop_boundary: {rows} rows, d {dim}"
    benchmark.name = name
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE)

    gain, copy_gain = draw(dim) + 1, draw(dim) + 1

    def run(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return loop_boundary(*given[:4], copy_gain=given[4], dtype=COPY, impl=name)

    with torch.no_grad():
        race(
            benchmark,
            eager if name == "eager" else run,
            None if name == "eager" else eager,
            rotated(lambda _: (draw(rows, dim), draw(rows, dim), gain, draw(rows, dim), copy_gain), rows * dim * 12),
            within(1e-2 if CUDA else 1e-5),
            dtype=COPY,
            tokens=rows,
            bytes=rows * dim * (4 * 4 + COPY.itemsize),
        )
