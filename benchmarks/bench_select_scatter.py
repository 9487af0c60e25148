"""select_scatter: C++ (CPU) and CUDA against the torch reference on the same device, equal before timed.

    pytest benchmarks/bench_select_scatter.py --benchmark-only
    LOOPMDM_RESULTS=benchmarks/results pytest benchmarks/bench_select_scatter.py -k interleaved

The op writes in place, so every call gets copies, made before the clock starts. The second command alternates the two
on one thread and writes the ratios that the op's table refers to.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm.ops.select_scatter import RULES, select_scatter

from .frame import CUDA, DEVICE, environment

SIZES = [(1, 64), (8, 256), (64, 1024), (16, 4096), (64, 16384)]
OURS = "cuda" if CUDA else "cpp"


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


def agree(given: dict[str, Any]) -> None:
    for a, b in zip(*(select_scatter(**copies(given), impl=impl) for impl in (OURS, "torch")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["torch", OURS])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rows", "cols"), SIZES[1:3], ids=str)
def test_select_scatter(benchmark: Any, rows: int, cols: int, rule: str, impl: str) -> None:
    given = problem(rows, cols, rule, 0)
    agree(given)

    def run(given: dict[str, Any]) -> None:
        select_scatter(**given, impl=impl)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"select_scatter {rule} {rows}x{cols} on {DEVICE.type}"
    benchmark.pedantic(run, setup=lambda: ((copies(given),), {}), rounds=50, warmup_rounds=3)


def test_interleaved() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines = [
            {"shape": [rows, cols], "rule": rule, **ratio(rows, cols, rule)} for rows, cols in SIZES for rule in RULES
        ]
    finally:
        torch.set_num_threads(before)
    write("select_scatter", lines)


def ratio(rows: int, cols: int, rule: str) -> dict[str, Any]:
    given = [problem(rows, cols, rule, seed) for seed in range(4)]
    for one in given:
        agree(one)

    def prepared(impl: str) -> Callable[[int], Callable[[], object]]:
        def at(turn: int) -> Callable[[], object]:
            fresh = copies(given[turn % 4])
            return lambda: select_scatter(**fresh, impl=impl)

        return at

    return interleave({impl: prepared(impl) for impl in ("torch", OURS)})


def interleave(arms: dict[str, Callable[[int], Callable[[], object]]], seconds: float = 0.5) -> dict[str, Any]:
    """Medians of the two arms run in turn, and their ratios; an arm gives the call to time for each turn."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 24:
        for name, prepare in arms.items():
            call = prepare(turn)
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if CUDA:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e6)
        turn += 1
    kept = {name: taken[4:] for name, taken in times.items()}
    ours = next(name for name in arms if name != "torch")
    return {
        **{f"{name}_us": round(statistics.median(taken), 1) for name, taken in kept.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(kept["torch"], kept[ours], strict=True)), 2),
        "fastest_ratio": round(min(kept["torch"]) / min(kept[ours]), 2),
        "runs": turn - 4,
    }


def write(op: str, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        print(line)
    folder = os.environ.get("LOOPMDM_RESULTS")
    if folder:
        facts = environment()
        machine = {"device": facts["device"], "cores": os.cpu_count(), "versions": facts["versions"]}
        note = "us, medians of interleaved runs on one thread; ratio is the median over pairs"
        head = json.dumps({"op": op, "machine": machine, "unit": note, "load": [round(x, 1) for x in os.getloadavg()]})
        rows = ",\n".join("  " + json.dumps(line) for line in lines)
        name = f"{'gpu' if CUDA else 'cpu'}-{op}.json"
        Path(folder, name).write_text(f'{head[:-1]},\n "rows": [\n{rows}\n ]}}\n')
