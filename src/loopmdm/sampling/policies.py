"""Policies that only reveal, and the names of all policies (those that also remask are in remask.py).

A policy that looks at scores is a pair (key, rule): fp32 keys, of equal ones the lower position first
(`ops.select_scatter`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import random
from ..errors import InputError, nearest, number
from ..ops.select_topk import select_topk
from .remask import P2, ReMDM
from .state import Looks, Move, Policy, Ranked, Score, State


@dataclass(frozen=True)
class Ancestral(Policy):
    """Reverse process on the grid t_j = 1 - j / steps (MDLM, arXiv 2406.07524, section 3).

    Between t and s each masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), independently
    of its value, compared by < with its noise; with the linear schedule that is (t - s) / t. The last step reveals
    what is left. Exact samples from the model as steps grow.

    MDLM's cached sampler ("ddpm_cache") reuses the last prediction while nothing changes. Steps that reveal nothing
    never run the model here, which saves the same passes and also holds for time-conditioned models.
    """

    temperature: ClassVar[float] = 1.0

    def choose(self, state: State, scores: Tensor | None = None) -> Move:
        alpha_t, alpha_s = (state.schedule.alpha(x) for x in state.interval)
        chance = torch.where(state.last, 1.0, (alpha_s - alpha_t) / (1 - alpha_t))
        return Move(state.masked & (state.noise(random.SAMPLE_POSITION) < chance[:, None]))


@dataclass(frozen=True)
class FirstHitting(Policy):
    """The reverse process in continuous time, token by token (first-hitting sampler, arXiv 2409.02908).

    With n tokens masked at t_n the next one is revealed at the t where 1 - alpha_t = u^(1/n) (1 - alpha_(t_n)), u
    uniform (t_n u^(1/n) with the linear schedule), and it is any of the n with equal probability. So nfe is the number
    of tokens and the samples are exact. A time-conditioned model is told these times.

    With fewer `steps` than tokens, ceil(left / steps left) tokens share a pass at the first one's time. With blocks
    the times start from 1 in each.
    """

    adaptive: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0

    def choose(self, state: State, scores: Tensor | None = None) -> Move:
        return Move(select_topk(state.noise(random.HIT), state.masked, state.least))

    def time(self, state: State) -> Tensor:
        T = state.masked.shape[1]
        # index 0 is where the positions come from
        u = random.uniform(state.row_seeds, random.HIT, 0, 1 + state.block, T).double()
        n = (state.total[:, None] - torch.arange(T, device=u.device)).clamp(min=1)
        hit = (u.log() / n).cumsum(-1).gather(1, (state.total - state.left)[:, None])[:, 0]
        one = torch.ones_like(hit)
        return state.schedule.inverse(1 - (1 - state.schedule.alpha(one)) * hit.exp())


@dataclass(frozen=True)
class Random(Policy):
    """n tokens spread evenly over the steps (`State.even_share`), each step's positions at random (LLaDA's random)."""

    def choose(self, state: State, scores: Tensor | None = None) -> Move:
        return Move(select_topk(state.noise(random.SAMPLE_POSITION), state.masked, state.even_share))


@dataclass(frozen=True)
class LeftToRight(Policy):
    """n tokens spread evenly over the steps (`State.even_share`), the leftmost first: autoregressive order."""

    def choose(self, state: State, scores: Tensor | None = None) -> Move:
        return Move(state.masked & (state.masked.cumsum(-1) <= state.even_share[:, None]))


@dataclass(frozen=True)
class Confidence(Policy):
    """The most confident predictions, n tokens spread evenly over the steps (LLaDA's low_confidence).

    n // S tokens a step and one more in each of the first n % S, for each sequence by itself.
    """

    looks: ClassVar[Looks] = "masked"
    score: ClassVar[Score | None] = "confidence"

    def idle(self, state: State) -> Tensor:
        return state.even_share == 0

    def choose(self, state: State, scores: Tensor | None) -> Ranked:
        assert scores is not None
        return Ranked(self.keys(scores), state.even_share)

    def keys(self, scores: Tensor) -> Tensor:
        """What is ranked, largest first."""
        return scores


@dataclass(frozen=True)
class Margin(Confidence):
    """As Confidence, by the first minus the second probability (Dream's topk_margin)."""

    score: ClassVar[Score | None] = "margin"


@dataclass(frozen=True)
class Entropy(Confidence):
    """As Confidence, the lowest entropy first (Dream's entropy)."""

    score: ClassVar[Score | None] = "entropy"

    def keys(self, scores: Tensor) -> Tensor:
        return -scores


@dataclass(frozen=True)
class Threshold(Policy):
    """Every prediction whose confidence is >= tau, and the best one always (Fast-dLLM, arXiv 2505.22618).

    Compared in fp32, tau rounded to it.

    Attributes:
        tau: a probability; above 1 reveals one token a step.
    """

    tau: float = 0.9

    looks: ClassVar[Looks] = "masked"
    score: ClassVar[Score | None] = "confidence"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("tau", self.tau)

    def choose(self, state: State, scores: Tensor | None) -> Ranked:
        assert scores is not None
        return Ranked(scores, state.least, "threshold", self.tau)


@dataclass(frozen=True)
class Factor(Policy):
    """The n most confident predictions, n the largest for which each i-th of them (i = 1..n) has confidence
    >= 1 - factor / (i + 1); the first always (Fast-dLLM's factor, arXiv 2505.22618).

    Compared in float64. (The authors' code takes one more when the rule holds for all but the last.)

    Attributes:
        factor: at least 0; larger is faster.
    """

    factor: float = 1.0

    looks: ClassVar[Looks] = "masked"
    score: ClassVar[Score | None] = "confidence"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("factor", self.factor)

    def choose(self, state: State, scores: Tensor | None) -> Ranked:
        assert scores is not None
        return Ranked(scores, state.least, "factor", self.factor)


@dataclass(frozen=True)
class EntropyBound(Policy):
    """The lowest entropies while their sum without the largest is <= gamma (EB-Sampler, arXiv 2505.24857).

    That bounds the mutual information among tokens that are revealed together as if they were independent. The first
    always goes. Entropies are fp32, each rounded up to a multiple of 2^-36 nats before they are summed.

    Attributes:
        gamma: nats, at least 0; larger is faster.
    """

    gamma: float = 0.1

    looks: ClassVar[Looks] = "masked"
    score: ClassVar[Score | None] = "entropy"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("gamma", self.gamma)

    def choose(self, state: State, scores: Tensor | None) -> Ranked:
        assert scores is not None
        return Ranked(-scores, state.least, "sum", self.gamma)


POLICIES: dict[str, type[Policy]] = {
    "ancestral": Ancestral,
    "ancestral_cache": Ancestral,
    "ddpm_cache": Ancestral,  # MDLM's name
    "origin": Ancestral,  # Dream's name
    "first_hitting": FirstHitting,
    "random": Random,
    "left_to_right": LeftToRight,
    "confidence": Confidence,
    "low_confidence": Confidence,  # LLaDA's name
    "maskgit_plus": Confidence,  # Dream's name
    "entropy": Entropy,
    "margin": Margin,
    "topk_margin": Margin,  # Dream's name
    "threshold": Threshold,
    "factor": Factor,
    "eb": EntropyBound,
    "remdm": ReMDM,
    "p2": P2,
}


def build(policy: str | Policy) -> Policy:
    """A policy object from its name (the peers' names too), or the object itself.

    Arguments may follow a name: "threshold:0.8", "remdm:loop,eta=0.05".

    Raises:
        InputError: an unknown name, arguments that do not fit, or something that is no `Policy`.
    """
    if not isinstance(policy, str):
        if not isinstance(policy, Policy):
            raise InputError(f"policy is {policy!r}; it must be a name or an object of a class derived from Policy")
        return policy
    name, _, rest = policy.partition(":")
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}{nearest(name, POLICIES)}")
    fields = [f.name for f in dataclasses.fields(POLICIES[name])]  # type: ignore[arg-type]
    given: dict[str, float | str] = {}
    for place, word in enumerate(rest.split(",") if rest else []):
        key, equals, value = word.partition("=")
        if not equals:
            key, value = (fields[place] if place < len(fields) else word), word
        if key not in fields:
            takes = f"it takes {', '.join(fields)}" if fields else "it takes none"
            raise InputError(f"policy {name!r} has no argument {key!r}; {takes}")
        try:
            given[key] = float(value) if key != "strategy" else value
        except ValueError:
            raise InputError(f"{key} of policy {name!r} is {value!r}; it must be a number") from None
    return POLICIES[name](**given)
