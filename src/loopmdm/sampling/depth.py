"""Depth schedules: how many loops S a denoising step gets, as a function of how much is still masked.

Looping pays most at intermediate noise (LoopMDM, arXiv 2605.26106, section on depth), so a table S(t) can spend the
same FLOPs better than one S. `solve` fills it from a measured NELBO(t, S).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import check_loops
from ..errors import InputError

DEPTH_FILE = "depth.json"
"""The name of a model's own table, beside its weights."""


@dataclass(frozen=True)
class DepthTable:
    """S as a step function of t, the share of tokens still masked. `generate` takes one as its `num_loops`.

    Attributes:
        edges: n + 1 increasing numbers from 0 to 1; bin i is edges[i] < t <= edges[i + 1].
        loops: S of each bin, n whole numbers of at least 1.

    Raises:
        InputError: edges that do not rise from 0 to 1, or another number of S than of bins.
    """

    edges: Sequence[float]
    loops: Sequence[int]

    def __post_init__(self) -> None:
        try:
            edges, loops = list(self.edges), list(self.loops)
        except TypeError:
            raise InputError("a depth table is made of two lists, its edges and the S between them") from None
        if not all(isinstance(e, (int, float)) and not isinstance(e, bool) for e in edges):
            raise InputError(f"a depth table's edges are numbers, not {edges}")
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not all(a < b for a, b in pairwise(edges)):
            raise InputError(f"a depth table's edges rise from 0 to 1; these are {edges}")
        if len(loops) != len(edges) - 1:
            raise InputError(f"a depth table of {len(edges) - 1} bins needs as many S; it has {len(loops)}")
        for S in loops:
            check_loops(S, "a depth table's S")
        object.__setattr__(self, "edges", tuple(float(e) for e in edges))
        object.__setattr__(self, "loops", tuple(loops))

    def __call__(self, t: Tensor) -> Tensor:
        """Shares of masked tokens [B], in (0, 1] -> S int64 [B]."""
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64, device=t.device)
        return torch.tensor(self.loops, device=t.device)[torch.bucketize(t.double(), inner)]

    @classmethod
    def constant(cls, num_loops: int) -> DepthTable:
        """The same S at every t."""
        return cls((0, 1), (num_loops,))

    def to_json(self, **facts: Any) -> str:
        """The table as JSON; `facts` (where it comes from) are kept beside it and ignored by `from_json`."""
        return json.dumps({"edges": self.edges, "loops": self.loops, **facts}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DepthTable:
        """The table that `to_json` wrote; InputError if it is none."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"a depth table is JSON; this cannot be read ({error})") from None
        if not isinstance(found, dict) or not all(isinstance(found.get(k), list) for k in ("edges", "loops")):
            raise InputError("a depth table is a JSON object with the lists `edges` and `loops`")
        return cls(found["edges"], found["loops"])

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write `to_json` to a file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(self.to_json(**facts), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | Path) -> DepthTable:
        """Read a file that `save` wrote."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(f"cannot read {path}: {reason}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def solve(cost: Sequence[float], loss: Tensor, weights: Sequence[float], budget: float) -> list[int]:
    """Choose a column of `loss` for each bin: least total loss within a budget, by marginal gain per FLOP.

    Every bin starts at its cheapest column, and the affordable upgrade of best gain per FLOP is taken, to any dearer
    column at once, so that a step which is useless alone but leads to a good one is not a dead end. While all fit these
    are the steps along the lower convex hulls of (cost, loss), so at a budget that they spend exactly the choice is
    optimal. The same is tried from every constant column that fits, and the best result returned.

    Args:
        cost: FLOPs of a forward pass at each of K candidate S, above 0.
        loss: [bins, K], what each bin adds to the total (for the NELBO: its integral over the bin).
        weights: share of the forward passes that fall in each bin, [bins], above 0.
        budget: in (0, 1], FLOPs allowed as a share of those of the dearest column in every bin.

    Returns:
        For each bin the index of its column.

    Raises:
        InputError: shapes that disagree, numbers that are not finite, a budget that the cheapest column exceeds.
    """
    loss = torch.as_tensor(loss, dtype=torch.float64)
    if loss.dim() != 2 or loss.shape != (len(weights), len(cost)) or not loss.numel():
        raise InputError(f"loss is {list(loss.shape)}; expected [{len(weights)}, {len(cost)}], bins by candidate S")
    if not bool(loss.isfinite().all()):
        raise InputError("the measured losses are not all finite")
    if not all(0 < x < math.inf for x in (*cost, *weights)):
        raise InputError("costs and weights must be above 0 and finite")
    if not 0 < budget <= 1:
        raise InputError(f"budget is {budget}; it is a share of the FLOPs of the largest S, above 0 and at most 1")
    share = [w / sum(weights) for w in weights]
    limit = budget * max(cost) * (1 + 1e-12)
    cheapest = min(range(len(cost)), key=lambda k: cost[k])
    if cost[cheapest] > limit:
        raise InputError(
            f"budget is {budget}; the smallest S alone takes {cost[cheapest] / max(cost):.3f} of the FLOPs"
        )
    rows = loss.tolist()

    def spent(choice: Sequence[int]) -> float:
        return math.fsum(w * cost[k] for w, k in zip(share, choice, strict=True))

    def total(choice: Sequence[int]) -> float:
        return math.fsum(row[k] for row, k in zip(rows, choice, strict=True))

    def upgrade(choice: list[int]) -> list[int] | None:
        """The affordable upgrade of one bin with the best gain per FLOP, or None."""
        best, found = 0.0, None
        for b, row in enumerate(rows):
            now = choice[b]
            for k in range(len(cost)):
                if cost[k] > cost[now] and row[k] < row[now]:
                    rate = (row[now] - row[k]) / (share[b] * (cost[k] - cost[now]))
                    changed = [*choice[:b], k, *choice[b + 1 :]]
                    if rate > best and spent(changed) <= limit:
                        best, found = rate, changed
        return found

    def climb(choice: list[int]) -> list[int]:
        while (better := upgrade(choice)) is not None:
            choice = better
        return choice

    constants = [[k] * len(rows) for k in range(len(cost)) if cost[k] <= limit]  # the cheapest among them
    return min((climb(start) for start in constants), key=total)
