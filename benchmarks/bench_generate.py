"""generate end to end against the samplers that LLaDA and MDLM publish, on the same looped model.

    pytest benchmarks/bench_generate.py --benchmark-only              small, and a few steps of the large model
    pytest benchmarks/bench_generate.py --benchmark-only -m slow      the large model, 64 steps (45 minutes)

Rules: "confidence", LLaDA's low-confidence remasking at temperature 1; "ancestral", MDLM's cached ancestral sampler.
Arms: "reference" and "loopmdm" in fp32 and with bf16 weights (ours on a CPU: `model.packed(torch.bfloat16)`); ratios
are to the reference in fp32, the last arm's to the one in bf16. Before anything is timed the greedy tokens of both must
be equal on a small float64 model (in fp32 they round differently, and random weights make near ties); at temperature 1
the noise differs, the law does not (tests/test_sampling_laws.py).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import loopmdm
from loopmdm.model.lm import LoopMDM

from .frame import CUDA, DEVICE, Run, race
from .reference import Reference, ancestral, low_confidence
from .sizes import drawn, model_config

LOOPS = 4
BF16, FP32 = torch.bfloat16, torch.float32
ARMS = {
    "reference": ("reference", FP32),
    "reference, bf16": ("reference", BF16),
    "loopmdm": ("loopmdm", FP32),
    "loopmdm, bf16": ("loopmdm", BF16),
    "loopmdm, bf16, against bf16": ("loopmdm", BF16),
}
CASES = {  # size: (sequences, tokens given, tokens generated, steps)
    "tiny": (2, 16, 64, 8),
    "llama-512": (1, 0, 256, 64 if CUDA else 2),
    "llama-512, 64 steps": (1, 0, 256, 64),
}
SLOW = pytest.mark.slow
SIZES = ["tiny", "llama-512", pytest.param("llama-512, 64 steps", marks=SLOW)]


@functools.cache
def models(size: str, dtype: torch.dtype) -> tuple[LoopMDM, Reference]:
    """(the model that generate gets, the reference), of the same weights."""
    wide = drawn(model_config(size.partition(",")[0]), DEVICE)
    model = copy.deepcopy(wide).to(dtype)
    return (wide.packed(dtype) if dtype == BF16 and not CUDA else model), Reference(model)


def prompts(model: LoopMDM, batch: int, given: int, new: int) -> list[Tensor]:
    """Random ids, then masks: from masks alone every position of a row would tie with every other."""
    rng = torch.Generator().manual_seed(0)
    masks = torch.full((batch, new), model.mask_id)
    return [
        torch.cat((torch.randint(0, model.mask_id, (batch, given), generator=rng), masks), 1).to(DEVICE)
        for _ in range(4)
    ]


def arm(kind: str, rule: str, model: LoopMDM, plain: Reference, steps: int) -> Run:
    """ids [B, T] with masks -> tokens [B, T]."""
    if kind == "loopmdm":
        temperature = 1.0 if rule == "confidence" else None
        options = {"steps": steps, "num_loops": LOOPS, "policy": rule, "temperature": temperature}
        return lambda ids: loopmdm.generate(model, ids, **options).tokens  # type: ignore[arg-type]
    if rule == "confidence":
        return lambda ids: low_confidence(plain, ids, steps, 1.0, LOOPS)
    return lambda ids: ancestral(plain, ids, steps, LOOPS)


@functools.cache
def check_greedy() -> None:
    model = copy.deepcopy(drawn(model_config("tiny"), DEVICE)).double()
    ids = prompts(model, 2, 16, 32)[0]
    ours = loopmdm.generate(model, ids, steps=8, num_loops=2, policy="confidence", temperature=0.0).tokens
    assert torch.equal(ours, low_confidence(Reference(model), ids, 8, 0.0, 2)), "the samplers differ"


def filled(mask_id: int, got: Tensor, want: Tensor) -> None:
    """Both arms filled every mask."""
    assert got.shape == want.shape and not (got == mask_id).any() and not (want == mask_id).any()
    check_greedy()


@pytest.mark.parametrize("rule", ["confidence", "ancestral"])
@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("size", SIZES)
def test_generate(benchmark: Any, size: str, name: str, rule: str) -> None:
    batch, given, new, steps = CASES[size]
    if not CUDA and "steps" not in size and "bf16" in name and (size == "tiny" or name == "reference, bf16"):
        pytest.skip("on a CPU only with -m slow")  # the last arm's row has that reference's time
    benchmark.group = f"generate, {rule}: {size.partition(',')[0]}, {batch} x {new} tokens, {steps} steps, S = {LOOPS}"
    benchmark.name = name
    kind, dtype = ARMS[name]
    model, plain = models(size, dtype)
    rival = models(size, BF16 if name.endswith("against bf16") else FP32)
    ids = prompts(model, batch, given, new)
    run = arm(kind, rule, model, plain, steps)
    if kind == "loopmdm":
        out = loopmdm.generate(model, ids[0], steps=steps, num_loops=LOOPS, policy=rule)
        nfe, head_rows, flops = out.nfe, out.head_rows, out.flops
    else:
        plain.passes = 0
        run(ids[0])
        nfe, head_rows = plain.passes, plain.passes * batch * (given + new)
        flops = nfe * batch * model.forward_flops(given + new, LOOPS)
    race(
        benchmark,
        run,
        None if name == "reference" else arm("reference", rule, *rival, steps),
        ids,
        functools.partial(filled, model.mask_id),
        dtype=dtype,
        against="bf16" if name.endswith("against bf16") else "",
        tokens=batch * new,
        flops=flops,
        nfe=nfe,
        loops=LOOPS,
        head_rows=head_rows,
    )
