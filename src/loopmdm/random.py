"""Counter-based random numbers: functions of (seed, stream, step, index, position), not of generator state.

Philox4x32-10 (Salmon et al., SC 2011) in int64 torch arithmetic, the same numbers on every device.
With it S, t and masks of a training step, and the noise of a sampled token, depend on nothing but
what they are for: resume, rank count, accumulation, batch composition and padding on the right change
nothing. Losses and bounds number a token by its column, so padding on the left gives it another mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError, integer, whole

# One stream a purpose, so that no two purposes share numbers under one seed.
LOOPS, TIME, MASK, SAMPLE_POSITION, SAMPLE_TOKEN, DATA, T_EVAL, COUNT, ORDER, REMASK, HIT, GROUP, TOKEN = range(13)

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32. Counter and key words are int64 tensors in [0, 2^32); so are the four results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps mod 2^64; both halves survive
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
    return c0, c1, c2, c3


def uniform(seed: int | Tensor, stream: int, step: int | Tensor, index: Tensor, count: int | Tensor) -> Tensor:
    """`count` numbers for each index: fp32 [N, count], odd multiples of 2^-24, so inside (0, 1).

    Args:
        seed: below 2^64, one or an int64 tensor of one a row.
        stream: purpose, 0..255.
        step: below 2^32, one or one a row.
        index: int64 [N], the global sample index or row, below 2^32.
        count: numbers a row, 0 to count - 1, or which: int64 [N, M], any numbers mod 2^34. Number j is the same
            whatever others are asked for.

    Raises:
        InputError: a step or seed outside its range, an index of fractions.
    """
    if index.dtype.is_floating_point:
        raise InputError(f"index is {index.dtype}; sequences are numbered by integers")
    if not isinstance(step, Tensor) and whole("step", step, 0) >= 2**32:
        raise InputError(f"step is {step}; it must be below 2^32")
    device = index.device
    row = index.to(torch.int64)[:, None]
    seed_ = torch.as_tensor(seed if isinstance(seed, Tensor) else signed(seed), dtype=torch.int64, device=device)
    step_ = torch.as_tensor(step, dtype=torch.int64, device=device)
    seed_, step_ = (v[:, None] if v.dim() else v for v in (seed_, step_))
    if isinstance(count, Tensor):
        block = (count >> 2) & _LOW
    else:
        block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)[None, :]
    words = philox(
        tuple(torch.broadcast_tensors(block, row & _LOW, step_ & _LOW, torch.full_like(block, stream))),
        (seed_ & _LOW, (seed_ >> 32) & _LOW),
    )
    bits = torch.stack(words, dim=-1)
    bits = bits.gather(-1, (count & 3)[..., None])[..., 0] if isinstance(count, Tensor) else bits.flatten(1)[:, :count]
    # 23 bits: with 24 the largest number would round to 1.0 in fp32.
    return (bits >> 9).to(torch.float32) * 2.0**-23 + 2.0**-24


def scalar(seed: int, stream: int, step: int) -> float:
    """One number in (0, 1) for a step."""
    return float(uniform(seed, stream, step, torch.zeros(1, dtype=torch.int64), 1))


def permuted(i: Tensor, n: int, seed: int, epoch: int | Tensor) -> Tensor:
    """The images of `i` under a permutation of 0..n-1, another one each epoch; nothing is stored.

    A Feistel network of eleven rounds on the smallest even number of bits that holds n, its rounds' keys by Philox;
    an image outside the range is permuted again until it is inside (cycle-walking; Black and Rogaway, CT-RSA 2002).

    Args:
        i: int64 of any shape, in [0, n).
        n: at most 2^62.
        epoch: below 2^32, one or one an element.
    """
    if not 1 <= n <= 2**62:
        raise InputError(f"n is {n}; a permutation takes 1 to 2^62 things")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low, x = (1 << half) - 1, i.to(torch.int64)
    epochs = torch.as_tensor(epoch, dtype=torch.int64, device=i.device).expand(x.shape)
    block = torch.arange(1, 4, device=i.device).expand(*x.shape, 3)  # 0 is `shift`'s
    counter = (block, torch.zeros_like(block), epochs[..., None].expand_as(block), torch.full_like(block, ORDER))
    keys = torch.cat(philox(counter, _key(seed, i.device)), dim=-1)
    keys, flip = keys[..., :-1], keys[..., -1] & 1
    pending = torch.ones_like(x, dtype=torch.bool)
    while bool(pending.any()):
        y, rounds = x[pending], keys[pending].unbind(-1)
        left, right = y >> half, y & low
        for key in rounds:
            left, right = right, left ^ (_mixed(right + key) & low)
        x = x.masked_scatter(pending, left << half | right)
        pending = x >= n
    # Feistel networks are even permutations; swapping 0 and 1 or not gives the odd ones their half.
    return x if n == 1 else torch.where(x < 2, x ^ flip, x)


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby): every bit in changes about half of those out."""
    x = x & _LOW
    x = ((x ^ x >> 16) * 0x85EBCA6B) & _LOW
    x = ((x ^ x >> 13) * 0xC2B2AE35) & _LOW
    return x ^ x >> 16


def shift(n: int, seed: int, epoch: Tensor) -> Tensor:
    """A number in [0, n) for each epoch, int64 of its shape; n is far below 2^63."""
    zero = torch.zeros_like(epoch)
    words = philox((zero, zero, epoch, torch.full_like(epoch, ORDER)), _key(seed, epoch.device))
    return (words[0] << 31 | words[1] >> 1) % n


def _key(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    whole = torch.tensor(signed(seed), device=device)
    return whole & _LOW, (whole >> 32) & _LOW


def signed(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed."""
    found = integer(seed)
    if found is None or not -(2**63) <= found < 2**64:
        raise InputError(f"seed is {seed!r}; it must be a whole number below 2^64")
    return found - 2**64 if found >= 2**63 else found
