"""Bounds of -log p: unbiased, paired, and each token of a long text once."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loopmdm import random
from loopmdm.diffusion import T_MIN, Linear, Polynomial, likelihood, nelbo_by_time, rolling
from loopmdm.diffusion.bounds import _windows
from loopmdm.diffusion.montecarlo import count_draw, ratio
from loopmdm.errors import InputError
from loopmdm.model.depth import Depth, RelativeChange

from .enumeration import all_masks, cross_entropies, exact
from .helpers import Table, ids, live, tiny

T, V = 4, 5
CLEAN = torch.tensor([2, 0, 3, 3])


@pytest.fixture(scope="module")
def toy():
    return live(tiny("llama", vocab_size=V, boundary="anchored"), dtype=torch.float64, head_scale=3.0)


def table(seed=0, length=T, spread=2.0):
    rng = torch.Generator().manual_seed(seed)
    return Table(spread * torch.randn(length, V, V, generator=rng, dtype=torch.float64), mask_id=V - 1)


def shown(model):
    """What a Table saw, one tensor."""
    return torch.cat([call[0] for call in model.calls])


# The bounds are what they say


def test_counts_bound_is_the_integral_over_all_times(toy):
    """Every subset of l positions, l = 1..L, once: L / l on average is the integral of the time bound over (0, 1]."""
    masks = all_masks(T)[1:]
    ce, count = cross_entropies(toy, CLEAN, masks, 2).sum(-1), masks.sum(-1)
    chance = torch.tensor([1 / (T * math.comb(T, int(k))) for k in count], dtype=torch.float64)
    want = exact(toy, CLEAN, 2, Fraction(0), Fraction(1))
    assert (chance * T / count * ce).sum().item() == pytest.approx(want, abs=1e-12)
    # and the interval that the time bound leaves out is worth less than a hundredth
    assert exact(toy, CLEAN, 2) / 0.999 == pytest.approx(want, rel=0.01)


def runs(model, bound, count=12, **options):
    """Means over independent seeds, and the nats of every sample."""
    found = [
        likelihood(model, CLEAN.repeat(256, 1), num_loops=2, bound=bound, seed=s, batch=1024, **options)
        for s in range(count)
    ]
    means = np.array([float(f.nats.mean()) for f in found])
    return means.mean(), means.std(ddof=1) / count**0.5, torch.cat([f.per_sample.flatten() for f in found])


def test_both_bounds_are_unbiased_and_counts_vary_less(toy):
    full = exact(toy, CLEAN, 2, Fraction(0), Fraction(1))
    time, time_error, spread = runs(toy, "time", samples=3)
    count, count_error, narrow = runs(toy, "count", samples=3)
    assert abs(time - exact(toy, CLEAN, 2) / 0.999) < 4 * time_error < 0.06 * full
    assert abs(count - full) < 4 * count_error < 0.02 * full
    assert narrow.var() < 0.5 * spread.var()


def test_a_wrong_weight_would_be_seen(toy, monkeypatch):
    monkeypatch.setattr(Linear, "weight", lambda self, t: t**-0.9)
    time, error, _ = runs(toy, "time", samples=3)
    assert abs(time - exact(toy, CLEAN, 2) / 0.999) > 6 * error


def test_the_bound_of_another_schedule_is_the_same(toy):
    got, error, _ = runs(toy, "time", samples=3, schedule=Polynomial())
    assert abs(got - exact(toy, CLEAN, 2, Fraction(0), Fraction(999, 1000))) < 0.002 * got + 4 * error


@pytest.mark.parametrize("bound", ["time", "count"])
def test_each_sample_by_hand(bound):
    """Padding and what is not maskable are left out; the weights are 1 / t, or L / l."""
    model, tokens = table(length=6), ids(5, 6, V, masks=0)
    real = torch.arange(6)[None] < torch.tensor([6, 5, 6, 4, 2])[:, None]
    counted = real & (torch.rand(5, 6) < 0.8)
    counted[4] = False
    got = likelihood(
        model, tokens, num_loops=1, bound=bound, samples=4, attention_mask=real, maskable=counted, seed=3, batch=7
    )
    assert got.tokens.tolist() == counted.sum(-1).tolist() and got.per_sample.shape == (5, 4)
    rows, clean = shown(model), tokens.repeat_interleave(4, 0)
    mask = rows == V - 1
    assert torch.equal(rows[~mask], clean[~mask]) and not (mask & ~counted.repeat_interleave(4, 0)).any()
    assert torch.equal(torch.cat([call[1] for call in model.calls]), real.repeat_interleave(4, 0))
    sigma = torch.cat([call[3] for call in model.calls]).double()
    chance = model.table[torch.arange(6), V - 1][:, : V - 1].softmax(-1)
    ce = (-torch.log(chance[torch.arange(6), clean]) * mask).sum(-1)
    if bound == "time":
        weight = 0.999 / (1 - torch.exp(-sigma))  # 1 / t, from sigma = -log(1 - 0.999 t)
    else:
        weight = torch.where(mask.any(-1), counted.sum(-1).repeat_interleave(4) / mask.sum(-1), 0.0)
        share = 1 - mask.sum(-1) / counted.sum(-1).repeat_interleave(4).clamp(min=1)
        torch.testing.assert_close(torch.exp(-sigma[:16]), share[:16].double().clamp(min=1e-3), rtol=1e-4, atol=0)
    torch.testing.assert_close(got.per_sample.flatten(), ce * weight, rtol=2e-4, atol=0)
    torch.testing.assert_close(got.nats, got.per_sample.mean(-1))
    assert got.nats[4] == 0


# Times and counts


@pytest.mark.parametrize(("samples", "length"), [(6, 6), (12, 6), (8, 6), (20, 7), (3, 9)])
def test_every_count_is_visited_evenly(samples, length):
    """K samples of a sequence visit each of L counts floor(K / L) times or once more."""
    model = table(length=length)
    likelihood(model, ids(40, length, V, masks=0), num_loops=1, bound="count", samples=samples)
    counts = (shown(model) == V - 1).sum(-1).view(40, samples)
    for row in counts:
        visits = np.bincount(row, minlength=length + 1)
        assert visits[0] == 0 and visits[1:].min() >= samples // length
        assert visits[1:].max() <= -(-samples // length)
    # over sequences as well: golden steps leave no count behind
    total = np.bincount(counts.flatten(), minlength=length + 1)[1:] / counts.numel() * length
    assert abs(total - 1).max() < 0.15


def test_masks_of_a_count_are_uniform_subsets():
    """With l of 4 masked, each of the subsets of that size is as likely."""
    draw = count_draw(Linear(), 5, 4)
    index = torch.arange(3000).repeat_interleave(4)
    mask, _, _ = draw(index, torch.arange(4).repeat(3000), torch.ones(12000, 4).bool())
    codes = (mask.long() * torch.tensor([8, 4, 2, 1])).sum(-1)
    for size in (1, 2, 3):
        seen = np.bincount(codes[mask.sum(-1) == size], minlength=16)
        seen = seen[[bin(code).count("1") == size for code in range(16)]]
        want = 3000 / len(seen)
        assert ((seen - want) ** 2 / want).sum() < 25


def test_the_smallest_numbers_are_masked():
    """l masks lie on the l smallest of the row's numbers among the counted positions."""
    index, sample = torch.arange(40).repeat_interleave(5), torch.arange(5).repeat(40)
    counted = torch.rand(200, 9) < 0.6
    mask, _, _ = count_draw(Linear(), 7, 5)(index, sample, counted)
    noise = random.uniform(7, random.COUNT, 1 + sample, index, 9)
    assert not (mask & ~counted).any() and 0.3 < mask.sum() / counted.sum() < 0.8
    for row in range(200):
        order = noise[row][counted[row]].sort().values
        assert torch.equal(noise[row][mask[row]].sort().values, order[: int(mask[row].sum())])


