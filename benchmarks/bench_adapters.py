"""A peer's model against the same model patched: MDLM-small's shape, MDLM's cached ancestral rule.

    pytest benchmarks/bench_adapters.py --benchmark-only              one layer, and a small model's 4 steps
    pytest benchmarks/bench_adapters.py --benchmark-only -m slow      the whole model, 256 tokens, 64 steps

The reference is MDLM in plain PyTorch (fp32, fused attention), with its own sampler: logits, log-softmax, exp, noise
and arg-max over the whole vocabulary at every position of every step, the prediction kept while nothing changes. Ours
is `generate(policy="ancestral")` on the patched model, in fp32 and with bf16 projections. Before anything is timed the
logits of both agree on the same weights, and `compat="mdlm"` on the patched model in float64 draws the reference's
tokens. The two rules differ in their noise, so their samples do.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loopmdm
from loopmdm.adapters import as_denoiser

from .frame import DEVICE, Run, race

DIM, HEADS, COND, LENGTH = 768, 12, 128, 256
EPS = 1e-5
BF16, FP32 = torch.bfloat16, torch.float32
ARMS = {"reference": FP32, "loopmdm": FP32, "loopmdm, bf16": BF16}
CASES = {  # size: (layers, vocabulary, steps)
    "2 layers, 4 steps": (2, 8192, 4),
    "MDLM-small, 64 steps": (12, 50258, 64),
}
SIZES = ["2 layers, 4 steps", pytest.param("MDLM-small, 64 steps", marks=pytest.mark.slow)]


def _peers() -> Any:
    path = Path(__file__).parent.parent / "tests" / "peer_layers.py"
    spec = importlib.util.spec_from_file_location("peer_layers", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.attend = lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return module


@functools.cache
def models(layers: int, vocab: int) -> tuple[Any, Any]:
    """(plain model, patched copy): every parameter drawn, gates and head included."""
    peers = _peers()
    sizes = {"hidden_size": DIM, "n_heads": HEADS, "n_blocks": layers, "cond_dim": COND, "length": LENGTH}
    model = peers.DIT(peers.namespace(model=peers.namespace(dropout=0.0, **sizes)), vocab).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and name.endswith("weight"):
                p.copy_(0.5 + torch.rand(p.shape, generator=rng))
            else:
                p.normal_(0, 0.1 if p.dim() == 1 else p.shape[1] ** -0.5, generator=rng)
    model = model.to(DEVICE)
    return model, loopmdm.patch(copy.deepcopy(model))


@torch.inference_mode()
def plain(model: nn.Module, length: int, steps: int, seed: int) -> Tensor:
    """MDLM's sampler "ddpm_cache" with its last arg-max pass, as its authors write it."""
    torch.manual_seed(seed)
    mask = model.vocab_size - 1
    x = torch.full((1, length), mask, device=DEVICE)
    times, dt = torch.linspace(1, EPS, steps + 1), (1 - EPS) / steps
    p = None
    for t in times[:-1]:
        if p is None:
            p = _subs(model, x, mask).exp()
        weights = p * (t - (t - dt))
        weights[:, :, mask] = t - dt
        noise = 1e-10 - (torch.rand_like(weights) + 1e-10).log()
        new = torch.where(x != mask, x, (weights / noise).argmax(-1))
        if not torch.equal(new, x):
            p = None
        x = new
    return _subs(model, x, mask).argmax(-1)


def _subs(model: nn.Module, x: Tensor, mask: int) -> Tensor:
    logits = model(x, torch.zeros(len(x), device=DEVICE))
    logits[:, :, mask] += -1e6
    logits = logits - logits.logsumexp(-1, keepdim=True)
    known = x != mask
    logits[known] = -1e6
    logits[known, x[known]] = 0
    return logits


@functools.cache
@torch.inference_mode()
def check(layers: int, vocab: int) -> None:
    """Logits in fp32 and bf16; token for token in float64, on few steps: in fp32 the arms round differently."""
    model, patched = models(layers, vocab)
    ids = torch.randint(0, vocab, (1, LENGTH), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    time = torch.zeros(1, device=DEVICE)
    want = model(ids, time)
    gap = (want - patched(ids, time)).abs().max() / want.abs().max()
    assert gap < 1e-5, gap
    narrow = as_denoiser(patched, dtype=BF16)
    gap = (want - F.linear(narrow.hidden(ids), *narrow.head()).float()).norm() / want.norm()
    assert gap < 0.03, gap
    wide = copy.deepcopy(model).double()
    ours = as_denoiser(loopmdm.patch(copy.deepcopy(wide)))
    drawn = loopmdm.generate(ours, max_new_tokens=24, steps=3, compat="mdlm", seed=5).tokens
    assert torch.equal(plain(wide, 24, 3, 5), drawn)


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("size", SIZES)
def test_generate(benchmark: Any, size: str, name: str) -> None:
    layers, vocab, steps = CASES[size]
    benchmark.group, benchmark.name = f"MDLM's model and sampler, {size}, 1 x {LENGTH} tokens", name
    model, patched = models(layers, vocab)
    denoiser = as_denoiser(patched, dtype=BF16 if ARMS[name] is BF16 else None)

    def reference(seed: int) -> Tensor:
        return plain(model, LENGTH, steps, seed)

    def ours(seed: int) -> Tensor:
        return loopmdm.generate(denoiser, max_new_tokens=LENGTH, steps=steps, policy="ancestral", seed=seed).tokens

    def agree(got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape and not (got == vocab - 1).any() and not (want == vocab - 1).any()
        check(layers, vocab)

    run, rival = (reference, None) if name == "reference" else (ours, reference)
    seeds = range(5)
    race(benchmark, run, rival, seeds, agree, dtype=ARMS[name], tokens=LENGTH, memory=False)


@pytest.mark.parametrize("name", ARMS)
def test_layer(benchmark: Any, name: str) -> None:
    benchmark.group, benchmark.name = f"one DDiTBlock, {LENGTH} x {DIM}", name
    model, patched = models(*CASES["2 layers, 4 steps"][:2])
    dtype = ARMS[name]
    ours = as_denoiser(patched, dtype=BF16).model if dtype is BF16 else patched
    rng = torch.Generator().manual_seed(2)
    inputs = [torch.randn(1, LENGTH, DIM, generator=rng).to(DEVICE) for _ in range(4)]
    rotary, c = model.rotary_emb(inputs[0]), torch.randn(1, COND, generator=rng).to(DEVICE)

    def layer(blocks: Any) -> Run:
        return torch.inference_mode()(lambda x: blocks[0](x, rotary, c))

    def agree(got: Tensor, want: Tensor) -> None:
        gap = float((got - want).norm() / want.norm())
        assert gap < (1e-5 if dtype is FP32 else 0.02), gap

    reference = None if name == "reference" else layer(model.blocks)
    flops = 2.0 * LENGTH * 12 * DIM * DIM + 4.0 * LENGTH * LENGTH * DIM
    race(
        benchmark,
        layer(ours.blocks if reference else model.blocks),
        reference,
        inputs,
        agree,
        dtype=dtype,
        tokens=LENGTH,
        flops=flops,
    )
