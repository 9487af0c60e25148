"""Philox and what is built on it: published vectors, the open interval, independence of shapes."""

import math

import numpy as np
import pytest
import torch

from loopmdm import random
from loopmdm.errors import InputError

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor(int(w, 16)) for w in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    assert [int(w) for w in random.philox(words(counter), words(key))] == [int(w) for w in words(result)]


def plain_philox(counter, key):
    """Python integers of any size, straight from the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**63, 2**64 - 1, -1])
def test_uniform_is_philox_of_its_arguments(seed):
    """Counter: (block, row, step, stream); key: the seed's low and high words; 23 bits of each word."""
    rows, step, stream = [0, 5, 2**32 - 1], 2**32 - 3, 200
    got = random.uniform(seed, stream, step, torch.tensor(rows), 10)
    for i, row in enumerate(rows):
        bits = []
        for block in range(3):
            bits += plain_philox((block, row, step, stream), (seed % 2**32, (seed % 2**64) >> 32))
        want = [((b >> 9) + 0.5) / 2**23 for b in bits[:10]]
        assert got[i].tolist() == want


def test_uniform_stays_inside_the_open_interval(monkeypatch):
    extreme = [0, 2**32 - 1, 511, 2**32 - 512]
    monkeypatch.setattr(random, "philox", lambda c, k: tuple(torch.full_like(c[0] + k[0], w) for w in extreme))
    got = random.uniform(0, 0, 0, torch.arange(2), 4)
    assert got.dtype == torch.float32 and got.shape == (2, 4)
    assert got.min() == 2.0**-24 and got.max() == 1 - 2.0**-24
    assert ((got * 2**24) % 2 == 1).all()


def test_a_number_depends_on_its_place_alone():
    rows = torch.tensor([3, 9, 4])
    whole = random.uniform(1, 2, 3, rows, 33)
    for count in (1, 2, 3, 4, 5, 32):
        assert torch.equal(random.uniform(1, 2, 3, rows, count), whole[:, :count])
    assert torch.equal(random.uniform(1, 2, 3, rows.flip(0), 33), whole.flip(0))
    assert torch.equal(random.uniform(1, 2, 3, rows[1:2], 33), whole[1:2])
    assert torch.equal(random.uniform(1, 2, 3, rows.int(), 33), whole)
    some = torch.tensor([[5, 32, 0], [1, 1, 31], [17, 2, 30]])
    assert torch.equal(random.uniform(1, 2, 3, rows, some), whole.gather(1, some))


def test_seeds_and_steps_a_row():
    seeds, steps, rows = torch.tensor([5, -1]), torch.tensor([8, 2]), torch.tensor([0, 0])
    got = random.uniform(seeds, 1, steps, rows, 6)
    assert torch.equal(got[:1], random.uniform(5, 1, 8, rows[:1], 6))
    assert torch.equal(got[1:], random.uniform(2**64 - 1, 1, 2, rows[:1], 6))


def test_every_argument_changes_every_number():
    base = {"seed": 1, "stream": 1, "step": 1, "index": torch.tensor([1])}
    changes = [{"seed": 2}, {"seed": 1 + 2**32}, {"stream": 2}, {"step": 2}, {"index": torch.tensor([2])}]
    draws = [random.uniform(**{**base, **c}, count=64)[0] for c in ({}, *changes)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert (a == b).sum() <= 1  # 64 chances of 2^-23
    streams = (random.LOOPS, random.TIME, random.MASK, random.SAMPLE_POSITION, random.SAMPLE_TOKEN, random.DATA)
    assert len(set(streams)) == 6 and max(streams) < 256


def test_moments_and_independence():
    u = random.uniform(11, random.MASK, 4, torch.arange(2000), 50).double()
    n = u.numel()
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):  # along positions, along rows
        corr = ((a - 0.5) * (b - 0.5)).mean() * 12
        assert abs(corr) < 4 / a.numel() ** 0.5
    counts = torch.histc(u.float(), 64, 0, 1).double()
    chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert 25 < chi2 < 115  # 63 degrees of freedom, p about 1e-4 at either end


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 65537])
def test_permuted_is_a_bijection_of_its_own_each_epoch_and_seed(n):
    everyone = torch.arange(n)
    images = [random.permuted(everyone, n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (2**64 - 1, 0))]
    for image in images:
        assert image.dtype == torch.int64 and torch.equal(image.sort().values, everyone)
    if n >= 100:
        for i, a in enumerate(images):
            assert (a == everyone).sum() < 12  # one fixed point is expected, and one agreement
            for b in images[:i]:
                assert (a == b).sum() < 12


