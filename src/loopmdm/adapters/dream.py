"""Dream's `DreamDecoderLayer` (also DiffuCoder, Open-dLLM) and transformers' Qwen2 and Qwen3 layers (dllm's A2D).

RMS norm, SwiGLU, separate projections with bias on q, k and v (Qwen2) or per-head norms before the rotation (Qwen3),
grouped heads, half-split rotary embedding in the input's dtype. The token at i is read at i - 1. `attention_mask` may
be "full", None, bool or additive [B, 1, N, N]; None is full attention in Dream and causal in a Qwen layer that says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config import ModelConfig, check_loops
from ..errors import InputError
from .family import Family, Part, fits, refuse, unlooped, value
from .layer import Layout, Patched, Shared, run
from .llada import RMSNorm


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: object = None,
    position_ids: Tensor | None = None,
    past_key_value: object = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    cache_position: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, ...] | Tensor:
    """hidden_states [B, T, D] -> the same, in a tuple where the layer's own forward returns one."""
    cached = (past_key_value, kwargs.get("past_key_values"), kwargs.get("replace_position"))
    if use_cache or any(part is not None for part in cached) or kwargs.get("dual_cache"):
        raise InputError("a patched decoder layer keeps no key/value cache; call the model with use_cache=False")
    if output_attentions:
        raise InputError("a patched decoder layer does not return attention weights; leave out output_attentions")
    record: Patched = self._loopmdm
    hd = record.layout.head_dim
    if position_embeddings is None:
        rope = _own_table(self, record, hidden_states, position_ids)
    else:
        cos, sin = position_embeddings
        rope = (cos[..., : hd // 2], sin[..., : hd // 2])
    if isinstance(attention_mask, str) and attention_mask != "full":
        raise InputError(f"attention_mask is {attention_mask!r}; the only name that it may be is 'full'")
    given: object = attention_mask
    if not isinstance(given, (str, Tensor, type(None))):
        kind = type(attention_mask).__name__
        raise InputError(
            f"attention_mask is a {kind}, which a patched layer does not read; use attn_implementation='sdpa'"
        )
    mask = attention_mask if isinstance(attention_mask, Tensor) else None
    if mask is not None and mask.dim() != 4:
        raise InputError(f"attention_mask is {list(mask.shape)}; a layer takes [B, 1, N, N]")
    if mask is not None and not mask.dtype.is_floating_point:
        mask = mask.bool()
    if record.shared.ignore_padding:
        mask = None
    causal = kwargs.get("is_causal")
    x = run(self, hidden_states, rope, mask, causal=_causal(self) if causal is None else causal)
    return (x,) if record.layout.tuple_out else x


def _own_table(block: Any, record: Patched, x: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    made = getattr(block.self_attn, "rotary_emb", None)
    if made is not None and position_ids is not None:
        cos, sin = made(x, position_ids)
        half = record.layout.head_dim // 2
        return cos[..., :half], sin[..., :half]
    base = float(value(getattr(block, "config", {}), "rope_theta", default=0.0))
    if not base:
        raise InputError("a patched decoder layer needs position_embeddings, (cos, sin) each [1 or B, N, head_dim]")
    length = x.shape[1] if position_ids is None else int(position_ids.max()) + 1
    table = record.shared.table(length, record.layout.head_dim, base, x.device)
    return table if position_ids is None else (table[0][position_ids], table[1][position_ids])


def _causal(block: Any) -> bool:
    """Whether None as a mask is causal, as the layer's attention says it now; Dream's does not look."""
    return not type(block).__name__.startswith("Dream") and bool(getattr(block.self_attn, "is_causal", False))


def layout(block: Any) -> Layout:
    attention = block.self_attn
    hd = int(attention.head_dim)
    norms = hasattr(attention, "q_norm")
    if norms:
        fits(attention.q_norm.weight.shape == (hd,), "its q_norm is not per head")
    act = getattr(block.mlp, "act_fn", None)
    fits(act is None or "silu" in type(act).__name__.lower(), f"its activation is {type(act).__name__}, not SiLU")
    sliding = getattr(attention, "sliding_window", None)
    fits(not sliding, f"it attends in a sliding window of {sliding}")
    norm = block.input_layernorm
    return Layout(
        heads=attention.q_proj.weight.shape[0] // hd,
        groups=attention.k_proj.weight.shape[0] // hd,
        head_dim=hd,
        attn_norm="input_layernorm",
        qkv=tuple(f"self_attn.{name}_proj" for name in "qkv"),
        out="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        up=("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
        eps=float(value(norm, "variance_epsilon", "eps", default=1e-6)),
        rope_dtype="input",
        qk_norm="before_rope" if norms else "none",
        q_norm="self_attn.q_norm" if norms else "",
        k_norm="self_attn.k_norm" if norms else "",
        attention_dropout=float(getattr(attention, "attention_dropout", 0.0)),
        causal=_causal(block),
        tuple_out=type(block).__name__.startswith("Dream") or _returns_tuple(type(block)),
    )


def _returns_tuple(cls: type) -> bool:
    """transformers' layers return a tuple in older versions and a tensor in newer ones."""
    return "uple" in str(inspect.signature(cls.forward).return_annotation)  # type: ignore[attr-defined]


class DreamDecoderLayer(nn.Module):
    """Dream's layer: constructor, forward and keys as there, and `num_loops` visits of it.

    Args:
        config: with `hidden_size`, `num_attention_heads`, `num_key_value_heads`, `intermediate_size`, `rms_norm_eps`,
            `rope_theta`; a mapping or an object. `head_dim`, `attention_bias` and `qk_norm` vary it: Qwen3 has no bias
            and norms on q and k.
        layer_idx: taken as Dream passes it; not used.
        num_loops: visits a forward pass.
    """

    def __init__(self, config: Any, layer_idx: int = 0, *, num_loops: int = 1) -> None:
        super().__init__()
        self.config, self.layer_idx, self.num_loops = config, layer_idx, check_loops(num_loops)
        D, eps = value(config, "hidden_size"), value(config, "rms_norm_eps", default=1e-6)
        self.self_attn = _Attention(config, eps)
        self.mlp = _MLP(D, value(config, "intermediate_size"))
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self._loopmdm = Patched("dream", layout(self), Shared())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        for _ in range(self.num_loops):
            hidden_states = forward(self, hidden_states, *args, **kwargs)[0]
        return (hidden_states,)


class _Attention(nn.Module):
    def __init__(self, config: Any, eps: float) -> None:
        super().__init__()
        D, heads = value(config, "hidden_size"), value(config, "num_attention_heads")
        groups = value(config, "num_key_value_heads", default=None) or heads
        self.head_dim = value(config, "head_dim", default=None) or D // heads
        norms = bool(value(config, "qk_norm", default=False))
        bias = bool(value(config, "attention_bias", default=not norms))
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(D, n * self.head_dim, bias=bias) for n in (heads, groups, groups)
        )
        self.o_proj = nn.Linear(heads * self.head_dim, D, bias=False)
        if norms:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, eps), RMSNorm(self.head_dim, eps)
        self.attention_dropout = value(config, "attention_dropout", default=0.0)


class _MLP(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)


def to_config(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of Dream, or of a model of the Qwen2 or Qwen3 layout (`model_type` tells these)."""
    layers, heads, width = (value(config, f"num_{n}" if n != "hidden_size" else n) for n in _SIZES)
    refuse(config, "dream", hidden_act=("silu",), rope_scaling__type=_PLAIN, rope_scaling__rope_type=_PLAIN)
    refuse(config, "dream", rope_parameters__rope_type=_PLAIN, partial_rotary_factor=(1.0,))
    kind = str(value(config, "model_type", default="dream")).lower()
    if "dream" not in kind:  # Dream has the setting and ignores it
        refuse(config, "dream", use_sliding_window=(False,))
    qwen3 = "qwen3" in kind
    return ModelConfig(
        vocab_size=value(config, "vocab_size"),
        mask_token_id=value(config, "mask_token_id", default=None),
        pad_token_id=value(config, "pad_token_id", default=None),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=value(config, "num_key_value_heads", default=None) or heads,
        head_dim=value(config, "head_dim", default=None),
        intermediate_size=value(config, "intermediate_size"),
        norm_eps=value(config, "rms_norm_eps", default=1e-6),
        qkv_bias=bool(value(config, "attention_bias", default=not qwen3)),
        qk_norm="before_rope" if qwen3 else "none",
        rope_theta=float(value(config, "rope_theta", "rope_parameters.rope_theta", default=10000.0)),
        rope_dtype="input",
        max_position_embeddings=value(config, "max_position_embeddings", default=2048),
        tie_word_embeddings=bool(value(config, "tie_word_embeddings", default=False)),
        residual_in_fp32=False,
        loop=unlooped(layers),
    )


_PLAIN = ("default", None)
_SIZES = ("hidden_layers", "attention_heads", "hidden_size")


def from_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the architecture; `model_type` is "Dream" or "qwen3"."""
    wanted = {"norm": "rmsnorm", "hidden_act": "swiglu", "modulation": "none", "positions": "rope", "mlp_bias": False}
    for name, needed in wanted.items():
        if getattr(config, name) != needed:
            raise InputError(f"Dream has {name} = {needed!r}; this model has {getattr(config, name)!r}")
    if config.qk_norm == "after_rope":
        raise InputError("Qwen3 normalises q and k before the rotation; this model does after it")
    return {
        "model_type": "Dream" if config.qk_norm == "none" else "qwen3",
        "vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "pad_token_id": config.pad_token_id,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
    }


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

FAMILY = Family(
    name="dream",
    blocks=("DreamDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
    layout=layout,
    forward=forward,
    required=tuple(
        f"{name}.weight"
        for name in (
            *_ATTENTION,
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
    batched={"attention_mask": 4, "position_ids": 2, "position_embeddings": 3},
    head=("lm_head",),
    final_norm=("model.norm",),
    embedding=("model.embed_tokens.weight",),
    layer_prefix="model.layers.{}.",
    layer_parts=(
        Part("attn_norm.weight", ("input_layernorm.weight",)),
        Part("attn.qkv.weight", tuple(f"{name}.weight" for name in _ATTENTION), "qkv"),
        Part("attn.qkv.bias", tuple(f"{name}.bias" for name in _ATTENTION), "qkv"),
        Part("attn.q_norm.weight", ("self_attn.q_norm.weight",)),
        Part("attn.k_norm.weight", ("self_attn.k_norm.weight",)),
        Part("attn.out.weight", ("self_attn.o_proj.weight",)),
        Part("mlp_norm.weight", ("post_attention_layernorm.weight",)),
        Part("mlp.up.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "halves"),
        Part("mlp.down.weight", ("mlp.down_proj.weight",)),
    ),
    parts=(
        Part("embed.weight", ("model.embed_tokens.weight",)),
        Part("final_norm.weight", ("model.norm.weight",)),
        Part("lm_head.weight", ("lm_head.weight",)),
    ),
    to_config=to_config,
    from_config=from_config,
    mask_id=151666,
    logit_shift=1,
    prefixes=("module.",),
    ignored=("rotary_emb.inv_freq",),
)
