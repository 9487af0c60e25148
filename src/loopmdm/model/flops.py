"""Analytic FLOPs of looped and unlooped models (METHOD: F_loop = F_base + (S - 1) n F_layer).

A multiply-add counts as 2. Norms, activations, rotary and softmax are not counted, nor what depends on
a sequence but not on its length, except each layer's adaLN projection. The vocabulary
projection is a convention, the same on both sides of a comparison:

    "head"            2 V d a token
    "head+embedding"  4 V d a token (the look-up counted as a matmul, as some papers do)
    "none"            0
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..config import ModelConfig, check_loops
from ..errors import InputError, nearest

CONVENTIONS = {"head": 2, "head+embedding": 4, "none": 0}


def layer_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of one layer for one token of a sequence of `length` tokens."""
    d, f, T = config.hidden_size, config.intermediate_size, length
    q_width = config.num_attention_heads * (config.head_dim or 0)
    kv_width = (config.num_key_value_heads or 0) * (config.head_dim or 0)
    projections = 2 * d * (q_width + 2 * kv_width) + 2 * q_width * d
    attention = 4 * T * q_width
    mlp = 2 * d * f * (3 if config.gated else 2)
    modulation = 2 * config.cond_dim * 6 * d / T if config.modulation == "adaln" else 0
    return projections + attention + mlp + modulation


def head_flops(config: ModelConfig, convention: str = "head", vocab_size: int | None = None) -> float:
    """FLOPs of the vocabulary projection for one token; `vocab_size` overrides the configuration's."""
    if convention not in CONVENTIONS:
        raise InputError(f"unknown FLOPs convention {convention!r}{nearest(convention, CONVENTIONS)}")
    return CONVENTIONS[convention] * (vocab_size or config.vocab_size) * config.hidden_size


def token_flops(
    config: ModelConfig,
    length: int,
    num_loops: float = 1,
    convention: str = "head",
    vocab_size: int | None = None,
) -> float:
    """Forward FLOPs a token at S = num_loops (a mean loop count may be fractional)."""
    depth = config.num_hidden_layers + (num_loops - 1) * config.loop.num_layers
    return depth * layer_flops(config, length) + head_flops(config, convention, vocab_size)


def forward_flops(config: ModelConfig, length: int, num_loops: float | None = None, convention: str = "head") -> float:
    """FLOPs of one forward pass of one sequence of `length` tokens.

    num_loops may be a mean: F is linear in S, so sequences of different S cost what their mean S does.
    """
    loops = config.loop.max_loops if num_loops is None else num_loops
    if isinstance(loops, bool) or not isinstance(loops, (int, float)) or not 1 <= loops < math.inf:
        raise InputError(f"num_loops is {loops!r}; it must be a finite number, and every visit is made at least once")
    return length * token_flops(config, length, loops, convention)


def training_flops(
    config: ModelConfig,
    length: int,
    num_loops: float,
    convention: str = "head",
    grad_loops: int | None = None,
    recompute: bool = False,
    every: bool = False,
) -> float:
    """FLOPs of one sequence's training step.

    Forward plus twice that backward, F(S) + 2 F(min(S, grad_loops)): as if all layers before the looped block had a
    gradient, which with truncated backprop and the plain boundary they have not.

    Args:
        num_loops: S; a mean where neither `grad_loops` nor `every` makes the cost other than linear in it.
        grad_loops: visits that have a gradient (`Depth.backprop_loops`).
        recompute: these visits are computed once more in the backward pass (`Depth.checkpoint`).
        every: coda and head are applied after each visit (`Depth.every`).
    """
    back = num_loops if grad_loops is None else min(num_loops, grad_loops)
    per_layer, head = layer_flops(config, length), head_flops(config, convention)
    further = config.loop.num_layers - config.loop.length
    # Read after visit k < S, the coda makes k visits of its further looped blocks.
    coda = config.num_hidden_layers - config.loop.start - config.loop.length
    again = (num_loops - 1) * (coda * per_layer + head) + further * per_layer * (num_loops - 1) * (num_loops - 2) / 2
    total = token_flops(config, length, num_loops, convention) + 2 * token_flops(config, length, back, convention)
    if every:
        total += 3 * again
    if recompute:
        visits = config.loop.length * back + further * (num_loops * (num_loops + 1) / 2 if every else num_loops)
        total += visits * per_layer
    return length * total


def uniform_loops(max_loops: int) -> dict[int, float]:
    """S ~ U{1..S_max} as {S: probability}; its mean is (S_max + 1) / 2."""
    check_loops(max_loops, "max_loops")
    return {s: 1 / max_loops for s in range(1, max_loops + 1)}


def inverse_flops_loops(
    config: ModelConfig,
    length: int,
    max_loops: int,
    convention: str = "head",
    vocab_size: int | None = None,
) -> dict[int, float]:
    """p(S) proportional to 1 / F(S), S in 1..S_max: equal FLOPs spent at every depth."""
    weight = {s: 1 / token_flops(config, length, s, convention, vocab_size) for s in uniform_loops(max_loops)}
    total = sum(weight.values())
    return {s: w / total for s, w in weight.items()}


def mean_loops(loop_distribution: Mapping[int, float]) -> float:
    """E[S]."""
    return sum(s * p for s, p in loop_distribution.items())


def matched_steps(
    config: ModelConfig,
    length: int,
    baseline_steps: int,
    loop_distribution: Mapping[int, float],
    convention: str = "head",
    vocab_size: int | None = None,
) -> int:
    """Looped training steps that cost the FLOPs of `baseline_steps` unlooped ones, rounded to the nearest."""
    base = token_flops(config, length, 1, convention, vocab_size)
    looped = token_flops(config, length, mean_loops(loop_distribution), convention, vocab_size)
    return round(baseline_steps * base / looped)
