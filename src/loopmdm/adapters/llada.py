"""LLaDA (GSAI-ML/LLaDA-8B-*): `LLaDALlamaBlock`.

RMS norm, SwiGLU, separate projections, grouped heads allowed, half-split rotary embedding in fp32. LLaDA drops padding
masks: its model adds them to a *causal* bias, and its blocks then ignore the sum. Here a key that the bias hides from
every query is padding and stays hidden; nothing else of the bias is read. `ignore_padding` is LLaDA's own behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig, check_loops
from ..errors import InputError
from .family import Family, Part, fits, refuse, unlooped, value
from .layer import Layout, Patched, Shared, run


def forward(
    self: Any,
    x: Tensor,
    attention_bias: Tensor | None = None,
    layer_past: object = None,
    use_cache: bool = False,
    replace_position: object = None,
) -> tuple[Tensor, None]:
    """x [B, T, D] -> (x [B, T, D], no cache)."""
    if use_cache or layer_past is not None or replace_position is not None:
        raise InputError("a patched LLaDALlamaBlock keeps no key/value cache; call it with use_cache=False")
    record: Patched = self._loopmdm
    shared, layout = record.shared, record.layout
    rope = shared.table(x.shape[1], layout.head_dim, theta(self), x.device) if value(self.config, "rope") else None
    mask = None if attention_bias is None or shared.ignore_padding else padding(attention_bias, x.shape[1])
    return run(self, x, rope, mask), None


def padding(bias: Tensor, length: int) -> Tensor:
    """Additive (or bool) bias [1 or B, 1, T or 1, T] -> bool [1 or B, 1, 1, T], the keys that some query may see."""
    bias = bias[:, :, :length, :length]
    seen = bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2
    return seen.any(dim=-2, keepdim=True)


def theta(block: Any) -> float:
    return float(value(block.config, "rope_theta", default=10000.0))


def layout(block: Any) -> Layout:
    config = block.config
    heads = value(config, "n_heads")
    hd = block.attn_out.weight.shape[0] // heads
    fits(not value(config, "alibi", default=False), "it uses ALiBi")
    fits(getattr(block, "q_norm", None) is None, "it normalises q and k over all heads (attention_layer_norm)")
    fits(value(config, "activation_type", default="silu") == "silu", "its activation is not SiLU")
    kind = value(config, "layer_norm_type", default="rms")
    fits(kind == "rms", f"its norm is {kind}, not rms")
    return Layout(
        heads=heads,
        groups=block.k_proj.weight.shape[0] // hd,
        head_dim=hd,
        attn_norm="attn_norm",
        qkv=("q_proj", "k_proj", "v_proj"),
        out="attn_out",
        mlp_norm="ff_norm",
        up=("ff_proj", "up_proj"),
        down="ff_out",
        eps=float(getattr(block.attn_norm, "eps", value(config, "rms_norm_eps", default=1e-5))),
        rope_dtype="float32" if value(config, "rope_full_precision", default=True) else "input",
        dropout=float(value(config, "residual_dropout", default=0.0)),
        attention_dropout=float(value(config, "attention_dropout", default=0.0)),
        tuple_out=True,
    )


class LLaDALlamaBlock(nn.Module):
    """LLaDA's block: constructor, forward and keys as there, and `num_loops` visits of it.

    Args:
        layer_id, cache: taken as LLaDA passes them; not used.
        config: with `d_model`, `n_heads`, `n_kv_heads`, `mlp_hidden_size`, `rms_norm_eps`, `rope`, `rope_theta`,
            `include_bias`, `include_qkv_bias`; a mapping or an object.
        num_loops: visits a forward pass.
    """

    def __init__(self, layer_id: int, config: Any, cache: object = None, *, num_loops: int = 1) -> None:
        super().__init__()
        self.layer_id, self.config, self.num_loops = layer_id, config, check_loops(num_loops)
        D, heads = value(config, "d_model"), value(config, "n_heads")
        groups = value(config, "effective_n_kv_heads", "n_kv_heads", default=None) or heads
        width = value(config, "mlp_hidden_size", default=None) or value(config, "mlp_ratio") * D
        kv, eps = D // heads * groups, value(config, "rms_norm_eps", default=1e-5)
        bias = bool(value(config, "include_bias", default=False))
        qkv_bias = bias or bool(value(config, "include_qkv_bias", default=False))
        self.attn_norm, self.ff_norm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n, bias=qkv_bias) for n in (D, kv, kv))
        self.attn_out = nn.Linear(D, D, bias=bias)
        self.ff_proj, self.up_proj = (nn.Linear(D, width, bias=bias) for _ in range(2))
        self.ff_out = nn.Linear(width, D, bias=bias)
        self._loopmdm = Patched("llada", layout(self), Shared())

    def forward(
        self,
        x: Tensor,
        attention_bias: Tensor | None = None,
        layer_past: object = None,
        use_cache: bool = False,
        replace_position: object = None,
    ) -> tuple[Tensor, None]:
        for _ in range(self.num_loops):
            x, _ = forward(self, x, attention_bias, layer_past, use_cache, replace_position)
        return x, None


class RMSNorm(nn.Module):
    """A gain and an eps; `layer.run` reads them."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def to_config(config: Mapping[str, Any]) -> ModelConfig:
    """LLaDA's config.json."""
    layers, heads, width = (value(config, name) for name in ("n_layers", "n_heads", "d_model"))
    bias = bool(value(config, "include_bias", default=False))
    refuse(config, "llada", input_emb_norm=(False,), scale_logits=(False,), alibi=(False,), rope=(True,))
    refuse(config, "llada", activation_type=("silu",), layer_norm_type=("rms",), block_type=("llama",))
    return ModelConfig(
        vocab_size=value(config, "embedding_size", default=None) or value(config, "vocab_size"),
        mask_token_id=value(config, "mask_token_id", default=126336),
        pad_token_id=value(config, "pad_token_id", default=None),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=value(config, "n_kv_heads", default=None) or heads,
        intermediate_size=value(config, "mlp_hidden_size", default=None) or value(config, "mlp_ratio") * width,
        norm_eps=value(config, "rms_norm_eps", default=1e-5),
        qkv_bias=bias or bool(value(config, "include_qkv_bias", default=False)),
        attention_out_bias=bias,
        mlp_bias=bias,
        rope_theta=float(value(config, "rope_theta", default=10000.0)),
        rope_dtype="float32" if value(config, "rope_full_precision", default=True) else "input",
        max_position_embeddings=value(config, "max_sequence_length", default=4096),
        tie_word_embeddings=bool(value(config, "weight_tying", default=False)),
        residual_in_fp32=False,
        loop=unlooped(layers),
    )


