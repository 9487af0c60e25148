"""Tasks a small model learns on a CPU in minutes. Each gives a model, a recipe, training batches and a test set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...config import ModelConfig
from ..train import Recipe


class Puzzles(Protocol):
    """A task with one right answer to each test item.

    Attributes:
        name, title: for files and for people.
        unit: what one masked position is called ("blank", "digit").
        config, recipe: what to train and how.
        probe, final: values of S watched during training, and measured at the end.
        puzzles, answers: int64 [N, T], unseen in training; puzzles hold the mask id where answers are to be found.
    """

    name: str
    title: str
    unit: str
    config: ModelConfig
    recipe: Recipe
    probe: tuple[int, ...]
    final: tuple[int, ...]
    puzzles: Tensor
    answers: Tensor

    def batch(self, step: int, index: Tensor) -> Tensor:
        """Training sequences int64 [len(index), T], a function of the seed, step and global sample index."""
        ...

    def lines(self, tokens: list[int], clue: list[bool], wrong: list[bool]) -> list[str]:
        """One item as lines of rich markup: clues plain, right answers green, wrong ones red with a '!'."""
        ...


def symbol(text: str, clue: bool, wrong: bool) -> str:
    """One symbol of an item in rich markup; the '!' tells a wrong one without colour."""
    if clue:
        return f"{text} "
    return f"[bold red]{text}![/]" if wrong else f"[green]{text}[/] "
