"""Addition of two numbers written with leading zeros: `123+989=1112`, the sum to be filled in.

A carry travels from the last digit to the first, so a one-step answer needs depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import random
from . import short_recipe, small_model, symbol

DIGITS = 6
PLUS, EQUALS, BLANK = 10, 11, 12
LENGTH = 3 * DIGITS + 3
_SUM = slice(2 * DIGITS + 2, LENGTH)


class Addition:
    """The addition task of one seed (a `Puzzles`). No test pair of numbers is drawn in training."""

    name, title, unit = "addition", f"{DIGITS}-digit addition, pairs never seen in training", "digit"
    probe: tuple[int, ...] = (1, 4)
    final: tuple[int, ...] = (1, 2, 4, 6, 8)

    def __init__(self, seed: int = 0, scale: float = 1.0, puzzles: int = 400) -> None:
        self.config = small_model(BLANK + 1, LENGTH)
        self.recipe = short_recipe(600 * scale, seed)
        self.seed = seed
        self.held_out: set[tuple[int, int]] = set()
        a, b = self._draw(0, torch.arange(puzzles))
        self.held_out = set(zip(a.tolist(), b.tolist(), strict=True))
        self.answers = _write(a, b)
        self.puzzles = self.answers.clone()
        self.puzzles[:, _SUM] = BLANK

    def batch(self, step: int, index: Tensor) -> Tensor:
        return _write(*self._draw(step + 1, index))

    def _draw(self, step: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform pairs; a held-out pair is moved to its neighbour."""
        noise = random.uniform(self.seed, random.DATA, step, index, 2)
        a, b = (noise.double() * 10**DIGITS).long().unbind(1)
        for i, pair in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            while pair in self.held_out:
                pair = (pair[0], (pair[1] + 1) % 10**DIGITS)
            b[i] = pair[1]
        return a, b

    def lines(self, tokens: list[int], clue: list[bool], wrong: list[bool]) -> list[str]:
        symbols = [*"0123456789+=."]
        return ["".join(symbol(symbols[t], c, w) for t, c, w in zip(tokens, clue, wrong, strict=True))]


def _write(a: Tensor, b: Tensor) -> Tensor:
    """Numbers [N], [N] -> ids [N, LENGTH] of "a+b=sum", most significant digit first."""

    def digits(number: Tensor, count: int) -> Tensor:
        powers = 10 ** torch.arange(count - 1, -1, -1)
        return number[:, None] // powers % 10

    sign = torch.full((len(a), 1), PLUS)
    return torch.cat((digits(a, DIGITS), sign, digits(b, DIGITS), sign + 1, digits(a + b, DIGITS + 1)), dim=1)
