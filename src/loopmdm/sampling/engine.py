"""generate: fill every masked position of a batch by denoising steps.

A step asks the policy which positions to look at or to reveal, runs the model on the sequences that need it, draws and
judges tokens without logits in memory (`ops.head_stats`), and writes what the policy decides (`ops.select_scatter`).
What is done leaves the batch: sequences without work this step do not reach the model, and rows that nobody asked for
do not reach the head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import random
from ..config import check_loops
from ..diffusion.schedule import Schedule, build_schedule
from ..errors import InputError, number, whole
from ..model.denoiser import Denoiser, evaluating
from ..model.depth import ExitRule
from ..ops.head_stats import HeadStats, head_stats
from .filters import Filters, also_suppressed
from .generation import Generation
from .network import Loops, Network
from .policies import build
from .prompts import Ends, Prompt, arrange, listed
from .state import Move, Policy, Ranked, State
from .unmask import settle

STEPS = 64
"""Denoising steps of a policy that is not adaptive, when none are asked for and there are no more blocks."""


@torch.no_grad()
def generate(
    model: Denoiser,
    prompt: Prompt = None,
    *,
    max_new_tokens: int = 0,
    batch_size: int = 1,
    steps: int | None = None,
    num_loops: Loops | None = None,
    early_exit: ExitRule | None = None,
    policy: str | Policy | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: Sequence[int] = (),
    block_length: int | None = None,
    cfg_scale: float = 0.0,
    eos_id: int | Sequence[int] | None = None,
    schedule: str | Schedule = "linear",
    seed: int = 0,
    row_seeds: Sequence[int] | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    compat: str | None = None,
    impl: str = "auto",
) -> Generation:
    """Sample from a masked diffusion LM.

    Args:
        model: any Denoiser; switched to evaluation mode meanwhile.
        prompt: one sequence of ids, a list of sequences (lengths may differ), a tensor or array [T] or [B, T], or None
            for `batch_size` unconditional samples. Mask ids inside a prompt are filled in place (infilling); other
            tokens never change.
        max_new_tokens: masks appended to each prompt; may be 0 when the prompts hold masks.
        steps: denoising steps, >= 1. More steps than masked tokens cost nothing extra. None is as many as it takes
            for an adaptive policy (threshold, factor, eb, first_hitting) and for the others 64, or one a block where
            that is more; an adaptive policy that is given steps reveals at least ceil(left / steps left) tokens in
            each.
        num_loops: S of every step, or a callable from the share of each sequence's tokens that are masked, float64
            [N] in (0, 1], to S, int64 [N] (a `DepthTable`); None is the model's `max_loops`.
        early_exit: rule by which a sequence makes fewer loops, for models that take a `Depth`.
        policy: a name, with arguments if need be ("threshold:0.8"), a peer's name, or a Policy; see `POLICIES`.
            None is "confidence", with `compat` the peer's default.
        temperature: of the token distribution, >= 0; 0 takes the arg-max; None is the policy's own
            (1 for ancestral, first_hitting, remdm and p2, else 0).
        top_k, top_p: keep the k likeliest tokens, the nucleus of mass p (`Filters`: temperature first, then top-k,
            then top-p on what is left). Policies judge the distribution without the three.
        suppress: ids never chosen, beside the model's `suppressed_ids` and the mask.
        block_length: semi-autoregressive blocks: the generated positions of each sequence, in order, in runs of so
            many, one run after the other. The steps are divided among a sequence's blocks as evenly as possible, one
            more for each of the first; the policy sees only the current block.
        cfg_scale: w >= 0 of classifier-free guidance, h = u + (w + 1) (c - u) on the final hidden states (the head is
            affine, so on the logits too); u is the pass that sees the given tokens masked. 0 is none.
        eos_id: an id, or several, that end a sequence: it is over once one is there and everything before it is
            filled, and is cut behind it. Only generated positions behind the last given token count.
        schedule: noise schedule of ancestral, first_hitting and remdm, and of time-conditioned models; these are told
            t = 1 - step / steps, or without `steps` the share of generated positions that are masked, unless the policy
            has its own times.
        seed: of all noise. Row i uses `row_seeds[i]`, by default seed + i, so go on with seed + batch_size for
            independent samples. A sequence's noise does not depend on what shares its batch. Its tokens do as far as
            the rounding of its logits does: in bf16 they may differ, with `LoopMDM.packed(torch.bfloat16)` where its
            layers run in native calls they are the same.
        on_step: called after each step that ran the model or remasked, with (step, tokens [B, T], revealed bool
            [B, T]).
        compat: "llada", "dream", "mdlm" or "smdm": that codebase's own sampler, bugs included, with its own policies
            and options (`sampling.compat`); options that it does not have are refused.
        impl: how tokens are drawn, judged and written, "auto" or a name that `head_stats` and `select_scatter` have,
            such as "torch", the reference. `compat` has its own.

    Raises:
        InputError: nothing to fill, an argument outside its range, a prompt with new tokens over the model's length,
            ids outside the vocabulary, fewer steps than blocks, `early_exit` for a model without depth control, an
            `impl` that cannot run here, a model whose hidden states or logits are not finite.
    """
    device = model.head()[0].device
    tokens, lengths, prompt_lengths = arrange(model, prompt, max_new_tokens, batch_size, device)
    if compat is not None:
        from .compat import run

        return run(
            compat,
            model,
            tokens,
            lengths,
            prompt_lengths,
            steps=STEPS if steps is None else steps,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            block_length=block_length,
            cfg_scale=cfg_scale,
            policy=policy,
            seed=seed,
            num_loops=num_loops,  # type: ignore[arg-type]  # a callable is refused there
            on_step=on_step,
            eos_id=eos_id,
            early_exit=early_exit,
            suppress=listed("suppress", suppress) or None,
            row_seeds=row_seeds,
            schedule=None if schedule == "linear" else schedule,
        )
    chosen = build("confidence" if policy is None else policy)
    random.signed(seed)  # refuses what is no seed
    wanted = [seed + i for i in range(len(tokens))] if row_seeds is None else listed("row_seeds", row_seeds)
    if len(wanted) != len(tokens):
        raise InputError(f"{len(wanted)} row seeds were given for {len(tokens)} sequences")
    if early_exit is not None and not getattr(model, "takes_depth", False):
        raise InputError("early_exit needs a model that takes a Depth (`takes_depth`); this one does not")
    number("cfg_scale", cfg_scale)
    if num_loops is None or not callable(num_loops):
        num_loops = check_loops(model.max_loops if num_loops is None else num_loops)
    network = Network(model, num_loops, early_exit, cfg_scale)
    filters = Filters(chosen.temperature if temperature is None else temperature, top_k, top_p)
    sampler = _Sampler(
        network,
        _Head(model, filters, also_suppressed(model, suppress), impl),
        chosen,
        build_schedule(schedule),
        tokens,
        lengths,
        torch.tensor([random.signed(s) for s in wanted], device=device),
        steps,
        block_length,
        eos_id,
    )
    with evaluating(model):
        started = time.perf_counter()
        sampler.run(on_step)
        network.result.seconds = time.perf_counter() - started
    return network.result


class _Head:
    """The model's vocabulary projection and how tokens are drawn from it."""

    def __init__(self, model: Denoiser, filters: Filters, never: tuple[int, ...], impl: str) -> None:
        self.weight, self.bias = model.head()
        self.filters, self.impl = filters, impl
        # a mask without a logit (SMDM) has no row to suppress
        self.suppressed = tuple(v for v in (*model.suppressed_ids, *never) if v < len(self.weight))

    def __call__(self, hidden: Tensor, state: State, rows: Tensor, tokens: Tensor) -> HeadStats:
        """Draw where tokens [N] is -1, judge them elsewhere; hidden [N, D] is that of `rows`, bool [B, T].

        Raises:
            InputError: numbers of which no distribution can be made.
        """
        row, position = rows.nonzero(as_tuple=True)
        with torch.autocast(hidden.device.type, enabled=False):
            stats = head_stats(
                hidden.to(self.weight.dtype),
                self.weight,
                self.bias,
                temperature=self.filters.temperature,
                seeds=state.row_seeds[row],
                steps=state.clock,
                positions=position,
                suppressed=self.suppressed,
                top_k=self.filters.top_k,
                top_p=self.filters.top_p,
                tokens=tokens,
                impl=self.impl,
            )
        if not bool((hidden.isfinite().all(-1) & stats.lse.isfinite() & (stats.token >= 0)).all()):
            raise InputError("the model's logits are not finite; its weights may be damaged, or its dtype too narrow")
        return stats


