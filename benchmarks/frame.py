"""How a benchmark is run: arms against the reference in turn, equal before timed, and what is kept beside a time.

    race(benchmark, arm, reference, inputs, agree, tokens=..., flops=...)

A round of the reference comes before each round of the arm, on the same input, so that what slows the machine slows
both; the ratio is the median over these pairs. Rounds of one burst share the machine's state, so their spread says too
little of what another run would give: medians of the same row, seconds or minutes apart, differ by BETWEEN beyond it.
The interval is where 95% of repeated runs should find their ratio (`repeated`).
"""

from __future__ import annotations

import functools
import itertools
import math
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
OURS = "cuda" if CUDA else "cpp"
THREADS = torch.get_num_threads()
ROUNDS = int(os.environ.get("LOOPMDM_ROUNDS", 20 if CUDA else 5))
SHORT, MOST = 0.4, 100
WARMUP = 5 if CUDA else 1

BETWEEN = 0.07
"""Standard deviation of a row's log ratio from run to run beyond that of its rounds: that of 138 rows on two cores."""

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
    fresh: Run | None = None,
    **facts: Any,
) -> None:
    """Time `run` on `inputs` in turn, against `reference` unless that is None (the reference's own row).

    Args:
        agree: called with both results on the first input before anything is timed; raises where they differ.
        rounds: timed ones; None is ROUNDS, or as many as fit in SHORT seconds, at most MOST. The variable
            LOOPMDM_ROUNDS sets them all, also instead of a number given here.
        warmup: untimed rounds before, of which the first is the one that `agree` sees.
        fresh: makes of an input what is given to each call, before the clock starts: for what writes in place.
        tokens, flops: of one round; what is generated, not what is given.
        memory: note the peak of what one round allocates; on a CPU by torch's own count.
        facts: further entries of the row (`nfe`, `loops`).
    """
    run, reference = synchronised(run), None if reference is None else synchronised(reference)
    fresh = fresh or (lambda x: x)
    turn, rival = itertools.cycle(inputs), []
    for n in range(max(1, warmup)):
        started, x = time.perf_counter(), inputs[n % len(inputs)]
        got, want = run(fresh(x)), None if reference is None else reference(fresh(x))
        taken = time.perf_counter() - started
        if n == 0 and reference is not None and agree is not None:
            agree(got, want)
        del got, want

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        x = next(turn)
        if reference is not None:
            given = fresh(x)
            started = time.perf_counter()
            reference(given)
            rival.append(time.perf_counter() - started)
        return (fresh(x),), {}

    if "LOOPMDM_ROUNDS" in os.environ:
        rounds = ROUNDS
    elif rounds is None:
        rounds = max(ROUNDS, min(MOST, int(SHORT / taken)))
    benchmark.pedantic(run, setup=setup, rounds=rounds)
    benchmark.extra_info.update(environment(), dtype=str(dtype).removeprefix("torch."), **facts)
    if benchmark.stats is None:
        return
    if memory:
        benchmark.extra_info["peak_bytes"] = peak_bytes(run, fresh(inputs[0]))
    seconds = list(benchmark.stats.stats.data)
    median = statistics.median(seconds)
    info: dict[str, Any] = {"rounds": len(seconds)}
    if tokens:
        info["tokens_per_second"] = tokens / median
    if flops:
        info |= {"flops": flops, "flop_per_second": flops / median, "share_of_matmul": flops / median / peak(dtype)}
    if reference is not None:
        pairs = [a / b for a, b in zip(rival, seconds, strict=True)]
        low, high = repeated(pairs)
        info |= {"ratio": statistics.median(pairs), "ratio_low": low, "ratio_high": high}
        info["reference_seconds"] = statistics.median(rival)
    benchmark.extra_info.update(info)


def repeated(pairs: Sequence[float]) -> tuple[float, float]:
    """Where another run's median of such ratios lies with 95%, in logarithms.

    The sign test's 95% interval of the median (all of the range where pairs are fewer than six) and 1.96 BETWEEN add as
    squares; the other run varies as much, hence sqrt(2).
    """
    middle = statistics.median(pairs)
    reach = [math.sqrt(2 * (math.log(end / middle) ** 2 + (1.96 * BETWEEN) ** 2)) for end in interval(pairs)]
    return middle * math.exp(-reach[0]), middle * math.exp(reach[1])


def within(allowed: float) -> Callable[[Any, Any], None]:
    """An `agree` of `race`: max|a - b| / max|b| of each tensor is at most `allowed`."""

    def agree(got: Any, want: Any) -> None:
        got, want = (x if isinstance(x, (tuple, list)) else (x,) for x in (got, want))
        gap = max(relative(a, b) for a, b in zip(got, want, strict=True))
        assert gap <= allowed, f"the arm is {gap:.1e} off the reference, allowed {allowed:.0e}"

    return agree


def same(got: Any, want: Any) -> None:
    """An `agree` of `race`: the same tensors, bit for bit."""
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), "the arm is not equal to the reference"


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
        "threads": THREADS,
        "versions": evidence.versions(),
        "revision": evidence.revision() or "unknown",
    }
