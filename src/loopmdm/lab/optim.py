"""Optimizers, learning-rate schedules and weight averaging of the recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..errors import InputError, nearest

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("constant", "linear", "cosine")


def build_optimizers(model: nn.Module, name: str, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or torch's Muon on the weight matrices of the blocks and AdamW on the rest.

    Args:
        name: "adamw" or "muon".
        lr: AdamW's peak rate; matrix_lr: Muon's.
    """
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]
    if name != "muon":
        raise InputError(f"optimizer is {name!r}{nearest(name, OPTIMIZERS)}")
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for key, parameter in model.named_parameters():
        outside = parameter.dim() != 2 or any(part in key for part in ("embed", "lm_head", "modulation"))
        (rest if outside else matrices).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def rate(progress: float, step: int, warmup: int, decay: str = "linear", tail: float = 0.4) -> float:
    """Multiplier of the peak learning rate.

    Args:
        progress: share of training done, in [0, 1].
        step: step number from 0; warm-up is linear over the first `warmup` steps.
        decay: "constant", "linear" or "cosine" down to 0 over the last `tail` of training.
    """
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = min(1.0, max(0.0, (1.0 - progress) / tail)) if tail else 1.0
    if decay == "constant":
        return up
    if decay == "linear":
        return up * left
    if decay == "cosine":
        return up * 0.5 * (1 - math.cos(math.pi * left))
    raise InputError(f"decay is {decay!r}{nearest(decay, DECAYS)}")


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, its decay warmed up as min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(average: Iterable[Tensor], current: Iterable[Tensor], count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(list(average), list(current), 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update)