def test_permuted_needs_no_neighbours():
    i, epochs = torch.tensor([[3, 99], [0, 41]]), torch.tensor([[0, 7], [1, 0]])
    got = random.permuted(i, 100, 9, epochs)
    for row in range(2):
        for column in range(2):
            epoch = int(epochs[row, column])
            assert got[row, column] == random.permuted(torch.arange(100), 100, 9, epoch)[i[row, column]]
    assert i.tolist() == [[3, 99], [0, 41]]
    far = random.permuted(torch.arange(500) + 2**61, 2**62, 9, 2**32 - 1)
    assert far.min() >= 0 and far.max() < 2**62 and len(far.unique()) == 500
    assert (far < 2**61).sum() in range(190, 311)
    for n in (0, 2**62 + 1):
        with pytest.raises(InputError, match="takes 1 to"):
            random.permuted(torch.tensor([0]), n, 0, 0)


def test_permuted_is_uniform():
    """All orders of 3, 4 and 5, pairs of images of 17, and where neighbours of 1000 go; bounds at p about 1e-5."""
    for n, upper in ((3, 31), (4, 67), (5, 195)):
        epochs = torch.arange(40000).repeat_interleave(n)
        images = random.permuted(torch.arange(n).repeat(40000), n, 1, epochs).view(-1, n)
        counts = images.unique(dim=0, return_counts=True)[1].double()
        assert len(counts) == math.factorial(n)
        mean = 40000 / len(counts)
        assert ((counts - mean) ** 2 / mean).sum() < upper
    epochs = torch.arange(20000)
    a, b = (random.permuted(torch.full_like(epochs, i), 17, 5, epochs) for i in (2, 3))
    counts = torch.bincount(a * 17 + b, minlength=289).view(17, 17).double()
    assert (counts.diagonal() == 0).all()
    off, mean = counts[~torch.eye(17, dtype=torch.bool)], 20000 / 272
    assert ((off - mean) ** 2 / mean).sum() < 380
    far = random.permuted(torch.arange(1000), 1000, 3, 0).double()
    gap = (far[1:] - far[:-1]).abs()
    assert abs(gap.mean() - 1000 / 3) < 4 * 1000 / 18**0.5 / 999**0.5 * 1.5


def test_shift_is_in_range_uniform_and_independent_of_the_order():
    epochs = torch.arange(20000)
    got = random.shift(10, 4, epochs)
    counts = torch.bincount(got, minlength=10).double()
    assert len(counts) == 10 and ((counts - 2000) ** 2 / 2000).sum() < 40
    assert torch.equal(random.shift(10, 4, epochs[7:9]), got[7:9])
    assert not torch.equal(random.shift(10, 5, epochs), got)
    wide = random.shift(2**40, 4, epochs).double() / 2**40
    assert wide.min() >= 0 and wide.max() < 1 and abs(wide.mean() - 0.5) < 0.01
    first = random.permuted(torch.zeros_like(epochs), 10, 4, epochs).double()
    correlation = torch.corrcoef(torch.stack((first, got.double())))[0, 1]
    assert abs(correlation) < 0.03


def test_streams_do_not_meet():
    names = "LOOPS TIME MASK SAMPLE_POSITION SAMPLE_TOKEN DATA T_EVAL COUNT ORDER REMASK HIT".split()  # noqa: SIM905
    assert [getattr(random, name) for name in names] == list(range(11))  # appended to, never reordered


def test_scalar():
    assert random.scalar(3, random.LOOPS, 9) == random.uniform(3, random.LOOPS, 9, torch.tensor([0]), 1).item()


@pytest.mark.parametrize("bad", [2**64, -(2**63) - 1, 1.5, "0", None])
def test_seed_must_fit_64_bits(bad):
    with pytest.raises(InputError, match=r"seed is .* whole number below 2\^64"):
        random.uniform(bad, 0, 0, torch.tensor([0]), 1)


def test_signed():
    assert [random.signed(s) for s in (0, 2**63 - 1, 2**63, 2**64 - 1, -5)] == [0, 2**63 - 1, -(2**63), -1, -5]
    numpy_s = [random.signed(s) for s in (np.int64(-5), np.uint64(2**64 - 1))]
    assert numpy_s == [-5, -1] and {type(s) for s in numpy_s} == {int}
