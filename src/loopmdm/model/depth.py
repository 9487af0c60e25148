"""How one pass visits the looped block: one S, an S a sequence, early exit, truncated backprop, checkpointing.

`Depth` is the request and, after the pass, what became of it; `RelativeChange` is the usual exit rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..config import check_loops
from ..errors import InputError, nearest

ExitRule = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
"""(h_prev, h, k, positions) -> bool [B], True where a sequence stops after visit k.

h_prev and h are the looped block's output after visits k - 1 and k (h^(0) is its input), [B, T, D]. positions is
bool [B, T] or None (all). A rule's attribute `over` says which ones it gets: "sequence" (the default: the real
tokens, None without padding) or "masked" (the positions that hold the mask). It sees only sequences that are still
in the batch, is asked after visits 1..S-1, and must judge each by itself.
"""

OVER = ("sequence", "masked")


@dataclass(eq=False)
class Depth:
    """How one pass visits the looped block and, when it is over, how it went. A pass overwrites the last one's record.

    Attributes:
        num_loops: S >= 1; or integers [B], one S a sequence; None is the model's `max_loops`.
        early_exit: `ExitRule` that may stop a sequence before its S. Costs one host synchronisation a visit.
        backprop_loops: gradients through the last k visits only: h^(S-k) is a constant (Huginn, arXiv 2502.05171).
            With the plain boundary and S > k nothing before the looped block gets a gradient; with the anchored one
            the prelude still does, through x0. Needs one S for the whole batch, no exit and one looped block.
        checkpoint: keep a visit's input only and compute the rest again in the backward pass.
        every: deep supervision: also keep what the model says after each visit. Needs one S and no exit.
        visits: int64 [B], visits of each sequence.
        outputs: with `every`, S tensors [B, T, D]: the k-th is the model's result at num_loops = k, so the last is
            the pass's own. (Of a `LoopedBlock` by itself: its state after each visit.)
    """

    num_loops: int | Tensor | None = None
    early_exit: ExitRule | None = None
    backprop_loops: int | None = None
    checkpoint: bool = False
    every: bool = False
    visits: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)


class RelativeChange:
    """Stop a sequence once a visit changes it little: ||h^k - h^(k-1)|| < tau ||h^k||, or not at all.

    Args:
        tau: threshold, at least 0; 0 never exits.
        min_loops: fewest visits of a sequence, at least 1. At 1 a sequence may leave after its first visit, which
            is then compared with the looped block's input.
        over: positions of the norms: a "sequence"'s real tokens, or its "masked" ones. A sequence that has none
            of them leaves after `min_loops`.

    Norms are over positions and D in at least fp32, of each sequence by itself.

    Raises:
        InputError: an argument outside its range.
    """

    def __init__(self, tau: float, min_loops: int = 2, over: str = "sequence") -> None:
        if not isinstance(tau, (int, float)) or isinstance(tau, bool) or not 0 <= tau < math.inf:
            raise InputError(f"tau is {tau!r}; it must be a finite number of at least 0")
        self.tau, self.min_loops, self.over = float(tau), check_loops(min_loops, "min_loops"), check_over(over)

    def __call__(self, h_prev: Tensor, h: Tensor, k: int, positions: Tensor | None) -> Tensor:
        """h_prev, h [B, T, D], positions bool [B, T] or None -> bool [B]."""
        if self.tau == 0 or k < self.min_loops:
            return torch.zeros(h.shape[0], dtype=torch.bool, device=h.device)
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return self.small(_norm(h - h_prev.to(h.dtype), positions), _norm(h, positions))

    def small(self, change: Tensor, size: Tensor) -> Tensor:
        """The comparison: norms of the change and of the state, [B] each -> bool [B]."""
        return (change < self.tau * size) | (change == 0)


def _norm(x: Tensor, positions: Tensor | None) -> Tensor:  # [B, T, D], [B, T] -> [B]
    if positions is not None:
        x = x.masked_fill(~positions[..., None], 0.0)
    return torch.linalg.vector_norm(x, dim=(1, 2))


def check_over(over: str) -> str:
    """Return the name of an exit rule's positions, or raise InputError."""
    if over not in OVER:
        raise InputError(f"over is {over!r}{nearest(str(over), OVER)}")
    return over