def test_samples_are_independent():
    """Two masks of one sequence with 2 of 4 positions agree in one of six, not always."""
    draw = count_draw(Linear(), 5, 8)  # two samples a count
    index = torch.arange(1500).repeat_interleave(8)
    mask, _, _ = draw(index, torch.arange(8).repeat(1500), torch.ones(12000, 4).bool())
    pairs = mask.view(1500, 4, 2, 4)[:, 1]
    assert (pairs.sum(-1) == 2).all()
    agree = (pairs[:, 0] == pairs[:, 1]).all(-1).double().mean().item()
    assert abs(agree - 1 / 6) < 4.5 * (5 / 36 / 1500) ** 0.5


def test_times_fill_the_interval():
    """K times a sequence, one in each K-th of it; over sequences every time is as likely."""
    model, N, K = table(), 200, 5
    likelihood(model, ids(N, T, V, masks=0), num_loops=1, samples=K, batch=1000)
    t = (1 - torch.exp(-torch.cat([call[3] for call in model.calls]).double())) / 0.999
    place = (t - T_MIN) / (1 - T_MIN)
    assert torch.equal((place.view(N, K) * K).floor().long(), torch.arange(K).expand(N, K))
    gaps = place.sort().values.diff()
    assert gaps.max() < 3 / (N * K) and place.min() < 2 / (N * K) and place.max() > 1 - 2 / (N * K)


