"""Optimizers, learning-rate shapes and the weight average."""

import math

import pytest
import torch
from torch import nn

from loopmdm.errors import InputError
from loopmdm.lab.optim import DECAYS, averaged, build_optimizers, rate
from loopmdm.model.lm import LoopMDM

from .helpers import tiny


@pytest.mark.parametrize("backbone", ["dit", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(name, tied, backbone):
    model = LoopMDM(tiny(backbone, boundary="anchored", positions="both", tie_word_embeddings=tied))
    optimizers = build_optimizers(model, name, 1e-3, 2e-2)
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}


def test_muon_gets_the_blocks_matrices_and_nothing_else():
    model = LoopMDM(tiny("dit", boundary="anchored", positions="both", time_conditioning=True))
    muon, adamw = build_optimizers(model, "muon", 1e-3, 2e-2)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert len(matrices) == 4 * model.config.num_hidden_layers  # qkv, out, up, down of each layer
    assert all(name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight")) for name in matrices)
    assert muon.param_groups[0]["lr"] == 2e-2 and adamw.param_groups[0]["lr"] == 1e-3


def test_unknown_optimizer_and_decay():
    with pytest.raises(InputError, match="did you mean 'adamw'"):
        build_optimizers(LoopMDM(tiny()), "adam", 1e-3, 1e-3)
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        rate(0.5, 10, 0, "cosin")


def curve(decay, steps=1000, warmup=100, tail=0.4):
    return [rate(s / steps, s, warmup, decay, tail) for s in range(steps)]


@pytest.mark.parametrize("decay", DECAYS)
def test_rate_rises_stays_and_falls(decay):
    values = curve(decay)
    assert values[:100] == pytest.approx([(s + 1) / 100 for s in range(100)])
    assert set(values[100:601]) == {1.0}
    rest = values[601:]
    if decay == "constant":
        assert set(rest) == {1.0}
    else:
        assert all(a > b for a, b in zip([1.0, *rest], rest, strict=False)) and 0 < rest[-1] < 0.01


def test_decays_are_what_they_are_called():
    linear, cosine = curve("linear"), curve("cosine")
    assert linear[800] == pytest.approx(0.5) and linear[900] == pytest.approx(0.25)
    assert cosine[800] == pytest.approx(0.5) and cosine[900] == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_rate_at_the_edges():
    assert rate(0.0, 0, 0) == 1.0  # no warm-up
    assert rate(0.999, 999, 0, "linear", tail=0.0) == 1.0  # no tail
    assert rate(0.75, 3, 0, "linear", tail=1.0) == 0.25
    assert rate(1.0, 4, 0, "linear") == rate(1.0, 4, 0, "cosine") == 0.0
    assert rate(0.9, 4, 10, "linear") == pytest.approx(0.5 * 0.25)  # a short run: both at once


def test_average_against_the_formula():
    model = nn.Linear(3, 2)
    average = averaged(model, decay=0.5)
    rng = torch.Generator().manual_seed(0)
    wanted = None
    for n in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=rng))
        now = [p.detach().double().clone() for p in model.parameters()]
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = now if wanted is None else [decay * a + (1 - decay) * b for a, b in zip(wanted, now, strict=True)]
        average.update_parameters(model)
        for got, want in zip(average.module.parameters(), wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    assert decay == 0.5  # the warm-up is over by then


def test_average_keeps_tied_weights_tied_and_leaves_the_model_alone():
    model = LoopMDM(tiny(tie_word_embeddings=True))
    before = [p.detach().clone() for p in model.parameters()]
    average = averaged(model, 0.9)
    for _ in range(2):
        average.update_parameters(model)
    assert average.module.lm_head.weight is average.module.embed.weight
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
