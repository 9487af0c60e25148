"""How a benchmark is run: arms against the reference in turn, equal before timed, and what is kept beside a time.

    race(benchmark, arm, reference, inputs, agree, tokens=..., flops=...)

A test says what is to be timed and checks it; `conftest.py` calls `measure` when all have. It goes through the groups
SWEEPS times, so that a row's rounds lie minutes apart and what slows the machine for a while meets all rows alike. In a
round of a group the reference and every arm run once, on the same input; in each round another one is first. A sweep's
ratio is the median over its rounds; what a row's ratio is, and another run's, `loopmdm.lab.bench` makes of these. On
CUDA, where all that was set up may not fit in memory at once, each row is timed in its own test, in sweeps one after
another.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loopmdm.errors import InputError
from loopmdm.lab import evidence
from loopmdm.lab.tune import L2
from loopmdm.ops.contract import relative
from loopmdm.ops.linear import linear, pack

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OURS = "cuda" if CUDA else "cpp"
THREADS = torch.get_num_threads()
SWEEPS = int(os.environ.get("LOOPMDM_SWEEPS", 3 if CUDA else 5))
WARMUP = 5 if CUDA else 1
LEAST, MOST, SHORT = 7 if CUDA else 1, 40, 0.12
"""Rounds of a group in a sweep: as many as fit in SHORT seconds an arm, and within these bounds."""
COLD = 1.0
"""Seconds of a round up to which a sweep begins with one that is not timed: longer ones fill the caches themselves."""

Run = Callable[[Any], Any]


@functools.cache
def keep_memory() -> str:
    """Let glibc's malloc keep what is freed, and say what malloc does.

    As it comes, each tensor above 32 MiB is mapped anew and its pages are cleared at their first touch. That took up to
    half of the reference's time, twice as much in some minutes as in others; an allocator that keeps memory takes none.
    LOOPMDM_MALLOC=default leaves malloc as it is.
    """
    if CUDA or os.environ.get("LOOPMDM_MALLOC") == "default" or os.environ.get("LD_PRELOAD"):
        return "default"
    mmap_max, trim_threshold = -4, -1  # glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = mallopt is not None and mallopt(mmap_max, 0) and mallopt(trim_threshold, -1)
    return "memory kept" if kept else "default"


@dataclass
class Timed:
    """What is run on which inputs. `seconds`: of each round, by sweep; `first`: of a call before any."""

    run: Run
    inputs: Sequence[Any]
    fresh: Run
    gradients: bool
    first: float = 0.0
    seconds: list[list[float]] = field(default_factory=list)

    @property
    def taken(self) -> float:
        return statistics.median(self.seconds[-1]) if self.seconds else self.first

    def once(self, n: int) -> float:
        given = self.fresh(self.inputs[n % len(self.inputs)])
        with torch.set_grad_enabled(self.gradients):
            started = time.perf_counter()
            self.run(given)
            return time.perf_counter() - started


@dataclass
class Arm:
    """A row: its fixture, and what it is timed against unless it is the reference itself."""

    benchmark: Any
    timed: Timed
    rival: Timed | None
    dtype: torch.dtype
    threads: int
    tokens: int
    flops: float

    def ratios(self) -> list[float]:
        """Times faster than the rival, of each sweep."""
        assert self.rival is not None
        sweeps = zip(self.rival.seconds, self.timed.seconds, strict=True)
        return [statistics.median(a / b for a, b in zip(*sweep, strict=True)) for sweep in sweeps]

    def report(self) -> None:
        """Give what was timed to pytest-benchmark, in place of the call that its test made."""
        seconds = [second for sweep in self.timed.seconds for second in sweep]
        self.benchmark.stats.stats.data[:] = seconds
        self.benchmark.has_error = False
        median = statistics.median(seconds)
        info: dict[str, Any] = {"sweeps": len(self.timed.seconds)}
        if self.tokens:
            info["tokens_per_second"] = self.tokens / median
        if self.flops:
            rate = self.flops / median
            info |= {
                "flops": self.flops,
                "flop_per_second": rate,
                "share_of_matmul": rate / peak(self.dtype, self.threads),
            }
        if self.rival is not None:
            info["ratios"] = [float(f"{ratio:.4g}") for ratio in self.ratios()]
            info["reference_seconds"] = statistics.median(itertools.chain(*self.rival.seconds))
        self.benchmark.extra_info.update(info)


@dataclass
class Group:
    """Rows with one reference, or with one for each kind that their arms name."""

    threads: int
    rivals: dict[str, Timed] = field(default_factory=dict)
    arms: list[Arm] = field(default_factory=list)

    @property
    def members(self) -> list[Timed]:
        return list({id(t): t for arm in self.arms for t in (arm.rival, arm.timed) if t is not None}.values())

    def sweep(self, say: Callable[[str], None]) -> int:
        """The rounds of one sweep. What fails is left out with one line, as is what was timed against it: how many."""
        before, lost = torch.get_num_threads(), 0
        torch.set_num_threads(self.threads)
        try:
            while self.arms and (failed := self._sweep()):
                for arm in [arm for arm in self.arms if failed[0] in (arm.timed, arm.rival)]:
                    say(f"not timed: {arm.benchmark.group}, {arm.benchmark.name}: {failed[1]}")
                    self.drop(arm)
                    lost += 1
        finally:
            torch.set_num_threads(before)
        return lost

    def drop(self, arm: Arm) -> None:
        arm.benchmark.has_error = True
        self.arms.remove(arm)

    def _sweep(self) -> tuple[Timed, Exception] | None:
        """Time all members, or none of them and what failed."""
        members = self.members
        done = sum(map(len, members[0].seconds))  # rounds go on where the last sweep ended: with its turn and input
        found: list[list[float]] = [[] for _ in members]

        def round_of(n: int, kept: list[list[float]]) -> tuple[Timed, Exception] | None:
            for turn in range(len(members)):
                place = (turn + n) % len(members)
                try:
                    kept[place].append(members[place].once(n))
                except Exception as error:  # such as memory that is not there: the others are still worth timing
                    return members[place], error
            return None

        if not done or sum(member.taken for member in members) < COLD:
            untimed: list[list[float]] = [[] for _ in members]
            failed = round_of(done - 1, untimed)
            if failed is not None:
                return failed
            for member, seconds in zip(members, untimed, strict=True):
                member.first = seconds[0]  # the call before, which checked, may have compiled
        whole = sum(member.taken for member in members)
        rounds = ROUNDS or max(LEAST, min(MOST, int(SHORT * len(members) / max(whole, 1e-9))))
        for n in range(done, done + rounds):
            failed = round_of(n, found)
            if failed is not None:
                return failed
        for member, seconds in zip(members, found, strict=True):
            member.seconds.append(seconds)
        return None


ROUNDS = int(os.environ.get("LOOPMDM_ROUNDS", 0))
"""Rounds of each sweep instead of what LEAST, MOST and SHORT say; 0 is those."""

GROUPS: dict[str, Group] = {}
"""What was set up and is not measured yet."""


def race(
    benchmark: Any,
    run: Run,
    reference: Run | None,
    inputs: Sequence[Any],
    agree: Callable[[Any, Any], None] | None,
    *,
    dtype: torch.dtype = torch.float32,
    tokens: int = 0,
    flops: float = 0.0,
    memory: bool = True,
    fresh: Run | None = None,
    against: str = "",
    **facts: Any,
) -> None:
    """Set up for `measure`: `run` on `inputs` in turn, against `reference` or, if that is None, as the reference.

    Args:
        agree: called with both results on the first input before anything is timed; raises where they differ.
        fresh: makes of an input what is given to each call, before the clock starts: for what writes in place.
        against: which reference that is, where a group has several.
        tokens, flops: of one round; what is generated, not what is given.
        memory: note the peak of what one round allocates; on a CPU by torch's own count.
        facts: further entries of the row (`nfe`, `loops`).
    """
    runs = [synchronised(run)] if reference is None else [synchronised(run), synchronised(reference)]
    fresh, gradients = fresh or (lambda x: x), torch.is_grad_enabled()
    found, results = [Timed(one, inputs, fresh, gradients) for one in runs], []
    for timed in found:
        given, started = fresh(inputs[0]), time.perf_counter()
        results.append(benchmark.pedantic(timed.run, args=(given,)) if timed is found[0] else timed.run(given))
        timed.first = time.perf_counter() - started
    if benchmark.stats is not None:  # no row before it was timed
        benchmark.has_error = True
        benchmark.stats.stats.data.clear()
    if reference is not None and agree is not None:
        agree(*results)
    del results
    for timed, n in itertools.product(found, range(1, WARMUP)):
        timed.first = timed.once(n)
    benchmark.extra_info.update(environment(), dtype=str(dtype).removeprefix("torch."), **facts)
    if benchmark.stats is None:
        return
    if memory:
        benchmark.extra_info["peak_bytes"] = peak_bytes(runs[0], fresh(inputs[0]))
    group = GROUPS.setdefault(benchmark.group, Group(torch.get_num_threads()))
    if reference is None:
        group.rivals[against] = found[0]
        rival = None
    else:
        rival = group.rivals.setdefault(against, found[1])
    group.arms.append(Arm(benchmark, found[0], rival, dtype, group.threads, tokens, flops))
    if CUDA:
        said: list[str] = []
        assert not measure(said.append), "; ".join(said)


def measure(say: Callable[[str], None] = lambda line: None) -> int:
    """Time all that was set up since the last call; how many rows could not be.

    `say` is told how far it is, and what cannot be timed.
    """
    groups, lost = list(GROUPS.values()), 0
    GROUPS.clear()
    try:
        for sweep in range(SWEEPS if groups else 0):
            say(f"sweep {sweep + 1} of {SWEEPS} through {len(groups)} groups")
            lost += sum(group.sweep(say) for group in groups)
    finally:  # after Ctrl-C: what there is
        for arm in (arm for group in groups for arm in group.arms if arm.timed.seconds):
            arm.report()
    return lost


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


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """torch.compile for the shapes that it is given, as many as there are: past Dynamo's limit it would be eager."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, mode=mode, dynamic=False)


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
def peak(dtype: torch.dtype, threads: int = THREADS) -> float:
    """FLOP/s of this machine's matrix product in `dtype`, measured: the fastest of ten of 1024 (CUDA: 8192) cubed.

    On a CPU of the libraries that there are, with the second matrix laid out beforehand.
    """
    size = 8192 if CUDA else 1024
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    products: list[Run] = [lambda _: a @ b]
    for impl in ("onednn", "cpp") if not CUDA else ():
        try:
            other = functools.partial(linear, a, b, packed=pack(b, size, impl=impl), impl=impl)
            other()
        except InputError:  # not for this dtype, or not on this processor
            continue
        products.append(lambda _, other=other: other())
    seconds, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        for product in map(synchronised, products):
            product(0)
            for _ in range(10):
                started = time.perf_counter()
                product(0)
                seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * size**3 / min(seconds)


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, device, threads and revision of this run."""
    return {
        "device": torch.cuda.get_device_name() if CUDA else evidence.processor(),
        "threads": THREADS,
        "malloc": keep_memory(),
        "versions": evidence.versions(),
        "revision": evidence.revision() or "unknown",
    }
