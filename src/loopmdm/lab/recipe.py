"""How a model is trained: the settings of a run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import random
from ..config import check_loops
from ..diffusion import SCHEDULES, T_MIN
from ..errors import InputError, nearest
from ..model.depth import Depth
from .optim import DECAYS, OPTIMIZERS

DISTRIBUTIONS = ("uniform", "inverse_flops")
CHOICES = {
    "optimizer": OPTIMIZERS,
    "decay": DECAYS,
    "schedule": tuple(SCHEDULES),
    "objective": ("nelbo", "masked_mean"),
    "average": ("token", "sequence"),
    "loop_distribution": DISTRIBUTIONS,
    "precision": ("no", "bf16", "fp16"),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences a step, over all processes and micro-batches.
        accumulate: micro-batches a step on each process.
        optimizer: "adamw" with lr, or "muon" with matrix_lr on weight matrices and lr elsewhere.
        lr: AdamW's peak rate.
        matrix_lr: Muon's peak rate.
        warmup: linear warm-up, steps.
        decay: "constant", "linear" or "cosine", down to 0 over the last decay_share of the steps.
        decay_share: see decay, in [0, 1].
        weight_decay: decoupled, of weight matrices and embeddings; gains and biases are left out.
        beta2: AdamW's second-moment decay.
        clip: gradient-norm bound.
        spike_guard: skip an update whose gradient norm is above this many times the median of the last 64; None
            skips only what is not finite.
        ema: decay of the weight average that is evaluated and saved; 0 keeps the raw weights.
        objective: "nelbo", or "masked_mean", the mean over all masked tokens of the step (`loopmdm.nelbo`).
        average: over the step's "token"s, or within each "sequence" first (`loopmdm.nelbo`).
        schedule: of noise: "linear", "cosine" or "polynomial".
        t_start: upper end of t at first; it grows to 1 over the first t_ramp of the steps.
        t_ramp: see t_start, a share in [0, 1].
        loops: S of every step; None draws it.
        loop_distribution: of the drawn S in 1..max_loops: "uniform", or "inverse_flops", p(S) proportional to 1 / F(S).
        backprop_loops: gradients through the last that many visits only; None is all.
        checkpoint_loops: recompute each visit in the backward pass instead of keeping its activations.
        deep_supervision: the loss is the mean of the losses read after each visit.
        seed: of everything random.
        precision: accelerate's "no", "bf16" or "fp16".
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-4
    matrix_lr: float = 0.02
    warmup: int = 100
    decay: str = "linear"
    decay_share: float = 0.4
    weight_decay: float = 0.0
    beta2: float = 0.99
    clip: float = 1.0
    spike_guard: float | None = None
    ema: float = 0.999
    objective: str = "nelbo"
    average: str = "token"
    schedule: str = "linear"
    t_start: float = 1.0
    t_ramp: float = 0.0
    loops: int | None = None
    loop_distribution: str = "uniform"
    backprop_loops: int | None = None
    checkpoint_loops: bool = False
    deep_supervision: bool = False
    seed: int = 0
    precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "matrix_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name, options in CHOICES.items():
            if getattr(self, name) not in options:
                raise InputError(f"{name} is {getattr(self, name)!r}{nearest(str(getattr(self, name)), options)}")
        if self.warmup < 0:
            raise InputError(f"warmup is {self.warmup}; it must be at least 0")
        for name in ("decay_share", "t_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must be in [0, 1)")
        if not T_MIN < self.t_start <= 1:
            raise InputError(f"t_start is {self.t_start}; it must be above {T_MIN} and at most 1")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay is {self.weight_decay}; it must be at least 0 and finite")
        if not 0 < self.beta2 < 1:
            raise InputError(f"beta2 is {self.beta2}; it must be in (0, 1)")
        if self.spike_guard is not None and not 1 < self.spike_guard < math.inf:
            raise InputError(f"spike_guard is {self.spike_guard}; it must be above 1 and finite")
        for name in ("loops", "backprop_loops"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_loops(getattr(self, name), name))
        random.signed(self.seed)

    def t_range(self, step: int) -> tuple[float, float]:
        ramp = self.t_ramp * self.steps
        share = min(1.0, step / ramp) if ramp else 1.0
        return (T_MIN, self.t_start + (1 - self.t_start) * share)

    @property
    def depth(self) -> Depth | None:
        """How a training pass visits the looped block, where that is not the plain way."""
        if self.backprop_loops is None and not self.checkpoint_loops and not self.deep_supervision:
            return None
        return Depth(backprop_loops=self.backprop_loops, checkpoint=self.checkpoint_loops, every=self.deep_supervision)
