"""MDLM (kuleshov-group/mdlm): `DDiTBlock` and `DIT`, also of ReMDM and SEDD; DUO's block is in `duo.py`.

Layer norm without bias, eps 1e-5; adaLN from the noise level in the order shift, scale, gate; packed qkv; half-split
rotary embedding with the table cast to the dtype of q and k; the residual stream stays in the embedding's fp32. With
sigma zero, which is MDLM's default, the modulation is one row and folds into the norms (`layer.run`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, check_loops
from ..errors import InputError
from .family import Family, Part, fits, unlooped, value
from .layer import Layout, Patched, Shared, run

EPS = 1e-5
MASKED = ("bert", "bart", "electra", "text8")
"""Parts of names of tokenizers that have a mask token; with others MDLM adds one behind the last id."""


def forward(
    self: Any, x: Tensor, rotary_cos_sin: tuple[Tensor, Tensor], c: Tensor | None = None, seqlens: object = None
) -> Tensor:
    """x [B, T, D], rotary tables [1, T, 3, 1, hd], c [1 or B, cond_dim] -> [B, T, D]."""
    if seqlens is not None:
        raise InputError("seqlens (packed documents) is not supported by the patched DDiTBlock; pass padded rows")
    cos, sin = rotary_cos_sin
    half = cos.shape[-1] // 2
    return run(self, x, (cos[0, :, 0, 0, :half], sin[0, :, 0, 0, :half]), cond=c)


def layout(block: Any) -> Layout:
    D = block.attn_out.weight.shape[0]
    heads = block.n_heads
    fits(tuple(block.attn_qkv.weight.shape) == (3 * D, D), f"attn_qkv is not [{3 * D}, {D}]")
    fits(D % heads == 0, f"{heads} heads do not divide {D}")
    act = block.mlp[1]
    fits(isinstance(act, nn.GELU), f"its activation is {type(act).__name__}, not GELU")
    return Layout(
        heads=heads,
        groups=heads,
        head_dim=D // heads,
        attn_norm="norm1",
        qkv=("attn_qkv",),
        out="attn_out",
        mlp_norm="norm2",
        up=("mlp.0",),
        down="mlp.2",
        norm="layernorm",
        eps=EPS,
        activation="gelu_tanh" if act.approximate == "tanh" else "gelu",
        rope_dtype="input",
        modulation="adaLN_modulation" if hasattr(block, "adaLN_modulation") else "",
        dropout=float(block.dropout),
    )


class LayerNorm(nn.Module):
    """Layer norm with a gain, in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), eps=EPS)


class DDiTBlock(nn.Module):
    """MDLM's block: constructor, forward and keys as there, and `num_loops` visits of it.

    Args:
        dim, n_heads, cond_dim, mlp_ratio, dropout: as in MDLM.
        adaLN: False leaves the modulation out (DUO).
        num_loops: visits a forward pass.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        cond_dim: int | None = None,
        mlp_ratio: int = 4,
        dropout: float = 0.1,
        *,
        adaLN: bool = True,
        num_loops: int = 1,
    ) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.adaLN = n_heads, dropout, adaLN
        self.num_loops = check_loops(num_loops)
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * dim, dim)
        )
        if adaLN:
            if cond_dim is None:
                raise InputError("DDiTBlock with adaLN needs cond_dim, the width of the conditioning")
            self.adaLN_modulation = nn.Linear(cond_dim, 6 * dim)
            nn.init.zeros_(self.adaLN_modulation.weight)
            nn.init.zeros_(self.adaLN_modulation.bias)
        self._loopmdm = Patched("mdlm", layout(self), Shared())

    def forward(
        self,
        x: Tensor,
        rotary_cos_sin: tuple[Tensor, Tensor],
        c: Tensor | None = None,
        seqlens: object = None,
    ) -> Tensor:
        for _ in range(self.num_loops):
            x = forward(self, x, rotary_cos_sin, c, seqlens)
        return x


class DIT(nn.Module):
    """MDLM's model: keys and forward as there, without flash-attn and einops.

    Args:
        config: with `model.hidden_size`, `.n_heads`, `.n_blocks`, `.cond_dim`, `.dropout`; a mapping or an object.
        vocab_size: number of ids, the mask included.
        num_loops: visits of each block in a forward pass; `loopify` loops a run of blocks.
    """

    def __init__(self, config: Any, vocab_size: int, num_loops: int = 1) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        dim, heads, cond = (value(config, f"model.{name}") for name in ("hidden_size", "n_heads", "cond_dim"))
        self.vocab_embed = Embedding(dim, vocab_size)
        self.sigma_map = TimestepEmbedder(cond)
        self.rotary_emb = Rotary(dim // heads)
        self.blocks = nn.ModuleList(
            DDiTBlock(dim, heads, cond, dropout=value(config, "model.dropout"), num_loops=num_loops)
            for _ in range(value(config, "model.n_blocks"))
        )
        self.output_layer = FinalLayer(dim, vocab_size, cond)
        shared = Shared()
        for block in self.blocks:
            block.__dict__["_loopmdm"].shared = shared

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:
        """ids [B, T], noise levels [1 or B] -> logits [B, T, V]; the blocks in bf16 autocast on a GPU."""
        x = self.vocab_embed(indices)
        c = F.silu(self.sigma_map(sigma))
        rotary = self.rotary_emb(x)
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else nullcontext():
            for block in self.blocks:
                x = block(x, rotary, c)
            return self.output_layer(x, c)


class Embedding(nn.Module):
    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class TimestepEmbedder(nn.Module):
    """Noise level -> conditioning: 256 sinusoids (cosines first), Linear, SiLU, Linear."""

    SINUSOIDS = 256

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.SINUSOIDS, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, t: Tensor) -> Tensor:  # [B] -> [B, cond_dim]
        half = self.SINUSOIDS // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(10000) * steps / half)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))


class Rotary(nn.Module):
    """Tables [1, T, 3, 1, hd] for q, k and v; `inv_freq` is a buffer that checkpoints hold."""

    def __init__(self, dim: int, base: float = 10_000) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angle = torch.outer(steps, self.get_buffer("inv_freq").float()).repeat(1, 2)
        cos, sin = (
            torch.stack((table, table, still.expand_as(table)), dim=1)[None, :, :, None]
            for table, still in ((angle.cos(), angle.new_ones(1)), (angle.sin(), angle.new_zeros(1)))
        )
        return cos, sin


class FinalLayer(nn.Module):
    def __init__(self, dim: int, vocab_size: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = nn.Linear(dim, vocab_size)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * dim)
        for layer in (self.linear, self.adaLN_modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def mask_index(config: Any) -> int | None:
    """The mask's id where the configuration has it; None is the last id.

    Raises:
        InputError: it has none, and the tokenizer that it names has a mask token, which MDLM then takes.
    """
    found = value(config, "mask_token_id", "mask_index", default=None)
    tokenizer = str(value(config, "data.tokenizer_name_or_path", default="")).rpartition("/")[2]
    if found is None and any(part in tokenizer.lower() for part in MASKED):
        raise InputError(
            f"the mask of this model is the mask token of {tokenizer}, whose id its configuration lacks; give it as "
            "mask_id, or as mask_index in the configuration"
        )
    return found


def to_config(config: Mapping[str, Any]) -> ModelConfig:
    """MDLM's Hydra configuration (with `model.*`), or the flat one of its models on the Hub."""
    hidden = value(config, "model.hidden_size", "hidden_size", "hidden_dim")
    layers = value(config, "model.n_blocks", "n_blocks")
    vocab = value(config, "vocab_size", "model.vocab_size")
    return ModelConfig(
        vocab_size=vocab,
        mask_token_id=mask_index(config),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=value(config, "model.n_heads", "n_heads"),
        intermediate_size=4 * hidden,
        hidden_act="gelu_tanh",
        norm="layernorm",
        norm_eps=EPS,
        mlp_bias=True,
        head_bias=True,
        rope_dtype="input",
        modulation="adaln",
        cond_dim=value(config, "model.cond_dim", "cond_dim"),
        time_conditioning=bool(value(config, "time_conditioning", default=False)),
        max_position_embeddings=value(config, "model.length", "model_length", "length", default=1024),
        dropout=value(config, "model.dropout", "dropout", default=0.0),
        loop=unlooped(layers),
    )


