"""One unmasking step for any codebase: hidden states or logits in, tokens out; `generate` writes through `settle`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.schedule import Schedule, build_schedule
from ..errors import InputError, number, shown, whole
from ..ops.compact import compact
from ..ops.head_stats import head_stats, logit_stats
from ..ops.select_scatter import Step, select_scatter
from ..random import signed
from .network import guided
from .policies import build
from .prompts import listed
from .state import Move, Policy, Ranked, State


class Unmasked(NamedTuple):
    """What a step did.

    tokens: int64 [B, T]; revealed, remasked: bool [B, T], what it filled and what it masked again; confidence: fp32
    [B, T], the policy's score of each position that it looked at (the probability of its token, unless the policy ranks
    by another score), 0 elsewhere; done: bool [B], an EOS with nothing masked before it, or (unless the policy remasks)
    nothing masked any more.
    """

    tokens: Tensor
    revealed: Tensor
    remasked: Tensor
    confidence: Tensor
    done: Tensor


def unmask_step(
    hidden: Tensor,
    head_weight: Tensor | None,
    tokens: Tensor,
    *,
    mask_id: int,
    bias: Tensor | None = None,
    k: int | Tensor | None = None,
    threshold: float | Tensor | None = None,
    policy: str | Policy | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    suppressed: Sequence[int] = (),
    seed: int = 0,
    row_seeds: Tensor | None = None,
    step: int | Tensor = 0,
    steps: int | None = None,
    positions: Tensor | None = None,
    attention_mask: Tensor | None = None,
    eligible: Tensor | None = None,
    generated: Tensor | None = None,
    confidence: Tensor | None = None,
    eos_ids: Sequence[int] = (),
    done: Tensor | None = None,
    logit_shift: int = 0,
    cfg_hidden: Tensor | None = None,
    cfg_scale: float = 0.0,
    schedule: str | Schedule = "linear",
    capacity: int | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> Unmasked:
    """Fill some of the masked positions from final hidden states, without ever holding logits.

        x = torch.full((2, 64), mask_id)
        for step in range(16):
            hidden = backbone(x)                                           # [2, 64, D], after the final norm
            x = unmask_step(hidden, lm_head.weight, x, mask_id=mask_id, k=4, temperature=1.0, step=step).tokens
        assert not (x == mask_id).any()

    The head runs on the masked rows alone, and for a policy that does not look at scores on the rows that it reveals
    alone. How many are revealed: `k` a sequence; those with confidence >= `threshold`, and at least k or 1; or what
    `policy` says, with k in place of its count if both are given. Noise is a function of (row seed, step, position), so
    a sequence comes out the same whatever shares its batch or pads it.

    Args:
        hidden: [B, T, D] in head_weight's dtype; head_weight: [V, D]; bias: [V] or None. Without a head_weight `hidden`
            are the logits [B, T, V] (`unmask_from_logits`).
        tokens: int64 [B, T]; positions that hold `mask_id` are to be filled.
        k: one count or int64 [B]; threshold: one or float64 [B] (a number above 1 is never met).
        policy: a name of `loopmdm.POLICIES` or a Policy; None is "confidence". Those that spread tokens over steps need
            `steps` (or k) and `generated`.
        temperature: of the draw; None is the policy's own, as in `generate`.
        top_k, top_p, suppressed: as in `head_stats`; mask_id is always suppressed, if the head has a row for it.
        seed: of all noise; row i uses `row_seeds[i]`, int64 [B], by default seed + i.
        step: number of this step, from 0; in a CUDA graph an int64 tensor, scalar or [B]. steps: how many there are.
        positions: int64 [B, T], counted from each sequence's first real token, from above 0 where the columns are a
            window of it; None counts `attention_mask`.
        attention_mask: bool [B, T], real positions, padding on either side; None is all.
        eligible: bool [B, T], where this step may reveal (the current block, say); None is everywhere.
        generated: bool [B, T], masked before the first step: what the policy may remask, and how many tokens there are
            to spread; needed for these two and for eos_ids. Padding does not count. None: the masked ones.
        confidence: fp32 [B, T], of filled positions when they were filled, for "remdm:conf".
        eos_ids: ids that end a sequence where `generated`; done: bool [B], sequences to leave alone.
        logit_shift: 1 if the token at i is read at i - 1 (Dream); the first real token, and the first column of a
            window, is read at itself.
        cfg_hidden: [B, T, D] of the unconditional pass u; with `cfg_scale` w the head sees u + (w + 1) (hidden - u).
        schedule: noise schedule of "ancestral" and "remdm".
        capacity: most rows that the head may see; None lists exactly those that it needs, for which a GPU waits once.
            With a capacity nothing waits for the host, so that the step can be captured in a CUDA graph; positions
            beyond it stay masked, or are masked again by "p2". B * T is always enough.
        inplace: write into `tokens` (and `done`) instead of a copy.
        impl: "auto", or a name that both `head_stats` and `select_scatter` have, such as "torch", the reference.

    Raises:
        InputError: shapes, dtypes or numbers that do not fit, or a policy that is not told how many to reveal.
    """
    _check(hidden, head_weight, bias, tokens)
    for name, known in (("mask_id", mask_id), ("steps", steps), ("capacity", capacity), ("cfg_scale", cfg_scale),
                        ("logit_shift", logit_shift), ("temperature", temperature), ("top_k", top_k),
                        ("top_p", top_p), ("seed", seed), ("impl", impl), ("policy", policy),
                        ("schedule", schedule), ("inplace", inplace)):  # fmt: skip
        if isinstance(known, Tensor):
            raise InputError(f"{name} is a tensor; it must be known to the host")
    for name, count, bits in (("step", step, 32), ("steps", steps, 32), ("mask_id", mask_id, 63)):
        if isinstance(count, int) and count >= 2**bits:
            raise InputError(f"{name} is {count}; it must be below 2^{bits}")
    if not isinstance(impl, str):
        raise InputError(f"impl is {impl!r}; it must be a name")
    vocab = hidden.shape[-1] if head_weight is None else len(head_weight)
    whole("mask_id", mask_id, 0)
    B, T = tokens.shape
    per_row = tokens.new_empty(B)
    for name, flags in (("attention_mask", attention_mask), ("eligible", eligible), ("generated", generated)):
        _given(name, flags, tokens, torch.bool)
    _given("positions", positions, tokens, torch.int64)
    _given("confidence", confidence, tokens, torch.float32)
    _given("done", done, per_row, torch.bool)
    _given("row_seeds", row_seeds, per_row, torch.int64)
    _given("k", k if isinstance(k, Tensor) else None, per_row, torch.int64)
    _given("threshold", threshold if isinstance(threshold, Tensor) else None, per_row, torch.float64)
    whole("logit_shift", logit_shift, 0)
    if not isinstance(step, Tensor):
        whole("step", step, 0)
    elif step.shape not in ((), (B,)) or step.dtype != torch.int64 or step.device != tokens.device:
        raise InputError(
            f"step is {list(step.shape)} {step.dtype} on {step.device}; it must be int64, one or one a row"
        )
    if inplace and not tokens.is_contiguous():
        raise InputError("tokens is written in place and must be contiguous")
    suppressed, eos_ids = _ids("suppressed", suppressed, vocab), _ids("eos_ids", eos_ids, 2**63)
    if eos_ids and generated is None:
        raise InputError("eos_ids end a sequence where it was generated; give `generated` too")
    chosen = build("confidence" if policy is None else policy)
    if threshold is not None and policy is not None:
        raise InputError("threshold and policy were both given; a threshold is a policy of its own")

    if row_seeds is None:
        row_seeds = torch.arange(B, device=tokens.device) + signed(seed)
    if positions is None:
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask.long()
        positions = (real.cumsum(1) - 1).clamp(min=0)
    masked = (tokens == mask_id).contiguous()
    if attention_mask is not None:
        masked &= attention_mask
        generated = None if generated is None else generated & attention_mask
    may = masked if eligible is None else masked & eligible
    room = may
    if generated is not None:
        room = generated if eligible is None else generated & eligible
    total = room.sum(-1)
    at = torch.zeros_like(total) + step
    counted = k is not None or threshold is not None
    if steps is not None:
        span = torch.full_like(total, whole("steps", steps))
    elif counted or chosen.adaptive:
        span = at + may.sum(-1).clamp(min=1)  # such that one token a step is enough
    else:
        raise InputError("how many tokens to reveal is not said: give k, threshold, or steps and generated")
    if not counted and not chosen.adaptive and generated is None:
        raise InputError("steps share out the tokens that were masked before the first one; give them as `generated`")
    if confidence is None:
        confidence = torch.zeros_like(tokens, dtype=torch.float32)
    state = State(
        may, room | may, total, at, span, torch.zeros_like(total), at, row_seeds, confidence,
        build_schedule(schedule), positions,
    )  # fmt: skip

    move = _move(chosen, state, None, k, threshold) if chosen.looks == "nothing" else None
    looked = state.generated if chosen.looks == "all" else may
    if isinstance(move, Move):
        looked = move.reveal & may
    if done is not None:
        looked = looked & ~done[:, None]
    rows, count = _rows(looked, capacity, impl)
    here = rows.clamp(min=0)
    row, column = here // max(T, 1), here % max(T, 1)
    place = positions.flatten()[here]
    draw: dict[str, Any] = {
        "temperature": chosen.temperature if temperature is None else temperature,
        "seeds": row_seeds[row],
        "steps": at[row],
        "positions": place,
        "suppressed": (*suppressed, mask_id) if mask_id < vocab else suppressed,
        "top_k": top_k,
        "top_p": top_p,
        "tokens": torch.where(may, -1, tokens).flatten()[here],
        "count": count,
        "impl": impl,
    }
    back_by = torch.minimum(place, column).clamp(0, min(logit_shift, T))
    picked = _picked(hidden, cfg_hidden, cfg_scale, here - back_by)
    stats = logit_stats(picked, **draw) if head_weight is None else head_stats(picked, head_weight, bias, **draw)

    slot = torch.where(rows < 0, B * T, rows)  # unused rows write behind the end

    def back(column: Tensor, empty: float) -> Tensor:
        behind = torch.full((B * T + 1,), empty, dtype=column.dtype, device=column.device)
        return behind.scatter(0, slot, column)[: B * T].view(B, T)

    scores = back(getattr(stats, chosen.score or "confidence"), 0.0)
    if move is None:
        move = _move(chosen, state, scores, k, threshold)
    tokens = tokens if inplace else tokens.clone(memory_format=torch.contiguous_format)
    done = torch.zeros_like(total, dtype=torch.bool) if done is None else done if inplace else done.clone()
    ends = None if generated is None or not eos_ids else (_constant(eos_ids, tokens.device), generated)
    wrote = settle(chosen, move, state, back(stats.token, -1), tokens, masked, done, mask_id, ends, impl)
    return Unmasked(wrote.tokens, wrote.revealed, wrote.remasked, scores, wrote.done)


def unmask_from_logits(
    logits: Tensor, tokens: Tensor, *, mask_id: int, cfg_logits: Tensor | None = None, **options: Any
) -> Unmasked:
    """`unmask_step` for a codebase that has logits already: the same tokens as from the hidden states they came from.

        logits = model(x)                                                  # [2, 64, V]
        out = unmask_from_logits(logits, x, mask_id=mask_id, threshold=0.9)
        x = out.tokens

    Args:
        logits: [B, T, V], floating, read as fp32; cfg_logits: those of the unconditional pass, with `cfg_scale`.
        tokens, mask_id: as for `unmask_step`.
        options: the other keywords of `unmask_step`, without bias and cfg_hidden.

    Raises:
        InputError: as `unmask_step`.
    """
    return unmask_step(logits, None, tokens, mask_id=mask_id, cfg_hidden=cfg_logits, **options)


def settle(
    policy: Policy,
    move: Move | Ranked,
    state: State,
    proposed: Tensor,
    tokens: Tensor,
    masked: Tensor,
    done: Tensor,
    mask_id: int,
    ends: tuple[Tensor, Tensor] | None,
    impl: str,
) -> Step:
    """Write a policy's move into tokens, masked and done, kept within what a policy may do.

    Args:
        state: what the policy saw; its `masked` may be a part of `masked`, as in blocks.
        proposed: int64 [B, T], -1 where no token was drawn.
        ends: (ids that end a sequence int64 [E], where they count bool [B, T]).
    """
    # a policy that remasks may do so after everything is filled
    again = torch.zeros_like(masked) if policy.remasks else None
    rows = state.total.shape
    eos, where = ends if ends is not None else (None, None)
    if isinstance(move, Ranked):
        eligible = state.generated if move.remask else state.masked
        scores, k, rule, remask, bound = move.keys, move.k, move.rule, move.remask, move.bound
        if not isinstance(bound, Tensor):
            bound = torch.full(rows, float(bound), dtype=torch.float64, device=tokens.device)
    else:
        eligible, scores = move.reveal & state.masked, torch.zeros_like(masked, dtype=torch.float32)
        k, rule, remask, bound = torch.full_like(state.total, tokens.shape[1]), "top_k", False, None
        again = again if move.remask is None else move.remask & state.generated & ~state.masked
    return select_scatter(
        scores, proposed, tokens, masked, eligible, k, mask_id=mask_id, rule=rule, bound=bound, remask=remask,
        again=again, eos=eos, ends=where, done=done, impl=impl,
    )  # fmt: skip


def _check(hidden: Tensor, head_weight: Tensor | None, bias: Tensor | None, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64:
        found = f"{list(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else repr(tokens)
        raise InputError(f"tokens is {found}; it must be int64 [B, T]")
    what = "logits" if head_weight is None else "hidden"
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
        found = str(list(hidden.shape)) if isinstance(hidden, Tensor) else repr(hidden)
        raise InputError(f"{what} is {found}; for tokens {list(tokens.shape)} it must be {[*tokens.shape, -1]}")
    for name, x in ((what, hidden), ("head_weight", head_weight), ("bias", bias)):
        if x is not None and (not isinstance(x, Tensor) or x.device != tokens.device or not x.is_floating_point()):
            found = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else repr(x)
            raise InputError(f"{name} is {found}; it must be a floating tensor on {tokens.device}, as tokens are")
    if head_weight is not None and (head_weight.ndim != 2 or not len(head_weight)):
        raise InputError(f"head_weight is {list(head_weight.shape)}; it must be [V, D]")
    if head_weight is None and bias is not None:
        raise InputError("logits have their bias already; leave bias out")


def _move(
    policy: Policy, state: State, scores: Tensor | None, k: int | Tensor | None, threshold: float | Tensor | None
) -> Move | Ranked:
    """The policy's move with the caller's count and threshold in place of its own."""
    move = policy.choose(state, scores)
    if threshold is None and k is None:
        return move
    if not isinstance(move, Ranked):
        raise InputError(f"policy {type(policy).__name__} says itself which positions are revealed; it takes no k")
    if not isinstance(k, Tensor):
        k = torch.full_like(state.total, 1 if k is None else min(whole("k", k, 0), state.masked.shape[1]))
    if threshold is None:
        return move._replace(k=k)
    bound = threshold if isinstance(threshold, Tensor) else number("threshold", threshold)
    return move._replace(k=k, rule="threshold", bound=bound)


def _picked(values: Tensor, blind: Tensor | None, scale: float, rows: Tensor) -> Tensor:
    """Rows of [B, T, D] by flat index, guided if there is an unconditional pass."""
    number("cfg_scale", scale)
    if bool(scale) != (blind is not None):
        raise InputError("guidance takes the unconditional pass and a cfg_scale above 0; only one of them was given")
    picked = values.flatten(0, 1)[rows]
    if blind is None:
        return picked
    _given("the unconditional pass", blind, values, values.dtype)
    return guided(picked, blind.flatten(0, 1)[rows], scale)


def _ids(name: str, ids: Sequence[int], vocab: int) -> tuple[int, ...]:
    found = listed(name, ids)
    for token in found:
        if not isinstance(token, int) or not 0 <= token < vocab:
            raise InputError(f"{name} holds {shown(token)}; ids go from 0 to {vocab - 1}")
    return tuple(found)


@functools.cache
def _constant(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, so that a step copies nothing to the device; for good, because a captured graph reads it."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _given(name: str, x: Tensor | None, like: Tensor, dtype: torch.dtype) -> None:
    if x is not None and (not isinstance(x, Tensor) or x.dtype != dtype or x.shape != like.shape):
        found = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
        raise InputError(f"{name} is {found}; it must be {list(like.shape)} {dtype}")
    if x is not None and x.device != like.device:
        raise InputError(f"{name} is on {x.device}, not on {like.device}; move all tensors to one device")


def _rows(looked: Tensor, capacity: int | None, impl: str) -> tuple[Tensor, Tensor | None]:
    """The flat indices that the head sees and, where their number stays on the device, that number."""
    if capacity is None or not looked.numel():
        return looked.flatten().nonzero()[:, 0], None
    rows, count = compact(looked, capacity, impl=impl)
    return rows, count