class _Sampler:
    """The tokens of one call of `generate` and the steps that fill them."""

    def __init__(
        self,
        network: Network,
        head: _Head,
        policy: Policy,
        schedule: Schedule,
        tokens: Tensor,
        lengths: Tensor,
        row_seeds: Tensor,
        steps: int | None,
        block_length: int | None,
        eos: int | Sequence[int] | None,
    ) -> None:
        self.network, self.head, self.policy, self.schedule = network, head, policy, schedule
        self.tokens, self.row_seeds = tokens, row_seeds
        column = torch.arange(tokens.shape[1], device=tokens.device)
        self.real = column < lengths[:, None]
        self.masked = (tokens == network.model.mask_id) & self.real
        if not self.masked.any():
            raise InputError("there is nothing to generate: no mask id in the prompt and max_new_tokens is 0")
        self.generated = self.masked.clone()
        self.given = self.real & ~self.generated
        self.ends = None if eos is None else Ends(eos, network.model, self.generated, self.given)
        self.over = torch.zeros_like(lengths, dtype=torch.bool)
        self.confidence = torch.zeros(tokens.shape, device=tokens.device)
        self._divide(block_length, steps)
        network.result = self.result = Generation(tokens, lengths, torch.full_like(tokens, -1))
        self.trace: list[Tensor] = []

    def _divide(self, block_length: int | None, steps: int | None) -> None:
        """Number the blocks: `block` int64 [B, T], -1 outside `generated`; `blocks` int64 [B]; `steps` for them all."""
        block_length = self.generated.shape[1] if block_length is None else whole("block_length", block_length)
        rank = self.generated.cumsum(-1) - 1
        self.block = torch.where(self.generated, rank // block_length, -1)
        self.blocks = self.block.max(-1).values + 1
        most = int(self.blocks.max())
        self.steps = None if self.policy.adaptive else max(STEPS, most)
        if steps is not None:
            self.steps = whole("steps", steps)
            if steps < most:
                raise InputError(f"steps is {steps}, but there are {most} blocks; each needs at least one step")
        self.at = torch.full_like(self.blocks, -1)  # without `steps`: each sequence's block and its step in it
        self.since = torch.zeros_like(self.blocks)

    def run(self, on_step: Callable[[int, Tensor, Tensor], None] | None) -> None:
        # without `steps`: a token a step of every sequence is the least that an adaptive policy does
        most = self.steps or int(self.generated.sum(-1).max())
        for clock in range(most):
            if not self._unfinished().any():
                break
            ran, reveal, remask = self._step(clock)
            self.result.revealed_at[reveal] = clock
            if on_step is not None and (ran or bool(remask.any())):
                on_step(clock, self.tokens.clone(), reveal)
        self._finish()

    def _unfinished(self) -> Tensor:
        """bool [B], sequences that may still change."""
        return ~self.over & (self.generated if self.policy.remasks else self.masked).any(-1)

    def _step(self, clock: int) -> tuple[bool, Tensor, Tensor]:
        """Write one step into `tokens`; (whether the model ran, revealed bool [B, T], remasked bool [B, T])."""
        reveal_all, remask_all = torch.zeros_like(self.masked), torch.zeros_like(self.masked)
        state, index = self._state(clock)
        looks, policy = self.policy.looks, self.policy
        if looks != "nothing" and len(index):
            busy = ~policy.idle(state)
            state, index = state.select(busy), index[busy]
        if not len(index):
            return False, reveal_all, remask_all

        move: Move | Ranked | None = None
        if looks == "nothing":
            move = policy.choose(state, None)
            if not isinstance(move, Move):
                raise InputError(f"{type(policy).__name__} looks at nothing and must return a Move, not {move!r}")
            rows = move.reveal & state.masked
        else:
            rows = state.generated if looks == "all" else state.masked
        entering = rows.any(-1)
        tokens, masked, over = self.tokens[index], self.masked[index], self.over[index]
        scores = torch.zeros(rows.shape, device=rows.device)
        proposed = torch.full_like(tokens, -1)
        if ran := bool(entering.any()):
            hidden = self._hidden(state.select(entering), index[entering], rows[entering])
            stats = self.head(hidden, state, rows, torch.where(state.masked, -1, tokens)[rows])
            proposed = proposed.masked_scatter(rows, stats.token)
            if policy.score is not None:
                scores = scores.masked_scatter(rows, getattr(stats, policy.score))
        if move is None:
            move = policy.choose(state, scores)
        ends = None if self.ends is None else (self.ends.ids, self.ends.tail[index])
        step = settle(
            policy, move, state, proposed, tokens, masked, over, self.network.model.mask_id, ends, self.head.impl
        )
        self.tokens[index], self.masked[index], self.over[index] = step.tokens, step.masked, step.done
        if policy.score is not None:
            self.confidence[index] = torch.where(step.revealed, scores, state.confidence)
        reveal_all[index], remask_all[index] = step.revealed, step.remasked
        return ran, reveal_all, remask_all

    def _state(self, clock: int) -> tuple[State, Tensor]:
        """What the policy sees of the sequences that may move this step, and which sequences these are."""
        if self.steps is None:
            last = self.block.shape[1]
            block = torch.where(self.masked, self.block, last).min(-1).values
            self.since = torch.where(block == self.at, self.since + 1, 0)
            self.at = block
            step = self.since
        else:
            # sequence b has `longer` blocks of `steps // blocks` + 1 steps, then blocks of `steps // blocks`
            blocks = self.blocks.clamp(min=1)
            each, longer = self.steps // blocks, self.steps % blocks
            block = torch.where(
                clock < longer * (each + 1), clock // (each + 1), longer + (clock - longer * (each + 1)) // each
            )
            step = clock - block * each - torch.minimum(block, longer)
            steps = each + (block < longer).long()
        current = self.block == block[:, None]
        masked = self.masked & current
        if self.steps is None:
            steps = step + masked.sum(-1)
        may = ~self.over & (current if self.policy.remasks else masked).any(-1)
        state = State(
            masked, current, current.sum(-1), step, steps, block, clock, self.row_seeds, self.confidence, self.schedule
        )
        index = may.nonzero()[:, 0]
        return state.select(index), index

    def _hidden(self, state: State, index: Tensor, rows: Tensor) -> Tensor:
        masked = self.masked[index].sum(-1)
        lengths = self.real[index].sum(-1)
        time_ = self.policy.time(state)
        if time_ is None and self.steps is None:
            time_ = masked.double() / self.generated[index].sum(-1)
        elif time_ is None:
            time_ = 1 - state.clock / self.steps + torch.zeros_like(masked, dtype=torch.float64)  # type: ignore[operator]
        width = int(lengths.max())
        hidden = self.network.hidden(
            self.tokens[index, :width],
            self.real[index, :width],
            self.given[index, :width],
            masked.double() / lengths,
            self.schedule.sigma(time_).float(),
            rows[:, :width],
        )
        loops = torch.zeros_like(self.blocks)
        loops[index] = self.network.visits[: len(index)].to(loops)
        self.trace.append(loops)
        return hidden

    def _finish(self) -> None:
        """Cut what is over behind its EOS, and count."""
        result = self.result
        if self.ends is not None:
            ends = self.ends.lengths(self.tokens, self.masked)
            result.lengths = torch.where(ends >= 0, ends, result.lengths)
            cut = self.real & (self.ends.column >= result.lengths[:, None])
            self.tokens[cut] = self.network.model.pad_id
            result.revealed_at[cut] = -1
            self.generated = self.generated & ~cut
        result.generated = int(self.generated.sum())
        result.loops = torch.stack(self.trace) if self.trace else result.loops
