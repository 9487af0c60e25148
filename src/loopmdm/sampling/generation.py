"""Generation: what `generate` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Generation:
    """The result of `generate`.

    Attributes:
        tokens: int64 [B, T], prompts and generated tokens, right-padded with the model's pad id.
        lengths: int64 [B], real tokens of each sequence.
        revealed_at: int64 [B, T], the step that filled a position last; -1 where nothing was generated.
        loops_per_step: of each step that ran the model the mean S over the passes of its sequences.
        loops: int64 [len(loops_per_step), B], S of each sequence; 0 where it did not enter the model. With guidance
            that of the conditional pass.
        nfe: number of function evaluations: steps that ran the model, guidance or not.
        head_rows: rows that reached the vocabulary projection.
        generated: tokens generated and kept.
        flops: analytic forward FLOPs of the sequences that entered the model, at the length that they were padded to
            and the loops that they made, both passes of guidance; head convention "head" (every row counted, whatever
            was skipped).
        seconds: wall time of the denoising steps.
    """

    tokens: Tensor
    lengths: Tensor
    revealed_at: Tensor
    loops_per_step: list[float] = field(default_factory=list)
    loops: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    nfe: int = 0
    head_rows: int = 0
    generated: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens (never prompt tokens) per second."""
        return self.generated / self.seconds if self.seconds else 0.0

    def sequences(self) -> list[list[int]]:
        """The tokens of each sequence without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths.tolist(), strict=True)]
