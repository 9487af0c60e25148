"""Philox and what is built on it: published vectors, the open interval, independence of shapes."""

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


def test_scalar():
    assert random.scalar(3, random.LOOPS, 9) == random.uniform(3, random.LOOPS, 9, torch.tensor([0]), 1).item()


@pytest.mark.parametrize("bad", [2**64, -(2**63) - 1, 1.5, "0", None])
def test_seed_must_fit_64_bits(bad):
    with pytest.raises(InputError, match=r"seed is .* whole number below 2\^64"):
        random.uniform(bad, 0, 0, torch.tensor([0]), 1)


def test_signed():
    assert [random.signed(s) for s in (0, 2**63 - 1, 2**63, 2**64 - 1, -5)] == [0, 2**63 - 1, -(2**63), -1, -5]
