"""rotary_attention on a CPU: rotation and attention of one layer, from the packed projection; equal before timed.

    pytest benchmarks/bench_rotary_attention.py --benchmark-only

"torch" rotates and calls F.scaled_dot_product_attention, which is what a plain implementation of the model does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm.ops.rotary_attention import OP, rotary_attention

from .frame import CUDA, DEVICE, race, within

pytestmark = pytest.mark.skipif(CUDA, reason="impl=cpp runs on a CPU")
SHAPES = [(1, 256, 8, 64), (4, 256, 8, 64), (1, 1024, 8, 64), (1, 256, 12, 64)]


@pytest.mark.parametrize("impl", OP.impls)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, tokens, heads, head_dim", SHAPES)
def test_rotary_attention(
    benchmark: Any, batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, impl: str
) -> None:
    benchmark.group = f"rotary_attention, {str(dtype).removeprefix('torch.')}: {batch} x {tokens}, {heads} x {head_dim}"
    benchmark.name = impl
    size = {"batch": batch, "tokens": tokens, "heads": heads, "groups": heads, "head_dim": head_dim}
    problems = [OP.problems[0](DEVICE, dtype, torch.Generator().manual_seed(seed), **size) for seed in range(4)]

    def run(which: str) -> Any:
        return torch.no_grad()(lambda problem: rotary_attention(**problem, impl=which))

    race(
        benchmark,
        run(impl),
        None if impl == "torch" else run("torch"),
        problems,
        within(OP.tolerance[dtype]),
        dtype=dtype,
        tokens=batch * tokens,
        flops=4 * batch * tokens**2 * heads * head_dim,
    )
