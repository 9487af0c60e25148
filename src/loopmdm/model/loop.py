"""The looped block: a run of layers visited S times with one set of weights.

    h^(k) = layers(h^(k-1)), k = 1..S        (LoopMDM, arXiv 2605.26106)

Nothing else: no loop embedding, no input injection; gradients flow through every visit. What can be varied is the
boundary between two visits, and by `Depth` how many visits a sequence gets and what the backward pass sees of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from ..ops.residual_norm import residual_norm
from ..ops.rotate import rope_table
from .block import Block, Context, through
from .depth import Depth, apart, planned, stops

if TYPE_CHECKING:
    from .fused_block import FusedBlock

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
        boundary: any callable in place of the one that `config.loop.boundary` names. It must treat each sequence
            by itself if sequences are to make different numbers of visits.
        length: another number of layers.

    With `num_loops=1` it is exactly its layers, one after the other.
    """

    def __init__(self, config: ModelConfig, boundary: Boundary | None = None, length: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(length or config.loop.length))
        self.boundary = boundary or (Anchored(config) if config.loop.boundary == "anchored" else None)

    def forward(
        self, x: Tensor, num_loops: int | Tensor | Depth | None = None, context: Context | None = None
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D] in x's dtype.

        Args:
            num_loops: S >= 1, any value whatever S_max was in training; integers [B], an S for each sequence; a
                `Depth` for all else; None is `config.loop.max_loops`.
            context: rotary table, mask and conditioning; None makes full attention at positions 0..T-1.

        A sequence that has made its visits leaves the batch: the work is that of the mean S. Integers [B] cost one
        host synchronisation a pass (none on the CPU).

        Raises:
            InputError: S below 1 or not one for each sequence; a `Depth` whose parts exclude one another.
        """
        loops, depth = planned(num_loops, self.config.loop.max_loops, len(x))
        dtype = x.dtype
        context = self._default_context(x) if context is None else context
        if isinstance(loops, Tensor):
            x = self._apart(x, loops, context, depth)
        else:
            x = self._together(x, loops, context, depth)
        if isinstance(num_loops, Depth):
            num_loops.visits, num_loops.outputs = depth.visits, [h.to(dtype) for h in depth.outputs]
            if isinstance(loops, int):
                num_loops.visits = torch.full((len(x),), loops, device=x.device)
        return x.to(dtype)

    def fused(
        self,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        attention_impl: str | None = None,
        cond: Tensor | None = None,
    ) -> FusedBlock:
        """The same block for inference on a GPU, its weights folded now: called as the block is, without gradients.

        Args and errors: those of `model.fused_block.FusedBlock`.
        """
        from .fused_block import FusedBlock

        return FusedBlock(self, dtype, impl, attention_impl, cond)

    def _together(self, x: Tensor, loops: int, context: Context, depth: Depth) -> Tensor:
        """Every sequence makes the same visits."""
        x0, cut = x, max(0, loops - (depth.backprop_loops or loops))
        if self.boundary is None and not (cut or depth.every or depth.checkpoint):
            return through([*self.layers] * loops, x, context)
        for k in range(1, loops + 1):
            with torch.no_grad() if k <= cut else nullcontext():
                x = self._visit(x, x0, k, context, depth.checkpoint)
            if k == cut and torch.is_autocast_enabled(x.device.type):
                torch.clear_autocast_cache()  # older torch reuses weights cast without a graph (its issue 112583)
            if depth.every:
                depth.outputs.append(x)
        return x

    def _apart(self, x: Tensor, limit: Tensor, context: Context, depth: Depth) -> Tensor:
        """Sequences leave the batch when they are done; limit int64 [B] and what decides it are on the host."""
        (out,), visits = apart(_Walk(self, x, context, depth), limit)
        depth.visits = visits.to(x.device)
        assert out is not None
        return out

    def _visit(self, x: Tensor, x0: Tensor, k: int, context: Context, recompute: bool = False) -> Tensor:
        if recompute and torch.is_grad_enabled():
            return checkpoint(self._visit, x, x0, k, context, use_reentrant=False)
        if k > 1 and self.boundary is not None:
            x = self.boundary(x, x0, k)
        return through(self.layers, x, context)

    def _default_context(self, x: Tensor) -> Context:
        config, rope, cond = self.config, None, None
        if config.positions in ("rope", "both"):
            positions = torch.arange(x.shape[1], device=x.device)
            rope = rope_table(
                positions, config.head_dim or 0, config.rope_theta, config.rope_sign, config.rope_table_dtype
            )
        if config.modulation == "adaln":
            # in the parameters' dtype: the residual stream may be wider
            cond = torch.zeros(1, config.cond_dim, device=x.device, dtype=next(self.parameters()).dtype)
        return Context(rope=rope, cond=cond)


class _Walk:
    """The sequences of one pass through a `LoopedBlock` that have not left it; a `depth.Walk`."""

    def __init__(self, block: LoopedBlock, x: Tensor, context: Context, depth: Depth) -> None:
        self.block, self.context, self.depth = block, context, depth
        self.x = self.x0 = self.previous = x

    def visit(self, k: int) -> None:
        self.previous = self.x
        self.x = self.block._visit(self.x, self.x0, k, self.context, self.depth.checkpoint)

    def stops(self, k: int) -> Tensor | None:
        rule = self.depth.early_exit
        return None if rule is None else stops(rule, self.previous, self.x, k, self.context.positions)

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self.x.device)
        self.x, self.context = self.x[rows], self.context.take(rows)
        self.x0 = self.x if self.block.boundary is None else self.x0[rows]

    def output(self, rows: Tensor | None) -> tuple[Tensor, ...]:
        return (self.x if rows is None else self.x[rows.to(self.x.device)],)
