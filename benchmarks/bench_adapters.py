"""A peer's model and sampler against the same model patched: MDLM-small shape, MDLM's cached ancestral rule.

    pytest benchmarks/bench_adapters.py                                       # 8 steps
    LOOPMDM_BENCH_STEPS=64 LOOPMDM_BENCH_ROUNDS=5 pytest -s benchmarks/bench_adapters.py

The plain arm is MDLM in plain PyTorch (fp32, fused attention) with its own sampler: logits, log-softmax, exp, noise and
arg-max over the whole vocabulary at every position of every step, the prediction kept while nothing changes. Ours is
`generate(policy="ancestral")` on the patched model in fp32 and with bf16 projections. The arms take turns and the ratio
is the median over rounds. Before that, on the same weights: patched and plain logits agree, and `compat="mdlm"` on the
patched model in float64 draws the plain sampler's tokens. The two rules differ in their noise, so their samples do.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import loopmdm
from loopmdm.adapters import as_denoiser

STEPS = int(os.environ.get("LOOPMDM_BENCH_STEPS", "8"))
ROUNDS = int(os.environ.get("LOOPMDM_BENCH_ROUNDS", "3"))
DIM, LAYERS, HEADS, COND, VOCAB, LENGTH = 768, 12, 12, 128, 50258, 256
EPS = 1e-5
WANTED = {"float32": 2.2, "bfloat16": 6.0}


def _peers():
    path = Path(__file__).parent.parent / "tests" / "peer_layers.py"
    spec = importlib.util.spec_from_file_location("peer_layers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.attend = lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return module


def plain(model, length: int, steps: int, mask: int, seed: int, conditioned: bool = False) -> torch.Tensor:
    """MDLM's sampler "ddpm_cache" with its last arg-max pass, as its authors write it."""
    torch.manual_seed(seed)
    x = torch.full((1, length), mask)
    times, dt = torch.linspace(1, EPS, steps + 1), (1 - EPS) / steps
    p = None
    for t in times[:-1]:
        if p is None:
            p = _subs(model, x, mask).exp()
        weights = p * (t - (t - dt))
        weights[:, :, mask] = t - dt
        noise = 1e-10 - (torch.rand_like(weights) + 1e-10).log()
        new = torch.where(x != mask, x, (weights / noise).argmax(-1))
        if not torch.equal(new, x) or conditioned:
            p = None
        x = new
    return _subs(model, x, mask).argmax(-1)


def _subs(model, x: torch.Tensor, mask: int) -> torch.Tensor:
    logits = model(x, torch.zeros(len(x)))
    logits[:, :, mask] += -1e6
    logits = logits - logits.logsumexp(-1, keepdim=True)
    known = x != mask
    logits[known] = -1e6
    logits[known, x[known]] = 0
    return logits


def ours(denoiser, length: int, steps: int, seed: int) -> torch.Tensor:
    return loopmdm.generate(denoiser, max_new_tokens=length, steps=steps, policy="ancestral", seed=seed).tokens


@pytest.fixture(scope="module")
def models():
    """(plain model, patched copy): every parameter drawn, gates and head included."""
    peers = _peers()
    sizes = {"hidden_size": DIM, "n_heads": HEADS, "n_blocks": LAYERS, "cond_dim": COND, "length": LENGTH}
    config = peers.namespace(model=peers.namespace(dropout=0.0, **sizes))
    model, rng = peers.DIT(config, VOCAB).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and name.endswith("weight"):
                p.copy_(0.5 + torch.rand(p.shape, generator=rng))
            else:
                p.normal_(0, 0.1 if p.dim() == 1 else p.shape[1] ** -0.5, generator=rng)
    return model, loopmdm.patch(copy.deepcopy(model))


@torch.no_grad()
def test_arms_agree(models):
    model, patched = models
    ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    want, got = model(ids, torch.zeros(1)), patched(ids, torch.zeros(1))
    gap = (want - got).abs().max() / want.abs().max()
    assert gap < 1e-5, gap
    narrow = as_denoiser(patched, dtype=torch.bfloat16)
    got = F.linear(narrow.hidden(ids), *narrow.head()).float()
    gap = (want - got).norm() / want.norm()
    assert gap < 0.03, gap
    # token for token in float64, on few steps and positions: in fp32 the arms round differently
    wide, patched = copy.deepcopy(model).double(), loopmdm.patch(copy.deepcopy(model).double())
    drawn = loopmdm.generate(as_denoiser(patched), max_new_tokens=24, steps=3, compat="mdlm", seed=5).tokens
    assert torch.equal(plain(wide, 24, 3, VOCAB - 1, 5), drawn)


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(WANTED))
def test_generate(models, dtype, capsys):
    model, patched = models
    denoiser = as_denoiser(patched, dtype=None if dtype == "float32" else torch.bfloat16)
    ours(denoiser, LENGTH, 2, 0), plain(model, LENGTH, 1, VOCAB - 1, 0)
    ratios, seconds = [], []
    for seed in range(ROUNDS):
        start = time.perf_counter()
        x = plain(model, LENGTH, STEPS, VOCAB - 1, seed)
        middle = time.perf_counter()
        y = ours(denoiser, LENGTH, STEPS, seed)
        end = time.perf_counter()
        assert not (x == VOCAB - 1).any() and not (y == VOCAB - 1).any()
        seconds.append((middle - start, end - middle))
        ratios.append((middle - start) / (end - middle))
    with capsys.disabled():
        theirs, own = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(
            f"\nMDLM-small, {LENGTH} tokens, {STEPS} steps, {dtype}, {torch.get_num_threads()} threads: plain "
            f"{theirs:.2f} s, ours {own:.2f} s, ratio {statistics.median(ratios):.2f} "
            f"(of {', '.join(f'{r:.2f}' for r in ratios)}; wanted {WANTED[dtype]} at 64 steps)"
        )