# Pairs


@pytest.mark.parametrize("bound", ["time", "count"])
def test_masks_are_those_of_seed_sequence_and_sample(bound):
    """Not of the model, S, the batch or the company; another seed has others."""
    tokens = ids(9, T, V, masks=0)

    def masks(model=None, rows=slice(None), **options):
        model = model or table()
        index = torch.arange(9)[rows]
        likelihood(model, tokens[rows], bound=bound, samples=3, index=index, **{"num_loops": 1, **options})
        return shown(model)

    base = masks()
    assert (base == V - 1).any() and torch.equal(base, masks(table(seed=1))) and torch.equal(base, masks(batch=4))
    assert torch.equal(base, masks(num_loops=7))
    several = masks(num_loops=[1, 2, 5], batch=27)
    assert torch.equal(several, base.repeat(3, 1))
    halves = [masks(rows=slice(0, 4)), masks(rows=slice(4, 9))]
    assert torch.equal(torch.cat(halves), base)
    assert not torch.equal(base, masks(seed=1))
    # more tokens on the right change nothing on the left, and padding nothing at all
    model, wide = table(length=T + 2), torch.cat((tokens, ids(9, 2, V, masks=0)), 1)
    real = (torch.arange(T + 2) < T).expand(9, T + 2)
    likelihood(model, wide, bound=bound, samples=3, num_loops=1, attention_mask=real)
    assert torch.equal(shown(model)[:, :T], base)


def test_paired_differences_are_tighter(toy):
    sequences = ids(40, 8, V, masks=0)
    both = likelihood(toy, sequences, num_loops=[1, 3], samples=4)
    one, three = both.at(1), both.at(3)
    paired = one.difference(three)
    assert paired.mean.item() == pytest.approx((one.nats_per_token - three.nats_per_token).item())
    apart = likelihood(toy, sequences, num_loops=3, samples=4, seed=9)
    assert paired.error < 0.6 * one.difference(apart).error
    assert paired.error < 0.6 * torch.hypot(one.error, three.error)
    per_token = (one.nats - three.nats) / 8
    assert paired.error.item() == pytest.approx((per_token.std() / 40**0.5).item())
    # one against several, all of them paired
    broad = both.difference(one)
    assert (
        broad.mean.shape == (2,) and broad.mean[0] == 0 and broad.mean[1].item() == pytest.approx(-paired.mean.item())
    )


def test_results_and_units(toy):
    tokens = ids(6, 8, V, masks=0)
    real = torch.arange(8)[None] < torch.tensor([8, 3, 5, 8, 1, 2])[:, None]
    one = likelihood(toy, tokens, num_loops=2, bound="count", samples=2, attention_mask=real)
    two = likelihood(toy, tokens, num_loops=(1, 2), bound="count", samples=2, attention_mask=real)
    assert one.nats.shape == one.tokens.shape == (6,) and two.nats.shape == (2, 6) and two.loops == (1, 2)
    assert one.nats.dtype == torch.float64 and torch.equal(two.at(2).nats, one.nats) and not one.nats.requires_grad
    nats = one.nats.sum().item() / 27
    assert one.nats_per_token.item() == pytest.approx(nats) and one.bits.item() == pytest.approx(nats / math.log(2))
    assert two.perplexity[1].item() == pytest.approx(math.exp(nats)) and two.error.shape == (2,)
    assert one.visits.eq(2).all() and two.visits[0].eq(1).all()
    assert likelihood(toy, tokens, attention_mask=real).loops == (3,)  # max_loops
    assert likelihood(toy, tokens[:1], num_loops=1).error == math.inf


