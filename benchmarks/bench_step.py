"""One denoising step from hidden states: vocabulary projection, draw, confidence, choice of positions, tokens written.

    pytest benchmarks/bench_step.py --benchmark-only

Half of the positions are masked. Arms, all with the same rule (the k most confident predictions of each sequence stay):
"reference" as LLaDA writes it (logits at all positions, float64 noise), "dream" (masked rows, fp32 softmax over the
vocabulary and a draw from it), "compile" (torch.compile of the reference), "fused softmax" (masked rows, then one pass
for softmax, arg-max and confidence, as serving engines have it; compiled; greedy alone), "loopmdm" (`unmask_step`).
Before timing the tokens of temperature 0 are compared, on weights such that no two ids are close; at temperature 1 the
laws are equal (tests/test_head_laws.py), the noise is not. "loopmdm, bf16" has bf16 weights and is measured against the
fp32 reference; it must choose the same ids, and nine tenths of the positions.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import loopmdm

from .frame import CUDA, DEVICE, Run, compiled, race
from .reference import gumbel_argmax

BF16, FP32 = torch.bfloat16, torch.float32
WIDTH, LENGTH, SHARE = 512, 256, 16  # one position in 16 is revealed
SIZES = [(4096, 1), (50258, 1), (126464, 1)]  # vocabulary, sequences; LENGTH rows each, half masked
SIZES += [(32000, 1), (50258, 16), (126464, 16), (50258, 128)] if CUDA else []
ARMS = {  # dtype, temperatures
    "reference": (FP32, (0.0, 1.0)),
    "dream": (FP32, (0.0, 1.0)),
    "compile": (FP32, (0.0, 1.0)),
    "fused softmax": (FP32, (0.0,)),
    "loopmdm": (FP32, (0.0, 1.0)),
    "loopmdm, bf16": (BF16, (0.0, 1.0)),
}
Problem = tuple[Tensor, Tensor]  # hidden [B, T, D], tokens [B, T]


@functools.cache
def head(vocab: int) -> Tensor:
    """A direction for each id; hidden states lie near one of them each, so that no row's two best ids are close."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(vocab, WIDTH, generator=rng).to(DEVICE)


def problems(vocab: int, batch: int) -> list[Problem]:
    made, weight = [], head(vocab)
    for seed in range(2):
        rng = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocab - 1, (batch, LENGTH), generator=rng)
        size = 0.01 + 0.018 * torch.rand(batch, LENGTH, 1, generator=rng)  # from unsure to 95% sure
        hidden = weight[ids.to(DEVICE)] * size.to(DEVICE)
        tokens = ids.masked_fill(torch.rand(ids.shape, generator=rng).argsort(-1) < LENGTH // 2, vocab - 1).to(DEVICE)
        made.append((hidden, tokens))
    return made


def reference(weight: Tensor, temperature: float, problem: Problem) -> Tensor:
    hidden, x = problem
    mask, k = len(weight) - 1, x.shape[1] // SHARE
    masked = x == mask
    logits = F.linear(hidden, weight)
    logits[..., mask] = -torch.inf
    x0 = gumbel_argmax(logits, temperature)
    p = F.softmax(logits, dim=-1)
    confidence = torch.where(masked, torch.gather(p, -1, x0[..., None])[..., 0], -torch.inf)
    transfer = torch.zeros_like(masked)
    for row in range(len(x)):
        transfer[row, confidence[row].topk(k).indices] = True
    return torch.where(transfer, x0, x)


def masked_rows(weight: Tensor, temperature: float, fused: Run | None, problem: Problem) -> Tensor:
    """Dream's way: logits at the masked rows, a softmax over them, a draw from it."""
    hidden, x = problem
    mask, k = len(weight) - 1, x.shape[1] // SHARE
    masked = x == mask
    logits = F.linear(hidden[masked], weight)
    logits[:, mask] = -torch.inf
    if fused is not None:
        confidence, x0 = fused(logits)
    else:
        p = torch.softmax(logits / temperature if temperature else logits, dim=-1)
        if temperature:
            x0 = torch.multinomial(p, 1)
            confidence, x0 = p.gather(-1, x0)[:, 0], x0[:, 0]
        else:
            confidence, x0 = p.max(-1)
    full = torch.full(x.shape, -torch.inf, device=x.device).masked_scatter(masked, confidence)
    transfer = torch.zeros_like(masked).scatter(1, full.topk(k, dim=-1).indices, True)
    return torch.where(transfer, torch.full_like(x, mask).masked_scatter(masked, x0), x)


def softmax_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    top, x0 = logits.max(-1)
    return 1 / (logits - top[:, None]).exp().sum(-1), x0


def ours(weight: Tensor, temperature: float, problem: Problem) -> Tensor:
    hidden, x = problem
    options = {"mask_id": len(weight) - 1, "k": x.shape[1] // SHARE, "temperature": temperature}
    return loopmdm.unmask_step(hidden.to(weight.dtype), weight, x, **options).tokens


def arm(name: str, weight: Tensor, temperature: float) -> Run:
    if name == "reference":
        return functools.partial(reference, weight, temperature)
    if name == "compile":
        return compiled(functools.partial(reference, weight, temperature))
    if name.startswith("loopmdm"):
        return functools.partial(ours, weight, temperature)
    fused = compiled(softmax_argmax) if name == "fused softmax" else None
    return functools.partial(masked_rows, weight, temperature, fused)


@functools.cache
def check_greedy(name: str, vocab: int, batch: int) -> None:
    weight, problem = head(vocab).to(ARMS[name][0]), problems(vocab, batch)[0]
    got, want = arm(name, weight, 0.0)(problem), reference(head(vocab), 0.0, problem)
    if weight.dtype == BF16:
        both = (got != vocab - 1) & (want != vocab - 1)
        assert torch.equal(got[both], want[both]), f"{name} chooses other ids"
        assert (got == want).sum() >= want.numel() - batch * (LENGTH // SHARE) // 10 * 2 - 2, f"{name} differs"
    else:
        assert torch.equal(got, want), f"{name} differs"


def case(name: str) -> list[Any]:
    """Compilations take a minute each on a CPU: one size of them there."""
    sizes = [(50258, 1)] if name in ("compile", "fused softmax") and not CUDA else SIZES
    cells = [(name, t, *size) for size in sizes for t in ARMS[name][1]]
    # the reference draws 126464 noises a position in float64: a second and more a round on a CPU
    slow = [t > 0 and vocab > 100_000 and not CUDA for _, t, vocab, _ in cells]
    return [pytest.param(*c, marks=pytest.mark.slow) if s else c for c, s in zip(cells, slow, strict=True)]


@pytest.mark.parametrize("name, temperature, vocab, batch", [c for name in ARMS for c in case(name)])
@torch.no_grad()
def test_step(benchmark: Any, name: str, temperature: float, vocab: int, batch: int) -> None:
    rows = batch * LENGTH
    benchmark.group = f"head and unmask: V {vocab}, {rows} rows, half masked, d {WIDTH}, T = {temperature:g}"
    benchmark.name = name
    weight = head(vocab).to(ARMS[name][0])
    if name != "reference":
        check_greedy(name, vocab, batch)
    race(
        benchmark,
        arm(name, weight, temperature),
        None if name == "reference" else arm("reference", head(vocab), temperature),
        problems(vocab, batch),
        None,
        dtype=ARMS[name][0],
        tokens=batch * (LENGTH // SHARE),
        flops=2.0 * vocab * WIDTH * (rows if name in ("reference", "compile") else rows // 2),
    )
