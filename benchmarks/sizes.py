"""The models that the benchmarks run: three sizes, drawn and not fresh (a new model's blocks are the identity)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from loopmdm.config import LoopConfig, ModelConfig
from loopmdm.model.block import Norm
from loopmdm.model.lm import LoopMDM
from loopmdm.model.loop import Anchored

DIT = {"hidden_act": "gelu_tanh", "norm": "layernorm", "mlp_bias": True, "head_bias": True, "modulation": "adaln"}


def llama(width: int, layers: int, heads: int = 0, **changes: Any) -> dict[str, Any]:
    heads = heads or width // 64
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return shape | {"intermediate_size": 64 * round(width * 8 / 3 / 64)} | changes


def dit(width: int, layers: int, heads: int = 0) -> dict[str, Any]:
    return llama(width, layers, heads, intermediate_size=4 * width) | DIT


def block_config(size: str, layers: int = 2, loops: int = 12) -> ModelConfig:
    """The looped block alone, between an embedding of 1024 ids and the last norm: layers visited `loops` times.

    `tiny-*`: d 128; `paper-170m`: the block of arXiv 2605.26106; `llama-512`, `-1024`, `-2048`.
    """
    shapes = {
        "tiny-dit": dit(128, layers),
        "tiny-llama": llama(128, layers),
        "paper-170m": dit(768, layers, 12),
        **{f"llama-{width}": llama(width, layers) for width in (512, 1024, 2048)},
    }
    loop = LoopConfig(start=0, length=layers, max_loops=loops)
    return ModelConfig(vocab_size=1024, max_position_embeddings=1024, **shapes[size], loop=loop)


def model_config(size: str) -> ModelConfig:
    """Whole models: `tiny` (d 128, V 8192), `llama-512` (12 layers, V 50258), and the paper's 170M."""
    if size == "paper-170m":
        return ModelConfig(vocab_size=50258, **dit(768, 12, 12), loop=LoopConfig(start=1, length=2, max_loops=12))
    shape = llama(128, 6) if size == "tiny" else llama(512, 12)
    vocabulary = 8192 if size == "tiny" else 50258
    return ModelConfig(vocab_size=vocabulary, **shape, loop=LoopConfig(start=2, length=2, max_loops=4))


@functools.cache
def drawn(config: ModelConfig, device: torch.device) -> LoopMDM:
    """Gains about 1, small biases, matrices at fan-in; evaluation mode."""
    with torch.device("meta"):
        model = LoopMDM(config).eval()
    model, rng = model.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    gains = {id(m.weight) for m in model.modules() if isinstance(m, (Norm, Anchored))}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for p in model.parameters():
            std = 0.1 if p.dim() == 1 else 1.0 if id(p) in tables else 1 / math.sqrt(p.shape[1])
            p.normal_(0.0, std, generator=rng).add_(float(id(p) in gains))
    return model.to(device)
