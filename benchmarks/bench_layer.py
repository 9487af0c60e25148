"""layer: a whole transformer layer in inference on a CPU in bf16, its projections one by one in torch against one call.

    pytest benchmarks/bench_layer.py --benchmark-only

Eight layers in turn, so that weights come from memory as in a model and not from cache. "torch" is what a plain
implementation does: F.linear, F.scaled_dot_product_attention, norms and activations in torch's own operations. The
residual stream is fp32. "cpp" has its weights laid out before, as `LoopMDM.packed` and `as_denoiser(dtype=)` keep them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.ops import native
from loopmdm.ops.layer import OP, Form, PackedLayer, _problem, layer

from .frame import CUDA, DEVICE, Run, race, within

pytestmark = pytest.mark.skipif(
    CUDA or not native.multiplies_bf16(), reason="impl=cpp needs a CPU with AVX-512's bf16 products"
)
# form, hidden, biases and gates: the layers of loopmdm-llama at d 512 and of loopmdm-dit at d 768
CASES = {
    "llama, d 512": (Form(8, 8, 64), 1344, False),
    "dit, d 768": (Form(12, 12, 64, "gelu_tanh", "layernorm"), 3072, True),
}
TOKENS = 256


@pytest.mark.parametrize("impl", OP.impls)
@pytest.mark.parametrize("case", CASES)
def test_layer(benchmark: Any, case: str, impl: str) -> None:
    form, hidden, dit = CASES[case]
    benchmark.group = f"layer, {case}, L {TOKENS}, bfloat16"
    benchmark.name = impl
    size = {"rows": TOKENS, "form": form, "hidden": hidden, "biased": dit, "gated": dit}
    problems = [_problem(DEVICE, torch.bfloat16, torch.Generator().manual_seed(seed), **size) for seed in range(8)]
    for problem in problems:
        problem["packed"] = PackedLayer.of(problem["weights"], form)

    def arm(which: str) -> Run:
        turn = itertools.cycle(problems)

        @torch.no_grad()
        def run(x: Tensor) -> Tensor:
            problem = next(turn) | {"x": x}
            if which == "torch":
                problem.pop("packed")
            return layer(**problem, impl=which)

        return run

    D, inner, kv = form.heads * form.head_dim, form.heads * form.head_dim, 2 * form.groups * form.head_dim
    products = D * (2 * inner + kv + hidden * (2 if dit else 3))
    race(
        benchmark,
        arm(impl),
        None if impl == "torch" else arm("torch"),
        [problem["x"] for problem in problems[:2]],
        within(OP.tolerance[torch.bfloat16]),
        dtype=torch.bfloat16,
        tokens=TOKENS,
        flops=2.0 * TOKENS * products + 4.0 * TOKENS**2 * inner,
    )
