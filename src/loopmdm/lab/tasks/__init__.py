"""Tasks a small model learns on a CPU in minutes. Each gives a model, a recipe, training batches and a test set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...config import LoopConfig, ModelConfig
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


def small_model(vocab_size: int, length: int) -> ModelConfig:
    """0.2M parameters, 1 prelude, 2 looped and 1 coda layer; what both puzzles use.

    Zero-initialised projections and the anchored boundary decide whether loops do anything here, and so does
    the embeddings' scale: at 0.02 nothing is learnt, at 0.3 the unlooped model learns badly.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=172,
        positions="learned",
        max_position_embeddings=length,
        initializer_range=1.0,
        loop=LoopConfig(start=1, length=2, max_loops=6, boundary="anchored"),
    )


def short_recipe(steps: float, seed: int) -> Recipe:
    """A minute or two on two cores: Muon on the matrices, a mean over masked tokens, a short average."""
    return Recipe(
        steps=max(1, round(steps)),
        batch_size=128,
        optimizer="muon",
        lr=3e-3,
        matrix_lr=0.02,
        warmup=50,
        ema=0.98,
        objective="masked_mean",
        seed=seed,
    )
