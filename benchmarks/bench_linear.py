"""linear: a layer's projection, torch's product against oneDNN's and ours, weights laid out or not.

    pytest benchmarks/bench_linear.py --benchmark-only

Eight weights in turn, so that they come from memory as in a model and not from cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.ops import native
from loopmdm.ops.linear import Packing, linear, pack

from .frame import CUDA, Run, race, within

pytestmark = pytest.mark.skipif(CUDA, reason="onednn is for CPUs; on a GPU the op is F.linear")
ARMS = ["torch", "onednn", "onednn, packed", "cpp, packed"]
DTYPES = [torch.float32, torch.bfloat16]
ROWS, INNER, OUTER = 256, 768, 3072


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_linear(benchmark: Any, dtype: torch.dtype, name: str) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16 product")
    impl = name.partition(",")[0]
    if impl == "cpp" and (dtype != torch.bfloat16 or not native.multiplies_bf16()):
        pytest.skip("our product takes bf16, on a CPU with AVX-512's bf16 products")
    benchmark.group = f"linear, {ROWS} x {INNER} to {OUTER}, {str(dtype).removeprefix('torch.')}"
    benchmark.name = name
    rng = torch.Generator().manual_seed(0)
    weights = [(torch.randn(OUTER, INNER, generator=rng) / INNER**0.5).to(dtype) for _ in range(8)]
    held = [pack(w, ROWS, impl=impl) for w in weights] if name.endswith("packed") else [None] * 8

    def arm(impl: str, packed: Sequence[Packing | None]) -> Run:
        turn = itertools.cycle(zip(weights, packed, strict=True))

        @torch.no_grad()
        def run(x: Tensor) -> Tensor:
            w, p = next(turn)
            return F.linear(x, w) if impl == "torch" else linear(x, w, packed=p, impl=impl)

        return run

    inputs = [torch.randn(1, ROWS, INNER, generator=rng).to(dtype) for _ in range(2)]
    race(
        benchmark,
        arm(impl, held),
        None if name == "torch" else arm("torch", [None] * 8),
        inputs,
        within(1e-5 if dtype == torch.float32 else 1e-2),
        dtype=dtype,
        flops=2.0 * ROWS * INNER * OUTER,
    )
