"""The looped block: a run of layers visited S times with one set of weights.

    h^(k) = layers(h^(k-1)), k = 1..S        (LoopMDM, arXiv 2605.26106)

Nothing else: no loop embedding, no input injection; gradients flow through every visit. The one
option is what happens at the boundary between two visits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import ModelConfig, check_loops
from ..ops.residual_norm import residual_norm
from .block import Block, Context, rope_table

Boundary = Callable[[Tensor, Tensor, int], Tensor]
"""(x, x0, k) -> x, called before visit k = 2..S with the last visit's output and the first one's input."""


class Anchored(nn.Module):
    """x <- RMSNorm(x + x0) * g: each visit starts from the prelude's output as much as from the last visit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.norm_eps

    def forward(self, x: Tensor, x0: Tensor, k: int) -> Tensor:  # [B, T, D], [B, T, D] -> [B, T, D]
        return residual_norm(x, x0, self.weight, kind="rmsnorm", eps=self.eps)[1]


class LoopedBlock(nn.Module):
    """`config.loop.length` layers applied `num_loops` times; a module on [B, T, D] of its own.

    Args:
        config: the model's configuration; the block has no use for its vocabulary.
        boundary: any callable in place of the one that `config.loop.boundary` names.

    With `num_loops=1` it is exactly its layers, one after the other.
    """

    def __init__(self, config: ModelConfig, boundary: Boundary | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.loop.length))
        self.boundary = boundary or (Anchored(config) if config.loop.boundary == "anchored" else None)

    def forward(self, x: Tensor, num_loops: int | None = None, context: Context | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D] in x's dtype.

        Args:
            num_loops: S >= 1, any value whatever S_max was in training; None is `config.loop.max_loops`.
            context: rotary table, mask and conditioning; None makes full attention at positions 0..T-1.

        Raises:
            InputError: S below 1.
        """
        loops = check_loops(self.config.loop.max_loops if num_loops is None else num_loops)
        if context is None:
            context = self._default_context(x)
        x0 = x
        for k in range(1, loops + 1):
            if k > 1 and self.boundary is not None:
                x = self.boundary(x, x0, k)
            for layer in self.layers:
                x = layer(x, context)
        return x

    def _default_context(self, x: Tensor) -> Context:
        config, rope, cond = self.config, None, None
        if config.positions in ("rope", "both"):
            positions = torch.arange(x.shape[1], device=x.device)
            rope = rope_table(positions, config.head_dim or 0, config.rope_theta, config.rope_sign)
        if config.modulation == "adaln":
            # in the parameters' dtype: the residual stream may be wider
            cond = torch.zeros(1, config.cond_dim, device=x.device, dtype=next(self.parameters()).dtype)
        return Context(rope=rope, cond=cond)
