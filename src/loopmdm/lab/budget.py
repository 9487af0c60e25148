"""What `loopmdm schedule` does: measure NELBO(t, S), spend a FLOPs budget over t, and check it on other text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.bounds import TimeProfile, ratio
from ..errors import InputError
from ..sampling.depth import DepthTable, solve
from .evaluate import finite

SURE = 2.0
"""Standard errors that a gain must reach before it counts."""


@dataclass(frozen=True)
class Spending:
    """A depth table and what it is worth on text that it was not solved on.

    Attributes:
        table: S by t.
        nelbo, error: of the table, nats a token and its standard error over the windows.
        share: its FLOPs as a share of those of the largest S everywhere.
        same_cost: (name, NELBO, gain of the table, its error) of constant S at the table's cost: a constant S that was
            measured, or the mixture of the two nearest that costs as much.
        deepest: the same of the largest S.
    """

    table: DepthTable
    nelbo: float
    error: float | None
    share: float
    same_cost: tuple[str, float, float, float | None]
    deepest: tuple[str, float, float, float | None]

    @property
    def sure(self) -> bool:
        """Whether the table beats constant S of its cost by more than the error."""
        _, _, gain, error = self.same_cost
        return error is not None and gain > SURE * error

    def facts(self) -> dict[str, Any]:
        """For `depth.json`."""

        def row(values: tuple[str, float, float, float | None]) -> dict[str, Any]:
            return dict(zip(("loops", "nelbo", "gain", "gain_error"), values, strict=True))

        return {
            "nelbo": self.nelbo,
            "error": self.error,
            "flops_share": self.share,
            "constant_of_the_same_cost": row(self.same_cost),
            "largest_constant": row(self.deepest),
        }


def check(windows: int, cost: Sequence[float], budget: float) -> None:
    """What `spend` would refuse, said before anything is measured.

    Raises:
        InputError: fewer than 4 windows, which leave no error to a half; a budget that the smallest S exceeds.
    """
    if windows < 4:
        raise InputError(
            f"{windows} windows cannot be split into a part to solve on and a part to check on; give more text"
        )
    solve(cost, torch.zeros(1, len(cost)), [1.0], budget)


def halves(profile: TimeProfile) -> tuple[TimeProfile, TimeProfile]:
    """The even and the odd windows of a measurement."""

    def part(rows: slice) -> TimeProfile:
        fields = ("nats", "tokens", "masked", "masked_nats")
        return dataclasses.replace(profile, **{name: getattr(profile, name)[..., rows] for name in fields})

    return part(slice(0, None, 2)), part(slice(1, None, 2))


def spend(profile: TimeProfile, cost: Sequence[float], budget: float) -> Spending:
    """Solve on one half of the windows and judge on the other.

    Args:
        profile: measured in bins of t that cover all of it.
        cost: FLOPs of a pass at each of `profile.loops`.
        budget: see `solve`.

    Raises:
        InputError: see `check`.
    """
    check(len(profile.tokens), cost, budget)
    first, second = halves(profile)
    weights = profile.share.tolist()
    choice = solve(cost, first.contribution, weights, budget)
    edges = [0.0, *profile.edges.tolist()[1:-1], 1.0]
    table = DepthTable(edges, [profile.loops[k] for k in choice])
    spent = sum(w * cost[k] for w, k in zip(weights, choice, strict=True))
    values = total(second, choice)
    mean, error = ratio(values, second.tokens)

    def against(name: str, other: Tensor) -> tuple[str, float, float, float | None]:
        gain, gap = ratio(other - values, second.tokens)
        return name, float(ratio(other, second.tokens)[0]), float(gain), finite(gap)

    def constant(k: int) -> Tensor:
        return total(second, [k] * len(weights))

    order = sorted(range(len(cost)), key=lambda k: cost[k])
    low = max((k for k in order if cost[k] <= spent * (1 + 1e-9)), key=lambda k: cost[k])
    high = min((k for k in order if cost[k] >= spent * (1 - 1e-9)), key=lambda k: cost[k])
    S = profile.loops
    if low == high:
        same = against(f"S = {S[low]}", constant(low))
    else:
        part = (spent - cost[low]) / (cost[high] - cost[low])
        mixed = (1 - part) * constant(low) + part * constant(high)
        same = against(f"S = {S[low]} in {1 - part:.0%} of the steps, else {S[high]}", mixed)
    top = order[-1]
    return Spending(table, float(mean), finite(error), spent / cost[top], same, against(f"S = {S[top]}", constant(top)))


def total(profile: TimeProfile, choice: Sequence[int]) -> Tensor:
    """NELBO of each window with column choice[b] in bin b, nats of the whole window, float64 [N]."""
    picked = profile.nats[torch.arange(len(choice)), torch.tensor(list(choice))]
    return (profile.share[:, None] * picked).sum(0)
