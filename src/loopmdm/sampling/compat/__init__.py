"""The peers' samplers, choice for choice: generate(..., compat="llada" | "dream" | "mdlm" | "smdm").

Each reproduces its peer step for step on any Denoiser: counts, dtypes, tie rules, and noise drawn from torch's
generator in the peer's order and shape, as if `torch.manual_seed(seed)` had been called just before. They are there to
compare with, to reproduce published samples and to debug a port, not to be fast: the head runs at every position, no
id is suppressed unless the peer does it, and nothing stops early. Each file says which limitations it keeps, and what
`generate` does instead. Only MDLM tells the model the time, so a time-conditioned model needs compat="mdlm".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import random
from ...config import check_loops
from ...errors import InputError, nearest, number, whole
from ...model.denoiser import Denoiser, evaluating
from ..generation import Generation
from . import dream, llada, mdlm, smdm
from .trace import Options, Trace, seeded, shift

__all__ = ["PEERS", "Options", "Peer", "Trace", "run"]


@dataclass(frozen=True)
class Peer:
    """A peer's sampler.

    Attributes:
        sample: runs it on a Trace.
        rules: names of its ways to choose positions -> its own name; the first is the default.
        takes: options that it has beside steps, policy and seed.
        temperature: its default.
    """

    sample: Callable[[Trace, Options], None]
    rules: dict[str, str]
    takes: frozenset[str]
    temperature: float


PEERS = {
    "llada": Peer(
        llada.sample,
        {"low_confidence": "low_confidence", "confidence": "low_confidence", "random": "random"},
        frozenset({"temperature", "block_length", "cfg_scale"}),
        0.0,
    ),
    "dream": Peer(
        dream.sample,
        {
            "origin": "origin",
            "ancestral": "origin",
            "maskgit_plus": "maskgit_plus",
            "confidence": "maskgit_plus",
            "topk_margin": "topk_margin",
            "margin": "topk_margin",
            "entropy": "entropy",
        },
        frozenset({"temperature", "top_p", "top_k", "alg_temp"}),
        0.0,
    ),
    "mdlm": Peer(
        mdlm.sample,
        {"ddpm_cache": "ddpm_cache", "ancestral_cache": "ddpm_cache", "ancestral": "ddpm_cache", "ddpm": "ddpm"},
        frozenset(),
        1.0,
    ),
    "smdm": Peer(
        smdm.sample,
        {"greddy": "greddy", "greedy": "greddy", "confidence": "greddy", "origin": "origin", "ancestral": "origin"},
        frozenset({"temperature", "cfg_scale"}),
        1.0,
    ),
}


@torch.no_grad()
def run(
    name: str,
    model: Denoiser,
    tokens: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    *,
    steps: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    block_length: int | None = None,
    cfg_scale: float | None = None,
    alg_temp: float | None = None,
    policy: object = None,
    seed: int = 0,
    num_loops: int | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    **others: Any,
) -> Generation:
    """Sample as the peer `name` would.

    Args:
        tokens: int64 [B, T], prompts, then masks, then padding on the right.
        lengths, prompt_lengths: int64 [B]; their difference, the number of new tokens, is the same in all rows.
        temperature, top_p, top_k, block_length, cfg_scale, alg_temp: None is the peer's default (top_p = 1,
            top_k = 0, cfg_scale = 0 are off; block_length None is one block).
        policy: a name from `PEERS[name].rules`, Dream's also with its alg_temp ("entropy:0.2"); None is the peer's
            default.
        seed: as for `torch.manual_seed`; torch's generators are left as they were.
        num_loops: S of every pass; None is the model's `max_loops`.
        on_step: called after each step with (step, tokens [B, T], revealed bool [B, T]). MDLM's last pass is a step.
        others: options of `generate` that no peer has; anything but None is refused.

    Returns:
        A Generation. `nfe`, `head_rows` and `flops` count what the peer runs, `generated` what was revealed: less
        than the masks where the peer leaves some.

    Raises:
        InputError: an unknown peer or rule, an option that the peer does not have, blocks or steps that do not divide.
    """
    if name not in PEERS:
        raise InputError(f"compat is {name!r}{nearest(str(name), PEERS)}")
    peer = PEERS[name]
    rule, alg_temp = _rule(name, policy, alg_temp)
    asked = {
        "temperature": None if name == "mdlm" and temperature == 1 else temperature,
        "top_p": None if top_p is None or number("top_p", top_p) >= 1 else top_p,
        "top_k": top_k or None,
        "block_length": block_length,
        "cfg_scale": cfg_scale or None,
        "alg_temp": alg_temp or None,
        **others,
    }
    for option, value in asked.items():
        if value is not None and option not in peer.takes:
            raise InputError(f"compat={name!r} has no {option}: its sampler does not take it; leave it out")
    options = Options(
        whole("steps", steps),
        number("temperature", peer.temperature if temperature is None else temperature),
        rule,
        number("alg_temp", alg_temp or 0.0),
        asked["top_p"],
        None if asked["top_k"] is None else whole("top_k", asked["top_k"]),
        None if block_length is None else whole("block_length", block_length),
        number("cfg_scale", cfg_scale or 0.0),
    )
    loops = check_loops(model.max_loops if num_loops is None else num_loops)
    random.signed(seed)  # refuses what is no seed
    trace = _trace(name, model, tokens, lengths, prompt_lengths, loops)
    trace.on_step = on_step
    if not bool(trace.masked.any()):
        raise InputError("there is nothing to generate: no mask id in the prompt and max_new_tokens is 0")

    with evaluating(model), seeded(seed, tokens.device):
        started = time.perf_counter()
        peer.sample(trace, options)
        seconds = time.perf_counter() - started
    return Generation(
        tokens=shift(trace.tokens, -trace.pad),
        lengths=lengths,
        revealed_at=shift(trace.revealed_at, -trace.pad),
        loops_per_step=[float(loops)] * trace.nfe,
        loops=torch.full((trace.nfe, len(tokens)), loops),
        nfe=trace.nfe,
        head_rows=trace.head_rows,
        generated=int((trace.revealed_at >= 0).sum()),
        flops=trace.rows * model.forward_flops(tokens.shape[1], loops),
        seconds=seconds,
    )


def _trace(name: str, model: Denoiser, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, loops: int) -> Trace:
    pad = tokens.shape[1] - lengths
    new = (lengths - prompt_lengths).unique().tolist()
    if len(new) != 1:
        raise InputError(f"compat={name!r} generates as many tokens in every sequence; here there are {new}")
    if model.pad_id == model.mask_id and bool(pad.any()):
        raise InputError(f"compat={name!r} would fill the padding: pad and mask are both id {model.mask_id}")
    return Trace(model, tokens, pad, tokens.shape[1] - int(new[0]), loops)


def _rule(name: str, policy: object, alg_temp: float | None) -> tuple[str, float | None]:
    """The peer's name of the rule, and alg_temp, which may follow it."""
    rules = PEERS[name].rules
    if policy is None:
        return next(iter(rules.values())), alg_temp
    if not isinstance(policy, str):
        raise InputError(f"compat={name!r} takes its policy by name; known: {', '.join(rules)}")
    rule, colon, argument = policy.partition(":")
    if rule not in rules:
        raise InputError(f"compat={name!r} has no policy {rule!r}{nearest(rule, rules)}")
    if colon:
        try:
            alg_temp = float(argument.removeprefix("alg_temp="))
        except ValueError:
            raise InputError(f"alg_temp is {argument!r} in policy {policy!r}; it must be a number") from None
    return rules[rule], alg_temp
