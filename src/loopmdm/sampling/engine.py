"""generate: fill every masked position of a batch in a given number of denoising steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import random
from ..config import check_loops
from ..diffusion import LogLinear
from ..errors import InputError
from ..model.denoiser import Denoiser, logits_at
from .policies import Policy, State, build

Prompt = Tensor | Sequence[int] | Sequence[Sequence[int]] | None


@dataclass
class Generation:
    """The result of `generate`.

    Attributes:
        tokens: int64 [B, T], prompts and generated tokens, right-padded with the model's pad id.
        lengths: int64 [B], real tokens of each sequence.
        revealed_at: int64 [B, T], the step that filled a position; -1 where nothing was generated.
        loops_per_step: S of each step that ran the model; empty steps are not in it.
        nfe: number of function evaluations, the forward passes of the batch.
        head_rows: rows that reached the vocabulary projection.
        generated: tokens generated.
        flops: analytic forward FLOPs of all passes, head convention "head" (every row counted, whatever was skipped).
        seconds: wall time of the denoising steps.
    """

    tokens: Tensor
    lengths: Tensor
    revealed_at: Tensor
    loops_per_step: list[int] = field(default_factory=list)
    nfe: int = 0
    head_rows: int = 0
    generated: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens (never prompt tokens) per second."""
        return self.generated / self.seconds if self.seconds else 0.0

    def sequences(self) -> list[list[int]]:
        """The tokens of each sequence without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths.tolist(), strict=True)]


@torch.no_grad()
def generate(
    model: Denoiser,
    prompt: Prompt = None,
    *,
    max_new_tokens: int = 0,
    batch_size: int = 1,
    steps: int = 64,
    num_loops: int | None = None,
    policy: str | Policy = "confidence",
    temperature: float | None = None,
    seed: int = 0,
    row_seeds: Sequence[int] | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Generation:
    """Sample from a masked diffusion LM.

    Args:
        model: any Denoiser; switched to evaluation mode meanwhile.
        prompt: one sequence of ids, a list of sequences (lengths may differ), a tensor [T] or [B, T], or None for
            `batch_size` unconditional samples. Mask ids inside a prompt are filled in place (infilling); other
            tokens never change.
        max_new_tokens: masks appended to each prompt; may be 0 when the prompts hold masks.
        steps: denoising steps, >= 1. More steps than masked tokens cost nothing extra.
        num_loops: S of every step; None is the model's `max_loops`.
        policy: "confidence", "ancestral", a peer's name for them, or a Policy.
        temperature: of the token distribution, >= 0; 0 takes the arg-max; None is the policy's own
            (ancestral 1, confidence 0).
        seed: of all noise. Row i uses `row_seeds[i]`, by default seed + i: a sequence comes out the same
            whatever shares its batch.
        on_step: called after each step with (step, tokens [B, T], revealed bool [B, T]).

    Raises:
        InputError: nothing to fill, steps or S below 1, prompt with new tokens over the model's length, ids
            outside the vocabulary.
    """
    loops = check_loops(model.max_loops if num_loops is None else num_loops)
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps}; a whole number of at least one denoising step is needed")
    chosen = build(policy)
    temperature = chosen.temperature if temperature is None else temperature
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; it must be a number of at least 0")
    device = model.head()[0].device
    tokens, lengths = _arrange(model, prompt, max_new_tokens, batch_size, device)
    B, T = tokens.shape
    if row_seeds is not None and len(row_seeds) != B:
        raise InputError(f"{len(row_seeds)} row seeds were given for {B} sequences")
    wanted = row_seeds if row_seeds is not None else [seed + i for i in range(B)]
    seeds = torch.tensor([random.signed(s) for s in wanted], device=device)

    logical = torch.arange(T, device=device).expand(B, T)
    real = logical < lengths[:, None]
    padding = None if bool(real.all()) else real
    masked = (tokens == model.mask_id) & real
    total = masked.sum(-1)
    result = Generation(tokens, lengths, torch.full_like(tokens, -1), generated=int(total.sum()))
    if not result.generated:
        raise InputError("there is nothing to generate: no mask id in the prompt and max_new_tokens is 0")

    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()  # type: ignore[attr-defined]
    started = time.perf_counter()
    try:
        for step in range(steps):
            state = State(masked, logical, total, step, steps, seeds)
            reveal = _denoise(model, chosen, state, tokens, padding, loops, temperature, result)
            if reveal is None:
                continue
            masked = masked & ~reveal
            result.revealed_at[reveal] = step
            if on_step is not None:
                on_step(step, tokens, reveal)
            if not masked.any():
                break
    finally:
        if was_training:
            model.train()  # type: ignore[attr-defined]
    result.seconds = time.perf_counter() - started
    return result


def _denoise(
    model: Denoiser,
    policy: Policy,
    state: State,
    tokens: Tensor,
    padding: Tensor | None,
    loops: int,
    temperature: float,
    result: Generation,
) -> Tensor | None:
    """One step: writes the revealed tokens into `tokens` and returns where, or None if the step was empty."""
    if policy.idle(state):
        return None
    rows = state.masked if policy.looks else policy.choose(state, None)
    if not rows.any():
        return None
    time_left = torch.full((len(tokens),), 1 - state.step / state.steps, device=tokens.device)
    hidden = model.hidden(tokens, padding, loops, LogLinear().sigma(time_left))
    proposal, confidence = propose(logits_at(model, hidden, rows), rows, state, temperature)
    result.nfe += 1
    result.head_rows += len(proposal)
    result.loops_per_step.append(loops)
    result.flops += len(tokens) * model.forward_flops(tokens.shape[1], loops)
    if not policy.looks:
        tokens[rows] = proposal
        return rows
    filled = tokens.masked_scatter(rows, proposal)
    reveal = policy.choose(state, torch.zeros(rows.shape, device=rows.device).masked_scatter(rows, confidence))
    tokens[reveal] = filled[reveal]
    return reveal


def propose(logits: Tensor, rows: Tensor, state: State, temperature: float) -> tuple[Tensor, Tensor]:
    """A token for each row and the model's own (un-tempered) probability of it.

    Args:
        logits: fp32 [N, V], suppressed ids at -inf; rows: bool [B, T], N True.

    Returns:
        tokens int64 [N], confidence fp32 [N]. Sampling inverts the cumulative distribution in float64 with one
        number a row, keyed by the sequence's seed, the step and the logical position.
    """
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        width = int(state.logical.max()) + 1
        zeros = torch.zeros_like(state.row_seeds)
        noise = random.uniform(state.row_seeds, random.SAMPLE_TOKEN, state.step, zeros, width)
        u = noise.gather(1, state.logical)[rows].double() * cumulative[:, -1]
        token = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0]
    picked = logits.gather(-1, token[:, None])[:, 0]
    return token, (picked - logits.logsumexp(-1)).exp().float()


def _arrange(
    model: Denoiser, prompt: Prompt, max_new_tokens: int, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts, then masks, then padding: (tokens int64 [B, T], lengths int64 [B])."""
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if prompt is None:
        rows: list[list[int]] = [[] for _ in range(batch_size)]
    else:
        if isinstance(prompt, Tensor) and prompt.dim() not in (1, 2):
            raise InputError(f"prompt is {list(prompt.shape)}; expected ids [T] or [B, T]")
        data: list[Any] = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        data = [r.tolist() if isinstance(r, Tensor) else r for r in data]
        nested = [isinstance(r, (list, tuple)) for r in data]
        if any(nested) and not all(nested):
            raise InputError("the prompt mixes ids and sequences; pass one sequence of ids or a list of sequences")
        rows = [list(r) for r in data] if any(nested) else [data]
    if not rows:
        raise InputError("the batch is empty")
    for row in rows:
        for token in row:
            if not isinstance(token, int) or not 0 <= token < model.vocab_size:
                raise InputError(f"the prompt holds {token!r}; ids must be whole numbers in 0..{model.vocab_size - 1}")
    lengths = torch.tensor([len(r) + max_new_tokens for r in rows], device=device)
    longest = int(lengths.max())
    if model.max_length is not None and longest > model.max_length:
        raise InputError(
            f"a prompt of {longest - max_new_tokens} tokens with {max_new_tokens} new ones is longer than the "
            f"model's {model.max_length}"
        )
    tokens = torch.full((len(rows), longest), model.pad_id, device=device)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        tokens[i, len(row) : len(row) + max_new_tokens] = model.mask_id
    return tokens, lengths