def planned(num_loops: int | Tensor | Depth | None, max_loops: int, batch: int) -> tuple[int | Tensor, Depth]:
    """The S of a batch and a checked copy of the request, its record empty.

    S is an int where all sequences make the same visits, known beforehand, and int64 [batch] on the host otherwise.
    """
    depth = num_loops if isinstance(num_loops, Depth) else Depth(num_loops)
    loops = max_loops if depth.num_loops is None else depth.num_loops
    if isinstance(loops, Tensor):
        if loops.shape != (batch,) or loops.dtype.is_floating_point or loops.dtype == torch.bool:
            raise InputError(
                f"num_loops is {loops.dtype} {list(loops.shape)}; it must be an S for each of the {batch} sequences, "
                f"integers [{batch}]"
            )
        loops = loops.cpu().long()
        check_loops(int(loops.min()) if batch else 1)
    else:
        loops = check_loops(loops)
    if depth.early_exit is not None:
        if not callable(depth.early_exit):
            raise InputError(f"early_exit is {depth.early_exit!r}; it must be a rule, as RelativeChange(0.01)")
        loops = torch.full((batch,), loops) if isinstance(loops, int) else loops
    if depth.backprop_loops is not None:
        check_loops(depth.backprop_loops, "backprop_loops")
    for name, wanted in (("backprop_loops", depth.backprop_loops is not None), ("every", depth.every)):
        if wanted and isinstance(loops, Tensor):
            raise InputError(f"{name} needs one S for the whole batch; leave out the exit rule and the S a sequence")
    return loops, dataclasses.replace(depth, num_loops=loops, visits=None, outputs=[])


def stops(rule: ExitRule, h_prev: Tensor, h: Tensor, k: int, positions: Tensor | None) -> Tensor:
    """What an exit rule decides after visit k, bool [B] on the host; InputError if it answers with anything else."""
    with torch.no_grad():
        stop = rule(h_prev, h, k, positions)
    if not isinstance(stop, Tensor) or stop.dtype != torch.bool or stop.shape != h.shape[:1]:
        got = f"{stop.dtype} {list(stop.shape)}" if isinstance(stop, Tensor) else repr(stop)
        raise InputError(f"the exit rule returned {got}; it must return bool [{len(h)}], one for each sequence")
    return stop.cpu()


class Walk(Protocol):
    """Visits of a batch that sequences leave one by one; `apart` counts them. Rows are int64 on the host."""

    def visit(self, k: int) -> None:
        """Make visit k = 1, 2, ... of the sequences that are left."""

    def stops(self, k: int) -> Tensor | None:
        """What the exit rule says after visit k, bool on the host; None without a rule."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the sequences that are left."""

    def output(self, rows: Tensor | None) -> tuple[Tensor | None, ...]:
        """Where these (None: all) of the sequences that are left are now; every tensor [rows, ...]."""


def apart(walk: Walk, limit: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Sequences leave the batch when they are done: the work is that of the mean S.

    Args:
        limit: the S of each sequence, int64 [B] on the host.

    Returns:
        The walk's output in the batch's order, and the visits of each sequence, int64 [B] on the host.
    """
    rows, visits, k = torch.arange(len(limit)), torch.zeros_like(limit), 0
    left: list[tuple[Tensor, tuple[Tensor | None, ...]]] = []
    while len(rows):
        k += 1
        walk.visit(k)
        done = limit[rows] <= k
        stop = None if bool(done.all()) else walk.stops(k)
        done = done if stop is None else done | stop
        if bool(done.all()):
            left.append((rows, walk.output(None)))
            visits[rows] = k
            break
        if bool(done.any()):
            gone, stay = (index.nonzero()[:, 0] for index in (done, ~done))
            visits[rows[gone]] = k
            left.append((rows[gone], walk.output(gone)))
            rows = rows[stay]
            walk.keep(stay)
    if len(left) <= 1:
        return walk.output(None), visits
    back = torch.cat([rows for rows, _ in left]).argsort()
    parts = zip(*(part for _, part in left), strict=True)
    return tuple(_together(part, back) for part in parts), visits


def _together(parts: tuple[Tensor | None, ...], back: Tensor) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held)[back.to(held[0].device)] if held else None
