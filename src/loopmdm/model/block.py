"""One transformer layer of a masked diffusion LM: bidirectional attention and an MLP, both residual.

Covers the two backbones (DiT with adaLN, Llama) and what their relatives vary; see `ModelConfig`.
Shapes: B sequences, T tokens, D hidden, H query heads, G key/value heads, C conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.activation import activation
from ..ops.linear import project
from ..ops.residual_norm import residual_norm
from ..ops.rotary_attention import rotary_attention
from ..ops.rotate import rotate


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    Attributes:
        rope: (cos, sin), each [T, head_dim/2] or [B, T, head_dim/2] in fp32; None without rotary positions.
        mask: bool, broadcastable to [B, 1, T, T], True where a query may look at a key; None is everywhere.
        cond: [1, C] (constant) or [B, C] (per sequence); None without modulation.
        positions: bool [B, T] that an exit rule looks at (`model.depth`); None is all. The layers do not read it.
    """

    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    cond: Tensor | None = None
    positions: Tensor | None = None

    def take(self, rows: Tensor) -> Context:
        """The context of some of the sequences, rows int64 [N]; what all of them share stays as it is."""

        def pick(part: Tensor, dims: int) -> Tensor:
            return part[rows] if part.dim() == dims and part.shape[0] > 1 else part

        return Context(
            rope=self.rope and (pick(self.rope[0], 3), pick(self.rope[1], 3)),
            mask=None if self.mask is None else pick(self.mask, 4),
            cond=None if self.cond is None else pick(self.cond, 2),
            positions=None if self.positions is None else pick(self.positions, 2),
        )

    def queries(self, rows: Tensor | None) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """rope and mask of the queries at `rows`, int64 [B, R]; None is all of them."""
        rope, mask = self.rope, self.mask
        if rows is None:
            return rope, mask
        if mask is not None and mask.shape[2] > 1:
            mask = at(mask[:, 0], rows)[:, None]
        return rope and (at(rope[0], rows), at(rope[1], rows)), mask


class Norm(nn.Module):
    """RMSNorm or LayerNorm over D in fp32, optionally after adding a residual branch."""

    def __init__(self, config: ModelConfig, size: int | None = None, kind: str | None = None) -> None:
        super().__init__()
        self.kind, self.eps = kind or config.norm, config.norm_eps
        size = size or config.hidden_size
        self.weight = nn.Parameter(torch.ones(size)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm_bias else None

    def forward(
        self, x: Tensor, branch: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, branch [..., D] -> (x + branch in x's dtype, norm(x + branch) in out_dtype or x's)."""
        return residual_norm(x, branch, self.weight, self.bias, kind=self.kind, eps=self.eps, out_dtype=out_dtype)


class Attention(nn.Module):
    """Bidirectional multi-head attention with rotary positions; grouped key/value heads allowed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads or 0
        self.head_dim, self.layout, self.rope_dtype = config.head_dim or 0, config.rope_layout, config.rope_dtype
        self.qk_order = config.qk_norm
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.groups) * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.attention_out_bias)
        if config.qk_norm != "none":
            self.q_norm = Norm(config, self.head_dim, "rmsnorm")
            self.k_norm = Norm(config, self.head_dim, "rmsnorm")

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; of the positions `rows` [B, R] alone, which attend to all, [B, R, D]."""
        B, T, _ = x.shape
        H, G = self.heads, self.groups
        # split, not slices: its backward is one concatenation
        q, k, v = project(self.qkv, x).view(B, T, H + 2 * G, self.head_dim).split((H, G, G), dim=2)
        if self.qk_order == "before_rope":
            q, k = self.q_norm(q)[1], self.k_norm(k)[1]
        rope, mask = context.queries(rows)
        if rows is not None:
            q = at(q, rows)
        tables = (context.rope, rope)  # of the keys and of the queries
        if self.qk_order == "after_rope":
            if rope is not None and context.rope is not None:
                q, k = (rotate(u, t, self.layout, self.rope_dtype) for u, t in ((q, rope), (k, context.rope)))
            q, k, tables = self.q_norm(q)[1], self.k_norm(k)[1], (None, None)
        y = rotary_attention(
            q, k, v, tables[0], mask, query_rope=tables[1], layout=self.layout, rope_dtype=self.rope_dtype
        )
        return project(self.out, y)


class MLP(nn.Module):
    """down(act(up(x))); for SwiGLU, `up` holds gate and up side by side and act(g, u) = silu(g) * u."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.act = config.hidden_act
        width = config.intermediate_size * (2 if config.gated else 1)
        self.up = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return project(self.down, activation(project(self.up, x), self.act))


class Block(nn.Module):
    """x + gate * Attention(norm(x)), then x + gate * MLP(norm(x)); gates and shifts only with adaLN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm, self.attn = Norm(config), Attention(config)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)
        self.dropout = config.dropout
        # DiT order: shift, scale, gate for attention, then for the MLP.
        self.modulation = nn.Linear(config.cond_dim, 6 * config.hidden_size) if config.modulation == "adaln" else None
        self.zero_init_output = config.zero_init_output
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fan-in everywhere; then either the gates or the output projections start at zero, never both
        (both would leave each without a gradient), so that a new block is the identity."""
        for layer in (self.attn.qkv, self.attn.out, self.mlp.up, self.mlp.down):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        elif self.zero_init_output:
            nn.init.zeros_(self.attn.out.weight)
            nn.init.zeros_(self.mlp.down.weight)

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D].

        With rows, int64 [B, R], only these positions come out, [B, R, D]: all that a last layer needs where the head
        reads few. They attend to all.
        """
        dtype = self.mlp.up.weight.dtype  # the residual stream may be wider than the parameters
        h = self.attn_norm(x, out_dtype=dtype)[1]
        if self.modulation is None:
            branch = self.attn(h, context, rows)
            x, h = self.mlp_norm(x if rows is None else at(x, rows), self._drop(branch), dtype)
            return x + self._drop(self.mlp(h))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(context.cond)[:, None].chunk(6, dim=-1)
        branch = self.attn(modulate(h, shift_a, scale_a).to(dtype), context, rows)
        x, h = self.mlp_norm(x if rows is None else at(x, rows), gate_a * self._drop(branch), dtype)
        return x + gate_m * self._drop(self.mlp(modulate(h, shift_m, scale_m).to(dtype)))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


def through(
    layers: Sequence[nn.Module] | nn.ModuleList, x: Tensor, context: Context, rows: Tensor | None = None
) -> Tensor:
    """x [B, T, D] through the layers in turn; with rows, int64 [B, R], the last one's output is [B, R, D].

    Layers of a class with a `together` (`model.packed`) may go through in one call.
    """
    together = getattr(layers[0], "together", None) if len(layers) else None
    out = None if together is None else together(layers, x, context, rows)
    if out is not None:
        return out
    for layer in layers[: len(layers) - 1]:
        x = layer(x, context)
    for layer in layers[len(layers) - 1 :]:
        x = layer(x, context) if rows is None else layer(x, context, rows)
    return x


def at(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, ..] or [1 or B, T, ..], rows int64 [B, R] -> [B, R, ..]."""
    if x.dim() == 2:
        return x[rows]
    return x[torch.arange(len(rows), device=x.device)[:, None] if len(x) > 1 else 0, rows]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, D], shift and scale [1 or B, 1, D] -> x * (1 + scale) + shift."""
    return x * (1 + scale) + shift