def from_config(config: ModelConfig) -> dict[str, Any]:
    """The flat configuration of MDLM's models on the Hub."""
    wanted = {"norm": "layernorm", "hidden_act": "gelu_tanh", "modulation": "adaln", "qk_norm": "none"}
    for name, needed in wanted.items():
        if getattr(config, name) != needed:
            raise InputError(f"MDLM has {name} = {needed!r}; this model has {getattr(config, name)!r}")
    if config.intermediate_size != 4 * config.hidden_size:
        raise InputError(
            f"MDLM's MLP is four times {config.hidden_size} wide; this model's is {config.intermediate_size}"
        )
    return {
        "vocab_size": config.vocab_size,
        "mask_index": config.mask_token_id,
        "hidden_dim": config.hidden_size,
        "n_blocks": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "cond_dim": config.cond_dim,
        "dropout": config.dropout,
        "model_length": config.max_position_embeddings,
        "time_conditioning": config.time_conditioning,
    }


FAMILY = Family(
    name="mdlm",
    blocks=("DDiTBlock",),
    layout=layout,
    forward=forward,
    required=(
        "norm1.weight",
        "attn_qkv.weight",
        "attn_out.weight",
        "norm2.weight",
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
    ),
    batched={"c": 2},
    head=("output_layer.linear",),
    final_norm=(),
    embedding=("vocab_embed.embedding",),
    layer_prefix="blocks.{}.",
    layer_parts=(
        Part("attn_norm.weight", ("norm1.weight",)),
        Part("attn.qkv.weight", ("attn_qkv.weight",)),
        Part("attn.out.weight", ("attn_out.weight",)),
        Part("mlp_norm.weight", ("norm2.weight",)),
        Part("mlp.up.weight", ("mlp.0.weight",)),
        Part("mlp.up.bias", ("mlp.0.bias",)),
        Part("mlp.down.weight", ("mlp.2.weight",)),
        Part("mlp.down.bias", ("mlp.2.bias",)),
        Part("modulation.weight", ("adaLN_modulation.weight",)),
        Part("modulation.bias", ("adaLN_modulation.bias",)),
    ),
    parts=(
        Part("embed.weight", ("vocab_embed.embedding",)),
        Part("sigma_embed.inner.weight", ("sigma_map.mlp.0.weight",)),
        Part("sigma_embed.inner.bias", ("sigma_map.mlp.0.bias",)),
        Part("sigma_embed.outer.weight", ("sigma_map.mlp.2.weight",)),
        Part("sigma_embed.outer.bias", ("sigma_map.mlp.2.bias",)),
        Part("final_norm.weight", ("output_layer.norm_final.weight",)),
        Part("final_modulation.weight", ("output_layer.adaLN_modulation.weight",)),
        Part("final_modulation.bias", ("output_layer.adaLN_modulation.bias",)),
        Part("lm_head.weight", ("output_layer.linear.weight",)),
        Part("lm_head.bias", ("output_layer.linear.bias",)),
    ),
    to_config=to_config,
    from_config=from_config,
    time_input=True,
    prefixes=("backbone.", "module.backbone.", "module."),
    ignored=("rotary_emb.inv_freq",),
)
