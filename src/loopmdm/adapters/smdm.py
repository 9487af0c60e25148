"""SMDM (ML-GSAI/SMDM): lit-gpt's `Block` of `diffmodel.py`.

RMS norm, SwiGLU under `mlp.swiglu` (w1 gate, w2 up, w3 down), qkv packed by query group (q, .., q, k, v), half-split
rotary embedding in fp32 with tables rounded to bf16. The embedding has one row more than the head: the mask's.
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
from .llada import RMSNorm


def forward(self: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, T, D], (cos, sin) each [T, head_dim / 2] -> [B, T, D]."""
    record: Patched = self._loopmdm
    if 2 * rope[0].shape[-1] != record.layout.head_dim:
        raise InputError(
            f"the rotary table turns {2 * rope[0].shape[-1]} of {record.layout.head_dim} dimensions of a head; "
            "the patched Block turns all (rotary_percentage = 1)"
        )
    return run(self, x, rope)


def layout(block: Any) -> Layout:
    config = block.config
    heads = value(config, "n_head")
    groups = value(config, "n_query_groups", default=None) or heads
    hd = value(config, "head_size", default=None) or value(config, "n_embd") // heads
    fits(not value(config, "parallel_residual", default=False), "its attention and MLP run in parallel")
    fits(not value(config, "shared_attention_norm", default=False), "its two branches share a norm")
    rows = block.attn.attn.weight.shape[0]
    fits(rows == (heads + 2 * groups) * hd, f"attn.attn has {rows} rows, not {(heads + 2 * groups) * hd}")
    norm = type(block.norm_1).__name__
    fits("RMS" in norm, f"its norm is {norm}, not an RMS norm")
    return Layout(
        heads=heads,
        groups=groups,
        head_dim=hd,
        attn_norm="norm_1",
        qkv=("attn.attn",),
        out="attn.proj",
        mlp_norm="norm_2",
        up=("mlp.swiglu.w1", "mlp.swiglu.w2"),
        down="mlp.swiglu.w3",
        eps=float(value(block.norm_1, "eps", "epsilon", default=value(config, "norm_eps", default=1e-5))),
        interleaved_qkv=True,
    )


class Block(nn.Module):
    """SMDM's block: constructor, forward and keys as there, and `num_loops` visits of it.

    Args:
        config: lit-gpt's `Config` with `n_embd`, `n_head`, `n_query_groups`, `intermediate_size`, `norm_eps`, `bias`; a
            mapping or an object.
        num_loops: visits a forward pass.
    """

    def __init__(self, config: Any, *, num_loops: int = 1) -> None:
        super().__init__()
        self.config, self.num_loops = config, check_loops(num_loops)
        D, heads = value(config, "n_embd"), value(config, "n_head")
        groups = value(config, "n_query_groups", default=None) or heads
        hd = value(config, "head_size", default=None) or D // heads
        eps, bias = value(config, "norm_eps", default=1e-5), bool(value(config, "bias", default=False))
        width = value(config, "intermediate_size")
        self.norm_1, self.norm_2 = RMSNorm(D, eps), RMSNorm(D, eps)
        self.attn = nn.ModuleDict({"attn": nn.Linear(D, (heads + 2 * groups) * hd, bias=bias)})
        self.attn["proj"] = nn.Linear(heads * hd, D, bias=bias)
        swiglu = {"w1": nn.Linear(D, width, bias=False), "w2": nn.Linear(D, width, bias=False)}
        swiglu["w3"] = nn.Linear(width, D, bias=False)
        self.mlp = nn.ModuleDict({"swiglu": nn.ModuleDict(swiglu)})
        self._loopmdm = Patched("smdm", layout(self), Shared())

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        for _ in range(self.num_loops):
            x = forward(self, x, rope)
        return x


def rope_cache(length: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The tables that SMDM's model passes to its blocks: (cos, sin), each [length, head_dim / 2] in bf16."""
    table = Shared().table(length, head_dim, 10000.0, device or torch.device("cpu"))
    return table[0].bfloat16(), table[1].bfloat16()


def to_config(config: Mapping[str, Any]) -> ModelConfig:
    """lit-gpt's Config. The mask is the last id, one past the head's rows."""
    layers, heads, width = (value(config, name) for name in ("n_layer", "n_head", "n_embd"))
    refuse(config, "smdm", condense_ratio=(1,), rotary_percentage=(1.0,), parallel_residual=(False,))
    refuse(config, "smdm", _norm_class=("RMSNorm", "FusedRMSNorm"), shared_attention_norm=(False,))
    vocab = value(config, "padded_vocab_size", "vocab_size") + 1
    return ModelConfig(
        vocab_size=vocab,
        mask_token_id=vocab - 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=value(config, "n_query_groups", default=None) or heads,
        intermediate_size=value(config, "intermediate_size"),
        norm_eps=value(config, "norm_eps", default=1e-5),
        rope_table_dtype="bfloat16",
        max_position_embeddings=value(config, "block_size", default=2048),
        residual_in_fp32=False,
        loop=unlooped(layers),
    )


def from_config(config: ModelConfig) -> dict[str, Any]:
    """What lit-gpt's Config says of the architecture."""
    wanted = {"norm": "rmsnorm", "hidden_act": "swiglu", "modulation": "none", "qk_norm": "none", "positions": "rope"}
    for name, needed in wanted.items():
        if getattr(config, name) != needed:
            raise InputError(f"SMDM has {name} = {needed!r}; this model has {getattr(config, name)!r}")
    if config.mask_token_id != config.vocab_size - 1:
        raise InputError(f"SMDM's mask is the last id; here it is {config.mask_token_id} of {config.vocab_size}")
    return {
        "padded_vocab_size": config.vocab_size - 1,
        "vocab_size": config.vocab_size - 1,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_query_groups": config.num_key_value_heads,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "norm_eps": config.norm_eps,
        "block_size": config.max_position_embeddings,
        "bias": False,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "shared_attention_norm": False,
        "_norm_class": "FusedRMSNorm",
        "_mlp_class": "LLaMAMLP",
    }


FAMILY = Family(
    name="smdm",
    blocks=("Block",),
    layout=layout,
    forward=forward,
    required=tuple(
        f"{name}.weight"
        for name in (
            "norm_1",
            "attn.attn",
            "attn.proj",
            "norm_2",
            "mlp.swiglu.w1",
            "mlp.swiglu.w2",
            "mlp.swiglu.w3",
        )
    ),
    batched={},
    head=("lm_head",),
    final_norm=("transformer.ln_f",),
    embedding=("transformer.wte.weight",),
    layer_prefix="transformer.h.{}.",
    layer_parts=(
        Part("attn_norm.weight", ("norm_1.weight",)),
        Part("attn.qkv.weight", ("attn.attn.weight",), "qkv_interleaved"),
        Part("attn.qkv.bias", ("attn.attn.bias",), "qkv_interleaved"),
        Part("attn.out.weight", ("attn.proj.weight",)),
        Part("attn.out.bias", ("attn.proj.bias",)),
        Part("mlp_norm.weight", ("norm_2.weight",)),
        Part("mlp.up.weight", ("mlp.swiglu.w1.weight", "mlp.swiglu.w2.weight"), "halves"),
        Part("mlp.down.weight", ("mlp.swiglu.w3.weight",)),
    ),
    parts=(
        Part("embed.weight", ("transformer.wte.weight",)),
        Part("final_norm.weight", ("transformer.ln_f.weight",)),
        Part("lm_head.weight", ("lm_head.weight",)),
    ),
    to_config=to_config,
    from_config=from_config,
    prefixes=("module.", "_forward_module."),
    extra_rows=1,
)
