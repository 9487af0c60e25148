"""head_stats against LLaDA's step: logits at every position, float64 noise over the vocabulary, arg-max, soft-max.

    pytest benchmarks/bench_head_stats.py --benchmark-only
    LOOPMDM_RESULTS=benchmarks/results pytest -s benchmarks/bench_head_stats.py -k interleaved

One sequence of 256 positions of which half are masked, d 512, V 50258. The peer's head is fp32 whatever ours is. The
second command alternates the arms, with one thread (processor time) and with all (wall time), prints the median of the
ratios round by round and, once, each arm's peak memory (of a process of its own, beyond what it held before), and
writes the file that the op's table refers to. On a busy machine believe the one-thread rows: processor time does not
count what others take.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.lab.evidence import processor
from loopmdm.ops.head_stats import OP, head_stats

from .frame import CUDA, DEVICE, keep_memory, race

LENGTH, DIM, VOCAB = 256, 512, 50258
MASKED = torch.arange(0, LENGTH, 2, device=DEVICE)
FUSED = "triton" if CUDA else "cpp"
ROUNDS = 1 + int(os.environ.get("LOOPMDM_ROUNDS", 5))  # the first is not counted
Arms = dict[str, Callable[[], Any]]


def problem(vocab: int = VOCAB) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(LENGTH, DIM, generator=rng), torch.randn(vocab, DIM, generator=rng) * 3 / DIM**0.5
    return {"hidden": hidden.to(DEVICE), "weight": weight.to(DEVICE)}


def llada(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The sampling half of a step as in LLaDA (Nie et al. 2025): a token and its confidence at every position."""
    logits = hidden @ weight.T
    if temperature:
        wide = logits.to(torch.float64)
        uniform = torch.rand_like(wide, dtype=torch.float64)
        token = (wide.exp() / (-uniform.log()) ** temperature).argmax(-1)
    else:
        token = logits.argmax(-1)
    confidence = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
    return token, confidence


@functools.cache
def arms(temperature: float, vocab: int = VOCAB) -> Arms:
    given = problem(vocab)
    seeds = torch.full((len(MASKED),), 7, device=DEVICE)

    def ours(dtype: torch.dtype, impl: str) -> Callable[[], Any]:
        hidden, weight = (t.to(dtype) for t in given.values())

        def run() -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {"temperature": temperature, "seeds": seeds, "positions": MASKED, "impl": impl}
            stats = head_stats(hidden[MASKED], weight, **options)
            return stats.token, stats.confidence

        return run

    made: Arms = {"llada": lambda: llada(**given, temperature=temperature), "torch": ours(torch.float32, "torch")}
    if OP.unavailable(FUSED, DEVICE) is None:
        made |= {"fp32": ours(torch.float32, FUSED), "bf16": ours(torch.bfloat16, FUSED)}
    return made


def agree(found: Arms) -> None:
    """At temperature 0 the same tokens and confidences, but where bf16 weights are other weights."""
    token, confidence = found["llada"]()
    for name, run in found.items():
        if name in ("torch", "fp32"):
            ours = run()
            assert torch.equal(ours[0], token[MASKED]), name
            assert torch.allclose(ours[1], confidence[MASKED], rtol=1e-4), name
        elif name == "bf16":
            assert float((run()[0] == token[MASKED]).double().mean()) > 0.9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("arm", ["llada", "torch", "fp32", "bf16"])
def test_head_stats(benchmark: Any, arm: str, temperature: float) -> None:
    found = arms(temperature)
    if arm not in found:
        pytest.skip(OP.unavailable(FUSED, DEVICE) or "")
    benchmark.group = f"head_stats: V {VOCAB}, {LENGTH} rows, half masked, d {DIM}, T = {temperature:g}"
    benchmark.name = arm
    race(
        benchmark,
        lambda _: found[arm](),
        None if arm == "llada" else lambda _: found["llada"](),
        [None],
        lambda got, want: agree(arms(0.0, 5000)),
        dtype=torch.bfloat16 if arm == "bf16" else torch.float32,
        tokens=len(MASKED),
        flops=2.0 * DIM * VOCAB * (LENGTH if arm == "llada" else len(MASKED)),
    )


def test_interleaved() -> None:
    agree(arms(0.0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            results += [line(temperature, threads, peaks=threads == 1) for temperature in (1.0, 0.0)]
    finally:
        torch.set_num_threads(before)
    for row in results:
        print(row)
    folder = os.environ.get("LOOPMDM_RESULTS")
    if folder:
        machine = {"cpu": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        machine["malloc"] = keep_memory()
        unit = "ms, medians of interleaved rounds; ratios are medians round by round, llada / arm; MB beyond the start"
        text = ",\n".join("  " + json.dumps(row) for row in results)
        head = json.dumps({"op": "head_stats", "machine": machine, "unit": unit})[:-1]
        Path(folder, "cpu-head_stats.json").write_text(f'{head},\n "rows": [\n{text}\n ]}}\n')


def line(temperature: float, threads: int, rounds: int = ROUNDS, peaks: bool = True) -> dict[str, Any]:
    clock = time.process_time if threads == 1 else time.perf_counter
    found = {name: run for name, run in arms(temperature).items() if name != "torch"}
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, run in found.items():
            start = clock()
            run()
            taken[name].append((clock() - start) * 1e3)
    taken = {name: times[1:] for name, times in taken.items()}
    row = {
        "shape": [LENGTH, len(MASKED), DIM, VOCAB],
        "temperature": temperature,
        "threads": threads,
        "clock": clock.__name__,
        "ms": {name: round(statistics.median(times), 1) for name, times in taken.items()},
        "ratio": {n: round(statistics.median(map(_over, taken["llada"], t)), 2) for n, t in taken.items()},
        "fastest_ratio": {n: round(min(taken["llada"]) / min(t), 2) for n, t in taken.items()},
    }
    return row | {"peak_MB": {name: peak(name, temperature, threads) for name in found}} if peaks else row


def _over(a: float, b: float) -> float:
    return a / b


def peak(arm: str, temperature: float, threads: int) -> float:
    """MB by which a process grows at most while it runs an arm once; a small problem has warmed it."""
    code = f"from benchmarks import bench_head_stats as b; print(b.grown({arm!r}, {temperature}, {threads}))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    return float(done.stdout)


def grown(arm: str, temperature: float, threads: int) -> float:
    torch.set_num_threads(threads)
    arms(temperature, 3000)[arm]()
    run = arms(temperature)[arm]
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would hide what the arm takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(name: str) -> int:
    (entry,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name)]
    return int(entry.split()[1])
