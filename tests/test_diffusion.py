"""The NELBO against exact enumeration, and the corruption behind it."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from loopmdm import diffusion, random
from loopmdm.diffusion import EPS, T_MIN, LogLinear, corrupt, nelbo, sample_loops, stratified_times
from loopmdm.errors import InputError
from loopmdm.model.denoiser import Denoiser

from .helpers import Table, ids, live, tiny

T, V = 4, 5  # ids 0..3 and the mask, 4


@pytest.fixture(scope="module")
def toy():
    return live(tiny("llama", vocab_size=V, boundary="anchored"), dtype=torch.float64, head_scale=3.0)


def all_masks(length=T):
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def cross_entropies(model, clean, masks, num_loops):
    """-log p of each clean token at each masked position, 0 elsewhere, for one clean sequence: [2^T, T]."""
    seen = torch.where(masks, model.mask_id, clean)
    with torch.no_grad():
        logits = model(seen, num_loops=num_loops).logits[..., : V - 1]
    chance = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    right = chance.gather(-1, clean.expand_as(seen)[..., None])[..., 0]
    return -torch.log(right) * masks


def mean_weight(k, length=T):
    """Mean over t in [1e-3, 1] of (1/t) p^k (1 - p)^(T - k), p = (1 - 1e-3) t: the polynomial integrated exactly."""
    low, rate, total = Fraction(1, 1000), Fraction(999, 1000), Fraction(0)
    for j in range(length - k + 1):
        power = k + j  # of t in the term, before the division by t
        term = math.comb(length - k, j) * (-1) ** j * rate**power
        total += term * (1 - low**power) / power
    return float(total / (1 - low))


def exact_nelbo(model, clean, num_loops):
    masks = all_masks(len(clean))
    ce = cross_entropies(model, clean, masks, num_loops).sum(-1)
    weight = torch.tensor([mean_weight(int(m.sum())) if m.any() else 0.0 for m in masks], dtype=torch.float64)
    return (weight * ce).sum().item() / len(clean)


@pytest.mark.parametrize("clean", [[0, 1, 2, 3], [3, 3, 0, 3], [2, 0, 0, 1]])
@pytest.mark.parametrize("num_loops", [1, 3])
def test_nelbo_is_exact_when_fed_every_mask_and_time(toy, clean, num_loops):
    """Every (t node, mask) as one row of a batch; Gauss-Legendre is exact for the polynomial integrand."""
    clean = torch.tensor(clean)
    nodes, weights = np.polynomial.legendre.leggauss(6)
    nodes = torch.tensor(T_MIN + (1 - T_MIN) * (nodes + 1) / 2)
    weights = torch.tensor(weights / 2)  # of a mean over the interval
    masks = all_masks()
    t = nodes.repeat_interleave(len(masks))
    mask = masks.repeat(len(nodes), 1)
    with torch.no_grad():
        out = nelbo(toy, clean.repeat(len(t), 1), t=t, mask=mask, num_loops=num_loops)
    p = 0.999 * t[:, None]
    chance = torch.where(mask, p, 1 - p).prod(-1)
    assert chance.view(len(nodes), -1).sum(-1).allclose(torch.ones(len(nodes), dtype=torch.float64))
    got = (weights.repeat_interleave(len(masks)) * chance * out.per_sequence).sum().item()
    want = exact_nelbo(toy, clean, num_loops)
    assert want > 0.5 and got == pytest.approx(want, abs=1e-9)
    assert out.masked_tokens == int(mask.sum()) and out.num_loops == num_loops


def estimates(model, clean, runs=24, batch=1024):
    with torch.no_grad():
        values = [nelbo(model, clean.repeat(batch, 1), num_loops=1, seed=s).nelbo.item() for s in range(runs)]
    return np.mean(values), np.std(values, ddof=1) / runs**0.5


def test_nelbo_is_exact_on_average(toy, monkeypatch):
    """Drawn t and masks; and a wrong weight or rate would be seen."""
    clean = torch.tensor([2, 0, 3, 3])
    want = exact_nelbo(toy, clean, 1)
    toy = copy.deepcopy(toy).float()
    mean, error = estimates(toy, clean)
    assert abs(mean - want) < 4 * error < 0.05 * want

    def wrong(name, function):
        with monkeypatch.context() as patch:
            patch.setattr(LogLinear, name, function)
            mean, error = estimates(toy, clean)
            assert abs(mean - want) > 5 * error

    wrong("weight", lambda self, t: torch.ones_like(t))
    wrong("weight", lambda self, t: t**-0.9)
    wrong("alpha", lambda self, t: 1 - 0.9 * t)
    wrong("alpha", lambda self, t: (1 - t) ** 1.5)


def test_loss_by_hand(toy):
    """Sum over counted, masked positions of CE / t, divided by the counted positions of the batch."""
    tokens = ids(5, 7, V, masks=0)
    real = torch.arange(7)[None] < torch.tensor([7, 4, 1, 6, 0])[:, None]
    maskable = torch.rand(5, 7) < 0.8
    counted = real & maskable
    out = nelbo(toy, tokens, attention_mask=real.long(), maskable=maskable, num_loops=2, seed=3, t_range=(0.3, 0.9))
    seen, mask, t = out.corruption.tokens, out.corruption.mask, out.corruption.t
    assert mask.any() and not (mask & ~counted).any() and torch.equal(seen == toy.mask_id, mask)
    assert torch.equal(seen[~mask], tokens[~mask])
    with torch.no_grad():
        chance = toy(seen, real, num_loops=2).logits[..., : V - 1].softmax(-1)
    sums, plain = [0.0] * 5, 0.0
    for b, i in mask.nonzero().tolist():
        ce = -math.log(chance[b, i, tokens[b, i]])
        sums[b] += ce / t[b].item()
        plain += ce
    total = int(counted.sum())
    assert out.loss.item() == pytest.approx(sum(sums) / total) and out.loss.requires_grad
    assert out.nelbo.item() == out.loss.item() and not out.nelbo.requires_grad
    want = [s / max(1, n) for s, n in zip(sums, counted.sum(-1).tolist(), strict=True)]
    assert out.per_sequence.tolist() == pytest.approx(want) and want[4] == 0
    assert out.masked_tokens == int(mask.sum())

    mean = nelbo(
        toy,
        tokens,
        attention_mask=real,
        maskable=maskable,
        num_loops=2,
        seed=3,
        t_range=(0.3, 0.9),
        objective="masked_mean",
    )
    assert mean.loss.item() == pytest.approx(plain / int(mask.sum()))
    assert mean.nelbo.item() == out.nelbo.item()


@pytest.mark.parametrize("objective", ["nelbo", "masked_mean"])
def test_nothing_masked(toy, objective):
    tokens = ids(2, T, V, masks=0)
    out = nelbo(toy, tokens, mask=torch.zeros(2, T).bool(), t=torch.tensor([0.5, 0.5]), objective=objective)
    assert out.loss.item() == 0 and out.masked_tokens == 0 and out.per_sequence.tolist() == [0, 0]
    out.loss.backward()
    toy.zero_grad()


# Corruption


@pytest.mark.parametrize("t", [0.001, 0.1, 0.5, 0.9, 1.0])
def test_mask_rate(t):
    """1 - alpha_t = 0.999 t, at every position."""
    tokens = torch.zeros(4000, 12).long()
    mask = corrupt(tokens, 9, torch.full((4000,), t), seed=5).mask
    p, n = 0.999 * t, 4000
    for rate, count in ((mask.float().mean(), 12 * n), (mask[:, 0].float().mean(), n), (mask[:, 11].float().mean(), n)):
        assert abs(rate.item() - p) < 4.5 * math.sqrt(p * (1 - p) / count)


def test_mask_rate_is_that_of_each_row():
    t = torch.tensor([0.1, 0.9]).repeat(2000)
    rates = corrupt(torch.zeros(4000, 20).long(), 9, t).mask.float().view(2000, 2, 20).mean((0, 2))
    assert abs(rates[0] - 0.0999) < 0.01 and abs(rates[1] - 0.8991) < 0.01


def test_masks_are_independent_across_positions_and_rows():
    mask = corrupt(torch.zeros(3000, 8).long(), 9, torch.full((3000,), 0.5)).mask.double() - 0.4995
    covariance = (mask.T @ mask / 3000).fill_diagonal_(0).abs().max()
    assert covariance < 5 * 0.25 / 3000**0.5
    assert (mask[1:] * mask[:-1]).mean().abs() < 5 * 0.25 / 24000**0.5


def test_corruption_is_a_function_of_seed_step_and_index():
    tokens, t = ids(8, 30, masks=0), torch.full((8,), 0.5)
    base = corrupt(tokens, 10, t, seed=1, step=2)
    assert torch.equal(base.mask, corrupt(tokens, 10, t, seed=1, step=2).mask)
    torch.manual_seed(99)
    assert torch.equal(base.mask, corrupt(tokens, 10, t, seed=1, step=2, index=torch.arange(8)).mask)
    for changed in (
        corrupt(tokens, 10, t, seed=2, step=2),
        corrupt(tokens, 10, t, seed=1, step=3),
        corrupt(tokens, 10, t, seed=1, step=2, index=torch.arange(8) + 8),
    ):
        assert all((changed.mask[i] != base.mask[i]).any() for i in range(8))
    # a longer sequence begins with the same masks, and masks grow with t
    longer = corrupt(ids(8, 40, masks=0), 10, t, seed=1, step=2)
    assert torch.equal(longer.mask[:, :30], base.mask)
    assert not (base.mask & ~corrupt(tokens, 10, t + 0.2, seed=1, step=2).mask).any()


def test_maskable_and_padding_are_never_masked():
    tokens = ids(6, 20, masks=0)
    maskable = torch.rand(6, 20) < 0.5
    out = corrupt(tokens, 10, torch.ones(6), maskable=maskable)
    assert not (out.mask & ~maskable).any() and out.mask.sum() > 0.9 * maskable.sum()
    assert torch.equal(out.tokens[~out.mask], tokens[~out.mask])
    assert (out.tokens[out.mask] == 10).all() and not (tokens == 10).any(), "the input is left alone"


@pytest.mark.parametrize("given", [torch.bool, torch.int64])
def test_an_injected_mask_spares_what_does_not_count(toy, given):
    tokens = ids(2, T, V, masks=0)
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    maskable = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    out = nelbo(
        toy,
        tokens,
        attention_mask=real.to(given),
        maskable=maskable.to(given),
        mask=torch.ones(2, T).to(given),
        t=torch.ones(2),
        num_loops=1,
    )
    assert out.corruption.mask.tolist() == [[False, True, True, False], [True] * 4]


def test_schedule():
    schedule, t = LogLinear(), torch.tensor([T_MIN, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    assert alpha.tolist() == pytest.approx([1 - 0.999e-3, 1 - 0.999 / 4, 1e-3]) and EPS == T_MIN == 1e-3
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha))
    torch.testing.assert_close(schedule.sigma(t), -torch.log(alpha))


# Times and loop counts


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 512])
def test_each_stratum_has_one_time(batch):
    for step in range(20):
        t = stratified_times(torch.arange(batch), batch, seed=3, step=step).double()
        assert t.min() >= T_MIN - 1e-9 and t.max() <= 1
        place = ((t - T_MIN) / (1 - T_MIN) * batch).clamp(max=batch - 1e-3)
        assert sorted(place.floor().long().tolist()) == list(range(batch))
        inside = (place % 1).sort().values  # the same offset in each stratum, wrap-around aside
        assert inside[-1] - inside[0] < 1e-3 or inside[-1] - inside[0] > 1 - 1e-3


def test_times_are_uniform():
    t = torch.cat([stratified_times(torch.arange(4), 4, seed=0, step=step) for step in range(500)]).double()
    assert abs(t.mean().item() - 0.5005) < 0.02 and abs(t.var().item() - 0.999**2 / 12) < 0.005
    first = torch.stack([stratified_times(torch.arange(4), 4, 0, s)[0] for s in range(400)])
    assert abs(first.mean().item() - 0.5005) < 0.06  # each sample sees all times, not its own stratum
    narrow = stratified_times(torch.arange(50), 50, 0, 0, (0.2, 0.4))
    assert narrow.min() >= 0.2 and narrow.max() <= 0.4 and narrow.max() - narrow.min() > 0.19


def test_batches_wrap_around():
    """Accumulation: samples B.. of a step take the strata again."""
    assert torch.equal(stratified_times(torch.arange(8, 16), 8, 0, 0), stratified_times(torch.arange(8), 8, 0, 0))


@pytest.mark.parametrize("bad", [(0.0, 1.0), (0.5, 0.4), (0.1, 1.1), (-1.0, 1.0)])
def test_time_range_is_checked(bad):
    with pytest.raises(InputError, match=r"t_range is .*0 < low <= high <= 1"):
        stratified_times(torch.arange(2), 2, 0, 0, bad)


def test_ranks_see_slices_of_one_batch(toy):
    """One process with 8 samples, two with 4, four with 2: the same times, masks, S and losses."""
    tokens = ids(8, 6, V, masks=0)
    with torch.no_grad():
        whole = nelbo(toy, tokens, seed=4, step=7)
        for ranks in (2, 4):
            per = 8 // ranks
            parts = [
                nelbo(
                    toy,
                    tokens[r * per : (r + 1) * per],
                    seed=4,
                    step=7,
                    index=torch.arange(r * per, (r + 1) * per),
                    global_batch=8,
                )
                for r in range(ranks)
            ]
            assert {p.num_loops for p in parts} == {whole.num_loops}
            for name in ("tokens", "mask", "t"):
                joined = torch.cat([getattr(p.corruption, name) for p in parts])
                assert torch.equal(joined, getattr(whole.corruption, name))
            torch.testing.assert_close(torch.cat([p.per_sequence for p in parts]), whole.per_sequence)
            torch.testing.assert_close(sum(p.loss for p in parts) / ranks, whole.loss)
        other = [nelbo(toy, tokens, seed=4, step=8), nelbo(toy, tokens, seed=5, step=7)]
    for o in other:
        assert not torch.equal(o.corruption.mask, whole.corruption.mask)
        assert not torch.equal(o.corruption.t, whole.corruption.t)


def test_loop_counts():
    draws = [sample_loops(12, seed=2, step=s) for s in range(2400)]
    counts = np.bincount(draws, minlength=13)
    assert counts[0] == 0 and len(counts) == 13
    assert ((counts[1:] - 200) ** 2 / 200).sum() < 35  # chi-square, 11 degrees of freedom: p about 2e-4
    assert draws != [sample_loops(12, seed=3, step=s) for s in range(2400)]
    assert sample_loops(1, 0, 0) == 1


def test_loop_counts_from_a_distribution(toy):
    table = {8: 0.25, 1: 0.5, 3: 0.25}
    for step in range(60):
        u = random.scalar(6, random.LOOPS, step)
        assert sample_loops(table, 6, step) == (1 if u < 0.5 else 3 if u < 0.75 else 8)
    tokens = ids(2, T, V, masks=0)
    with torch.no_grad():
        assert {nelbo(toy, tokens, num_loops=table, step=s).num_loops for s in range(12)} == {1, 3, 8}
        assert {nelbo(toy, tokens, step=s).num_loops for s in range(12)} == {1, 2, 3}  # U{1..max_loops}
        assert nelbo(toy, tokens, num_loops=5).num_loops == 5


@pytest.mark.parametrize("bad", [0, -3, 2.0])
def test_loop_count_is_checked(toy, bad):
    with pytest.raises(InputError, match="at least once"):
        nelbo(toy, ids(2, T, V, masks=0), num_loops=bad)


# Inputs


def test_mask_ids_in_the_data(toy):
    tokens = ids(2, T, V, masks=0)
    tokens[1, 2] = toy.mask_id
    with pytest.raises(InputError, match="the data contain the mask id 4; clean tokens cannot be"):
        nelbo(toy, tokens)
    maskable = tokens != toy.mask_id
    with torch.no_grad():
        assert nelbo(toy, tokens, maskable=maskable).nelbo.isfinite()
        assert nelbo(toy, tokens, attention_mask=maskable).nelbo.isfinite()


def test_targets_that_are_never_predicted():
    """Their cross-entropy would be infinite; where they do not count, they may stand."""
    model = Table(torch.randn(T, V, V), mask_id=4, suppressed=(2,))
    tokens = torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(InputError, match="contain id 2, which this model never predicts"):
        nelbo(model, tokens)
    out = nelbo(model, tokens, maskable=tokens != 2, mask=torch.ones(1, T).bool(), t=torch.ones(1))
    assert out.nelbo.isfinite() and out.masked_tokens == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"maskable": torch.ones(2, 3).bool()}, r"maskable is \[2, 3\], tokens is \[2, 4\]; they must agree"),
        ({"attention_mask": torch.ones(3, 4).bool()}, r"attention_mask is \[3, 4\], tokens is \[2, 4\]"),
        ({"mask": torch.ones(4).bool()}, r"mask is \[4\], tokens is \[2, 4\]"),
        ({"t": torch.tensor(0.5)}, r"t is \[\]; it must be \[2\], one for each sequence"),
        ({"index": torch.arange(3)}, r"index is \[3\]; it must be \[2\]"),
        ({"objective": "elbo"}, "objective is 'elbo'; it must be 'nelbo' or 'masked_mean'"),
        ({"t_range": (0.0, 1.0)}, "t_range"),
    ],
)
def test_refusals(toy, bad, words):
    with pytest.raises(InputError, match=words):
        nelbo(toy, ids(2, T, V, masks=0), **bad)


# Any Denoiser


@pytest.mark.parametrize("shift", [0, 1])
def test_any_denoiser(shift):
    """A table of logits; with a shift of 1 the token at i is read at i - 1, and position 0 at itself (Dream)."""
    model = Table(torch.randn(T, V, V, dtype=torch.float64), mask_id=4, logit_shift=shift)
    assert isinstance(model, Denoiser)
    clean = torch.tensor([[3, 1, 0, 2], [0, 0, 1, 3]])
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    t = torch.tensor([0.5, 0.8], dtype=torch.float64)
    out = nelbo(model, clean, mask=mask, t=t)
    want = 0.0
    for b, i in mask.nonzero().tolist():
        at = max(0, i - shift)
        logits = model.table[at, 4 if mask[b, at] else clean[b, at], :4]
        want += -logits.log_softmax(0)[clean[b, i]].item() / t[b].item()
    assert out.nelbo.item() == pytest.approx(want / 8)
    (_, attention_mask, loops, sigma) = model.calls[0]
    assert attention_mask is None and loops == 1
    torch.testing.assert_close(sigma, -torch.log(1 - 0.999 * t))


def test_time_conditioned_models_get_sigma():
    model = live(tiny("dit", time_conditioning=True), dtype=torch.float64)
    tokens = ids(2, 6, masks=0)
    mask = torch.ones(2, 6).bool()
    with torch.no_grad():
        out = [nelbo(model, tokens, mask=mask, t=torch.tensor(t), num_loops=1) for t in ([0.2, 0.9], [0.9, 0.9])]
    # masks and weights aside, only sigma differs between the first rows
    assert abs(out[0].per_sequence[0] * 0.2 / (out[1].per_sequence[0] * 0.9) - 1) > 1e-3
    torch.testing.assert_close(out[0].per_sequence[1], out[1].per_sequence[1])


def test_training_lowers_the_bound():
    """Thirty steps on one sequence, known by heart at the end."""
    model = live(tiny("llama", boundary="anchored", positions="learned")).train()
    tokens = ids(1, 8, masks=0).repeat(16, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        out = diffusion.nelbo(model, tokens, seed=0, step=step, objective="masked_mean")
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.tensor([[1, 99]])}, "outside the vocabulary of 7"),
        ({"tokens": torch.tensor([[1, -100]])}, "outside the vocabulary of 7"),
        ({"t": torch.tensor([0.0])}, r"t must be in \(0, 1\]"),
        ({"t": torch.tensor([2.0])}, r"t must be in \(0, 1\]"),
    ],
)
def test_data_that_would_go_wrong_silently(change, words):
    model = live(tiny(vocab_size=7))
    arguments = {"tokens": torch.tensor([[1, 2]]), "mask": torch.tensor([[True, True]]), **change}
    with pytest.raises(InputError, match=words):
        nelbo(model, arguments.pop("tokens"), **arguments)


def test_packed_documents_reach_the_model():
    """Two documents packed in a row have the loss of each alone."""
    model = live(tiny(vocab_size=7))
    row = torch.tensor([[1, 2, 3, 4, 5, 0, 1, 2]])
    mask = torch.tensor([[True, False, True, True, False, True, True, False]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    t = torch.tensor([0.5])
    packed = nelbo(model, row, t=t, mask=mask, num_loops=2, document_ids=documents).loss * 8
    alone = [nelbo(model, row[:, s], t=t, mask=mask[:, s], num_loops=2).loss for s in (slice(0, 3), slice(3, 8))]
    assert abs(packed - (alone[0] * 3 + alone[1] * 5)) < 1e-4
    unpacked = nelbo(model, row, t=t, mask=mask, num_loops=2).loss * 8
    assert abs(packed - unpacked) > 1e-3
