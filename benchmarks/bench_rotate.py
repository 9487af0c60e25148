"""rotate on a CPU: the heads of one layer turned by their positions, forward and with backward; equal before timed.

pytest benchmarks/bench_rotate.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm.ops.rotate import LAYOUTS, OP, rotate

from .frame import CUDA, DEVICE, race, within

pytestmark = pytest.mark.skipif(CUDA, reason="impl=cpp runs on a CPU")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("impl", OP.impls)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", ["forward", "training"])
@pytest.mark.parametrize("heads", [4, 12])
def test_rotate(benchmark: Any, heads: int, step: str, layout: str, impl: str) -> None:
    benchmark.group = f"rotate, {layout}, {step}, one thread: 256 tokens, {heads} x 64"
    benchmark.name = impl
    numbers = 256 * heads * 64
    problems = [
        OP.problems[0](DEVICE, torch.float32, torch.Generator().manual_seed(seed), numbers=numbers, heads=heads)
        | {"layout": layout}
        for seed in range(4)
    ]
    grad = torch.randn(1, 256, heads, 64, generator=torch.Generator().manual_seed(4), device=DEVICE)

    def run(which: str) -> Any:
        def training(problem: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            x = problem["x"].requires_grad_()
            out = rotate(**problem, impl=which)
            return out.detach(), *torch.autograd.grad(out, x, grad)

        return training if step == "training" else torch.no_grad()(lambda problem: rotate(**problem, impl=which))

    race(
        benchmark,
        run(impl),
        None if impl == "torch" else run("torch"),
        problems,
        within(0.0),
        dtype=torch.float32,
        tokens=256,
        bytes=numbers * 8 * (1 if step == "forward" else 2),
    )
