"""benchmarks/reference.py, the arm that every ratio is measured against, computes what our models and samplers do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import loopmdm
from loopmdm.config import preset

from .helpers import live


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load("reference")

MODELS = {
    "llama": {"preset": "tiny-llama", "boundary": "plain"},
    "llama, anchored": {"preset": "tiny-llama", "boundary": "anchored"},
    "llama, grouped keys": {"preset": "tiny-llama", "boundary": "plain", "num_key_value_heads": 2},
    "dit": {"preset": "tiny-dit"},
}


def pair(name: str, **changes):
    options = {**MODELS[name], "vocab_size": 50, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16} | changes
    if "num_key_value_heads" not in options:
        options["num_key_value_heads"] = options["num_attention_heads"]
    model = live(preset(options.pop("preset"), **options)).double()
    return model, reference.Reference(model)


def prompts(model, rows=3, given=4, new=12):
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.mask_id, (rows, given), generator=rng)
    return torch.cat((ids, torch.full((rows, new), model.mask_id)), dim=1)


@pytest.mark.parametrize("loops", (1, 3))
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_models(name, loops):
    ours, plain = pair(name)
    ids = prompts(ours)
    want = ours(ids, num_loops=loops).logits[..., : ours.mask_id]  # the mask is the last id and never predicted
    got = plain(ids, loops)[..., : ours.mask_id]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).double()
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(plain.embed.grad, ours.embed.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", (0.0, 0.8))
def test_low_confidence_is_lladas_generate(temperature):
    ours, plain = pair("llama")
    ids = prompts(ours)
    options = {"steps": 5, "num_loops": 2, "temperature": temperature, "compat": "llada", "seed": 7}
    want = loopmdm.generate(ours, ids[:, :4], max_new_tokens=12, **options)
    torch.manual_seed(7)
    got = reference.low_confidence(plain, ids, 5, temperature, 2, mask_may_win=True)
    assert torch.equal(got, want.tokens)
    assert not (reference.low_confidence(plain, ids, 5, temperature, 2) == ours.mask_id).any()


def test_ancestral_is_mdlms_cached_sampler():
    ours, plain = pair("dit")
    ids = prompts(ours, given=0, new=16)
    want = loopmdm.generate(ours, ids, steps=6, num_loops=2, compat="mdlm", seed=3)
    torch.manual_seed(3)
    got = reference.ancestral(plain, ids, 6, 2)
    assert torch.equal(got, want.tokens)
