"""The noise of unmasking in torch: the same bits as csrc/noise.h and kernels/noise.py.

Every fp32 operation is rounded on its own and nothing is left to a library's log or exp, so eager torch gives
these bits on any device. (A compiler that contracts a * b + c would not.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..random import GROUP, TOKEN, philox
from .contract import extension

__all__ = ["GROUP", "TOKEN", "exp24", "gumbel", "gumbel_rows", "log_fp32"]

_LOW = 0xFFFFFFFF
_LOG = (0.12761576, -0.13160183, 0.14201757, -0.16623357, 0.20001227, -0.2500082, 0.3333333)
_EXP2 = (1.340027e-3, 9.618004e-3, 5.550328e-2, 0.2402265, 0.6931472, 1.0)
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)


def gumbel(seed: Tensor, step: Tensor | int, position: Tensor, index: Tensor, stream: int) -> Tensor:
    """Standard Gumbel numbers -log(-log1p(-u)), fp32 of the arguments' broadcast shape.

    u has 32 bits of Philox4x32-10 (Salmon et al., SC 2011) and lies in [2^-33, 1 - 2^-24], so the numbers lie
    in [-2.82, 22.88].

    Args:
        seed: int64, 64 bits a row.
        step, position, index: int64 in [0, 2^32).
        stream: purpose; `GROUP` or `TOKEN`.
    """
    clock = torch.as_tensor(step, dtype=torch.int64, device=index.device)
    seed, clock, position, index = torch.broadcast_tensors(seed, clock, position, index)
    counter = (index >> 2, position & _LOW, clock & _LOW, torch.full_like(index, stream))
    words = torch.stack(philox(counter, (seed & _LOW, (seed >> 32) & _LOW)), dim=-1)
    bits = words.gather(-1, (index & 3)[..., None])[..., 0]
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -log_fp32(-_log1p_of_minus(u))


def log_fp32(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal fp32 numbers, to 1.2 units in the last place."""
    return _log_of(*_split(x))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = (1 + f) 2^e with 1 + f in [sqrt(1/2), sqrt(2)): (f, e), both fp32."""
    bits = x.view(torch.int32)
    e = (bits - _SQRT_HALF) >> 23
    return (bits - (e << 23)).view(torch.float32) - 1, e.to(torch.float32)


def _log_of(f: Tensor, e: Tensor) -> Tensor:
    p = torch.full_like(f, -0.07634497)
    for c in _LOG:
        p = p * f + c
    square = f * f
    y = p * f * square
    y = y + e * -2.1219444e-4
    y = y + square * -0.5
    return (f + y) + e * 0.693359375


def _log1p_of_minus(u: Tensor) -> Tensor:
    f, e = _split(1 - u)
    small = u < 0.29289323
    return _log_of(torch.where(small, -u, f), torch.where(small, 0.0, e))


def gumbel_rows(
    seeds: Tensor, steps: Tensor, positions: Tensor, first: Tensor, count: int, stream: int, impl: str = "torch"
) -> Tensor:
    """fp32 [N, count]: `gumbel` of each row at the indices first, first + 1, ... All tensors int64 [N].

    impl: "torch", "cpp" on the CPU, or "triton"; the same bits.
    """
    if impl == "torch":
        index = first[:, None] + torch.arange(count, device=first.device)
        return gumbel(seeds[:, None], steps[:, None], positions[:, None], index, stream)
    out = torch.empty(len(first), count, dtype=torch.float32, device=first.device)
    seeds, steps, positions, first = (t.contiguous() for t in (seeds, steps, positions, first))
    if impl == "triton":
        from ..kernels import noise as kernel

        with torch.cuda.device_of(seeds):
            kernel.gumbel_rows(seeds, steps, positions, first, out, stream)
        return out
    where = (t.data_ptr() for t in (seeds, steps, positions, first, out))
    extension().gumbel_cpu(*where, len(first), count, stream, torch.get_num_threads())
    return out


def exp24(t: Tensor) -> Tensor:
    """2^24 exp(t) in fp32 for t <= 0; below -87 as at -87."""
    y = t.clamp(min=-87.0) * 1.44269504
    z = y + 12582936.0  # 1.5 * 2^23 + 24: the low bits hold 24 + round(y)
    r = y - (z - 12582936.0)
    p = torch.full_like(r, 1.5476301e-4)
    for c in _EXP2:
        p = p * r + c
    return (p.view(torch.int32) + (z.view(torch.int32) << 23)).view(torch.float32)
