"""The looped block, forward and with backward: unfused reference, compiled reference, the model, the fused plan.

    pytest benchmarks/bench_block.py --benchmark-only

Arms: "reference" (`reference.py`), "compile" (torch.compile of it, max-autotune with CUDA graphs on CUDA; the whole
pass and layer by layer are both compiled and the faster one counts), "loopmdm" (the model as it is called), "fused"
(`model.fused()`; Triton on CUDA, attention as its table has it), "graph" (the same captured once, CUDA only) and
"graph-cublas" (that with cuBLAS for the products).
"""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopmdm.model.lm import LoopMDM

from .frame import CUDA, DEVICE, Run, compiled, race, synchronised
from .reference import Reference
from .sizes import block_config, drawn

ARMS = ("reference", "compile", "loopmdm", "fused", "graph", "graph-cublas")
DTYPE = torch.bfloat16 if CUDA else torch.float32
ROWS = (
    {"small": (1, 128), "pair": (2, 128), "single": (1, 1024), "medium": (4, 1024), "large": (64, 1024)}
    if CUDA
    else {"small": (1, 128), "medium": (2, 256)}
)
LARGE = ("paper-170m", "llama-1024")
POINTS = [  # size, S, rows
    *((size, loops, "small") for size in ("tiny-dit", "tiny-llama") for loops in (1, 4, 12)),
    *(("tiny-llama", loops, "medium") for loops in (1, 4)),
    *((size, loops, "small") for size in LARGE for loops in ((1, 4, 12) if CUDA else (1, 4))),
    *((size, loops, rows) for size in LARGE for loops in (4, 12) for rows in ("medium", "large") if CUDA),
    *((size, 12, rows) for size in ("llama-512", "llama-2048") for rows in ROWS if CUDA),
    *((size, 12, rows) for size in LARGE for rows in ("pair", "single") if CUDA),
]
COMPILED = [
    ("tiny-llama", 4, "small"),
    *((size, 12, rows) for size in LARGE for rows in ("small", "large") if CUDA),
]
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="CUDA graphs need a CUDA device")
BACKWARD = [(size, 4, "small") for size in ("tiny-dit", "tiny-llama")] + [
    (size, 4, "medium" if CUDA else "small") for size in LARGE
]


def inputs(rows: str) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 1023, ROWS[rows], generator=rng).to(DEVICE) for _ in range(4)]


def close(got: Any, want: Any) -> None:
    """Equal up to the rounding of the products' dtype, by the norm of the difference."""
    for g, w in zip(
        got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True
    ):
        gap = ((g.double() - w.double()).norm() / w.double().norm()).item()
        assert gap <= (5e-2 if CUDA else 1e-4), f"the arm is {gap:.1e} off the reference"


def arm(name: str, model: LoopMDM, plain: Reference, loops: int, example: Tensor) -> Run:
    """ids [B, T] -> hidden states."""
    if name == "reference":
        return lambda ids: plain.hidden(ids, loops)
    if name == "loopmdm":
        return lambda ids: model.hidden(ids, num_loops=loops)
    if name == "compile":
        return fastest([make(copy.deepcopy(plain), loops, example) for make in (whole, by_layer)], example)
    impl = "cublas" if name == "graph-cublas" else "triton"
    plan = model.fused(**({"impl": impl, "attention_impl": "auto"} if CUDA else {}))
    run = functools.partial(plan.hidden, num_loops=loops)
    return run if name == "fused" else captured(run, example)


def whole(plain: Reference, loops: int, example: Tensor) -> Run:
    """All visits in one graph."""
    run = compiled(plain.hidden, mode="max-autotune" if CUDA else None)
    return lambda ids: run(ids, loops)


