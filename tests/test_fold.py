"""Folding: a layer of folded weights equals the layer, in float64, for everything that a layer can be."""

import pytest
import torch

from loopmdm.model.block import Block, Context
from loopmdm.model.fold import fold
from loopmdm.ops.linear_residual import linear_residual, square_sums
from loopmdm.ops.norm_linear import Heads, norm_linear
from loopmdm.ops.rotate import rope_table

from .helpers import randomize_, tiny

VARIANTS = {
    "llama": ("llama", {}),
    "dit": ("dit", {}),
    "qwen2": ("llama", {"qkv_bias": True}),
    "qwen3": ("llama", {"qk_norm": "before_rope"}),
    "norm after": ("llama", {"qk_norm": "after_rope"}),
    "interleaved": ("llama", {"rope_layout": "interleaved", "qk_norm": "before_rope"}),
    "no rotation": ("llama", {"positions": "learned"}),
    "biases": ("llama", {"mlp_bias": True, "attention_out_bias": True, "norm_bias": True}),
    "no gain": ("dit", {"norm_weight": False}),
    "layer norm": ("llama", {"norm": "layernorm", "norm_bias": True, "hidden_act": "gelu", "mlp_bias": True}),
    "relu2": ("llama", {"hidden_act": "relu2"}),
    "modulated rms": ("llama", {"modulation": "adaln", "norm_bias": True, "cond_dim": 5}),
}


def plain(layer, config, x, cond, rope):
    """The folded layer in bare torch, reading the stream's own statistics."""
    B, T, _ = x.shape
    paired = rope is not None and config.rope_layout == "half"
    folded = fold(layer, cond, x.dtype, paired)
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    H, G, hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    tables = (None, None) if rope is None else rope
    heads = Heads(H, G, hd, *tables, folded.q_gain, folded.k_gain, config.qk_norm == "before_rope")
    eps = config.norm_eps
    copy = x if folded.attn_gain is None else x * folded.attn_gain
    qkv = norm_linear(copy, square_sums(x), folded.qkv, folded.qkv_bias, eps=eps, heads=heads)
    q, k, v = (u.transpose(1, 2) for u in qkv.view(B, T, H + 2 * G, hd).split((H, G, G), dim=2))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=H != G)
    x, copy, squares = linear_residual(
        y.transpose(1, 2).flatten(2), folded.out, folded.out_bias, x, copy_gain=folded.mlp_gain
    )
    h = norm_linear(copy, squares, folded.up, folded.up_bias, eps=eps, act=config.hidden_act)
    return linear_residual(h, folded.down, folded.down_bias, x)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folded_layer_is_the_layer(name):
    backbone, changes = VARIANTS[name]
    config = tiny(backbone, **changes)
    layer = randomize_(Block(config), seed=3).double()
    rng = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(2, 7, 32, generator=rng, dtype=torch.float64) + 1
    rope = rope_table(torch.arange(7), config.head_dim, 100.0) if config.positions == "rope" else None
    cond = torch.randn(1, config.cond_dim, generator=rng, dtype=torch.float64) if config.modulation == "adaln" else None
    want = layer(x, Context(rope, None, cond))
    got = plain(layer, config, x, cond, rope)
    if config.norm == "layernorm":  # the folded stream has no mean, and no layer norm after it would see one
        want = want - want.mean(-1, keepdim=True)
        assert got.mean(-1).abs().max() < 1e-14
    assert (want - x).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 if rope is not None else 1e-12)


def test_folding_is_differentiable():
    config = tiny("dit")
    layer = randomize_(Block(config), seed=3).double()
    cond = torch.randn(1, config.cond_dim, dtype=torch.float64)
    sum(t.sum() for t in fold(layer, cond, torch.float64, True) if t is not None).backward()
    missing = [name for name, p in layer.named_parameters() if p.grad is None]
    assert not missing


def test_weights_are_rounded_once():
    """Gains stay out of them; a gate and a centre are worked in before the cast."""
    layer = randomize_(Block(tiny("llama")), seed=3)
    got = fold(layer, None, torch.bfloat16, False)
    assert torch.equal(got.qkv, layer.attn.qkv.weight.bfloat16()) and got.qkv_bias is None
    assert torch.equal(got.attn_gain, layer.attn_norm.weight) and torch.equal(got.mlp_gain, layer.mlp_norm.weight)
    layer, cond = randomize_(Block(tiny("dit")), seed=3), torch.randn(1, 12)
    got, gate = fold(layer, cond, torch.bfloat16, False), layer.modulation(cond)[0].chunk(6)[2]
    out = layer.attn.out.weight * gate[:, None]
    assert torch.equal(got.out, (out - out.mean(0)).bfloat16())


@pytest.mark.parametrize(
    "name, copies", [("llama", {"qkv", "up"}), ("no rotation", {"up"}), ("dit", {"qkv", "out", "down"})]
)
def test_what_folding_leaves_alone_is_not_copied(name, copies):
    backbone, changes = VARIANTS[name]
    config = tiny(backbone, **changes)
    layer = randomize_(Block(config), seed=3).bfloat16()
    cond = torch.randn(1, config.cond_dim).bfloat16() if config.modulation == "adaln" else None
    got = fold(layer, cond, torch.bfloat16, config.positions == "rope")
    own = {p.data_ptr() for p in layer.parameters()}
    assert {name for name in ("qkv", "out", "up", "down") if getattr(got, name).data_ptr() not in own} == copies