def test_standard_error_of_unequal_lengths():
    """Of a ratio of sums: against the spread of many data sets."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (2000, 60), generator=rng)
    nats = lengths * 2.0 + lengths.sqrt() * torch.randn(2000, 60, generator=rng, dtype=torch.float64)
    found = [ratio(n, k) for n, k in zip(nats, lengths, strict=True)]
    spread = torch.stack([mean for mean, _ in found]).std()
    assert torch.stack([error for _, error in found]).mean().item() == pytest.approx(spread.item(), rel=0.06)


def test_modes_and_gradients(toy):
    """Evaluation mode meanwhile, each module's own mode afterwards, even after an error."""
    seen = []
    handle = toy.coda[0].register_forward_hook(lambda module, *_: seen.append(module.training or toy.training))
    toy.train()
    toy.loop.eval()
    try:
        likelihood(toy, ids(2, T, V, masks=0), num_loops=1)
        assert seen == [False] and toy.training and not toy.loop.training and toy.coda[0].training
        with pytest.raises(InputError, match="more than max_position_embeddings"):
            likelihood(toy, ids(2, 65, V, masks=0), num_loops=1)
        assert toy.training and not toy.loop.training
    finally:
        toy.eval()
        handle.remove()


def test_depth_and_visits():
    class Leaves(Table):
        takes_depth = True

        def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
            num_loops.visits = 1 + (input_ids == V - 1).sum(-1)
            return super().hidden(input_ids, attention_mask, num_loops, sigma)

    model = Leaves(table().table, mask_id=V - 1)
    template = Depth(checkpoint=True)
    got = likelihood(model, ids(8, T, V, masks=0), num_loops=[6, 9], bound="count", samples=4, depth=template, batch=5)
    counts = torch.arange(2, T + 2, dtype=torch.float64)
    assert torch.equal(got.visits, counts.expand(2, 8, T)) and template.visits is None
    assert {call[2].num_loops for call in model.calls} == {6, 9} and model.calls[0][2].checkpoint


def test_early_exit_is_measured(toy):
    """The visits of each sequence, and the bound of the S that it used."""
    tokens = ids(12, 8, V, masks=0)
    rule = RelativeChange(0.2)
    got = likelihood(toy, tokens, num_loops=6, samples=2, bound="count", depth=Depth(early_exit=rule))
    fixed = likelihood(toy, tokens, num_loops=list(range(1, 7)), samples=2, bound="count")
    assert got.visits.unique().tolist() == [4, 5, 6]
    picked = fixed.per_sample.gather(0, got.visits.long()[None] - 1)[0]
    torch.testing.assert_close(got.per_sample, picked)


# Where in t


def test_bins_are_exact_on_average(toy):
    """Each bin's mean of the integrand, against the polynomial integrated over the bin."""
    edges = [T_MIN, 0.1, 0.5, 0.8, 1.0]
    profiles = [
        nelbo_by_time(toy, CLEAN.repeat(300, 1), [1, 2], edges, samples=2, seed=s, batch=1200) for s in range(8)
    ]
    means = torch.stack([p.nats_per_token for p in profiles]) * T
    assert means.shape == (8, 4, 2)
    got, error = means.mean(0), means.std(0) / 8**0.5
    for b in range(4):
        low, high = (Fraction(999, 1000) * Fraction(e).limit_denominator(1000) for e in edges[b : b + 2])
        for i, S in enumerate((1, 2)):
            want = exact(toy, CLEAN, S, low, high) / (edges[b + 1] - edges[b])
            assert abs(got[b, i] - want) < 4.5 * error[b, i] + 1e-6 and error[b, i] < 0.1 * want
    profile = profiles[0]
    assert profile.share.tolist() == pytest.approx([0.099 / 0.999, 0.4 / 0.999, 0.3 / 0.999, 0.2 / 0.999])
    torch.testing.assert_close(profile.contribution.sum(0), (profile.nats_per_token * profile.share[:, None]).sum(0))
    assert profile.contribution.sum(0)[1].item() * T == pytest.approx(exact(toy, CLEAN, 2) / 0.999, rel=0.1)
    assert profile.error.shape == (4, 2) and (profile.error > 0).all()


