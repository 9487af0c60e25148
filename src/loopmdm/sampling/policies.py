"""Policies: which masked positions a denoising step reveals.

A policy says whether it looks at the model's predictions. One that does not chooses its positions
first, so the head runs on the revealed rows alone and a step that reveals nothing costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import random
from ..errors import InputError, nearest
from ..ops.select_topk import select_topk


@dataclass(frozen=True)
class State:
    """What a policy may read.

    Attributes:
        masked: bool [B, T], positions still masked.
        logical: int64 [B, T], position counted from the sequence's first real token.
        total: int64 [B], masked positions before the first step.
        step, steps: this step (0-based) and how many there are.
        row_seeds: int64 [B]; a sequence's noise depends on its own seed, not on its neighbours.
    """

    masked: Tensor
    logical: Tensor
    total: Tensor
    step: int
    steps: int
    row_seeds: Tensor


class Policy(Protocol):
    """A way to choose positions.

    Attributes:
        looks: whether `choose` reads the confidences. If not, it is called before the model runs.
        temperature: what tokens are sampled with unless the caller says otherwise.
    """

    looks: bool
    temperature: float

    def idle(self, state: State) -> bool:
        """True when this step reveals nothing whatever the model says, so that it need not run."""
        ...

    def choose(self, state: State, confidence: Tensor | None) -> Tensor:
        """bool [B, T], a subset of `state.masked`.

        `confidence` is fp32 [B, T], the probability of the token proposed at each masked position; None
        unless the policy looks.
        """
        ...


class Ancestral:
    """Reverse process of the log-linear schedule on the grid t_j = 1 - j / steps (MDLM, arXiv 2406.07524, sec. 3).

    Between t and s each masked token is revealed with probability (t - s) / t, independently of its
    value; the last step reveals what is left. Exact samples from the model as steps grow.
    """

    looks = False
    temperature = 1.0

    def idle(self, state: State) -> bool:
        return False  # the draw itself says, and it costs nothing

    def choose(self, state: State, confidence: Tensor | None = None) -> Tensor:
        probability = 1.0 / (state.steps - state.step)  # (t - s) / t with t = 1 - step / steps
        if probability == 1.0:
            return state.masked
        width = int(state.logical.max()) + 1
        rows = torch.zeros_like(state.row_seeds)
        noise = random.uniform(state.row_seeds, random.SAMPLE_POSITION, state.step, rows, width)
        return state.masked & (noise.gather(1, state.logical) < probability)


class Confidence:
    """The k most confident predictions of each sequence, k spread evenly over the steps (LLaDA's low_confidence).

    n masked tokens in S steps: n // S a step, one more in each of the first n % S steps. Ties go to the
    lower position.
    """

    looks = True
    temperature = 0.0

    def idle(self, state: State) -> bool:
        return not self.count(state).any()

    def choose(self, state: State, confidence: Tensor | None) -> Tensor:
        if confidence is None:
            raise InputError("the confidence policy needs the model's confidences")
        return select_topk(confidence, state.masked, self.count(state))

    @staticmethod
    def count(state: State) -> Tensor:
        """k of this step, int64 [B]."""
        return state.total // state.steps + (state.step < state.total % state.steps).long()


POLICIES: dict[str, type[Ancestral] | type[Confidence]] = {
    "ancestral": Ancestral,
    "origin": Ancestral,  # Dream's name
    "confidence": Confidence,
    "low_confidence": Confidence,  # LLaDA's name
    "maskgit_plus": Confidence,  # Dream's name
}


def build(policy: str | Policy) -> Policy:
    """A policy object from its name (the peers' names too), or the object itself."""
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise InputError(f"unknown policy {policy!r}{nearest(policy, POLICIES)}")
    return POLICIES[policy]()