def from_config(config: ModelConfig) -> dict[str, Any]:
    """What LLaDA's config.json says of the architecture."""
    wanted = {"norm": "rmsnorm", "hidden_act": "swiglu", "modulation": "none", "qk_norm": "none", "positions": "rope"}
    for name, needed in wanted.items():
        if getattr(config, name) != needed:
            raise InputError(f"LLaDA has {name} = {needed!r}; this model has {getattr(config, name)!r}")
    return {
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "pad_token_id": config.pad_token_id,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "mlp_hidden_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "include_bias": config.mlp_bias,
        "include_qkv_bias": config.qkv_bias,
        "rope": True,
        "rope_theta": config.rope_theta,
        "rope_full_precision": config.rope_dtype == "float32",
        "max_sequence_length": config.max_position_embeddings,
        "weight_tying": config.tie_word_embeddings,
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "block_type": "llama",
        "alibi": False,
    }


FAMILY = Family(
    name="llada",
    blocks=("LLaDALlamaBlock",),
    layout=layout,
    forward=forward,
    required=tuple(
        f"{name}.weight"
        for name in ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    ),
    batched={"attention_bias": 4},
    head=("model.transformer.ff_out", "transformer.ff_out"),
    final_norm=("model.transformer.ln_f", "transformer.ln_f"),
    embedding=("model.transformer.wte.weight", "transformer.wte.weight"),
    layer_prefix="model.transformer.blocks.{}.",
    layer_parts=(
        Part("attn_norm.weight", ("attn_norm.weight",)),
        Part("attn.qkv.weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "qkv"),
        Part("attn.qkv.bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias"), "qkv"),
        Part("attn.out.weight", ("attn_out.weight",)),
        Part("attn.out.bias", ("attn_out.bias",)),
        Part("mlp_norm.weight", ("ff_norm.weight",)),
        Part("mlp.up.weight", ("ff_proj.weight", "up_proj.weight"), "halves"),
        Part("mlp.up.bias", ("ff_proj.bias", "up_proj.bias"), "halves"),
        Part("mlp.down.weight", ("ff_out.weight",)),
        Part("mlp.down.bias", ("ff_out.bias",)),
    ),
    parts=(
        Part("embed.weight", ("model.transformer.wte.weight",)),
        Part("final_norm.weight", ("model.transformer.ln_f.weight",)),
        Part("lm_head.weight", ("model.transformer.ff_out.weight",)),
    ),
    to_config=to_config,
    from_config=from_config,
    mask_id=126336,
    prefixes=("module.",),
    groups="model.transformer.block_groups.{}.{}.",
    group_size="block_group_size",
)
