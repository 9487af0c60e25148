"""The NELBO of a short sequence without chance: every mask, and the weights integrated exactly."""

import itertools
import math
from fractions import Fraction

import torch

LOW, HIGH = Fraction(999, 1_000_000), Fraction(999, 1000)
"""Shares of masked tokens, 0.999 t, at the ends of t in [0.001, 1]."""


def all_masks(length):
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def cross_entropies(model, clean, masks, num_loops):
    """-log p of each clean token at each masked position, 0 elsewhere, for one clean sequence: [2^T, T]."""
    seen = torch.where(masks, model.mask_id, clean)
    with torch.no_grad():
        logits = model(seen, num_loops=num_loops).logits[..., : model.vocab_size - 1]
    chance = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    right = chance.gather(-1, clean.expand_as(seen)[..., None])[..., 0]
    return -torch.log(right) * masks


def mask_weight(k, length, low=LOW, high=HIGH):
    """Integral over the share p in [low, high] of p^k (1 - p)^(length - k) / p, the polynomial integrated exactly."""
    total = Fraction(0)
    for j in range(length - k + 1):
        power = k + j
        total += math.comb(length - k, j) * (-1) ** j * (high**power - low**power) / power
    return float(total)


def exact(model, clean, num_loops, low=LOW, high=HIGH):
    """Integral over the share of masked tokens in [low, high], nats of the sequence."""
    masks = all_masks(len(clean))
    ce = cross_entropies(model, clean, masks, num_loops).sum(-1)
    weights = [mask_weight(int(m.sum()), len(clean), low, high) if m.any() else 0.0 for m in masks]
    return (torch.tensor(weights, dtype=torch.float64) * ce).sum().item()


def exact_nelbo(model, clean, num_loops):
    """Mean over t in [0.001, 1] with alpha = 1 - 0.999 t, nats a token."""
    return exact(model, clean, num_loops) / 0.999 / len(clean)
