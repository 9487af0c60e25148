"""Text: English that ships with Python by default, any files on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...config import LoopConfig, ModelConfig
from ...errors import InputError
from ..data import TextData, build_tokenizer, read_text
from ..train import Recipe

LENGTH = 64


class Text:
    """Characters of a text, in windows of 64.

    Attributes:
        data: the text as tokens, its held-out part and its unigram entropy.
        config, recipe: what to train and how; steep training noise is ramped in, since a model of this size
            otherwise stays on the plateau of the letter frequencies for most of its time.
        probe, final: values of S watched during training, and measured at the end.
    """

    name = "text"
    probe, final = (1, 4), (1, 2, 4, 8)

    def __init__(self, seed: int = 0, scale: float = 1.0, files: Sequence[str | Path] | None = None) -> None:
        text = read_text(files) if files else python_topics()
        self.title = ", ".join(Path(f).name for f in files) if files else "Python's own help topics"
        self.title += f" ({len(text):,} characters), the last 5% of each of 20 parts held out"
        self.data = TextData.from_text(text, build_tokenizer("char", text), LENGTH)
        if len(self.data.valid_windows()) < 2:
            raise InputError(f"the text is too short to measure on: {LENGTH * 2 * 20:,} characters are the least")
        self.config = ModelConfig(
            vocab_size=self.data.mask_id + 1,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
            initializer_range=0.3,
            loop=LoopConfig(start=1, length=1, max_loops=4, boundary="anchored"),
        )
        self.recipe = Recipe(
            steps=max(1, round(750 * scale)),
            batch_size=16,
            optimizer="muon",
            lr=2e-3,
            matrix_lr=0.01,
            warmup=50,
            ema=0.98,
            objective="masked_mean",
            t_start=0.3,
            t_ramp=0.5,
            seed=seed,
        )
        self.seed = seed

    def batch(self, step: int, index: Tensor) -> Tensor:
        return self.data.batch(self.seed, step, index)


def python_topics() -> str:
    """The help topics of Python itself: 0.4 million characters of English about a programming language."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
