"""Folding: what surrounds a layer's four projections, worked into their weights once instead of into every token.

    norm(x) * g * (1 + scale) + shift, then W        ->  rstd * (x * gain) @ W.T + b'     gain = g (1 + scale)
    x + gate * (h @ W.T + b)                         ->  x + h @ W'.T + b'      W' = diag(gate) W
    LayerNorm                                        ->  RMS norm of a stream whose mean is 0: the mean that
                                                         LayerNorm would remove is removed from every writer's weights
    rotary pairs i, i + hd/2 of q and k, gate and up ->  neighbours: scores do not see the order of a head's numbers

The gain is not multiplied into W: a weight of 16 bits would be rounded twice, the same way at every visit. Whoever
writes the stream multiplies it into the copy that the projection reads, which is rounded in any case.

All of it is differentiable torch code in at least fp32, and exact up to rounding. Modulation folds while it is the same
for every sequence (DiT's default). With time conditioning it stays out of the weights, and `conditioned` makes of it,
once a pass, what the same kernels take as vectors of each sequence's own: gains of the copies, biases, gates. The mean
that a gated branch would bring into a centred stream is then a product of its input with one vector, taken off it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import Block, Norm

Projection = tuple[Tensor, Tensor | None]
"""Weight [out, in] and bias [out]."""


class Folded(NamedTuple):
    """One layer's weights as `norm_linear` and `linear_residual` take them.

    Attributes:
        qkv [(H + 2G) hd, D], out [D, H hd], up [f or 2f, D], down [D, f]: in the dtype that is multiplied in.
            Where nothing changes a weight (out and down without gate and centring, qkv without `paired`, up of a plain
            MLP, all in the layer's dtype) it is the layer's own tensor.
        qkv_bias, out_bias, up_bias, down_bias: fp32, or None.
        attn_gain, mlp_gain: [D] fp32, for the copies that qkv and up read; None for 1.
        q_gain, k_gain: [hd] fp32, of the per-head norms; or None.
        out_mean [1, H hd], out_shift [1], down_mean [1, f], down_shift [1]: what centring took from the two writers, as
            weight and bias: their input projected by it is what they would have added to the stream's mean. None
            without centring.
        out_gate, down_gate: None; of a conditioned layer fp32 [B, D], and then gains and biases of qkv and up, means
            and shifts are those of each sequence too, [B, ...], the means not yet taken off what the writers add.
    """

    attn_gain: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_gain: Tensor | None
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
    out_gate: Tensor | None = None
    down_gate: Tensor | None = None

    def take(self, rows: Tensor) -> Folded:
        """Of some of the sequences, int64 [N]."""
        if self.out_gate is None:
            return self
        held: dict[str, Any] = {name: getattr(self, name) for name in EACH}
        held |= {name: t[rows] for name, t in held.items() if t is not None}
        return self._replace(**held)


EACH = (
    *("attn_gain", "qkv_bias", "out_gate", "out_mean", "out_shift"),
    *("mlp_gain", "up_bias", "down_gate", "down_mean", "down_shift"),
)
"""What `conditioned` sets: one for each sequence."""


def fold(layer: Block, cond: Tensor | None, dtype: torch.dtype, paired: bool) -> Folded:
    """Fold one layer.

    Args:
        cond: conditioning [1, C] of a layer with modulation; None for one without, or to leave it to `conditioned`.
        dtype: of the folded weights; biases and gains are fp32 (float64 if the layer is).
        paired: bring the numbers that rotate together, i and i + hd/2, side by side.
    """
    shift_a = scale_a = gate_a = shift_m = scale_m = gate_m = None
    if layer.modulation is not None and cond is not None:
        assert len(cond) == 1, "only constant modulation folds"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _wide(layer.modulation(cond)[0]).chunk(6)
    attn, mlp = layer.attn, layer.mlp
    centre = layer.attn_norm.kind == "layernorm" and (layer.modulation is None or cond is not None)
    attn_gain, qkv = _reader(attn.qkv, layer.attn_norm, shift_a, scale_a)
    mlp_gain, up = _reader(mlp.up, layer.mlp_norm, shift_m, scale_m)
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
    return Folded(attn_gain, *weights[0], *weights[1], mlp_gain, *weights[2], *weights[3], *gains, *means)


def conditioned(folded: Folded, layer: Block, cond: Tensor) -> Folded:
    """A layer folded without its modulation, with what that is under cond [B, C]."""
    assert layer.modulation is not None
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _wide(layer.modulation(cond)).chunk(6, dim=-1)
    made: dict[str, Any] = {"out_gate": gate_a.contiguous(), "down_gate": gate_m.contiguous()}
    for name, norm, read, weight, bias, shift, scale in (
        ("attn", layer.attn_norm, "qkv", folded.qkv, folded.qkv_bias, shift_a, scale_a),
        ("mlp", layer.mlp_norm, "up", folded.up, folded.up_bias, shift_m, scale_m),
    ):
        # the norm's own bias is in that of the projection already
        offset = shift if norm.bias is None else scale * _wide(norm.bias) + shift
        made[f"{name}_gain"] = 1 + scale if norm.weight is None else _wide(norm.weight) * (1 + scale)
        offset = offset @ _wide(weight).t()
        made[f"{read}_bias"] = offset if bias is None else bias + offset
    if layer.attn_norm.kind == "layernorm":
        for write, weight, bias, gate in (
            ("out", folded.out, folded.out_bias, gate_a),
            ("down", folded.down, folded.down_bias, gate_m),
        ):
            made[f"{write}_mean"] = (gate @ _wide(weight) / gate.shape[-1]).to(weight.dtype)
            made[f"{write}_shift"] = gate.new_zeros(len(gate)) if bias is None else (gate * bias).mean(-1)
    return folded._replace(**made)


def _rows(projection: Projection, move: Callable[[Tensor], Tensor]) -> Projection:
    weight, bias = projection
    return move(weight), None if bias is None else move(bias)


def _reader(
    linear: nn.Linear, norm: Norm, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, Projection]:
    """Gain of norm and modulation; and the projection that reads the normalised stream, their biases in its own."""
    bias = None if linear.bias is None else _wide(linear.bias)
    gain = None if norm.weight is None else _wide(norm.weight)
    offset = None if norm.bias is None else _wide(norm.bias)
    if scale is not None and shift is not None:
        gain = 1 + scale if gain is None else gain * (1 + scale)
        offset = shift if offset is None else offset * (1 + scale) + shift
    if offset is not None:
        offset = _wide(linear.weight) @ offset
        bias = offset if bias is None else bias + offset
    return gain, (linear.weight, bias)


def _writer(linear: nn.Linear, gate: Tensor | None) -> Projection:
    """A projection that adds to the stream, with its gate in it."""
    weight, bias = linear.weight, None if linear.bias is None else _wide(linear.bias)
    if gate is not None:
        weight = _wide(weight) * gate[:, None]
        bias = None if bias is None else bias * gate
    return weight, bias


def _centred(weight: Tensor, bias: Tensor | None) -> tuple[Projection, tuple[Tensor, Tensor]]:
    """A writer such that what it adds has mean 0, and the mean that it had: weight [1, K], bias [1]."""
    weight = _wide(weight)
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
