"""Noise schedules: the share alpha_t of tokens still clean at time t in [0, 1], and what follows from it.

Every schedule here is alpha_t = 1 - (1 - eps) (1 - a(t)) with a falling from a(0) = 1 to a(1) = 0, so that
alpha_1 = eps is not 0 and sigma is finite. The weight is -alpha'_t / (1 - alpha_t) = -a'(t) / (1 - a(t)): eps cancels.

The NELBO is an integral over alpha, so it does not depend on the schedule (MD4, arXiv 2406.04329, section 3; MDLM,
arXiv 2406.07524, section 3.5); the variance of its estimate, and where training looks most, do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import InputError, nearest, number

EPS = 1e-3


@runtime_checkable
class Schedule(Protocol):
    """What losses, bounds and time-conditioned models need; all four are elementwise and keep shape and dtype."""

    def alpha(self, t: Tensor) -> Tensor:
        """Share of tokens still clean at time t in [0, 1]; it never rises."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """w(t) = -alpha'_t / (1 - alpha_t), t in (0, 1]."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level -log(alpha_t), what a time-conditioned model reads."""
        ...

    def inverse(self, alpha: Tensor) -> Tensor:
        """The t at which a share alpha is clean; what alpha never reaches gives the nearer end, 0 or 1."""
        ...


@dataclass(frozen=True)
class Scaled:
    """alpha = eps + (1 - eps) a(t): a subclass gives a (`clean`), its inverse (`time`) and -a' / (1 - a) (`weight`).

    Attributes:
        eps: alpha at t = 1, in [0, 1).
    """

    eps: float = EPS

    def __post_init__(self) -> None:
        if number("eps", self.eps) >= 1:
            raise InputError(f"eps is {self.eps}; the share of tokens still clean at t = 1 must be in [0, 1)")

    def alpha(self, t: Tensor) -> Tensor:
        return self.eps + (1 - self.eps) * self.clean(t)

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log(self.alpha(t))

    def inverse(self, alpha: Tensor) -> Tensor:
        return self.time(((alpha - self.eps) / (1 - self.eps)).clamp(0, 1))

    def clean(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def weight(self, t: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Scaled):
    """a(t) = 1 - t, weight 1 / t. MDLM calls it log-linear, after its sigma."""

    def clean(self, t: Tensor) -> Tensor:
        return 1 - t

    def time(self, a: Tensor) -> Tensor:
        return 1 - a

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t


LogLinear = Linear


@dataclass(frozen=True)
class Cosine(Scaled):
    """a(t) = 1 - cos(pi/2 (1 - t)), weight pi/2 tan(pi/2 (1 - t)): more time at much noise (MD4, table 1)."""

    def clean(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2  # 1 - cos without its cancellation at t = 1

    def time(self, a: Tensor) -> Tensor:
        return 1 - 4 / math.pi * torch.asin(torch.sqrt(a / 2))

    def weight(self, t: Tensor) -> Tensor:
        # cos(pi/2 (1 - t)) written as a sine of t, which keeps its digits at t = 0
        return math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)) / torch.sin(math.pi / 2 * t)


@dataclass(frozen=True)
class Polynomial(Scaled):
    """a(t) = 1 - t^power, weight power / t (MD4, table 1). At power 1 it is Linear.

    Attributes:
        power: above 0; above 1 more time at little noise, below 1 at much.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if number("power", self.power) == 0:
            raise InputError(f"power is {self.power}; it must be a number above 0")

    def clean(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.power * torch.log(t))  # 1 - t^power without its cancellation at t = 1

    def time(self, a: Tensor) -> Tensor:
        return torch.exp(torch.log1p(-a) / self.power)

    def weight(self, t: Tensor) -> Tensor:
        return self.power / t


SCHEDULES = {
    "linear": Linear,
    "log_linear": Linear,
    "loglinear": Linear,
    "cosine": Cosine,
    "polynomial": Polynomial,
}


def build_schedule(schedule: str | Schedule) -> Schedule:
    """The schedule of that name at its defaults, or the one given.

    Raises:
        InputError: an unknown name, or an object that is no `Schedule`.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise InputError(f"there is no schedule {schedule!r}{nearest(schedule, SCHEDULES)}")
        return SCHEDULES[schedule]()
    if not isinstance(schedule, Schedule) or isinstance(schedule, type):
        raise InputError(f"schedule is {schedule!r}; it must be a name or have alpha, weight, sigma and inverse")
    return schedule
