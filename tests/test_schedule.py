"""Noise schedules: their ends, weights and inverses, and a bound that does not depend on them."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from loopmdm.diffusion import (
    EPS,
    SCHEDULES,
    T_MIN,
    Cosine,
    Linear,
    LogLinear,
    Polynomial,
    Schedule,
    build_schedule,
    corrupt,
    likelihood,
    nelbo,
)
from loopmdm.errors import InputError

from .enumeration import all_masks, exact
from .helpers import ids, live, tiny

ALL = [Linear(), Cosine(), Polynomial(), Polynomial(power=0.5), Linear(eps=0.05), Cosine(eps=0.2)]
by_name = pytest.mark.parametrize("schedule", ALL, ids=repr)


def grid(points=401):
    return torch.linspace(1e-3, 1, points, dtype=torch.float64)


@by_name
def test_ends_and_direction(schedule):
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([1, schedule.eps], abs=1e-15)
    assert (schedule.alpha(grid()).diff() < 0).all() and EPS == T_MIN == 1e-3


@by_name
def test_weight_is_the_derivative(schedule):
    t = grid()[:-1].requires_grad_()
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.sigma(t), -torch.log(alpha))


@by_name
def test_inverse(schedule):
    t = grid()
    torch.testing.assert_close(schedule.inverse(schedule.alpha(t)), t, rtol=0, atol=1e-9)
    beyond = torch.tensor([1.5, schedule.eps / 2, 0.0], dtype=torch.float64)
    assert schedule.inverse(beyond).tolist() == pytest.approx([0, 1, 1])


def test_values_by_hand():
    half = torch.tensor([0.5], dtype=torch.float64)
    masked = {Linear(): 0.5, Cosine(): math.cos(math.pi / 4), Polynomial(power=3): 0.125, Polynomial(eps=0.1): 0.25}
    weight = {Linear(): 2, Cosine(): math.pi / 2, Polynomial(power=3): 6, Polynomial(eps=0.1): 4}
    for schedule, share in masked.items():
        assert 1 - schedule.alpha(half).item() == pytest.approx((1 - schedule.eps) * share)
        assert schedule.weight(half).item() == pytest.approx(weight[schedule])
    t = grid()
    torch.testing.assert_close(Polynomial(power=1).alpha(t), Linear().alpha(t))
    assert LogLinear is Linear


@by_name
def test_fp32_keeps_its_digits_at_both_ends(schedule):
    """Weights, sigma and alpha of fp32 times against the same times in float64."""
    t = torch.tensor([1e-6, 1e-4, T_MIN, 0.5, 1 - 1e-3, 1 - 1e-5, 1 - 2**-24, 1.0])
    for name in ("alpha", "weight", "sigma"):
        got, want = getattr(schedule, name)(t), getattr(schedule, name)(t.double())
        assert got.dtype == torch.float32 and got.isfinite().all() and (got >= 0).all()
        # near t = 0 sigma is a small difference of numbers near 1
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-7 if name == "sigma" else 0)


@pytest.mark.parametrize("name", ["cosine", "polynomial"])
def test_mask_rate_is_that_of_the_schedule(name):
    share = {"cosine": math.sin(math.pi / 2 * 0.3), "polynomial": 0.09}[name]
    mask = corrupt(torch.zeros(1000, 100).long(), 9, torch.full((1000,), 0.3), schedule=name).mask
    assert mask.double().mean().item() == pytest.approx(0.999 * share, abs=0.007)


@pytest.fixture(scope="module")
def toy():
    return live(tiny("llama", vocab_size=5, boundary="anchored"), dtype=torch.float64, head_scale=3.0)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(), Polynomial(power=0.5)], ids=repr)
def test_the_bound_does_not_depend_on_the_schedule(toy, schedule):
    """Every mask at 40 quadrature nodes of log t, between the times of one interval of alpha."""
    clean, low, high = torch.tensor([2, 0, 3, 1]), Fraction(1, 100), Fraction(99, 100)
    ends = schedule.inverse(torch.tensor([1 - low, 1 - high], dtype=torch.float64))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    span = torch.log(ends[1] / ends[0])
    t = ends[0] * torch.exp(span * torch.tensor(nodes + 1) / 2)
    step = torch.tensor(weights) / 2 * span * t
    masks = all_masks(4)
    rows, mask = t.repeat_interleave(len(masks)), masks.repeat(len(t), 1)
    with torch.no_grad():
        out = nelbo(toy, clean.repeat(len(rows), 1), t=rows, mask=mask, num_loops=2, schedule=schedule)
    share = 1 - schedule.alpha(rows)[:, None]
    chance = torch.where(mask, share, 1 - share).prod(-1)
    got = (step.repeat_interleave(len(masks)) * chance * out.per_sequence * 4).sum().item()
    want = exact(toy, clean, 2, low, high)
    assert want > 1 and got == pytest.approx(want, abs=1e-6)


def test_a_time_conditioned_model_reads_the_schedule():
    model = live(tiny("dit", time_conditioning=True), dtype=torch.float64)
    seen = []
    model.sigma_embed.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    with torch.no_grad():
        nelbo(model, ids(2, 6, masks=0), t=t, num_loops=1, schedule="cosine")
        torch.testing.assert_close(seen[-1], -torch.log(Cosine().alpha(t)))
        likelihood(model, ids(1, 4, masks=0), num_loops=1, bound="count", samples=4, schedule="cosine")
    shares = torch.tensor([0.75, 0.5, 0.25, 1e-3])  # of clean tokens; alpha never falls below eps
    torch.testing.assert_close(seen[-1].sort().values.float(), -torch.log(shares))


def test_names_and_objects():
    for name, kind in SCHEDULES.items():
        assert type(build_schedule(name)) is kind
    assert isinstance(build_schedule("polynomial"), Schedule) and build_schedule("log_linear") == LogLinear()
    mine = Polynomial(power=3.0)
    assert build_schedule(mine) is mine


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_schedule("cosin"), "there is no schedule 'cosin'; did you mean 'cosine'?"),
        (lambda: build_schedule("xyz"), "there is no schedule 'xyz'; known: cosine, linear"),
        (lambda: build_schedule(Cosine), "it must be a name or have alpha, weight, sigma and inverse"),
        (lambda: build_schedule(3), "schedule is 3"),
        (lambda: Linear(eps=1.0), "eps is 1.0"),
        (lambda: Linear(eps="a"), "eps is 'a'; it must be a number of at least 0"),
        (lambda: Polynomial(power=None), "power is None; it must be a number"),
        (lambda: Polynomial(power=0.0), "power is 0.0; it must be a number above 0"),
        (lambda: corrupt(ids(2, 4), 9, torch.ones(2), schedule="linaer"), "did you mean 'linear'"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        call()
