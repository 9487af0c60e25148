"""The noise of unmasking in Triton: the same bits as csrc/noise.h and ops/noise.py, which say what it is.

A kernel that calls these must be launched with enable_fp_fusion=False: then neither LLVM nor ptxas makes one rounding
of a * b + c. (`launch_options` below.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .tuned import Compile

launch_options: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def log_of(f, e):
    """log(1 + f) + e log 2, f in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    p = f * -0.07634497 + 0.12761576
    p = p * f + -0.13160183
    p = p * f + 0.14201757
    p = p * f + -0.16623357
    p = p * f + 0.20001227
    p = p * f + -0.2500082
    p = p * f + 0.3333333
    square = f * f
    y = p * f * square
    y = y + e * -2.1219444e-4
    y = y + square * -0.5
    return (f + y) + e * 0.693359375


@triton.jit
def log_fp32(x):
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    return log_of((bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0, e.to(tl.float32))


@triton.jit
def log1p_of_minus(u):
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    small = u < 0.29289323
    e = tl.where(small, 0, (bits - 0x3F3504F3) >> 23)
    f = tl.where(small, -u, (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0)
    return log_of(f, e.to(tl.float32))


@triton.jit
def exp24(t):
    """2^24 exp(t) for t <= 0; below -87 as at -87."""
    y = tl.maximum(t, -87.0) * 1.44269504
    z = y + 12582936.0
    r = y - (z - 12582936.0)
    p = r * 1.5476301e-4 + 1.340027e-3
    p = p * r + 9.618004e-3
    p = p * r + 5.550328e-2
    p = p * r + 0.2402265
    p = p * r + 0.6931472
    p = p * r + 1.0
    return (p.to(tl.int32, bitcast=True) + (z.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def gumbel(seed, step, position, index, STREAM: tl.constexpr):
    """fp32 of index's shape: seed int64, step and position scalars, index int32."""
    zero = index.to(tl.uint32) * 0
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = index.to(tl.uint32) >> 2, zero + position.to(tl.uint32)
    c2, c3 = zero + step.to(tl.uint32), zero + STREAM
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    word = index & 3
    bits = tl.where(word < 2, tl.where(word == 0, c0, c1), tl.where(word == 2, c2, c3))
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    return -log_fp32(-log1p_of_minus(u))


@triton.jit(do_not_specialize=["count"])
def gumbel_kernel(
    seeds_ptr, steps_ptr, positions_ptr, first_ptr, out_ptr, count, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    seed, step = tl.load(seeds_ptr + row), tl.load(steps_ptr + row)
    index = (tl.load(first_ptr + row) + at).to(tl.int32)
    noise = gumbel(seed, step, tl.load(positions_ptr + row), index, STREAM)
    tl.store(out_ptr + row * count + at, noise, mask=at < count)


def gumbel_rows(
    seeds: torch.Tensor,
    steps: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    out: torch.Tensor,
    stream: int,
    block: int = 1024,
) -> None:
    """Launch: out fp32 [N, count] <- the noise of each row at indices first, first + 1, ...; the others int64 [N]."""
    rows, count = out.shape
    if out.numel():
        gumbel_kernel[(rows, triton.cdiv(count, block))](
            seeds, steps, positions, first, out, count, STREAM=stream, BLOCK=block, num_warps=4, **launch_options
        )


GATE_SIZES: tuple[dict[str, int], ...] = ({},)


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    signature = {name: "*i64" for name in ("seeds_ptr", "steps_ptr", "positions_ptr", "first_ptr")}
    signature |= {"out_ptr": "*fp32", "count": "i32"}
    yield Compile(gumbel_kernel, signature, {"STREAM": 11, "BLOCK": 1024}, 4, 1)
