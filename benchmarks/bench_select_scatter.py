"""select_scatter: C++ (CPU) and CUDA against the torch reference on the same device, equal before timed, on one thread.

    pytest benchmarks/bench_select_scatter.py --benchmark-only
    loopmdm bench --select select_scatter --out benchmarks/results/cpu-select_scatter.json

The op writes in place, so every call gets copies, made before the clock starts. The second command writes the file that
the op's table refers to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm.ops.select_scatter import RULES, select_scatter

from .frame import DEVICE, OURS, Run, race, same

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(1, 64), (8, 256), (64, 1024), (16, 4096), (64, 16384)]


def problem(rows: int, cols: int, rule: str, seed: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, cols, generator=rng)
    bound = {"top_k": 0.0, "threshold": 0.9, "factor": 1.0, "sum": 0.5}[rule]
    made = {
        "scores": scores.log() if rule == "sum" else scores,
        "proposed": torch.randint(0, 50_000, (rows, cols), generator=rng),
        "tokens": torch.full((rows, cols), 50_000),
        "masked": torch.rand(rows, cols, generator=rng) < 0.5,
        "eligible": torch.rand(rows, cols, generator=rng) < 0.7,
        "k": torch.full((rows,), max(1, cols // 64)),
        "bound": torch.full((rows,), bound, dtype=torch.float64),
        "eos": torch.tensor([0, 1]),
        "ends": torch.ones(rows, cols).bool(),
    }
    return {name: x.to(DEVICE) for name, x in made.items()} | {"rule": rule, "mask_id": 50_000}


def copies(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("impl", ["torch", OURS])
@pytest.mark.parametrize(
    "rule, rows, cols", [*(("top_k", *size) for size in SIZES), *((r, *SIZES[1]) for r in RULES[1:])]
)
def test_select_scatter(benchmark: Any, rule: str, rows: int, cols: int, impl: str) -> None:
    def arm(impl: str) -> Run:
        return lambda given: select_scatter(**given, impl=impl)

    benchmark.group = f"select_scatter, {rule}, one thread: {rows} x {cols}"
    benchmark.name = impl
    race(
        benchmark,
        arm(impl),
        None if impl == "torch" else arm("torch"),
        [problem(rows, cols, rule, seed) for seed in range(4)],
        same,
        fresh=copies,
    )
