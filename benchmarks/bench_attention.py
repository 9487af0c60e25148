"""attention: every implementation that takes a shape, with and without padding and packed documents.

    pytest benchmarks/bench_attention.py --benchmark-only

Arms: "eager", the formula written out in torch (scores in memory), and every impl of the op that runs here. Forward
only. FLOPs are those of the ranges that queries look at: an arm that computes what it masks gains nothing by it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.errors import InputError
from loopmdm.ops.attention import OP, attention
from loopmdm.ops.spans import Spans, packed, spans_of

from .frame import CUDA, DEVICE, race, rotated, within

DTYPE = torch.bfloat16 if CUDA else torch.float32
# B, T, H, G, head_dim: the paper's block, llamas, grouped heads; on a CPU the demo's
GPU_SHAPES = [
    (64, 128, 12, 12, 64),
    (16, 512, 12, 12, 64),
    (16, 1024, 12, 12, 64),
    (8, 2048, 12, 12, 64),
    (4, 4096, 12, 12, 64),
    (256, 81, 8, 8, 32),
    (64, 128, 16, 4, 128),
    (16, 1024, 16, 4, 128),
    (4, 4096, 16, 16, 128),
]
SHAPES = GPU_SHAPES if CUDA else [(36, 64, 4, 4, 16), (2, 256, 12, 12, 64)]
pytestmark = pytest.mark.usefixtures("one_thread")


def eager(qkv: Tensor, heads: int, groups: int, spans: Spans | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.split((heads, groups, groups), dim=2))
    k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if spans is not None:
        keys = torch.arange(qkv.shape[1], device=qkv.device)
        seen = (spans.first[..., None] <= keys) & (keys < spans.last[..., None])
        scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return y if spans is None else y * (spans.first < spans.last)[..., None]


def layout(name: str, batch: int, tokens: int) -> Spans | None:
    """Every other sequence half padding on the right, or four documents a row."""
    real = torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE)
    real[::2, tokens // 2 :] = False
    ids = (torch.arange(tokens, device=DEVICE) * 4 // tokens).expand(batch, tokens)
    spans = {"all": None, "padding": spans_of(real), "documents": spans_of(None, ids)}[name]
    return None if spans is None else packed(spans)


@pytest.mark.parametrize("name", ["eager", *OP.impls])
@pytest.mark.parametrize("spans", ["all", "padding", "documents"])
@pytest.mark.parametrize("batch, tokens, heads, groups, head_dim", SHAPES)
def test_attention(
    benchmark: Any, batch: int, tokens: int, heads: int, groups: int, head_dim: int, spans: str, name: str
) -> None:
    benchmark.group = f"attention, {spans}, one thread: {batch} x {tokens}, {heads}/{groups} heads of {head_dim}"
    benchmark.name = name
    ranges = layout(spans, batch, tokens)
    rng = torch.Generator().manual_seed(0)
    shape = (batch, tokens, heads + 2 * groups, head_dim)
    seen = batch * tokens**2 if ranges is None else int((ranges.last - ranges.first).sum())

    def reference(qkv: Tensor) -> Tensor:
        return eager(qkv, heads, groups, ranges)

    def run(qkv: Tensor) -> Tensor:
        return attention(qkv, heads, groups, ranges, impl=name)

    with torch.no_grad():
        problems = rotated(
            lambda _: torch.randn(shape, generator=rng).to(DEVICE, DTYPE), math.prod(shape) * DTYPE.itemsize
        )
        if name != "eager":
            try:
                run(problems[0])
            except InputError as refusal:
                pytest.skip(str(refusal))
        race(
            benchmark,
            reference if name == "eager" else run,
            None if name == "eager" else reference,
            problems,
            within(3e-2 if CUDA else 1e-4),
            dtype=DTYPE,
            tokens=batch * tokens,
            flops=4.0 * heads * head_dim * seen,
        )