def test_bins_hold_their_times_and_masks():
    model, tokens = table(length=6), ids(10, 6, V, masks=0)
    profile = nelbo_by_time(model, tokens, [1, 4], [0.2, 0.5, 1.0], samples=3, seed=2, batch=7)
    assert profile.nats.shape == profile.masked_nats.shape == (2, 2, 10) and profile.masked.shape == (2, 10)
    rows = torch.cat([call[0] for call in model.calls if call[2] == 1])
    assert torch.equal(rows, torch.cat([call[0] for call in model.calls if call[2] == 4]))
    sigma = torch.cat([call[3] for call in model.calls if call[2] == 1]).double()
    t = ((1 - torch.exp(-sigma)) / 0.999).view(10, 2, 3)
    for b, (low, high) in enumerate([(0.2, 0.5), (0.5, 1.0)]):
        assert torch.equal(((t[:, b] - low) / (high - low) * 3).floor(), torch.arange(3.0).expand(10, 3).double())
    mask = rows == V - 1
    assert torch.equal(profile.masked, mask.sum(-1).double().view(10, 2, 3).mean(-1).T)
    chance = model.table[torch.arange(6), V - 1][:, : V - 1].softmax(-1)
    ce = (-torch.log(chance[torch.arange(6), tokens.repeat_interleave(6, 0)]) * mask).sum(-1).view(10, 2, 3)
    torch.testing.assert_close(profile.masked_nats[:, 0], ce.mean(-1).T)
    torch.testing.assert_close(profile.nats[:, 1], (ce / t).mean(-1).T, rtol=1e-4, atol=0)
    want = ce.sum((0, 2)) / mask.view(10, 2, -1).sum((0, 2))
    torch.testing.assert_close(profile.masked_ce, want[:, None].expand(2, 2))


# Long texts


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
@example(5, 8, None)
def test_each_token_is_scored_once(length, window, data):
    """Side by side; what a window is given is the end of the one before."""
    context = data.draw(st.integers(0, window - 1)) if data else 7
    model = Table(torch.zeros(window, length + 2, length + 2), mask_id=length, max_length=window)
    text = torch.arange(length)
    got = rolling(model, text, context=context, num_loops=1, bound="count", samples=1)
    assert int(got.tokens.sum()) == length and (got.tokens > 0).all()
    # a flat table of length + 1 ids that are predicted
    assert got.nats.sum().item() == pytest.approx(length * math.log(length + 1), rel=1e-5)
    if length > window:
        rows, real, scored = _windows(text, window, context, 0)
        assert torch.equal(rows[scored], text) and torch.equal(scored.sum(-1), got.tokens)
        assert (real | (rows == 0)).all() and not scored[1:, :context].any()
        assert torch.equal(rows[1:, :context], rows[:-1, window - context :]) and real[1:, :context].all()
        masked = shown(model) == length
        assert not (masked & ~scored).any()


def test_short_text_is_plain_likelihood(toy):
    text = ids(1, 12, V, masks=0)[0]
    for bound in ("time", "count"):
        got = rolling(toy, text, window=20, context=15, num_loops=[1, 2], bound=bound, samples=3, seed=4)
        want = likelihood(toy, text[None], num_loops=[1, 2], bound=bound, samples=3, seed=4)
        assert torch.equal(got.per_sample, want.per_sample) and torch.equal(got.tokens, want.tokens)
    assert torch.equal(rolling(toy, text, num_loops=1).nats, likelihood(toy, text[None], num_loops=1).nats)
    unbounded = table(length=12)
    assert rolling(unbounded, text).tokens.tolist() == [12] and unbounded.calls[0][1] is None


def test_windows_against_the_conditional_bound(toy):
    """A window is a sequence of its own whose beginning is given; the last is padded."""
    text = ids(1, 20, V, masks=0)[0]
    got = rolling(toy, text, window=8, context=3, num_loops=2, bound="count", samples=2, seed=1)
    assert got.tokens.tolist() == [8, 5, 5, 2]
    given_ = torch.arange(8) >= 3
    for w, start in ((1, 5), (2, 10)):
        alone = likelihood(
            toy,
            text[None, start : start + 8],
            maskable=given_[None],
            num_loops=2,
            bound="count",
            samples=2,
            seed=1,
            index=torch.tensor([w]),
        )
        torch.testing.assert_close(got.nats[w], alone.nats[0])
    last = likelihood(
        toy,
        text[None, 15:],
        maskable=given_[None, :5],
        num_loops=2,
        bound="count",
        samples=2,
        seed=1,
        index=torch.tensor([3]),
    )
    torch.testing.assert_close(got.nats[3], last.nats[0])
    assert got.perplexity.item() == pytest.approx(math.exp(got.nats.sum().item() / 20)) and got.error.isfinite()


