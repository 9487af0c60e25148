"""How a benchmark is run: arms against the reference in turn, equal before timed, and what is kept beside a time.

    race(benchmark, arm, reference, inputs, agree, tokens=..., flops=...)

A round of the reference comes before each round of the arm, on the same input, so that what slows the machine slows
both. The ratio is the median over these pairs, its interval the narrowest pair of ranks that holds the median of such
ratios with at least 95% (a sign test: no distribution is assumed), or all of them where they are fewer than six.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loopmdm.lab import evidence
from loopmdm.lab.tune import L2, interval
from loopmdm.ops.contract import relative

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROUNDS = int(os.environ.get("LOOPMDM_ROUNDS", 20 if CUDA else 7))
WARMUP = 5 if CUDA else 1

Run = Callable[[Any], Any]


def race(
    benchmark: Any,
    run: Run,
    reference: Run | None,
    inputs: Sequence[Any],
    agree: Callable[[Any, Any], None] | None,
    *,
    dtype: torch.dtype = torch.float32,
    rounds: int | None = None,
    warmup: int = WARMUP,
    tokens: int = 0,
    flops: float = 0.0,
    memory: bool = True,
    **facts: Any,
) -> None:
    """Time `run` on `inputs` in turn, against `reference` unless that is None (the reference's own row).

    Args:
        agree: called with both results on the first input before anything is timed; raises where they differ.
        rounds: timed ones; None is ROUNDS, which the variable LOOPMDM_ROUNDS sets, also instead of a number given here.
        tokens, flops: of one round; what is generated, not what is given.
        memory: note the peak of what one round allocates; on a CPU by torch's own count.
        facts: further entries of the row (`nfe`, `loops`).
    """
    run, reference = synchronised(run), None if reference is None else synchronised(reference)
    if reference is not None and agree is not None:
        agree(run(inputs[0]), reference(inputs[0]))
    turn, rival = itertools.cycle(inputs), []

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        x = next(turn)
        if reference is not None:
            started = time.perf_counter()
            reference(x)
            rival.append(time.perf_counter() - started)
        return (x,), {}

    if rounds is None or "LOOPMDM_ROUNDS" in os.environ:
        rounds = ROUNDS
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=warmup)
    benchmark.extra_info.update(environment(), dtype=str(dtype).removeprefix("torch."), **facts)
    if benchmark.stats is None:
        return
    if memory:
        benchmark.extra_info["peak_bytes"] = peak_bytes(run, inputs[0])
    seconds = list(benchmark.stats.stats.data)
    median = statistics.median(seconds)
    info: dict[str, Any] = {"rounds": len(seconds)}
    if tokens:
        info["tokens_per_second"] = tokens / median
    if flops:
        info |= {"flops": flops, "flop_per_second": flops / median, "share_of_matmul": flops / median / peak(dtype)}
    if reference is not None:
        pairs = [a / b for a, b in zip(rival[-len(seconds) :], seconds, strict=True)]
        low, high = interval(pairs)
        info |= {"ratio": statistics.median(pairs), "ratio_low": low, "ratio_high": high}
        info["reference_seconds"] = statistics.median(rival[-len(seconds) :])
    benchmark.extra_info.update(info)


def within(allowed: float) -> Callable[[Any, Any], None]:
    """An `agree` of `race`: max|a - b| / max|b| of each tensor is at most `allowed`."""

    def agree(got: Any, want: Any) -> None:
        got, want = (x if isinstance(x, (tuple, list)) else (x,) for x in (got, want))
        gap = max(relative(a, b) for a, b in zip(got, want, strict=True))
        assert gap <= allowed, f"the arm is {gap:.1e} off the reference, allowed {allowed:.0e}"

    return agree


def rotated(make: Callable[[int], Any], size: int) -> list[Any]:
    """`make(seed)`'s problems of `size` bytes, so many that on CUDA together they exceed the L2 cache."""
    return [make(seed) for seed in range(min(16, max(2, L2 // size)) if CUDA else 2)]


def synchronised(run: Run) -> Run:
    def timed(x: Any) -> Any:
        out = run(x)
        if CUDA:
            torch.cuda.synchronize()
        return out

    return timed


def peak_bytes(run: Run, x: Any) -> int:
    """Most bytes of torch's memory that a call holds beyond what there was before it."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run(x)
    assert watched.profiler is not None
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


@functools.cache
def peak(dtype: torch.dtype) -> float:
    """FLOP/s of this machine's matrix product in `dtype`, measured: the fastest of ten of 1024 (CUDA: 8192) cubed."""
    size = 8192 if CUDA else 1024
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    product = synchronised(lambda _: a @ b)
    product(0)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product(0)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, device, threads and revision of this run."""
    return {
        "device": torch.cuda.get_device_name() if CUDA else evidence.processor(),
        "threads": torch.get_num_threads(),
        "versions": evidence.versions(),
        "revision": evidence.revision() or "unknown",
    }
