"""Folding: what surrounds a layer's four projections, multiplied into their weights once instead of into every token.

    norm(x) * g * (1 + scale) + shift, then W        ->  rms(x) @ W'.T + b'     W' = W diag(g (1 + scale))
    x + gate * (h @ W.T + b)                         ->  x + h @ W'.T + b'      W' = diag(gate) W
    LayerNorm                                        ->  RMS norm of a stream whose mean is 0: the mean that
                                                         LayerNorm would remove is removed from every writer's weights
    rotary pairs i, i + hd/2 of q and k, gate and up ->  neighbours: scores do not see the order of a head's numbers

All of it is differentiable torch code in at least fp32, and exact up to rounding. Modulation folds only while it is the
same for every sequence (no time conditioning: DiT's default).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .block import Block, Norm

Projection = tuple[Tensor, Tensor | None]
"""Weight [out, in] and bias [out]."""


class Folded(NamedTuple):
    """One layer's weights as `norm_linear` and `linear_residual` take them.

    Attributes:
        qkv [(H + 2G) hd, D], out [D, H hd], up [f or 2f, D], down [D, f]: in the dtype that is multiplied in.
        qkv_bias, out_bias, up_bias, down_bias: fp32, or None.
        q_gain, k_gain: [hd] fp32, of the per-head norms; or None.
        out_mean [1, H hd], out_shift [1], down_mean [1, f], down_shift [1]: what centring took from the two writers, as
            weight and bias: their input projected by it is what they would have added to the stream's mean. None
            without centring.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    out_mean: Tensor | None = None
    out_shift: Tensor | None = None
    down_mean: Tensor | None = None
    down_shift: Tensor | None = None


def fold(layer: Block, cond: Tensor | None, dtype: torch.dtype, paired: bool) -> Folded:
    """Fold one layer.

    Args:
        cond: conditioning [1, C] of a layer with modulation, None for one without.
        dtype: of the folded weights; biases and gains are fp32 (float64 if the layer is).
        paired: bring the numbers that rotate together, i and i + hd/2, side by side.
    """
    shift_a = scale_a = gate_a = shift_m = scale_m = gate_m = None
    if layer.modulation is not None:
        assert cond is not None and len(cond) == 1, "only constant modulation folds"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _wide(layer.modulation(cond)[0]).chunk(6)
    attn, mlp = layer.attn, layer.mlp
    centre = layer.attn_norm.kind == "layernorm"
    qkv = _reader(attn.qkv, layer.attn_norm, shift_a, scale_a)
    up = _reader(mlp.up, layer.mlp_norm, shift_m, scale_m)
    gains: list[Tensor | None] = [None, None]
    if attn.qk_order != "none":
        ones = torch.ones(attn.head_dim, device=attn.qkv.weight.device)
        gains = [_wide(ones if norm.weight is None else norm.weight) for norm in (attn.q_norm, attn.k_norm)]
    if paired:
        order = _pairs(attn.heads, attn.groups, attn.head_dim, attn.qkv.weight.device)
        qkv = _rows(qkv, lambda t: t[order])
        gains = [None if g is None else g[order[: attn.head_dim]] for g in gains]
    if mlp.act == "swiglu":
        up = _rows(up, lambda t: t.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1))
    out, down = _writer(attn.out, gate_a), _writer(mlp.down, gate_m)
    means: list[Tensor] = []
    if centre:
        (out, out_mean), (down, down_mean) = _centred(*out), _centred(*down)
        means = [out_mean[0].to(dtype), out_mean[1], down_mean[0].to(dtype), down_mean[1]]
    weights = [(w.to(dtype).contiguous(), b) for w, b in (qkv, out, up, down)]
    return Folded(*weights[0], *weights[1], *weights[2], *weights[3], *gains, *means)


def _rows(projection: Projection, move: Callable[[Tensor], Tensor]) -> Projection:
    weight, bias = projection
    return move(weight), None if bias is None else move(bias)


def _reader(linear: nn.Linear, norm: Norm, shift: Tensor | None, scale: Tensor | None) -> Projection:
    """A projection that reads the normalised stream, with the norm's gain and bias and the modulation in it."""
    weight = _wide(linear.weight)
    bias = None if linear.bias is None else _wide(linear.bias)
    gain = None if norm.weight is None else _wide(norm.weight)
    offset = None if norm.bias is None else _wide(norm.bias)
    if scale is not None and shift is not None:
        gain = 1 + scale if gain is None else gain * (1 + scale)
        offset = shift if offset is None else offset * (1 + scale) + shift
    if offset is not None:
        bias = weight @ offset if bias is None else bias + weight @ offset
    return (weight if gain is None else weight * gain), bias


def _writer(linear: nn.Linear, gate: Tensor | None) -> Projection:
    """A projection that adds to the stream, with its gate in it."""
    weight = _wide(linear.weight)
    bias = None if linear.bias is None else _wide(linear.bias)
    if gate is not None:
        weight = weight * gate[:, None]
        bias = None if bias is None else bias * gate
    return weight, bias


def _centred(weight: Tensor, bias: Tensor | None) -> tuple[Projection, tuple[Tensor, Tensor]]:
    """A writer such that what it adds has mean 0, and the mean that it had: weight [1, K], bias [1]."""
    mean = weight.mean(0, keepdim=True)
    shift = weight.new_zeros(1) if bias is None else bias.mean()[None]
    return (weight - mean, None if bias is None else bias - shift), (mean, shift)


def _pairs(heads: int, groups: int, dim: int, device: torch.device) -> Tensor:
    """Row order of a qkv projection: i, i + dim/2 of each q and k head side by side, v as it is."""
    one = torch.arange(dim, device=device).view(2, dim // 2).t().flatten()
    start = torch.arange(heads + 2 * groups, device=device)[:, None] * dim
    order = start + one
    order[heads + groups :] = start[heads + groups :] + torch.arange(dim, device=device)
    return order.flatten()


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