# Packed documents


class Split:
    """A Denoiser that runs a model on parts of a row as if each were a sequence, and undoes its shift."""

    pad_id, logit_shift, max_length = 0, 0, None

    def __init__(self, model, *lengths):
        self.model, self.lengths, self.head = model, lengths, model.head
        self.mask_id, self.vocab_size, self.suppressed_ids = model.mask_id, model.vocab_size, model.suppressed_ids

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        parts = [self.model.hidden(x, None, num_loops) for x in input_ids.split(self.lengths, 1)]
        if self.model.logit_shift:
            parts = [torch.cat((h[:, :1], h[:, :-1]), 1) for h in parts]
        return torch.cat(parts, 1)


@pytest.mark.parametrize("shift", [0, 1])
def test_packed_documents_are_measured_apart(shift):
    """Under the same masks a row of documents has the nats that they have one by one."""
    model = live(tiny(vocab_size=7, logit_shift=shift), dtype=torch.float64)
    rows, lengths = ids(3, 8, 7, masks=0), ((3, 5), (8,), (1, 5, 2))
    documents = torch.stack([torch.repeat_interleave(torch.tensor(n)) for n in lengths])

    def of_each(measure):
        return [measure(Split(model, *n), rows[[i]], index=torch.tensor([i])) for i, n in enumerate(lengths)]

    for bound in ("time", "count"):
        common = {"num_loops": [1, 3], "samples": 4, "seed": 2, "bound": bound, "batch": 5}
        got = likelihood(model, rows, document_ids=documents, **common)
        apart = of_each(lambda *a, **k: likelihood(*a, **k, **common))  # noqa: B023
        torch.testing.assert_close(got.nats, torch.cat([part.nats for part in apart], -1))
        mixed = likelihood(model, rows, **common)
        assert ((got.nats - mixed.nats).abs() > 1e-3).all(0).tolist() == [True, False, True]
    common = {"loops": [1, 3], "edges": [0.2, 0.5, 1.0], "samples": 2, "seed": 2, "batch": 5}
    got = nelbo_by_time(model, rows, document_ids=documents, **common)
    apart = of_each(lambda *a, **k: nelbo_by_time(*a, **k, **common))
    torch.testing.assert_close(got.nats, torch.cat([part.nats for part in apart], -1))


@pytest.mark.parametrize("shift", [0, 1])
def test_padding_on_the_left_costs_nothing(shift):
    """With every count of masks measured, a lone token has the nats that it has without padding."""
    model = live(tiny(vocab_size=7, logit_shift=shift), dtype=torch.float64)
    token, padding = torch.tensor([[4]]), torch.tensor([[2, 5, 1]])
    common = {"num_loops": 2, "bound": "count"}
    got = likelihood(model, torch.cat((padding, token), 1), attention_mask=torch.arange(4)[None] >= 3, **common)
    torch.testing.assert_close(got.nats, likelihood(model, token, **common).nats)


# Refusals


