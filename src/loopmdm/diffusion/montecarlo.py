"""Which masks a bound is measured on, and the passes that measure them.

Masks are functions of (seed, sequence index, sample). Step 0 of a stream of random numbers places the sequences, step
1 + j draws the masks of sample j.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import random
from ..errors import InputError, whole
from ..model.denoiser import Denoiser, document_numbers, evaluating
from ..model.depth import Depth
from .loss import counted_tokens, cross_entropies, one_each, packed, plan_depth, same_shape
from .schedule import Schedule

GOLDEN = (math.sqrt(5) - 1) / 2

Draw = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(global index [R], sample number [R], counted bool [R, T]) -> (mask bool [R, T], sigma [R], weight float64 [R])."""


def _spread(seed: int, stream: int, index: Tensor) -> Tensor:
    """v_i in [0, 1), float64: a random start, then golden-ratio steps, which any run of sequences fills evenly."""
    return (random.scalar(seed, stream, 0) + index.double() * GOLDEN) % 1.0


def _noise(seed: int, stream: int, index: Tensor, sample: Tensor, length: int) -> Tensor:
    return random.uniform(seed, stream, 1 + sample, index, length)


def time_draw(schedule: Schedule, seed: int, samples: int, edges: Tensor) -> Draw:
    """Sample number b * samples + j is the j-th of bin b."""

    def draw(index: Tensor, sample: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = edges.to(index.device)[:-1], edges.to(index.device)[1:]
        chosen = sample // samples
        place = (_spread(seed, random.T_EVAL, index) + sample % samples) / samples
        t = low[chosen] + (high - low)[chosen] * place
        noise = _noise(seed, random.T_EVAL, index, sample, counted.shape[1])
        mask = (noise < (1 - schedule.alpha(t))[:, None]) & counted
        return mask, schedule.sigma(t).float(), schedule.weight(t)

    return draw


def count_draw(schedule: Schedule, seed: int, samples: int) -> Draw:
    def draw(index: Tensor, sample: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = counted.sum(-1)
        place = (_spread(seed, random.COUNT, index) + sample) * length / samples
        masks = torch.minimum(place.long() + 1, length)
        noise = _noise(seed, random.COUNT, index, sample, counted.shape[1]).masked_fill(~counted, math.inf)
        rank = noise.argsort(dim=-1, stable=True).argsort(dim=-1)
        clean = 1 - masks / length.clamp(min=1).double()
        weight = length / masks.clamp(min=1).double()
        sigma = schedule.sigma(schedule.inverse(clean)).float()
        return rank < masks[:, None], sigma, weight

    return draw


@dataclass(frozen=True)
class Measured:
    """Weighted and plain sums of CE and visits, float64 [len(S), N, samples]; masked tokens float64 [N, samples]."""

    weighted: Tensor
    plain: Tensor
    visits: Tensor
    masked: Tensor
    tokens: Tensor


@torch.no_grad()
def measure(
    model: Denoiser,
    sequences: Tensor,
    loops: tuple[int, ...],
    samples: int,
    draw: Draw,
    attention_mask: Tensor | None,
    maskable: Tensor | None,
    *,
    document_ids: Tensor | None,
    depth: Depth | None,
    index: Tensor | None,
    batch: int,
) -> Measured:
    """Show every (sequence, sample) to the model at every S, `batch` of them at a time."""
    same_shape("sequences", sequences, attention_mask=attention_mask, maskable=maskable, document_ids=document_ids)
    if not sequences.numel():
        raise InputError(f"sequences is {list(sequences.shape)}; there must be tokens to measure, [N, T]")
    whole("batch", batch)
    N, device = len(sequences), model.head()[0].device
    index = torch.arange(N) if index is None else index
    one_each("index", index, sequences)
    counted = counted_tokens(model, sequences, attention_mask, maskable)
    weighted = torch.zeros(len(loops), N * samples, dtype=torch.float64)
    plain, visits, masked = torch.zeros_like(weighted), torch.zeros_like(weighted), torch.zeros_like(weighted[0])
    with evaluating(model):
        for start in range(0, N * samples, batch):
            cell = torch.arange(start, min(start + batch, N * samples))
            row, sample = cell // samples, cell % samples
            clean, allowed = (x[row.to(x.device)].to(device) for x in (sequences, counted))
            real, documents = (
                None if x is None else x[row.to(x.device)].to(device) for x in (attention_mask, document_ids)
            )
            numbers = document_numbers(real, documents)
            mask, sigma, weight = draw(index[row.to(index.device)].to(device), sample.to(device), allowed)
            seen, owner = clean.masked_fill(mask, model.mask_id), mask.nonzero()[:, 0]
            masked[cell] = mask.sum(-1).double().cpu()
            for i, S in enumerate(loops):
                plan = plan_depth(model, depth, S)
                visit: int | Depth = S if plan is None else plan
                hidden = model.hidden(seen, real, visit, sigma, **packed(model, documents))  # type: ignore[arg-type]
                _, ce = cross_entropies(model, hidden, clean, mask, numbers=numbers)
                sums = torch.zeros(len(cell), dtype=torch.float64, device=device).index_add_(0, owner, ce.double())
                plain[i, cell], weighted[i, cell] = sums.cpu(), (sums * weight).cpu()
                done = plan.visits if plan is not None else None
                visits[i, cell] = float(S) if done is None else done.double().cpu()
    shape = (len(loops), N, samples)
    weighted, plain, visits = (x.view(shape) for x in (weighted, plain, visits))
    return Measured(weighted, plain, visits, masked.view(N, samples), counted.sum(-1).cpu())


def ratio(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """sum(values) / sum(tokens) over the last axis, N, and its standard error over sequences of unequal length."""
    count, N = tokens.to(values).sum().clamp(min=1), values.shape[-1]
    mean = values.sum(-1) / count
    if N == 1:
        return mean, torch.full_like(mean, math.inf)
    rest = values - mean[..., None] * tokens
    return mean, (rest.square().sum(-1) * N / (N - 1)).sqrt() / count
