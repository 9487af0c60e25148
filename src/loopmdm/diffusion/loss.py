"""The absorbing-state diffusion: corruption, the NELBO that trains and measures, and fine-tuning on answers.

    q(x_t^i | x_0^i) = alpha_t [x_0^i] + (1 - alpha_t) [MASK],   alpha_t = 1 - (1 - eps) t unless a schedule is given
    NELBO = E_{t, S, x_t}  1/(B T) sum_i 1[x_t^i = MASK] w(t) CE(logits_i, x_0^i),   w(t) = 1/t with that schedule

(MDLM, arXiv 2406.07524, eq. 10; S as in LoopMDM, arXiv 2605.26106.) t runs over [T_MIN, 1], so
the NELBO here is the mean of the integrand over that interval.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import random
from ..config import check_loops
from ..errors import InputError, whole
from ..model.denoiser import Denoiser, check_mask, document_numbers, rows_at
from ..model.depth import Depth
from ..model.flops import uniform_loops
from ..ops.linear_cross_entropy import linear_cross_entropy
from .schedule import Schedule, build_schedule

T_MIN = 1e-3


@dataclass
class Corruption:
    """A masked batch: `tokens` [B, T] with mask ids in, `mask` bool [B, T], `t` fp32 [B]."""

    tokens: Tensor
    mask: Tensor
    t: Tensor


@dataclass
class NELBO:
    """The result of `nelbo`.

    Attributes:
        loss: scalar to minimise, nats a token (`objective="nelbo"`) or a masked token ("masked_mean").
        nelbo: the NELBO estimate whatever the objective; nats a maskable token, of the last visit, detached.
        per_sequence: the same for each sequence, [B], detached.
        corruption: what the model saw.
        num_loops: S of this pass (an exit rule may have stopped sequences before it).
        masked_tokens: rows that reached the head.
    """

    loss: Tensor
    nelbo: Tensor
    per_sequence: Tensor
    corruption: Corruption
    num_loops: int
    masked_tokens: int


def sample_loops(distribution: int | Mapping[int, float], seed: int, step: int) -> int:
    """S of a training step, the same on every rank: from U{1..distribution} or from {S: probability}.

    Raises:
        InputError: an S below 1, probabilities below 0 or that do not sum to 1.
    """
    if isinstance(distribution, int):
        distribution = uniform_loops(distribution)
    chances = distribution.values()
    if not all(isinstance(p, (int, float)) and p >= 0 for p in chances) or abs(math.fsum(chances) - 1) > 1e-6:
        raise InputError(f"num_loops is {dict(distribution)}; the probabilities of S must be at least 0 and sum to 1")
    for loops in distribution:
        check_loops(loops)
    u, total = random.scalar(seed, random.LOOPS, step), 0.0
    for loops, probability in sorted(distribution.items()):
        total += probability
        if u < total:
            return loops
    return max(distribution)


def stratified_times(
    index: Tensor, global_batch: int, seed: int, step: int, t_range: tuple[float, float] = (T_MIN, 1.0)
) -> Tensor:
    """t_i = (u + i/B) mod 1 over the global batch of a step, rescaled to `t_range`; fp32 [len(index)]."""
    low, high = check_interval("t_range", t_range)
    u = random.scalar(seed, random.TIME, step)
    return low + (high - low) * ((u + (index % global_batch).double() / global_batch) % 1.0).float()


def corrupt(
    tokens: Tensor,
    mask_id: int,
    t: Tensor,
    *,
    seed: int = 0,
    step: int = 0,
    index: Tensor | None = None,
    maskable: Tensor | None = None,
    schedule: Schedule | str = "linear",
) -> Corruption:
    """Mask each maskable token with probability 1 - alpha_t.

    Args:
        tokens: [B, T]; t: [B]; index: global sample indices [B] (default 0..B-1); maskable: bool [B, T].
        schedule: a `Schedule`, or the name of one in `SCHEDULES`.
    """
    B, T = tokens.shape
    index = torch.arange(B, device=tokens.device) if index is None else index
    noise = random.uniform(seed, random.MASK, step, index.to(tokens.device), T)
    mask = noise < (1 - build_schedule(schedule).alpha(t)).to(noise)[:, None]
    if maskable is not None:
        mask &= maskable
    return Corruption(tokens.masked_fill(mask, mask_id), mask, t)


def nelbo(
    model: Denoiser,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    num_loops: int | Mapping[int, float] | Callable[[int], int] | None = None,
    t: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    index: Tensor | None = None,
    global_batch: int | None = None,
    t_range: tuple[float, float] = (T_MIN, 1.0),
    schedule: Schedule | str = "linear",
    objective: str = "nelbo",
    average: str = "token",
    depth: Depth | None = None,
    document_ids: Tensor | None = None,
) -> NELBO:
    """The negative evidence lower bound of clean tokens under the model, one corruption a sequence.

    Every random thing can be given; what is not given is a function of (seed, step, index).

    Args:
        model: any Denoiser.
        tokens: clean integer ids [B, T].
        attention_mask: bool [B, T], True on real tokens; padding is neither masked nor counted.
        maskable: bool [B, T], tokens that may be masked and are counted; None is all real ones.
        num_loops: S; a distribution {S: probability} to draw S from; a function of the step; None draws
            S ~ U{1..max_loops}.
        t: [B] in (0, 1]; None is stratified over the global batch.
        mask: bool [B, T], given together with its t; None draws it.
        seed, step, index, global_batch: identify the random numbers; index is the global sample
            index [B] (default 0..B-1) and global_batch the number of samples a step (default B).
        t_range: interval of the stratified t.
        schedule: a `Schedule`, or the name of one in `SCHEDULES`.
        objective: "nelbo" (weights w(t)), or "masked_mean": the plain mean over masked tokens, a lower-variance
            training loss.
        average: of the loss. "token": the sum over the batch divided by all counted (with "masked_mean", masked)
            tokens. "sequence": each sequence's sum divided by its own number of them, then the mean over the sequences
            that have any (LLaDA's loss of fine-tuning, arXiv 2502.09992).
        depth: how the looped block is visited (gradients, recomputation, exits), for models that take it; its
            num_loops stays None. With `every` (deep supervision) the loss is the mean of those read after visits 1..S.
        document_ids: integer [B, T] of packed rows, for models that take them (`LoopMDM.forward`).

    Raises:
        InputError: ids outside the vocabulary or that the model never predicts, [MASK] among them, t outside (0, 1]
            (all checked on CPU); shapes that disagree, an unknown objective or schedule, S < 1 or probabilities of S
            that do not sum to 1, a mask without its t, a depth or document_ids that the model does not take, a wrapper
            that has no `hidden`, as DistributedDataParallel (see `NELBOLoss`).
    """
    if not hasattr(model, "hidden"):
        raise InputError(
            f"{type(model).__name__} has no hidden(), so it is no Denoiser; to train under DDP wrap the loss, not the "
            "model: DistributedDataParallel(NELBOLoss(model))"
        )
    same_shape("tokens", tokens, attention_mask=attention_mask, maskable=maskable, mask=mask, document_ids=document_ids)
    B, device = len(tokens), tokens.device
    for name, given in (("t", t), ("index", index)):
        if given is not None:
            one_each(name, given, tokens)
    global_batch = B if global_batch is None else whole("global_batch", global_batch)
    if device.type == "cpu" and t is not None and not bool(((t > 0) & (t <= 1)).all()):
        raise InputError("t must be in (0, 1] for every sequence")
    counted = counted_tokens(model, tokens, attention_mask, maskable)
    if mask is not None and t is None:
        raise InputError("mask is given without t; give the times [B] that it belongs to too, as the weights need them")
    one_of("objective", objective, ("nelbo", "masked_mean"))
    one_of("average", average, ("token", "sequence"))
    schedule = build_schedule(schedule)

    index = torch.arange(B, device=device) if index is None else index.to(device)
    loops = _draw_loops(num_loops, model.max_loops, seed, step)
    if t is None:
        t = stratified_times(index, global_batch, seed, step, t_range)
    if mask is None:
        corruption = corrupt(
            tokens, model.mask_id, t, seed=seed, step=step, index=index, maskable=counted, schedule=schedule
        )
    else:
        mask = mask.bool() & counted
        corruption = Corruption(tokens.masked_fill(mask, model.mask_id), mask, t)

    plan = plan_depth(model, depth, loops)
    visits: int | Depth = loops if plan is None else plan
    documents = packed(model, document_ids)
    hidden = model.hidden(corruption.tokens, attention_mask, visits, schedule.sigma(t), **documents)  # type: ignore[arg-type]

    sequence, counts = corruption.mask.nonzero()[:, 0], counted.sum(-1)
    weight = schedule.weight(t)[sequence].to(torch.promote_types(hidden.dtype, torch.float32))
    factor, terms = _average(
        weight if objective == "nelbo" else None,
        sequence,
        counts if objective == "nelbo" else corruption.mask.sum(-1),
        average,
    )
    losses, numbers = [], document_numbers(attention_mask, document_ids)
    for state in plan.outputs if plan is not None and plan.every else [hidden]:
        total, ce = cross_entropies(model, state, tokens, corruption.mask, factor, numbers)
        losses.append(total / terms)
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    weighted = ce * weight.detach()  # of the last visit
    per_sequence = weighted.new_zeros(B).index_add_(0, sequence, weighted) / counts.clamp(min=1)
    value = weighted.sum() / counts.sum().clamp(min=1)
    return NELBO(loss, value, per_sequence, corruption, loops, len(sequence))


def sft(
    model: Denoiser,
    tokens: Tensor,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    *,
    prompt_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    average: str = "sequence",
    **options: Any,
) -> NELBO:
    """The NELBO of answers given their prompts, to fine-tune on (LLaDA, arXiv 2502.09992, section 2.3).

    A prompt is never masked and never counted. All the rest is the answer, the EOS tokens that fill a batch up to one
    length among them: that is how the model learns where to stop, so they are no padding in `attention_mask`.

    Args:
        tokens: prompt and answer, clean integer ids [B, T].
        prompt_lengths: integers [B], real tokens of each prompt at the start of its sequence (padding on the left is
            not counted). This or prompt_mask.
        prompt_mask: bool [B, T], True on prompt tokens, wherever they are (several turns).
        attention_mask: bool [B, T], True on real tokens; padding is neither seen nor counted.
        average: as in `nelbo`; each answer weighs the same by default.
        options: whatever else `nelbo` takes, `maskable` aside.

    Raises:
        InputError: a sequence without an answer, both prompt arguments or none, `maskable`, and what `nelbo` refuses.
    """
    if "maskable" in options:
        raise InputError("sft masks answers: leave out maskable, and tell the prompts by prompt_lengths or prompt_mask")
    same_shape("tokens", tokens, attention_mask=attention_mask, prompt_mask=prompt_mask)
    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if (prompt_lengths is None) == (prompt_mask is None):
        raise InputError("sft needs one of prompt_lengths and prompt_mask, to tell the prompts from the answers")
    if prompt_mask is not None:
        answer = real & ~prompt_mask.bool()
    else:
        lengths = torch.as_tensor(prompt_lengths, device=tokens.device)
        if lengths.shape != tokens.shape[:1] or lengths.dtype.is_floating_point:
            raise InputError(
                f"prompt_lengths is {lengths.dtype} {list(lengths.shape)}; expected integers [{len(tokens)}]"
            )
        if bool((lengths < 0).any()):
            raise InputError(f"prompt_lengths are {lengths.tolist()}; a prompt has at least 0 tokens")
        answer = real & (real.cumsum(-1) > lengths[:, None])
    empty = (~answer.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"the prompt of sequence {empty[0]} covers all of it; leave room for an answer or drop it")
    return nelbo(model, tokens, attention_mask=attention_mask, maskable=answer, average=average, **options)


def cross_entropies(
    model: Denoiser,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-log p of the clean token at each of n masked positions: their weighted sum, and each, [n] in row-major order.

    The sum may be differentiated, what is [n] is detached. No more than a chunk of the logits is ever held. Where
    there are padding or documents, `numbers` tells them (`document_numbers`).
    """
    head, bias = model.head()
    picked = rows_at(model, hidden, mask, numbers)
    return linear_cross_entropy(picked, head, tokens[mask], bias, weights, suppressed=model.suppressed_ids)


def counted_tokens(
    model: Denoiser, tokens: Tensor, attention_mask: Tensor | None = None, maskable: Tensor | None = None
) -> Tensor:
    """Which tokens may be masked and are counted, bool [B, T]; on CPU, InputError if the model cannot predict one."""
    counted = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if maskable is not None:
        counted = counted & maskable.bool()
    if tokens.device.type == "cpu":
        if bool((((tokens < 0) | (tokens >= model.vocab_size)) & counted).any()):
            raise InputError(f"the data hold ids outside the vocabulary of {model.vocab_size}")
        if bool(((tokens == model.mask_id) & counted).any()):
            raise InputError(f"the data contain the mask id {model.mask_id}; clean tokens cannot be [MASK]")
        for never in model.suppressed_ids:
            if bool(((tokens == never) & counted).any()):
                raise InputError(
                    f"the data contain id {never}, which this model never predicts; leave it out with maskable"
                )
    return counted


def same_shape(name: str, tokens: Tensor, **others: Tensor | None) -> None:
    """InputError unless the tokens are integers [B, T] and the others of their shape."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype.is_floating_point:
        got = f"{tokens.dtype} {_shape(tokens)}" if isinstance(tokens, Tensor) else _shape(tokens)
        raise InputError(f"{name} is {got}; expected a tensor of integers, a row for each sequence")
    for other, given in others.items():
        if given is not None and _shape(given) != _shape(tokens):
            raise InputError(f"{other} is {_shape(given)}, {name} is {_shape(tokens)}; they must agree")
        if given is not None and other == "attention_mask":
            check_mask(given)


def one_each(name: str, given: Tensor, tokens: Tensor) -> None:
    """InputError unless there is one number for each of the rows of tokens."""
    if _shape(given) != [len(tokens)]:
        raise InputError(f"{name} is {_shape(given)}; it must be [{len(tokens)}], one for each sequence")


def _shape(given: object) -> list[int] | str:
    return list(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"


def check_interval(name: str, interval: tuple[float, float]) -> tuple[float, float]:
    """Return (low, high) with 0 < low <= high <= 1, or raise InputError."""
    try:
        low, high = interval
        inside = 0 < low <= high <= 1
    except (TypeError, ValueError):
        inside = False
    if not inside:
        raise InputError(f"{name} is {interval}; it must satisfy 0 < low <= high <= 1")
    return low, high


def packed(model: Denoiser, document_ids: Tensor | None) -> dict[str, Tensor]:
    """What `hidden` is told of packed documents; InputError where the model takes none."""
    if document_ids is None:
        return {}
    takes = inspect.signature(model.hidden).parameters.values()
    if not any(p.name == "document_ids" or p.kind is p.VAR_KEYWORD for p in takes):
        raise InputError(f"{type(model).__name__} does not take document_ids; give it one document a row")
    if document_ids.dtype.is_floating_point:
        raise InputError(f"document_ids is {document_ids.dtype}; documents are numbered by integers")
    return {"document_ids": document_ids}


def one_of(name: str, value: str, known: tuple[str, str]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; it must be {known[0]!r} or {known[1]!r}")


def _draw_loops(
    num_loops: int | Mapping[int, float] | Callable[[int], int] | None, max_loops: int, seed: int, step: int
) -> int:
    if num_loops is None:
        return sample_loops(max_loops, seed, step)
    if isinstance(num_loops, Mapping):
        return sample_loops(num_loops, seed, step)
    return check_loops(num_loops(step) if callable(num_loops) else num_loops)


def plan_depth(model: Denoiser, depth: Depth | None, loops: int) -> Depth | None:
    """A copy of the template with this pass's S, which the pass will fill."""
    if depth is None:
        return None
    if not isinstance(depth, Depth):
        raise InputError(f"depth is {depth!r}; it must be a Depth")
    if not getattr(model, "takes_depth", False):
        raise InputError(f"{type(model).__name__} does not take a depth; give num_loops only")
    if depth.num_loops is not None:
        raise InputError("depth.num_loops must be None here; S is nelbo's own num_loops")
    return dataclasses.replace(depth, num_loops=loops, visits=None, outputs=[])


def _average(weight: Tensor | None, sequence: Tensor, counts: Tensor, average: str) -> tuple[Tensor | None, Tensor]:
    """(factor [n], terms): the loss is the sum of the factors (None: 1) times the values, over `terms`.

    Value i, of weight [n], belongs to row sequence[i]; counts [B] is how many terms each row's sum stands for.
    """
    if average == "token":
        return weight, counts.sum().clamp(min=1)
    share = 1 / counts.clamp(min=1).to(torch.float32 if weight is None else weight.dtype)[sequence]
    return share if weight is None else weight * share, (counts > 0).sum().clamp(min=1)
