"""Policies that mask filled positions again, so that early mistakes can be corrected. Prompts are never remasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import random
from ..errors import InputError, nearest, number
from .state import Looks, Move, Policy, Ranked, Score, State

ETA = {"cap": 0.008, "rescale": 0.015, "conf": 1.0, "loop": 0.02}
"""The eta of each strategy when none is given; the authors' settings for text."""


@dataclass(frozen=True)
class ReMDM(Policy):
    """Ancestral steps that also remask filled tokens with probability sigma (ReMDM, arXiv 2503.00307).

    From t to s a masked token is revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which
    leaves the marginals as they are for any sigma up to sigma_max = min(1, (1 - alpha_s) / alpha_t):

        cap      sigma = min(eta, sigma_max)
        rescale  sigma = eta sigma_max
        conf     sigma_i = eta sigma_max softmax(-psi)_i over the filled tokens, psi the confidence that a token had
                 when it was filled; masked ones are revealed as with sigma = 0 (as the authors' code has it)
        loop     alpha rises to alpha_on at t = t_on, stays there until t_off and then rises to 1; while it stays
                 sigma = min(eta, sigma_max), else 0

    Noise is compared by <. The last step fills what is left and remasks nothing. Positions need no logits, so the head
    runs on revealed rows only, and a step that only remasks runs no model.

    Attributes:
        strategy: "cap", "rescale", "conf" or "loop".
        eta: in [0, 1]; None is 0.008, 0.015, 1 and 0.02 for the four.
        t_on, t_off, alpha_on: of "loop"; 0 < t_off < t_on < 1 and 0 < alpha_on < 1.
    """

    strategy: str = "cap"
    eta: float | None = None
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    score: ClassVar[Score | None] = "confidence"
    remasks: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.strategy not in ETA:
            raise InputError(f"strategy is {self.strategy!r}{nearest(str(self.strategy), ETA)}")
        if self.eta is not None and number("eta", self.eta) > 1:
            raise InputError(f"eta is {self.eta}; the remasking rate must be in [0, 1]")
        for name in ("t_on", "t_off", "alpha_on"):
            number(name, getattr(self, name))
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            raise InputError(
                f"t_on, t_off and alpha_on are {self.t_on}, {self.t_off} and {self.alpha_on}; "
                "they must satisfy 0 < t_off < t_on < 1 and 0 < alpha_on < 1"
            )

    def choose(self, state: State, scores: Tensor | None = None) -> Move:
        filled = state.generated & ~state.masked
        t, s = (x[:, None] for x in state.interval)
        alpha_t, alpha_s = self._alpha(t, state), self._alpha(s, state)
        bound = ((1 - alpha_s) / alpha_t).clamp(max=1)  # sigma_max
        eta = ETA[self.strategy] if self.eta is None else self.eta
        sigma = eta * bound if self.strategy in ("rescale", "conf") else bound.clamp(max=eta)
        if self.strategy == "loop":
            sigma = torch.where((t <= self.t_on) & (t > self.t_off), sigma, 0.0)
        sigma = torch.where(state.last[:, None], 0.0, sigma)
        again = sigma if self.strategy != "conf" else sigma * _share(state.confidence, filled)
        kept = alpha_t if self.strategy == "conf" else (1 - sigma) * alpha_t
        chance = torch.where(state.last[:, None], 1.0, (alpha_s - kept) / (1 - alpha_t))
        reveal = state.masked & (state.noise(random.SAMPLE_POSITION) < chance)
        return Move(reveal, filled & (state.noise(random.REMASK) < again))

    def _alpha(self, t: Tensor, state: State) -> Tensor:
        if self.strategy != "loop":
            return state.schedule.alpha(t)
        on = state.schedule.inverse(torch.full_like(t, self.alpha_on))  # the schedule's own time of alpha_on
        rising = 1 - (1 - t) / (1 - self.t_on) * (1 - on)
        return state.schedule.alpha(torch.where(t > self.t_on, rising, (t / self.t_off).clamp(max=1) * on))


def _share(confidence: Tensor, filled: Tensor) -> Tensor:
    """softmax(-confidence) over the filled positions, float64 [B, T]; 0 elsewhere."""
    weight = torch.where(filled, (-confidence.double()).exp(), 0.0)
    return weight / weight.sum(-1, keepdim=True).clamp(min=0.1)  # a filled token weighs at least exp(-1)


@dataclass(frozen=True)
class P2(Policy):
    """Path planning with the model as its own planner (P2, arXiv 2502.03540, self-planning).

    After step j of S, floor(n (S - j - 1) / S) of the n generated positions are masked: those with the lowest
    score, log p of the proposed token where masked and eta log p of the token there where filled, of equal scores the
    higher positions. p is the confidence; scores are fp32. (The authors' code; eta multiplies a logarithm, so more eta
    is more remasking, 1 ranks all positions alike and 0 never remasks.)

    Attributes:
        eta: at least 0.
    """

    eta: float = 1.0

    looks: ClassVar[Looks] = "all"
    score: ClassVar[Score | None] = "confidence"
    remasks: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        number("eta", self.eta)

    def idle(self, state: State) -> Tensor:
        return state.left == 0  # all filled: and so it stays, since fewer are masked step by step

    def choose(self, state: State, scores: Tensor | None) -> Ranked:
        assert scores is not None
        masked_after = state.total * (state.steps - state.step - 1) // state.steps
        rank = scores.log()
        rank = torch.where(state.masked, rank, self.eta * rank if self.eta else torch.inf)
        return Ranked(rank, state.total - masked_after, remask=True)
