"""Numbers that a step needs on its device: copied there once, so that no step waits for the copy."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native


def constant(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on `device`, the same tensor each time; a new one where a tracer, transform or mode must see it made.

    It is kept for good, because a captured graph reads it; nobody may write to it.
    """
    make = _made if native.watched() is not None else _kept
    return make(tuple(numbers), device)


def _made(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@functools.cache
def _kept(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made inside could not be saved for a backward
        return _made(numbers, device)
