"""linear_cross_entropy: the loss of the masked rows, forward and backward, against what eager torch does.

    pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only
    LOOPMDM_RESULTS=benchmarks/results pytest -s benchmarks/bench_linear_cross_entropy.py -k interleaved

Half of the positions are masked. Arms: "head_then_gather", logits at every position and then the masked ones, as most
training loops have it; "gather_then_head", the masked rows' logits, which is what impl="torch" computes; and each impl
that runs here. All arms must agree, loss and gradients, before one is timed.

The second command alternates the arms, takes the median of the ratios round by round, measures the memory that each
needs beyond the gradients, and the error of each against float64; it prints one line a problem and writes the file
that the op's table refers to. The first problem is the one that the claims are about. On a busy machine believe
LOOPMDM_THREADS=1: torch's pool waits for workers that are not scheduled.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.lab.evidence import processor
from loopmdm.ops.linear_cross_entropy import OP, linear_cross_entropy

from .frame import keep_memory, race, within

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
PEERS = ("head_then_gather", "gather_then_head")
LIBRARIES = ("torch_native", "liger", "cce")
# positions (half of them masked), D, V
CLAIM = (4096, 256, 32000)
SIZES = (
    [CLAIM, (32768, 768, 50258), (8192, 4096, 126464), (32768, 1024, 126464)]
    if CUDA
    else [CLAIM, (512, 256, 32000), (128, 256, 32000), (512, 512, 126464), (4096, 256, 8192), (2048, 96, 4096),
          (256, 96, 4096), (4096, 128, 1000), (4608, 64, 11)]
)  # fmt: skip
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Problem:
    def __init__(self, positions: int, dim: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(positions, dim, generator=rng).to(DEVICE, dtype).requires_grad_()
        self.weight = (torch.randn(vocab, dim, generator=rng) * dim**-0.5).to(DEVICE, dtype).requires_grad_()
        self.mask = torch.zeros(positions, dtype=torch.bool)
        self.mask[torch.randperm(positions, generator=rng)[: positions // 2]] = True
        self.mask = self.mask.to(DEVICE)
        self.targets = torch.randint(vocab - 1, (positions // 2,), generator=rng).to(DEVICE)
        self.factor = (1 / torch.rand(positions // 2, generator=rng).clamp(min=0.05)).to(DEVICE)
        self.suppressed = (vocab - 1,)

    def loss(self, name: str) -> Tensor:
        if name not in PEERS:
            rows = self.hidden[self.mask]
            options: dict[str, Any] = {"suppressed": self.suppressed, "impl": name}
            return linear_cross_entropy(rows, self.weight, self.targets, None, self.factor, **options)[0]
        if name == "head_then_gather":
            logits = F.linear(self.hidden, self.weight)[self.mask].float()
        else:
            logits = F.linear(self.hidden[self.mask], self.weight).float()
        logits[:, list(self.suppressed)] = float("-inf")
        return (F.cross_entropy(logits, self.targets, reduction="none") * self.factor).sum()

    def step(self, name: str) -> None:
        self.hidden.grad = self.weight.grad = None
        self.loss(name).backward()
        if CUDA:
            torch.cuda.synchronize()

    def results(self, name: str) -> list[Tensor]:
        loss = self.loss(name)
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))]

    def truth(self) -> list[Tensor]:
        """By float64, in chunks."""
        hidden, weight = (t.detach().double().requires_grad_() for t in (self.hidden, self.weight))
        rows, head = hidden[self.mask], weight
        loss = sum(
            (
                linear_cross_entropy(h, head, t, None, w, suppressed=self.suppressed, impl="torch")[0]
                for h, t, w in zip(*(x.split(256) for x in (rows, self.targets, self.factor.double())), strict=True)
            ),
            start=torch.zeros((), dtype=torch.float64, device=DEVICE),
        )
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return float((got.double() - want).norm() / want.norm())


def agree(problem: Problem, names: list[str], dtype: torch.dtype) -> dict[str, float]:
    want, gaps = problem.results("gather_then_head"), {}
    for name in names:
        gaps[name] = max(gap(a, b) for a, b in zip(problem.results(name), want, strict=True))
        allowed = CLOSE[dtype] * (10 if name in LIBRARIES else 1)  # a library's own rounding is its own
        assert gaps[name] <= allowed, f"{name} differs by {gaps[name]:.1e}; nothing to time"
    return gaps


def impls(dtype: torch.dtype) -> list[str]:
    problem = Problem(8, 64, 96, dtype)
    options: dict[str, Any] = {"suppressed": problem.suppressed}
    refuses: Callable[..., str | None] = OP.refuses  # type: ignore[assignment]
    return [
        impl
        for impl in OP.impls
        if OP.unavailable(impl, DEVICE) is None
        and refuses(impl, problem.hidden[problem.mask], problem.weight, problem.targets, **options) is None
    ]


# on a CPU: "torch_native" takes up to 20 times the reference's time, and "torch" is gather_then_head
SLOW = () if CUDA else ("torch_native", "torch")
ARMS = [pytest.param(a, marks=[pytest.mark.slow] if a in SLOW else []) for a in OP.impls]


@pytest.mark.parametrize("name", [*PEERS, *ARMS])
@pytest.mark.parametrize("size", SIZES if CUDA else SIZES[:2], ids=str)
def test_linear_cross_entropy(benchmark: Any, size: tuple[int, int, int], name: str) -> None:
    if name not in (*PEERS, *impls(DTYPE)):
        pytest.skip(f"{name} cannot run here")
    positions, dim, vocab = size
    benchmark.group = f"loss, forward and backward: {positions} positions, half masked, d {dim}, V {vocab}"
    benchmark.name = name
    problem = Problem(*size, DTYPE)
    race(
        benchmark,
        lambda given: given.results(name),
        None if name == PEERS[0] else lambda given: given.results(PEERS[0]),
        [problem],
        within(CLOSE[DTYPE] * (10 if name in LIBRARIES else 1)),
        dtype=DTYPE,
        tokens=positions // 2,
        flops=3.0 * 2 * positions // (1 if name == PEERS[0] else 2) * dim * vocab,
    )


def test_interleaved() -> None:
    before, threads = torch.get_num_threads(), int(os.environ.get("LOOPMDM_THREADS", "0"))
    if threads:
        torch.set_num_threads(threads)
    try:
        rows = []
        for size in SIZES:
            rows.append(compare(size, DTYPE))
            print(json.dumps(rows[-1]), flush=True)
        accuracy = [accurate(dtype) for dtype in (torch.float32, torch.bfloat16)]
        for line in accuracy:
            print(json.dumps(line), flush=True)
        save(rows, accuracy)
    finally:
        torch.set_num_threads(before)


def compare(size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    problem, ours = Problem(*size, dtype), impls(dtype)
    # what recomputes is three times as slow on a CPU: enough to know it once
    names = [*PEERS, *(name for name in ours if CUDA or size == CLAIM or name not in LIBRARIES)]
    gaps = agree(problem, names, dtype)
    memory = {name: beyond_gradients(problem, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    # with one thread, processor time: the machine's other work lengthens it least
    clock = time.process_time if not CUDA and torch.get_num_threads() == 1 else time.perf_counter
    end, turn = time.perf_counter() + 5, 0
    while turn < 5 or (time.perf_counter() < end and turn < 200):
        for name in itertools.islice(itertools.cycle(names), turn % len(names), turn % len(names) + len(names)):
            start = clock()
            problem.step(name)
            times[name].append(1e3 * (clock() - start))
        turn += 1

    def ratio(to: str, name: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[to], times[name], strict=True)), 2)

    arms = {
        name: {
            "ms": round(statistics.median(times[name]), 3),
            **{f"{peer}_over_it": ratio(peer, name) for peer in PEERS},
            "mib_beyond_gradients": round(memory[name] / 2**20, 1),
            "gap": float(f"{gaps[name]:.1e}"),
        }
        for name in names
    }
    return {"positions, D, V": size, "rounds": turn, "arms": arms}


def beyond_gradients(problem: Problem, name: str) -> int:
    """Bytes that torch's allocator held at the peak of a step, less the gradients that stay."""
    kept = sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight))
    problem.hidden.grad = problem.weight.grad = None
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.step(name)
        return torch.cuda.max_memory_allocated() - before - kept
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        problem.step(name)
    events = [(e.start_ns(), e.nbytes()) for e in seen.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(events))) - kept


