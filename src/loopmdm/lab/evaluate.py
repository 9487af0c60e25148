"""Measuring a model: NELBO at several S on the same masks, exact solves, standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import nelbo
from ..errors import InputError
from ..model.denoiser import Denoiser
from ..sampling.engine import Generation, generate

BITS = 1 / math.log(2)
SEVERAL = 4
"""Denoising steps of the demo's column that asks what is left of the loops' gain when steps are several."""


@dataclass(frozen=True)
class Estimate:
    """Mean over sequences and its standard error."""

    mean: float
    error: float


@torch.no_grad()
def nelbo_by_loops(
    model: Denoiser,
    sequences: Tensor,
    loops: Sequence[int],
    *,
    maskable: Tensor | None = None,
    repeats: int = 1,
    batch: int = 64,
    seed: int = 0,
) -> Tensor:
    """NELBO of each sequence at each S, bits a maskable token, float64 [len(loops), N].

    t is stratified over the N sequences and `repeats` rounds; t and masks are the same for every S (and for every
    model given the same seed), so that differences pair. The model is in evaluation mode meanwhile.
    """
    if not len(sequences):
        raise InputError("there is nothing to evaluate: no sequences")
    N, device = len(sequences), model.head()[0].device
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()  # type: ignore[attr-defined]
    totals = torch.zeros(len(loops), N, dtype=torch.float64)
    try:
        for round_ in range(repeats):
            for start in range(0, N, batch):
                rows = slice(start, start + batch)
                index = round_ * N + torch.arange(N)[rows]
                for i, S in enumerate(loops):
                    result = nelbo(
                        model,
                        sequences[rows].to(device),
                        maskable=None if maskable is None else maskable[rows].to(device),
                        num_loops=S,
                        seed=seed,
                        index=index,
                        global_batch=N * repeats,
                    )
                    totals[i, rows] += result.per_sequence.double().cpu() * BITS / repeats
    finally:
        if was_training:
            model.train()  # type: ignore[attr-defined]
    return totals


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of independent values [N]."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf
    return Estimate(float(values.mean()), error)


def fill(model: Denoiser, puzzles: Tensor, loops: int, steps: int = 1) -> Generation:
    """Fill all masks of puzzles [N, T] by arg-max in `steps` denoising steps at S = loops."""
    return generate(model, puzzles, steps=steps, num_loops=loops, policy="confidence", temperature=0.0)


def solved(tokens: Tensor, answers: Tensor) -> Estimate:
    """Share of rows [N, T] that equal their answer in every cell, and its binomial standard error."""
    share = float((tokens.cpu() == answers).all(-1).double().mean())
    return Estimate(share, math.sqrt(share * (1 - share) / len(answers)))
