"""`loopmdm tune`: time every implementation and configuration of every op on this device, and find the rows it earns.

For each op, dtype and size: all arms are compared with torch on the problem itself, and one that differs is not timed.
Those left run a few rounds, the fastest of them and torch many more. A round times every arm once, so that a
disturbance meets all alike; what counts is the ratio to torch within a round. An arm earns a row where it is `MARGIN`
times as fast as torch by the 95% interval of the median, in every problem of the op, and with its gradients where it
has any. Where the interval of the fastest arm leaves that open it gets one longer look. Elsewhere torch gets the row.

On CUDA the calls are timed as a graph, so that the launches cost what they cost inside one; where torch's own cannot be
captured, launch by launch, which the arm's `variant` then says.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import tuned
from ..ops.contract import Choice, Example, Op, relative

MARGIN = 1.05
CONFIDENCE = 0.95
NO_GRAPH = ", launch by launch"
L2 = 128 << 20
"""Bytes, above any GPU's today: the inputs of one arm's calls together exceed it."""


class Effort(NamedTuple):
    """How much is measured: rounds of all arms, rounds of the `finalists` fastest, seconds a sample takes at least."""

    name: str
    screening: int
    rounds: int
    finalists: int
    seconds: float


EFFORTS = {"full": Effort("full", 5, 31, 3, 2e-3), "quick": Effort("quick", 3, 9, 1, 1e-3)}


@dataclass
class Arm:
    """One implementation with one configuration at one size.

    Attributes:
        outcome: "timed" (then the numbers mean something), or why it was not.
        microseconds, torch: medians of the decisive variant, in which the arm gains least; ratio: median of
            torch's time over the arm's; low, high: its 95% interval.
    """

    impl: str
    config: Mapping[str, int] = field(default_factory=dict)
    outcome: str = "timed"
    microseconds: float = math.nan
    torch: float = math.nan
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    rounds: int = 0
    variant: str = ""


@dataclass
class Cell:
    """What was found for one op, dtype and size; `row` is the evidence that follows, without its file.

    `failed`: why torch itself could not be timed (then there is no evidence), or None.
    """

    op: str
    arch: str
    dtype: str
    size: Mapping[str, int]
    arms: list[Arm]
    best: Arm | None = None
    failed: str | None = None

    @property
    def row(self) -> tuned.Row:
        won = self.best
        impl, config = ("torch", {}) if won is None else (won.impl, dict(won.config))
        return tuned.Row(self.op, impl, self.arch, self.dtype, dict(self.size), config)

    def facts(self) -> dict[str, Any]:
        """For JSON: no number where there is none."""
        arms = [
            {k: v for k, v in asdict(arm).items() if not (isinstance(v, float) and not math.isfinite(v))}
            for arm in self.arms
        ]
        row = self.failed or self.row.impl
        return {"op": self.op, "dtype": self.dtype, "size": dict(self.size), "row": row, "arms": arms}


def why_not(op: Op, device: torch.device) -> str | None:
    """Why nothing of an op can be timed on a device, or None."""
    reasons = [op.unavailable(impl, device) for impl in op.impls if impl != "torch"]
    if not reasons:
        return "torch is all it has"
    if all(reasons):
        return reasons[0]
    if not op.problems or device.type not in op.sizes:
        return f"it has no sizes to time on {device.type}"
    return None


def cells(op: Op, device: torch.device, dtypes: Sequence[torch.dtype], effort: Effort) -> Iterator[Callable[[], Cell]]:
    """The measurements of one op, each to be called for its result."""
    for dtype in dtypes:
        for size in op.sizes[device.type]:
            yield partial(measure, op, device, dtype, size, effort)


def measure(op: Op, device: torch.device, dtype: torch.dtype, size: Mapping[str, int], effort: Effort) -> Cell:
    """Time one op in one dtype at one size."""
    cell = Cell(op.name, tuned.arch(device), _name(dtype), size, arms(op, device, dtype, size))
    try:
        _measure(cell, op, device, dtype, effort)
    except Exception as error:  # torch may want more memory than there is: the other sizes are still worth timing
        cell.best, cell.failed = None, f"torch failed: {_line(error)}"
    return cell


def _measure(cell: Cell, op: Op, device: torch.device, dtype: torch.dtype, effort: Effort) -> None:
    size = cell.size
    variants = list(_variants(op, device, dtype, size))
    for arm in cell.arms:
        arm.outcome = next((why for v in variants if (why := v.refused(arm)) is not None), "timed")
    left = [arm for arm in cell.arms if arm.outcome == "timed"]
    left = _looked(left, variants, effort.screening, effort.seconds)[: effort.finalists]
    left = _looked(left, variants, effort.rounds, effort.seconds)
    if left and left[0].low < MARGIN <= left[0].high:
        left[:1] = _looked(left[:1], variants, 3 * effort.rounds, effort.seconds)
    cell.best = max((arm for arm in left if arm.low >= MARGIN), key=lambda arm: arm.ratio, default=None)


def _looked(arms: list[Arm], variants: Sequence[_Variant], rounds: int, seconds: float) -> list[Arm]:
    """Time arms anew; those that ran, the fastest first."""
    for arm in arms:
        arm.low = math.inf
    for variant in variants if arms else ():
        variant.time(arms, rounds, seconds)
    return sorted((arm for arm in arms if arm.outcome == "timed"), key=lambda arm: -arm.ratio)


def arms(op: Op, device: torch.device, dtype: torch.dtype, size: Mapping[str, int]) -> list[Arm]:
    """What there is to try: each implementation that runs here, with its own choice and all configurations known."""
    found = []
    for impl in op.impls:
        if impl == "torch" or op.unavailable(impl, device) is not None:
            continue
        configs: list[Mapping[str, int]] = [{}]
        configs += [row.config for row in tuned.table(op.name) if row.impl == impl and row.dtype in ("*", _name(dtype))]
        if impl == "triton" and importlib.util.find_spec("triton"):
            listed = getattr(importlib.import_module(f"loopmdm.kernels.{op.name}"), "candidates", None)
            configs += list(listed(_name(dtype), size)) if listed is not None else []
        unique = {tuple(sorted(config.items())): config for config in configs}
        found += [Arm(impl, config) for config in unique.values()]
    return found


@dataclass
class _Variant:
    """One problem of an op, with or without gradients: what is timed."""

    op: Op
    device: torch.device
    dtype: torch.dtype
    name: str
    example: Example
    training: bool
    want: list[Tensor]

    def refused(self, arm: Arm) -> str | None:
        """Why an arm is not timed on this problem, or None: it fails, or its results are not torch's."""
        op = self.op
        if op.refuses is not None:
            inputs = self.example(self.device, self.dtype, torch.Generator().manual_seed(0))
            reason = op.refuses(arm.impl, **inputs)
            if reason is not None:
                return reason
        try:
            with op.pinned(Choice(arm.impl, arm.config)):
                got = op.run(self.example, arm.impl, self.device, self.dtype)
        except Exception as error:  # a tile that does not fit is a finding, not the end
            return f"failed: {_line(error)}"
        for a, b in zip(got, self.want, strict=True):
            # a 16-bit result of a 32-bit problem is rounded as 16-bit results are
            gap, allowed = relative(a, b), max(op.tolerance.get(kind, 0.0) for kind in (self.dtype, b.dtype))
            if not gap <= allowed:
                return f"differs from torch by {gap:.1e}, allowed {allowed:.0e}"
        return None

    def time(self, arms: list[Arm], rounds: int, seconds: float) -> None:
        """Interleaved rounds; each arm keeps the numbers of the variant in which it gains least."""
        problems, on_cpu = self._problems(), self.device.type == "cpu"
        clock = _Clock(self.device, lambda impl: self._call(problems, impl), seconds)
        base = Arm("torch")
        ready = {id(base): clock.prepare(base.impl)}
        for arm in arms:
            try:
                with self.op.pinned(Choice(arm.impl, arm.config)):
                    ready[id(arm)] = clock.prepare(arm.impl)
            except Exception as error:  # what runs once may still fail in a graph
                arm.outcome = f"failed: {_line(error)}"
        present = [base, *(arm for arm in arms if id(arm) in ready)]
        taken: dict[int, list[float]] = {id(arm): [] for arm in present}
        for turn in range(rounds):
            first = turn % len(present)
            for arm in present[first:] + present[:first]:
                with self.op.pinned(Choice(arm.impl, arm.config)):
                    taken[id(arm)].append(ready[id(arm)]())
        for arm in present[1:]:
            ratios = [a / b for a, b in zip(taken[id(base)], taken[id(arm)], strict=True)]
            low, high = interval(ratios)
            if low < arm.low:
                arm.low, arm.high, arm.ratio = low, high, statistics.median(ratios)
                arm.microseconds, arm.torch = (1e6 * statistics.median(taken[id(a)]) for a in (arm, base))
                arm.rounds, arm.variant = rounds, self.name + ("" if clock.graphs or on_cpu else NO_GRAPH)

    def _problems(self) -> list[dict[str, Any]]:
        """The problem several times, in memory of its own each."""

        def once() -> dict[str, Any]:
            return self.example(self.device, self.dtype, torch.Generator().manual_seed(0))

        first = once()
        size = sum(t.nbytes for t in first.values() if isinstance(t, Tensor))
        copies = min(16, max(2, L2 // max(1, size))) if self.device.type == "cuda" else 4
        return [first, *(once() for _ in range(copies - 1))]

    def _call(self, problems: list[dict[str, Any]], impl: str) -> Callable[[], None]:
        """A call on the next of the problems."""
        op, turn = self.op, itertools.cycle(problems)
        if not self.training:

            def forward() -> None:
                with torch.no_grad():
                    op.call(**next(turn), impl=impl)

            return forward
        weights: list[Tensor] = []

        def training() -> None:
            given = next(turn)
            leaves = {name: given[name].detach().requires_grad_() for name in op.grads if given.get(name) is not None}
            result = op.call(**(given | leaves), impl=impl)
            outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
            weights.extend(torch.ones_like(o) for o in outputs[len(weights) :])
            torch.autograd.grad(outputs, list(leaves.values()), weights)

        return training


def _variants(op: Op, device: torch.device, dtype: torch.dtype, size: Mapping[str, int]) -> Iterable[_Variant]:
    size = dict(size)
    trained = size.pop("training", None)
    ways = (False, True)[: 1 + bool(op.grads)] if trained is None else (bool(trained),)
    for make in op.problems:
        example = _drawn_once(partial(make, **size))
        want = op.run(example, "torch", device, dtype)
        for training in ways:
            name = getattr(make, "__name__", "problem").strip("_") + (", training" if training else "")
            yield _Variant(op, device, dtype, name, example, training, want)


def _drawn_once(make: Example) -> Example:
    """For one seed: the same numbers in new tensors. To draw them on the host takes longer than what is timed."""
    made: dict[str, Any] = {}
    state: list[Tensor] = []

    def example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
        if not state:
            made.update(make(device, dtype, rng))
            state.append(rng.get_state())
        rng.set_state(state[0])
        return {name: _again(value) for name, value in made.items()}

    return example


def _again(value: Any) -> Any:
    """The same numbers in memory of their own, as far apart as they were."""
    if isinstance(value, tuple):
        made = map(_again, value)
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


class _Clock:
    """Seconds a call, from samples of as many calls as take `seconds` in torch."""

    def __init__(self, device: torch.device, call: Callable[[str], Callable[[], None]], seconds: float) -> None:
        self.device, self.call, self.seconds = device, call, seconds
        self.calls = 0
        self.graphs = device.type == "cuda"

    def prepare(self, impl: str) -> Callable[[], float]:
        """Warm an arm up, torch first, and return what times one sample of it."""
        once = self.call(impl)
        once()
        if not self.calls:
            once()
            self.calls = max(1, round(self.seconds / max(1e-9, self._time(once, 1))))
            if self.graphs:
                self.calls = min(200, max(4, self.calls))
                try:
                    return self._graph(once)
                except RuntimeError:  # the reference itself waits for the device: no arm gets a graph
                    torch.cuda.synchronize(self.device)
                    self.graphs = False
        if self.graphs:
            return self._graph(once)
        self._time(once, self.calls)
        return lambda: self._time(once, self.calls) / self.calls

    def _graph(self, once: Callable[[], None]) -> Callable[[], float]:
        calls, side = self.calls, torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                once()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # a capture that fails leaves its stream as the current one: the outer context takes that back
        with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(graph):
            for _ in range(calls):
                once()
        self._time(graph.replay, 2)
        return lambda: self._time(graph.replay, 1) / calls

    def _time(self, once: Callable[[], None], calls: int) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            once()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The distribution-free interval of the median, from order statistics; all of the range where there are too few."""
    n, ordered = len(values), sorted(values)
    missed = itertools.accumulate(2 * math.comb(n, k) / 2**n for k in range(n // 2))
    drop = max((k for k, share in enumerate(missed) if share <= 1 - confidence), default=0)
    return ordered[drop], ordered[n - 1 - drop]


def collapsed(rows: Sequence[tuned.Row]) -> list[tuned.Row]:
    """The same answers in fewer rows: one that says what the next one says, which covers all of it, is left out."""
    kept: list[tuned.Row] = []
    for row in reversed(rows):
        if kept and (kept[-1].impl, kept[-1].config) == (row.impl, row.config) and _covers(kept[-1], row):
            continue
        kept.append(row)
    return kept[::-1]


def _covers(a: tuned.Row, b: tuned.Row) -> bool:
    return (a.op, a.arch, a.dtype) == (b.op, b.arch, b.dtype) and all(
        name in b.upto and b.upto[name] <= bound for name, bound in a.upto.items()
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
