"""Filters: temperature, top-k and top-p against one row at a time in Python, by what is drawn and how often."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.errors import InputError
from loopmdm.sampling.engine import generate
from loopmdm.sampling.filters import Filters
from loopmdm.sampling.unmask import unmask_from_logits

from .helpers import Table
from .samplers import drawn

N = 20_000
INF = math.inf


def plain(row, temperature, top_k, top_p):
    """Probabilities after suppression, temperature, top-k, top-p."""
    kept = sorted((v for v in range(len(row)) if row[v] > -INF), key=lambda v: (-row[v], v))[:top_k]
    weight = {v: math.exp((row[v] - max(row)) / temperature) for v in kept}
    total, mass, nucleus = math.fsum(weight.values()), 0.0, []
    for v in kept:
        nucleus.append(v)
        mass += weight[v] / total
        if top_p is not None and mass >= top_p:
            break
    total = math.fsum(weight[v] for v in nucleus)
    return [weight[v] / total if v in nucleus else 0.0 for v in range(len(row))]


def draw(row, n=1, **options):
    """Tokens of n positions of one row of logits, by the public step."""
    masks = torch.full((1, n), len(row))
    logits = torch.tensor([*row, 0.0]).expand(1, n, -1)  # the mask's own logit comes last
    return unmask_from_logits(logits, masks, mask_id=len(row), k=n, **options).tokens[0].tolist()


# Halves and quarters, so that ties happen; powers of two, so that the sums are exact
ROWS = st.lists(st.sampled_from([0.0, math.log(2), math.log(4), -INF]), min_size=5, max_size=9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    row=ROWS.filter(lambda row: max(row) > -INF),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.sampled_from([None, 1e-9, 0.3, 0.55, 0.9, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_draws_against_a_plain_implementation(row, temperature, top_k, top_p, seed):
    """What top-k and top-p leave, drawn with the noise of the contract."""
    got = draw(row, 20, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, step=3)
    kept = row
    if temperature:
        left = plain(row, temperature, top_k, top_p)
        kept = [x if p else -INF for x, p in zip(row, left, strict=True)]
    signed = seed if seed < 2**63 else seed - 2**64
    assert got == [drawn(kept, temperature, signed, 3, position) for position in range(20)]


def test_the_nucleus_is_the_smallest_set_of_that_mass():
    """Mass equal to p is enough, at least one token stays, ties go to the lower id; top-p counts what top-k left."""

    def kept(p, *row, k=None):
        return sorted(set(draw([math.log(x) for x in row], 300, temperature=1.0, top_k=k, top_p=p)))

    assert kept(0.75, 0.25, 0.5, 0.25) == [0, 1]
    assert kept(0.5, 0.25, 0.5, 0.25) == [1]
    assert kept(0.5 + 1e-6, 0.25, 0.5, 0.25) == [0, 1]
    assert kept(1e-12, 0.25, 0.25, 0.25, 0.25) == [0]
    assert kept(0.5, 0.25, 0.25, 0.25, 0.25) == [0, 1]
    assert kept(None, 0.25, 0.25, 0.25, 0.25, k=3) == [0, 1, 2]
    # of 4/7, 2/7 and 1/7 top-k leaves 2/3 and 1/3
    assert kept(0.6, 4 / 7, 2 / 7, 1 / 7, k=2) == [0] and kept(0.6, 4 / 7, 2 / 7, 1 / 7) == [0, 1]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"temperature": 4.0}, {"top_k": 2}, {"top_p": 0.6, "temperature": 2.0}]
)
def test_frequencies(options):
    """Tokens come up as often as they should; the mask never."""
    logits = torch.tensor([0.0, 1.0, 2.5, 9.0])  # the last is the mask
    table = Table(logits.expand(1, 4, 4), mask_id=3)
    out = generate(table, [[3]] * N, steps=1, policy="ancestral", **options)
    share = torch.bincount(out.tokens.flatten(), minlength=4) / N
    want = plain([0.0, 1.0, 2.5, -INF], options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
    for got, p in zip(share.tolist(), want, strict=True):
        assert abs(got - p) <= 4.5 * math.sqrt(p * (1 - p) / N)


def test_extreme_temperatures():
    """No temperature overflows: the coldest are the arg-max, the hottest are uniform."""
    row = [1e4, 1e4 + 1, -1e4, -INF]
    for cold in (0.0, 1e-3, 1e-300, 5e-324):
        assert draw(row, 500, temperature=cold) == [1] * 500
    counts = torch.bincount(torch.tensor(draw(row, 6000, temperature=1e30)), minlength=4)
    assert counts[3] == 0 and (counts[:3] - 2000).abs().max() < 4.5 * math.sqrt(6000 * 2 / 9)
    assert draw([0.0] * 4) == [0]


def test_scores_do_not_depend_on_temperature_or_filters():
    """So that a policy's order is the same: at temperature 0 and with one token left by top-k."""
    table = Table(torch.randn(9, 6, 6, dtype=torch.float64), mask_id=5)
    for policy in ("margin", "entropy", "confidence"):
        runs = [
            generate(table, [5] * 9, steps=5, policy=policy, **options)
            for options in ({}, {"temperature": 3.0, "top_k": 1}, {"temperature": 0.2, "top_p": 1e-9})
        ]
        assert all(torch.equal(r.revealed_at, runs[0].revealed_at) for r in runs)
        assert all(torch.equal(r.tokens, runs[0].tokens) for r in runs)


def test_suppress():
    """Suppressed ids never come up and leave the others' shares; the mask is suppressed even if the model forgot it."""
    logits = torch.tensor([0.0, 1.0, 2.5, 9.0])
    table = Table(logits.expand(1, 4, 4), mask_id=3)
    for model_own in ((3,), ()):
        table.suppressed_ids = model_own
        out = generate(table, [[3]] * 2000, steps=1, policy="ancestral", suppress=[2])
        share = torch.bincount(out.tokens.flatten(), minlength=4) / 2000
        assert share[2] == share[3] == 0 and abs(share[0] - 1 / (1 + math.e)) < 0.05
    assert generate(table, [3], steps=1, suppress=(2, 1)).tokens.tolist() == [[0]]
    for ids, words in (
        ([0, 1, 2], "suppress leaves none of the 4 ids"),
        ([4], r"suppress holds 4; ids must be whole numbers in 0\.\.3"),
        (["a"], "suppress holds 'a'"),
    ):
        with pytest.raises(InputError, match=words):
            generate(table, [3], suppress=ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0; it must be a whole number of at least 1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(InputError, match=words):
        Filters(**options)
