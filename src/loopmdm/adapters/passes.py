"""What one pass tells the layers beside the arguments that the codebase passes: its padding and the S of its loops.

A pass belongs to the thread that makes it. Activation checkpointing computes layers again in the backward pass, when
the pass is over and perhaps in another thread: `remember` lets them find it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..model.depth import Depth

if TYPE_CHECKING:
    from .splice import Loop

Loops = int | Tensor | Depth | Callable[[], int]
"""S; integers [B], an S a sequence; a `Depth`; or a schedule, called once a pass for its S."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass.

    Attributes:
        mask: bool, broadcastable to [B, 1, T, T], True where a query may look at a key.
        loops: looped runs with their S in this pass and bool [B, T], the positions that an exit rule looks at (None is
            all). A run that is not among them has its own S.
    """

    mask: Tensor | None = None
    loops: tuple[tuple[Loop, Loops, Tensor | None], ...] = ()

    def of(self, loop: Loop) -> tuple[Loops, Tensor | None]:
        """The S of a looped run and the positions for its exit rule."""
        for other, num_loops, positions in self.loops:
            if other is loop:
                return num_loops, positions
        return loop.num_loops, None

    def with_loop(self, loop: Loop, num_loops: Loops, positions: Tensor | None) -> Pass:
        """The same pass with other settings of one looped run."""
        others = tuple(entry for entry in self.loops if entry[0] is not loop)
        return replace(self, loops=(*others, (loop, num_loops, positions)))


class _Here(threading.local):
    """A thread's pass and the backward pass in which it began; no ContextVar, since torch.compile cannot read one."""

    now: Pass | None = None
    task: int = -1


_HERE, _NONE = _Here(), Pass()
_REMEMBERED: WeakValueDictionary[int, Pass] = WeakValueDictionary()  # by the id of the backward pass


def current() -> Pass:
    """The pass that this thread makes; within a backward pass the one that layers are computed again for."""
    if not torch.compiler.is_compiling() and (task := _task()) not in (-1, _HERE.task):
        remembered = _REMEMBERED.get(task)
        if remembered is not None:
            return remembered
    return _NONE if _HERE.now is None else _HERE.now


@contextmanager
def during(now: Pass) -> Iterator[None]:
    """Let this thread make a pass for a while."""
    before = _HERE.now, _HERE.task
    _HERE.now, _HERE.task = now, _task()
    try:
        yield
    finally:
        _HERE.now, _HERE.task = before


def remember(out: Any, now: Pass) -> None:
    """Let what is computed again in a backward pass through `out`, a pass's result, find the pass.

    The backward pass goes through the last result first, so it is in the pass whose result it came through last.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(out, Mapping):
        out = tuple(out.values())
    if isinstance(out, (tuple, list)):
        for part in out:
            remember(part, now)
    elif isinstance(out, Tensor) and out.grad_fn is not None:
        mine = replace(now)  # which lives as long as the graph, and so does its entry

        def found(gradients: object) -> None:
            _REMEMBERED[_task()] = mine

        out.grad_fn.register_prehook(found)


def recomputing() -> bool:
    """Whether this thread is in a backward pass."""
    return not torch.compiler.is_compiling() and _task() != -1


def _task() -> int:
    return torch._C._current_graph_task_id()
