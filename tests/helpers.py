"""Models for tests: small, and never freshly initialised.

A new model has zero gates, zero output projections and a zero head: every block is the identity and every
implementation of it is "right". `randomize_` draws every parameter; `assert_live` refuses a model whose
parameters are constant or whose blocks return what they were given.
"""

import math

import torch
from torch import nn

from loopmdm.config import ModelConfig
from loopmdm.model.block import Block, Norm
from loopmdm.model.lm import LoopMDM
from loopmdm.model.loop import Anchored

DIT = {
    "hidden_act": "gelu_tanh",
    "norm": "layernorm",
    "mlp_bias": True,
    "head_bias": True,
    "modulation": "adaln",
    "cond_dim": 12,
}
LLAMA = {"num_key_value_heads": 2, "intermediate_size": 40}
BACKBONES = {"dit": DIT, "llama": LLAMA}


def tiny(backbone="llama", **changes):
    """A configuration of 4 layers, d = 32, 11 ids of which 10 is the mask, looped layers 1 and 2."""
    base = {
        "vocab_size": 11,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        **BACKBONES[backbone],
    }
    loop = {"max_loops": 3}
    for key in ("start", "length", "max_loops", "boundary"):
        if key in changes:
            loop[key] = changes.pop(key)
    return ModelConfig.from_dict({**base, **changes, "loop": loop})


def randomize_(module, seed=0, head_scale=1.0):
    """Draw every parameter: gains in [0.5, 1.5], biases and embeddings normal, matrices normal at fan-in."""
    rng = torch.Generator().manual_seed(seed)

    def normal(parameter, std):
        return torch.randn(parameter.shape, generator=rng) * std

    gains = {id(m.weight) for m in module.modules() if isinstance(m, (Norm, Anchored)) and m.weight is not None}
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if id(parameter) in gains:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=rng))
            elif parameter.dim() == 1:
                parameter.copy_(normal(parameter, 0.3))
            elif id(parameter) in tables:
                parameter.copy_(normal(parameter, 1.0))
            else:
                scale = head_scale if name.startswith("lm_head") else 1.0
                parameter.copy_(normal(parameter, scale / math.sqrt(parameter.shape[1])))
    return module


def assert_live(model, **inputs):
    """Fail if a parameter is constant, a block is the identity, a visit changes nothing or the logits are flat."""
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1:
            assert parameter.float().std() > 0, f"{name} is constant"
    handles = []

    def changed(name):
        def hook(_, args, output):
            gap = (output - args[0]).float().norm() / args[0].float().norm()
            assert gap > 1e-2, f"{name} returns its input"

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (Block, Anchored)):
            handles.append(module.register_forward_hook(changed(name)))
    try:
        with torch.no_grad():
            ids = torch.arange(8)[None] % model.vocab_size
            once, twice = (model.hidden(ids, num_loops=s, **inputs) for s in (1, 2))
            assert (once - twice).abs().max() > 1e-3, "a second visit changes nothing"
            spread = model(ids, num_loops=1, **inputs).logits
            assert spread[..., : model.vocab_size - 1].std(-1).min() > 1e-3, "the logits are flat"
    finally:
        for handle in handles:
            handle.remove()
    return model


def live(config, seed=0, dtype=torch.float32, head_scale=1.0):
    """A randomised LoopMDM in evaluation mode that has passed `assert_live`."""
    model = randomize_(LoopMDM(config), seed, head_scale).to(dtype).eval()
    sigma = {"sigma": torch.full((1,), 0.7)} if config.time_conditioning else {}
    return assert_live(model, **sigma)


def ids(batch, length, vocab_size=11, seed=1, masks=0.3):
    """Random ids [batch, length] with about `masks` of them the last id."""
    rng = torch.Generator().manual_seed(seed)
    out = torch.randint(0, vocab_size - 1, (batch, length), generator=rng)
    return out.masked_fill(torch.rand(out.shape, generator=rng) < masks, vocab_size - 1)


class Table:
    """A Denoiser that is no LoopMDM: logits at i from a table of (id at i, i), optionally read one position late.

    It keeps what it was called with in `calls`.
    """

    def __init__(self, table, mask_id, logit_shift=0, suppressed=(), max_length=None):
        self.table = table  # [T, V, V] in any dtype: position, id seen there, logit
        self.vocab_size, self.mask_id, self.pad_id = table.shape[-1], mask_id, 0
        self.suppressed_ids = (mask_id, *suppressed)
        self.logit_shift, self.max_length, self.max_loops, self.calls = logit_shift, max_length, 1, []

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        self.calls.append((input_ids.clone(), attention_mask, num_loops, sigma))
        return self.table[torch.arange(input_ids.shape[1]), input_ids]

    def head(self):
        return torch.eye(self.vocab_size, dtype=self.table.dtype), None

    def forward_flops(self, length, num_loops):
        return 100.0 * length
