"""residual_norm: what fusing the add and the norm buys, forward and backward.

    pytest benchmarks/bench_residual_norm.py --benchmark-only

Arms: "eager", the formula written out in torch, one kernel an operation; "torch", the op's reference; "triton", the
fused kernel (CUDA only); "cpp", the same on a CPU. `bytes` is what the fused operation must move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.ops.residual_norm import residual_norm

from .frame import CUDA, DEVICE, Run, race, rotated, within

SHAPES = [(256, 512), (4096, 768), (65536, 768), (4096, 4096)] if CUDA else [(36 * 64, 64), (256, 768)]
CPU_ONLY = pytest.mark.skipif(CUDA, reason="impl=cpp runs on a CPU")
# normed is what the next GEMM reads: bf16 on a GPU, and fp32 on a CPU, where the model trains in fp32
OUT = torch.bfloat16 if CUDA else torch.float32
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="impl=triton needs a CUDA device")
ARMS = ["eager", "torch", pytest.param("triton", marks=NEEDS_CUDA), pytest.param("cpp", marks=CPU_ONLY)]
pytestmark = pytest.mark.usefixtures("one_thread")


def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    summed = x + branch
    centred = summed - summed.mean(-1, keepdim=True) if kind == "layernorm" else summed
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight
    return summed, (normed if bias is None else normed + bias).to(OUT)


def arm(name: str, kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if name == "eager":
        return lambda x, branch, weight, bias: eager(x, branch, weight, bias, kind)
    return lambda *inputs: residual_norm(*inputs, kind=kind, out_dtype=OUT, impl=name)


def problem(rows: int, dim: int, kind: str, seed: int) -> list[Tensor | None]:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    bias = draw(dim).to(DEVICE) if kind == "layernorm" else None
    inputs = [draw(rows, dim).to(DEVICE), draw(rows, dim).to(DEVICE, OUT), (draw(dim).abs() + 0.5).to(DEVICE), bias]
    return [None if t is None else t.requires_grad_() for t in inputs]


def forward(run: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    def once(inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return run(*inputs)

    return once


def training(run: Callable[..., tuple[Tensor, Tensor]], grads: list[Tensor]) -> Run:
    """Outputs and gradients."""

    def once(inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        outputs = run(*inputs)
        found = torch.autograd.grad(outputs, [t for t in inputs if t is not None], grads)
        return *(t.detach() for t in outputs), *found

    return once


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("step", ["forward", "training"])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("rows, dim", SHAPES)
def test_residual_norm(benchmark: Any, rows: int, dim: int, kind: str, step: str, name: str) -> None:
    benchmark.group = f"residual_norm, {kind}, {step}, one thread: {rows} rows, d {dim}"
    benchmark.name = name
    grads = [torch.randn(rows, dim, device=DEVICE), torch.randn(rows, dim, device=DEVICE).to(OUT)]
    run, reference = (
        forward(a) if step == "forward" else training(a, grads) for a in (arm(name, kind), arm("eager", kind))
    )
    stream, other = 4, OUT.itemsize
    moved = rows * dim * (2 * stream + 2 * other)
    if step == "training":
        moved += rows * dim * (3 * stream + 2 * other if CUDA else 4 * stream)
    race(
        benchmark,
        run,
        None if name == "eager" else reference,
        rotated(lambda seed: problem(rows, dim, kind, seed), rows * dim * 10),
        within(1e-2 if CUDA else 1e-4),
        dtype=OUT,
        tokens=rows,
        bytes=moved,
    )
