"""Optimizers, learning-rate schedules, weight averaging and the loss-spike guard of the recipes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..errors import InputError, nearest

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("constant", "linear", "cosine")


def build_optimizers(
    model: nn.Module, name: str, lr: float, matrix_lr: float, weight_decay: float = 0.0, beta2: float = 0.99
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or torch's Muon on the weight matrices of the blocks and AdamW on the rest.

    Args:
        name: "adamw" or "muon".
        lr: AdamW's peak rate; matrix_lr: Muon's.
        weight_decay: decoupled, of matrices and embeddings; gains and biases are left out.
        beta2: AdamW's.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer is {name!r}{nearest(name, OPTIMIZERS)}")
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for key, parameter in model.named_parameters():
        outside = parameter.dim() != 2 or any(part in key for part in ("embed", "lm_head", "modulation"))
        (rest if outside or name == "adamw" else matrices).append(parameter)
    decayed, kept = ([p for p in rest if (p.dim() > 1) is large] for large in (True, False))
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, beta2))
    return [adamw] if name == "adamw" else [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=weight_decay), adamw]


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


class SpikeGuard:
    """Says which updates to skip: a loss or gradient that is not finite, or a gradient far above what is usual.

    "Usual" is the median norm of the last WINDOW updates that were made; it is not judged before there are LEAST.

    Args:
        factor: times that median; None lets every finite gradient pass.
    """

    WINDOW, LEAST, PATIENCE = 64, 16, 10

    def __init__(self, factor: float | None = None) -> None:
        self.factor = factor
        self.norms: list[float] = []
        self.skipped, self.in_a_row = 0, 0

    def refuses(self, loss: float, norm: float) -> str | None:
        """Why the update must be skipped, or None. To be asked once a step."""
        why = None
        if not math.isfinite(loss):
            why = f"the loss became {loss}"
        elif not math.isfinite(norm):
            why = f"the gradient's norm became {norm}"
        elif self.factor is not None and len(self.norms) >= self.LEAST:
            usual = statistics.median(self.norms)
            if norm > self.factor * usual:
                why = f"the gradient's norm became {norm:.3g}, {norm / usual:.0f} times the usual"
        if why is None:
            self.in_a_row = 0
            self.norms = [*self.norms[1 - self.WINDOW :], norm]
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return why

    @property
    def exhausted(self) -> bool:
        """Whether PATIENCE updates in a row had to be skipped: the run has diverged."""
        return self.in_a_row >= self.PATIENCE

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms, self.skipped, self.in_a_row = list(state["norms"]), state["skipped"], state["in_a_row"]
