"""A masked diffusion LM without loops, written on its own: what S = 1 must equal, bit for bit.

Plain functions over a dictionary of tensors named as in an ordinary 'layers.0 .. layers.L-1' checkpoint. It shares
no code with loopmdm; only the names of the weights inside a layer are those of LoopMDM's state_dict.
"""

import torch
import torch.nn.functional as F


def rename(state, start, length):
    """LoopMDM's keys -> layers.0 .. layers.L-1; the loop's own gain, if any, is returned as 'anchor'."""
    plain = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "prelude":
            index, _, rest = rest.partition(".")
            key = f"layers.{int(index)}.{rest}"
        elif part == "loop" and rest == "boundary.weight":
            key = "anchor"
        elif part == "loop":
            index, _, rest = rest.removeprefix("layers.").partition(".")
            key = f"layers.{start + int(index)}.{rest}"
        elif part == "coda":
            index, _, rest = rest.partition(".")
            key = f"layers.{start + length + int(index)}.{rest}"
        plain[key] = value
    assert len(plain) == len(state)
    return plain


def rope(x, theta=10000.0):
    """x [B, T, heads, hd], halves rotated against each other, angles in fp32."""
    half = x.shape[-1] // 2
    exponent = torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1]
    angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * theta**-exponent
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(w, name, x, heads, kv_heads):
    B, T, D = x.shape
    hd = D // heads
    joint = F.linear(x, w[name + ".qkv.weight"])
    q, k, v = joint.split([heads * hd, kv_heads * hd, kv_heads * hd], dim=-1)
    q, k, v = rope(q.view(B, T, heads, hd)), rope(k.view(B, T, kv_heads, hd)), v.view(B, T, kv_heads, hd)
    k, v = (y.repeat_interleave(heads // kv_heads, dim=2) for y in (k, v))
    y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
    return F.linear(y.transpose(1, 2).reshape(B, T, D), w[name + ".out.weight"])


def dit_condition(w, half=128):
    """The conditioning of a model without time conditioning: sigma = 0, [1, C]."""
    wave = torch.cat([torch.ones(1, half), torch.zeros(1, half)], -1)  # cosines of 0, then sines
    y = F.linear(wave, w["sigma_embed.inner.weight"], w["sigma_embed.inner.bias"])
    y = F.linear(F.silu(y), w["sigma_embed.outer.weight"], w["sigma_embed.outer.bias"])
    return F.silu(y)


def dit_layer(w, i, x, c, heads, kv_heads):
    p = f"layers.{i}."
    six = F.linear(c, w[p + "modulation.weight"], w[p + "modulation.bias"])
    shift1, scale1, gate1, shift2, scale2, gate2 = six.view(6, -1)
    h = F.layer_norm(x, x.shape[-1:], w[p + "attn_norm.weight"], None, 1e-5)
    x = x + gate1 * attention(w, p + "attn", h * (1 + scale1) + shift1, heads, kv_heads)
    h = F.layer_norm(x, x.shape[-1:], w[p + "mlp_norm.weight"], None, 1e-5)
    h = F.linear(h * (1 + scale2) + shift2, w[p + "mlp.up.weight"], w[p + "mlp.up.bias"])
    h = F.linear(F.gelu(h, approximate="tanh"), w[p + "mlp.down.weight"], w[p + "mlp.down.bias"])
    return x + gate2 * h


def llama_layer(w, i, x, c, heads, kv_heads):
    p = f"layers.{i}."
    h = F.rms_norm(x, x.shape[-1:], w[p + "attn_norm.weight"], 1e-5)
    x = x + attention(w, p + "attn", h, heads, kv_heads)
    h = F.rms_norm(x, x.shape[-1:], w[p + "mlp_norm.weight"], 1e-5)
    both = F.linear(h, w[p + "mlp.up.weight"])
    f = both.shape[-1] // 2
    return x + F.linear(F.silu(both[..., :f]) * both[..., f:], w[p + "mlp.down.weight"])


@torch.no_grad()
def logits(w, ids, heads, kv_heads, order):
    """Full logits [B, T, V] of fp32 weights `w`, the layers applied in `order`."""
    dit = "final_modulation.weight" in w
    c = dit_condition(w) if dit else None
    x = w["embed.weight"][ids]
    for i in order:
        x = (dit_layer if dit else llama_layer)(w, i, x, c, heads, kv_heads)
    if dit:
        shift, scale = F.linear(c, w["final_modulation.weight"], w["final_modulation.bias"])[0].chunk(2)
        h = F.layer_norm(x, x.shape[-1:], w["final_norm.weight"], None, 1e-5) * (1 + scale) + shift
        return F.linear(h, w["lm_head.weight"], w["lm_head.bias"])
    h = F.rms_norm(x, x.shape[-1:], w["final_norm.weight"], 1e-5)
    return F.linear(h, w["lm_head.weight"])