X = ids(3, T, V, masks=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: likelihood(m, X, bound="elbo"), "bound is 'elbo'; it must be 'time' or 'count'"),
        (lambda m: likelihood(m, X, samples=0), "samples is 0"),
        (lambda m: likelihood(m, X, batch=0), "batch is 0"),
        (lambda m: likelihood(m, X[:0]), r"sequences is \[0, 4\]; there must be tokens"),
        (lambda m: likelihood(m, X, num_loops=[]), "num_loops is empty"),
        (lambda m: likelihood(m, X, num_loops=[1, 0]), "at least once"),
        (lambda m: likelihood(m, X, schedule="cos"), "no schedule 'cos'"),
        (lambda m: likelihood(m, X, t_range=(0.0, 1.0)), "0 < low <= high <= 1"),
        (lambda m: likelihood(m, X, maskable=X[:2] > 0), r"maskable is \[2, 4\], sequences is \[3, 4\]"),
        (lambda m: likelihood(m, X.tolist()), "sequences is a list; expected a tensor of integers"),
        (lambda m: likelihood(m, X[0]), r"sequences is torch.int64 \[4\]; expected a tensor of integers, a row"),
        (lambda m: likelihood(m, X.float()), r"sequences is torch.float32 \[3, 4\]"),
        (lambda m: likelihood(m, X, samples=1.5), "samples is 1.5"),
        (lambda m: likelihood(m, X, batch=1.5), "batch is 1.5"),
        (lambda m: likelihood(m, X, num_loops=2.5), "num_loops is 2.5"),
        (lambda m: likelihood(m, X, t_range=0.5), "t_range is 0.5; it must satisfy 0 < low <= high <= 1"),
        (lambda m: likelihood(m, X, t_range=(0.1, 0.2, 0.3)), "t_range is"),
        (lambda m: likelihood(m, X, depth=3), "depth is 3; it must be a Depth"),
        (lambda m: likelihood(m, X, index=[0, 1, 2]), r"index is a list; it must be \[3\]"),
        (lambda m: likelihood(m, X, index=torch.tensor([0.0, 0.5, 1.0])), "numbered by integers"),
        (lambda m: likelihood(m, X, document_ids=X), "Table does not take document_ids"),
        (lambda m: likelihood(m, X, document_ids=X[:2]), r"document_ids is \[2, 4\], sequences is \[3, 4\]"),
        (lambda m: likelihood(m, X, index=torch.arange(2)), r"index is \[2\]; it must be \[3\]"),
        (lambda m: likelihood(m, X.masked_fill(X > 0, 4)), "contain the mask id 4"),
        (lambda m: likelihood(m, X, depth=Depth()), "Table does not take a depth"),
        (lambda m: likelihood(m, X).at(2), "S = 2 was not measured; there are 1"),
        (lambda m: likelihood(m, X).difference(likelihood(m, X[:2])), "needs the same sequences"),
        (lambda m: likelihood(m, X).difference(likelihood(m, X, bound="count")), "two estimators"),
        (lambda m: likelihood(m, X, num_loops=[1, 2]).difference(likelihood(m, X, num_loops=[1, 2, 3])), "do not pair"),
        (lambda m: nelbo_by_time(m, X, [1], [0.5]), "at least two, rising"),
        (lambda m: nelbo_by_time(m, X, [1], [0.5, 0.4]), "at least two, rising"),
        (lambda m: nelbo_by_time(m, X, [1], [0.0, 0.4]), "0 < low <= high <= 1"),
        (lambda m: nelbo_by_time(m, X, [1], [0.5, 1.4]), "0 < low <= high <= 1"),
        (lambda m: nelbo_by_time(m, X, [1], [0.5, 1.0], samples=0), "samples is 0"),
        (lambda m: nelbo_by_time(m, X, [1], [0.5, 0.7, 1.0], samples=-1), "samples is -1"),
        (lambda m: nelbo_by_time(m, X, [1], "ab"), "edges are 'ab'; they must be numbers"),
        (lambda m: rolling(m, [1, 2]), "ids is a list; a text is a vector"),
        (lambda m: rolling(m, X[0], window=2.5), "window is 2.5"),
        (lambda m: rolling(m, X[0], context=0.5), "context is 0.5"),
        (lambda m: rolling(m, X), r"ids is \[3, 4\]; a text is a vector"),
        (lambda m: rolling(m, X[0][:0]), "at least one token"),
        (lambda m: rolling(m, X[0], window=0), "window is 0"),
        (lambda m: rolling(m, X[0], window=9), "window is 9; it must be at least 1 and at most"),
        (lambda m: rolling(m, X[0], window=3, context=3), "context is 3; it must be at least 0 and below"),
        (lambda m: rolling(m, X[0], context=-1), "context is -1; it must be a whole number of at least 0"),
    ],
)
def test_refusals(call, words):
    model = Table(table().table, mask_id=V - 1, max_length=8)
    with pytest.raises(InputError, match=words):
        call(model)


def test_evaluation_shares_no_numbers_with_training():
    index = torch.arange(4)
    streams = [random.uniform(0, s, 1, index, 8) for s in (random.MASK, random.T_EVAL, random.COUNT)]
    assert not any(torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])
