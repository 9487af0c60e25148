"""unmask_step on a GPU: the CPU's tokens, no wait for the host, and one CUDA graph for every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm import unmask_step
from loopmdm.sampling.policies import Ancestral, Confidence, EntropyBound, Factor, Threshold

if not torch.cuda.is_available():
    pytest.skip("these tests need a CUDA device", allow_module_level=True)

GPU = torch.device("cuda", torch.cuda.current_device())
B, T, D, V, STEPS = 3, 160, 64, 1000, 8
POLICIES = [Confidence(), Threshold(0.5), Factor(1.5), EntropyBound(0.5), Ancestral()]


def problem(device: torch.device) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.full((B, T), V - 1)
    tokens[1, :50] = torch.randint(0, V - 1, (50,), generator=rng)
    made = {
        "hidden": torch.randn(B, T, D, generator=rng),
        "head_weight": torch.randn(V, D, generator=rng) / 4,
        "tokens": tokens,
        "generated": tokens == V - 1,
        "row_seeds": torch.arange(B) + 5,
    }
    return {name: x.to(device) for name, x in made.items()} | {"mask_id": V - 1, "temperature": 1.0, "steps": STEPS}


def whole(policy: Any, device: torch.device, **options: Any) -> Tensor:
    given = problem(device)
    for step in range(STEPS):
        given["tokens"] = unmask_step(**given, policy=policy, step=step, **options).tokens
    return given["tokens"].cpu()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_the_gpu_fills_in_what_the_cpu_does(policy: Any) -> None:
    """Where rounding of the product does not decide: under 1% of the positions."""
    want = whole(policy, torch.device("cpu"))
    for options in ({}, {"capacity": B * T}):
        got = whole(policy, GPU, **options)
        assert not (got == V - 1).any() and (got != want).double().mean() < 0.01


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_a_step_never_waits_for_the_host_and_is_captured(policy: Any) -> None:
    """One graph, replayed with the step on the device, gives every step of the eager loop."""
    given = problem(GPU)
    start, step = given["tokens"].clone(), torch.zeros((), dtype=torch.int64, device=GPU)

    def run() -> None:
        unmask_step(**given, policy=policy, step=step, capacity=B * T, inplace=True)
        step.add_(1)

    run()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    given["tokens"].copy_(start)
    step.zero_()
    for _ in range(STEPS):
        graph.replay()
    assert torch.equal(given["tokens"].cpu(), whole(policy, GPU, capacity=B * T))
