"""What passes between the engine and a policy: a State goes in, a Move comes out.

A policy says what it looks at. One that looks at nothing chooses its positions first, so that the head runs on the
revealed rows alone and a step that reveals nothing costs nothing. One that looks returns a `Ranked` as a rule: a key to
rank by and a rule of how many, both by name of `ops.select_scatter`, so that a new policy needs no new kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .. import random
from ..diffusion.schedule import Schedule

Looks = Literal["nothing", "masked", "all"]
Score = Literal["confidence", "margin", "entropy"]


@dataclass(frozen=True)
class State:
    """What a policy may read. With blocks everything is about the current block of each sequence.

    Attributes:
        masked: bool [B, T], positions still masked.
        generated: bool [B, T], positions that were masked before the first step; what a policy may fill and remask.
        total: int64 [B], how many of those there are.
        step, steps: int64 [B], this step (0-based) and how many there are. With as many steps as it takes,
            `steps` is such that one token a step is enough.
        block: int64 [B], number of the current block, 0-based.
        clock: this step of the whole generation, the same for all sequences; it keys the noise. May be an int64 tensor.
        row_seeds: int64 [B]; a sequence's noise depends on its own seed, not on its neighbours.
        confidence: fp32 [B, T], for a policy with a `score`: that of each filled position when it was filled.
        schedule: noise schedule, for policies that follow the reverse process.
        positions: int64 [B, T], of each column, counted from the sequence's first real token; None: the columns.
    """

    masked: Tensor
    generated: Tensor
    total: Tensor
    step: Tensor
    steps: Tensor
    block: Tensor
    clock: int | Tensor
    row_seeds: Tensor
    confidence: Tensor
    schedule: Schedule
    positions: Tensor | None = None

    def select(self, rows: Tensor) -> State:
        """The state of some sequences: rows is bool [B] or int64 [N]."""
        per_row: dict[str, Any] = {k: v[rows] for k, v in vars(self).items() if isinstance(v, Tensor) and v.ndim}
        return replace(self, **per_row)

    @property
    def left(self) -> Tensor:
        """int64 [B], masked positions."""
        return self.masked.sum(-1)

    @property
    def even_share(self) -> Tensor:
        """int64 [B], n tokens spread over S steps: n // S each, one more in each of the first n % S."""
        return self.total // self.steps + (self.step < self.total % self.steps).long()

    @property
    def least(self) -> Tensor:
        """int64 [B], ceil(left / steps left): the fewest tokens a step that still finish in time; at least 1."""
        steps_left = (self.steps - self.step).clamp(min=1)
        return (-(-self.left // steps_left)).clamp(min=1)

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """(t, s) float64 [B] of the grid t_j = 1 - j / steps: this step goes from t to s < t."""
        step, steps = self.step.double(), self.steps.double()
        return 1 - step / steps, 1 - (step + 1) / steps

    @property
    def last(self) -> Tensor:
        """bool [B], whether this step must fill what is left."""
        return self.step >= self.steps - 1

    def noise(self, stream: int) -> Tensor:
        """fp32 [B, T] in (0, 1), keyed by the sequence's seed, the stream, the clock and the position."""
        row = torch.zeros_like(self.row_seeds)
        places = self.masked.shape[1] if self.positions is None else self.positions
        return random.uniform(self.row_seeds, stream, self.clock, row, places)


class Move(NamedTuple):
    """What a step does: `reveal` bool [B, T] within `state.masked`; `remask` within the filled rest of `generated`."""

    reveal: Tensor
    remask: Tensor | None = None


class Ranked(NamedTuple):
    """What a step does, as a ranking: the masked positions by falling key, ties to the lower position, NaN last.

    Attributes:
        keys: fp32 [B, T].
        k: int64 [B], at least so many are revealed.
        rule: of `ops.select_scatter`: more are while it holds for the next one; "top_k" is none.
        bound: its parameter, a number or float64 [B].
        remask: rank the filled positions of `generated` too, and mask those that are not taken.
    """

    keys: Tensor
    k: Tensor
    rule: str = "top_k"
    bound: float | Tensor = 0.0
    remask: bool = False


class Policy:
    """A way to choose positions; subclasses give `choose`.

    Attributes:
        looks: "nothing": `choose` is called before the model runs, with None; "masked" or "all": it gets the scores
            of the masked, or of all generated positions, and the head runs on all of these.
        score: which ones, "confidence" (probability of the proposed token, or of the one that is there), "margin"
            (first minus second probability) or "entropy" (nats): of the distribution without temperature and filters.
            A policy that looks at nothing may name one to find it in `state.confidence`.
        adaptive: whether `steps=None` means as many steps as it takes rather than 64. Such a policy reveals at least
            `state.least` tokens a step.
        remasks: whether a `Move` may have a `remask`; a sequence then stays until the last step.
        temperature: what tokens are sampled with unless the caller says otherwise.
    """

    looks: ClassVar[Looks] = "nothing"
    score: ClassVar[Score | None] = None
    adaptive: ClassVar[bool] = False
    remasks: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0

    def idle(self, state: State) -> Tensor:
        """bool [B], True where this step does nothing whatever the model says, so that it need not run.

        Asked only of a policy that looks; what another reveals says it.
        """
        return torch.zeros_like(state.total, dtype=torch.bool)

    def time(self, state: State) -> Tensor | None:
        """float64 [B] in (0, 1], the time that a time-conditioned model is told; None is the engine's own."""
        return None

    def choose(self, state: State, scores: Tensor | None) -> Move | Ranked:
        """The step's move; scores is fp32 [B, T], meaningless where the policy does not look.

        A policy that looks at nothing returns a `Move`.
        """
        raise NotImplementedError
