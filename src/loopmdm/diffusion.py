"""The absorbing-state diffusion: noise schedule, corruption, and the NELBO that trains and measures.

    q(x_t^i | x_0^i) = alpha_t [x_0^i] + (1 - alpha_t) [MASK],   alpha_t = 1 - (1 - eps) t
    NELBO = E_{t, S, x_t}  1/(B T) sum_i 1[x_t^i = MASK] w(t) CE(logits_i, x_0^i),   w(t) = 1/t

(MDLM, arXiv 2406.07524, eq. 10; S as in LoopMDM, arXiv 2605.26106.) t runs over [T_MIN, 1], so
the NELBO here is the mean of the integrand over that interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import random
from .config import check_loops
from .errors import InputError
from .model.denoiser import Denoiser, logits_at
from .model.flops import uniform_loops

EPS = 1e-3
T_MIN = 1e-3


class LogLinear:
    """alpha_t = 1 - (1 - eps) t: the share of tokens still clean at time t in [0, 1]."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - EPS) * t

    def weight(self, t: Tensor) -> Tensor:
        """w(t) = -alpha'_t / (1 - alpha_t) = 1 / t."""
        return 1 / t

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level -log(alpha_t), what a time-conditioned model reads."""
        return -torch.log(self.alpha(t))


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
        nelbo: the NELBO estimate whatever the objective; nats a maskable token, detached.
        per_sequence: the same for each sequence, [B], detached.
        corruption: what the model saw.
        num_loops: S of this pass.
        masked_tokens: rows that reached the head.
    """

    loss: Tensor
    nelbo: Tensor
    per_sequence: Tensor
    corruption: Corruption
    num_loops: int
    masked_tokens: int


def sample_loops(distribution: int | Mapping[int, float], seed: int, step: int) -> int:
    """S of a training step, the same on every rank: from U{1..distribution} or from {S: probability}."""
    if isinstance(distribution, int):
        distribution = uniform_loops(distribution)
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
    low, high = t_range
    if not 0 < low <= high <= 1:
        raise InputError(f"t_range is {t_range}; it must satisfy 0 < low <= high <= 1")
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
) -> Corruption:
    """Mask each maskable token with probability 1 - alpha_t.

    Args:
        tokens: [B, T]; t: [B]; index: global sample indices [B] (default 0..B-1); maskable: bool [B, T].
    """
    B, T = tokens.shape
    index = torch.arange(B, device=tokens.device) if index is None else index
    noise = random.uniform(seed, random.MASK, step, index.to(tokens.device), T)
    mask = noise < (1 - LogLinear().alpha(t)).to(noise)[:, None]
    if maskable is not None:
        mask &= maskable
    return Corruption(tokens.masked_fill(mask, mask_id), mask, t)


def nelbo(
    model: Denoiser,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    num_loops: int | Mapping[int, float] | None = None,
    t: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    index: Tensor | None = None,
    global_batch: int | None = None,
    t_range: tuple[float, float] = (T_MIN, 1.0),
    objective: str = "nelbo",
    document_ids: Tensor | None = None,
) -> NELBO:
    """The negative evidence lower bound of clean tokens under the model, one corruption a sequence.

    Every random thing can be given; what is not given is a function of (seed, step, index).

    Args:
        model: any Denoiser.
        tokens: clean integer ids [B, T].
        attention_mask: bool [B, T], True on real tokens; padding is neither masked nor counted.
        maskable: bool [B, T], tokens that may be masked and are counted; None is all real ones.
        num_loops: S; a distribution {S: probability} to draw S from; None draws S ~ U{1..max_loops}.
        t: [B] in (0, 1]; None is stratified over the global batch.
        mask: bool [B, T]; None draws it.
        seed, step, index, global_batch: identify the random numbers; index is the global sample
            index [B] (default 0..B-1) and global_batch the number of samples a step (default B).
        t_range: interval of the stratified t.
        objective: "nelbo" (weights 1/t), or "masked_mean": the plain mean over masked tokens, a lower-variance
            training loss.
        document_ids: integer [B, T] of packed rows, for models that take them (`LoopMDM.forward`).

    Raises:
        InputError: ids outside the vocabulary or that the model never predicts, [MASK] among them, t outside (0, 1]
            (all checked on CPU); shapes that disagree, an unknown objective, S < 1.
    """
    B = len(tokens)
    device = tokens.device
    for name, given in (("attention_mask", attention_mask), ("maskable", maskable), ("mask", mask)):
        if given is not None and given.shape != tokens.shape:
            raise InputError(f"{name} is {list(given.shape)}, tokens is {list(tokens.shape)}; they must agree")
    for name, given in (("t", t), ("index", index)):
        if given is not None and given.shape != tokens.shape[:1]:
            raise InputError(f"{name} is {list(given.shape)}; it must be [{B}], one for each sequence")
    counted = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if maskable is not None:
        counted = counted & maskable.bool()
    if device.type == "cpu":
        if bool((((tokens < 0) | (tokens >= model.vocab_size)) & counted).any()):
            raise InputError(f"the data hold ids outside the vocabulary of {model.vocab_size}")
        if t is not None and not bool(((t > 0) & (t <= 1)).all()):
            raise InputError("t must be in (0, 1] for every sequence")
        if bool(((tokens == model.mask_id) & counted).any()):
            raise InputError(f"the data contain the mask id {model.mask_id}; clean tokens cannot be [MASK]")
        for never in model.suppressed_ids:
            if bool(((tokens == never) & counted).any()):
                raise InputError(
                    f"the data contain id {never}, which this model never predicts; leave it out with maskable"
                )
    if objective not in ("nelbo", "masked_mean"):
        raise InputError(f"objective is {objective!r}; it must be 'nelbo' or 'masked_mean'")

    index = torch.arange(B, device=device) if index is None else index.to(device)
    if num_loops is None:
        num_loops = model.max_loops
        loops = sample_loops(num_loops, seed, step)
    else:
        loops = sample_loops(num_loops, seed, step) if isinstance(num_loops, Mapping) else check_loops(num_loops)
    if t is None:
        t = stratified_times(index, global_batch or B, seed, step, t_range)
    if mask is None:
        corruption = corrupt(tokens, model.mask_id, t, seed=seed, step=step, index=index, maskable=counted)
    else:
        mask = mask.bool() & counted
        corruption = Corruption(tokens.masked_fill(mask, model.mask_id), mask, t)

    sigma = LogLinear().sigma(t)
    packed = {} if document_ids is None else {"document_ids": document_ids}
    hidden = model.hidden(corruption.tokens, attention_mask, loops, sigma, **packed)
    ce = F.cross_entropy(logits_at(model, hidden, corruption.mask), tokens[corruption.mask], reduction="none")

    sequence = corruption.mask.nonzero()[:, 0]
    weighted = ce * LogLinear().weight(t).to(ce)[sequence]
    counts = counted.sum(-1)
    total = counts.sum().clamp(min=1)
    bound = weighted.sum() / total
    per_sequence = torch.zeros(B, dtype=ce.dtype, device=device).index_add_(0, sequence, weighted.detach())
    loss = bound if objective == "nelbo" else ce.sum() / max(1, ce.numel())
    return NELBO(loss, bound.detach(), per_sequence / counts.clamp(min=1), corruption, loops, ce.numel())