def by_layer(plain: Reference, loops: int, example: Tensor) -> Run:
    """Each layer its own graph, whatever S; on CUDA all launches are then captured as one."""
    for layer in plain.layers:
        layer.forward = compiled(layer.forward, mode="max-autotune-no-cudagraphs" if CUDA else None)

    def run(ids: Tensor) -> Tensor:
        return plain.hidden(ids, loops)

    return captured(run, example) if CUDA else run


def fastest(runs: list[Run], example: Tensor) -> Run:
    """The one that is faster now, after three runs of each to compile."""
    seconds = []
    for run in map(synchronised, runs):
        for _ in range(3):
            run(example)
        started = time.perf_counter()
        for _ in range(5):
            run(example)
        seconds.append(time.perf_counter() - started)
    return runs[seconds.index(min(seconds))]


def captured(run: Run, example: Tensor) -> Run:
    """`run` as one CUDA graph; its result is overwritten by the next call."""
    static, side, graph = example.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = run(static)

    def replay(ids: Tensor) -> Tensor:
        static.copy_(ids)
        graph.replay()
        return out

    return replay


@functools.cache
def models(size: str, loops: int) -> tuple[LoopMDM, Reference]:
    model = copy.deepcopy(drawn(block_config(size, loops=loops), DEVICE)).to(DTYPE)
    return model, Reference(model)


def case(name: str) -> Any:
    """The parameters of one arm: every point of POINTS, for compilations those of COMPILED."""
    marks = [NEEDS_CUDA] if name.startswith("graph") else []
    return [pytest.param(name, *point, marks=marks) for point in (COMPILED if name == "compile" else POINTS)]


@pytest.mark.parametrize("name, size, loops, rows", [c for n in ARMS for c in case(n)])
def test_forward(benchmark: Any, name: str, size: str, loops: int, rows: str) -> None:
    batch, length = ROWS[rows]
    benchmark.group = f"looped block, forward: {size}, S = {loops}, {batch} x {length}"
    benchmark.name = name
    model, plain = models(size, loops)
    ids = inputs(rows)
    with torch.no_grad():
        run, reference = arm(name, model, plain, loops, ids[0]), arm("reference", model, plain, loops, ids[0])
        race(
            benchmark,
            run,
            None if name == "reference" else reference,
            ids,
            close,
            dtype=DTYPE,
            tokens=batch * length,
            flops=batch * flops(model, length, loops),
            loops=loops,
        )


@pytest.mark.parametrize("name", ["reference", "loopmdm"])
@pytest.mark.parametrize("size, loops, rows", BACKWARD)
def test_forward_backward(benchmark: Any, name: str, size: str, loops: int, rows: str) -> None:
    batch, length = ROWS[rows]
    benchmark.group = f"looped block, forward and backward: {size}, S = {loops}, {batch} x {length}"
    benchmark.name = name
    model, plain = models(size, loops)
    ids = inputs(rows)

    def step(run: Run, module: nn.Module, embedding: Tensor) -> Run:
        parameters = list(module.parameters())
        place = next(n for n, p in enumerate(parameters) if p is embedding)

        def both(ids: Tensor) -> tuple[Tensor, ...]:
            h = run(ids)
            # of all parameters, as training needs them; the head's are None
            gradients = torch.autograd.grad((h * h.detach().roll(1, -1)).sum(), parameters, allow_unused=True)
            return h.detach(), gradients[place]

        return both

    ours = step(arm("loopmdm", model, plain, loops, ids[0]), model, model.embed.weight)
    theirs = step(arm("reference", model, plain, loops, ids[0]), plain, plain.embed)
    race(
        benchmark,
        ours if name == "loopmdm" else theirs,
        None if name == "reference" else theirs,
        ids,
        close,
        dtype=DTYPE,
        tokens=batch * length,
        flops=3 * batch * flops(model, length, loops),
        loops=loops,
    )


def flops(model: LoopMDM, length: int, loops: int) -> float:
    """Of one sequence, without the vocabulary projection."""
    return model.forward_flops(length, loops) - 2 * model.vocab_size * model.config.hidden_size * length