def accurate(dtype: torch.dtype) -> dict[str, Any]:
    """Errors of loss, dhidden, dweight against float64, over torch's own; of head_then_gather and of every impl."""
    problem = Problem(1024, 256, 8000, dtype)
    want = problem.truth()
    errors = {
        name: [error(a, b) for a, b in zip(problem.results(name), want, strict=True)]
        for name in ("gather_then_head", *impls(dtype))
    }
    torchs = errors["gather_then_head"]
    over = {name: [round(a / b, 3) for a, b in zip(line[1:], torchs[1:], strict=True)] for name, line in errors.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "torch_error_of_loss_dhidden_dweight": [float(f"{e:.2e}") for e in torchs],
        "loss_error": {name: float(f"{line[0]:.1e}") for name, line in errors.items()},
        "dhidden_and_dweight_error_over_torchs": over,
    }


def save(rows: list[dict[str, Any]], accuracy: list[dict[str, Any]]) -> None:
    folder = os.environ.get("LOOPMDM_RESULTS")
    if not folder:
        return
    machine = torch.cuda.get_device_name() if CUDA else processor()
    head = {
        "op": "linear_cross_entropy",
        "machine": machine,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "malloc": keep_memory(),
        "torch": torch.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
        "load": [round(x, 1) for x in os.getloadavg()],
        "unit": "ms of a step (forward and backward), medians of interleaved rounds; ratios are medians over rounds",
        "clock": "processor time" if not CUDA and torch.get_num_threads() == 1 else "wall time",
    }
    lines = [",\n".join("  " + json.dumps(line) for line in part) for part in (rows, accuracy)]
    body = f'{json.dumps(head)[:-1]},\n "rows": [\n{lines[0]}\n ],\n "accuracy": [\n{lines[1]}\n ]}}\n'
    name = f"{'gpu' if CUDA else 'cpu'}-linear_cross_entropy.json"
    Path(folder, name).write_text(body)
