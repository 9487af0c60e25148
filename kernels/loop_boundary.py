"""Between two visits of the looped block, one pass: what the next visit starts from, in all the forms it is read in.

    out = rms(x + x0) * gain      (an anchored boundary; x itself for a plain one)

and beside it out's 16-bit copy, scaled by the gain of the norm that reads it, and its sums of squares, which the next
visit's first projection reads, and the two sums that tell how far a visit moved the sequence, for early exit.

For R rows of D columns, an fp32 stream, 16-bit copy:

    unfused  add reads x, x0, writes the sum; norm reads it, writes out; the exit reads x and the
             previous x for the difference and again for the norm                    R D (12 + 8 + 16)
    fused    reads x, x0, the previous x, writes out, the copy and D/64 + 2 numbers  R D (12 + 6)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from .gemm import GROUP, vector
from .tuned import Compile

MAX_DIM = 4096  # a row is one tile in registers


def candidates(dtype: str, size: Mapping[str, int]) -> list[dict[str, int]]:
    """Rows and warps that `loopmdm tune` tries: a warp takes 64 to 1024 numbers of a tile."""
    block = max(GROUP, triton.next_power_of_2(size.get("dim", MAX_DIM)))
    tries = ((rows, warps) for rows in (1, 2, 4, 8) for warps in (2, 4, 8, 16))
    return [{"rows": rows, "warps": warps} for rows, warps in tries if 64 <= rows * block // warps <= 1024]


def default_config(dim: int) -> dict[str, int]:
    block = max(GROUP, triton.next_power_of_2(dim))
    return {"rows": max(1, min(8, 1024 // block)), "warps": max(4, block // 256)}


@triton.jit(do_not_specialize=["n_rows", "period"])
def loop_boundary_kernel(
    x_ptr,
    x0_ptr,
    gain_ptr,
    copy_gain_ptr,
    previous_ptr,
    out_ptr,
    copy_ptr,
    squares_ptr,
    change_ptr,
    n_rows,
    period,
    eps,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    ANCHORED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_COPY_GAIN: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    HAS_COPY: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    rows = tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    in_row = first + rows < n_rows
    inside = in_row[:, None] & (cols < DIM)[None, :]
    start = first * DIM
    at = rows[:, None] * DIM + cols[None, :]

    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_PREVIOUS:
        moved = x - tl.load(previous_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(change_ptr + 2 * (first + rows), tl.sum(moved * moved, axis=1), mask=in_row)
        tl.store(change_ptr + 2 * (first + rows) + 1, tl.sum(x * x, axis=1), mask=in_row)
    if ANCHORED:
        x += tl.load(x0_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        # of the sum as residual_norm stores it, in the stream's dtype
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, axis=1) / DIM + tl.cast(eps, tl.float32))[:, None]
        if HAS_GAIN:
            x *= tl.load(gain_ptr + cols, mask=cols < DIM, other=0.0).to(tl.float32)[None, :]
        stored = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + at, stored, mask=inside)
        x = stored.to(tl.float32)
    if HAS_COPY:
        scaled = x
        if HAS_COPY_GAIN:
            scaled *= vector(copy_gain_ptr, first + rows, cols, n_rows, period, DIM, PER_SEQUENCE)
        tl.store(copy_ptr + start + at, scaled.to(copy_ptr.dtype.element_ty), mask=inside)
    groups: tl.constexpr = BLOCK_D // GROUP
    n_groups: tl.constexpr = (DIM + GROUP - 1) // GROUP
    squares = tl.sum(tl.reshape(x * x, [BLOCK_R, groups, GROUP]), axis=2)
    group = tl.arange(0, groups)
    tl.store(
        squares_ptr + (first + rows)[:, None] * n_groups + group[None, :],
        squares,
        mask=in_row[:, None] & (group < n_groups)[None, :],
    )


def forward(
    x: torch.Tensor,
    x0: torch.Tensor | None,
    gain: torch.Tensor | None,
    copy_gain: torch.Tensor | None,
    previous: torch.Tensor | None,
    out: torch.Tensor | None,
    copy: torch.Tensor | None,
    squares: torch.Tensor,
    change: torch.Tensor | None,
    eps: float,
    config: Mapping[str, int],
) -> None:
    """Launch. All contiguous and on one device: x, x0, previous, out, copy [R, D], gain [D], copy_gain [D] or [P, D],
    squares fp32 [R, ceil(D / 64)], change fp32 [R, 2]. x0 None: x is not changed and out not written.
    """
    n_rows, dim = x.shape
    config = {**default_config(dim), **config}
    if not n_rows:
        return
    each = copy_gain is not None and copy_gain.dim() == 2
    loop_boundary_kernel[(triton.cdiv(n_rows, config["rows"]),)](
        x,
        x0,
        gain,
        copy_gain,
        previous,
        out,
        copy,
        squares,
        change,
        n_rows,
        n_rows // len(copy_gain) if copy_gain is not None and each else 1,
        eps,
        DIM=dim,
        BLOCK_D=max(GROUP, triton.next_power_of_2(dim)),
        BLOCK_R=config["rows"],
        GROUP=GROUP,
        ANCHORED=x0 is not None,
        HAS_GAIN=gain is not None,
        HAS_COPY_GAIN=copy_gain is not None,
        PER_SEQUENCE=each,
        HAS_PREVIOUS=previous is not None,
        HAS_COPY=copy is not None,
        num_warps=config["warps"],
    )


GATE_SIZES = tuple({"dim": dim} for dim in (64, 1000, MAX_DIM))


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    """The widest form, on an fp32 stream with a copy in `dtype`; for the kernel's own sizes the entry of a stack."""
    dim, forms = size["dim"], (True,) if config else (True, False)
    config = {**default_config(dim), **config}
    half = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    pointers = dict.fromkeys(("x", "x0", "gain", "copy_gain", "previous", "out", "copy", "squares", "change"), "*fp32")
    signature = {f"{name}_ptr": kind for name, kind in (pointers | {"copy": half}).items()}
    for anchored in forms:
        yield Compile(
            loop_boundary_kernel,
            signature | {"n_rows": "i32", "period": "i32", "eps": "fp32"},
            {
                "DIM": dim,
                "BLOCK_D": max(GROUP, triton.next_power_of_2(dim)),
                "BLOCK_R": config["rows"],
                "GROUP": GROUP,
                "ANCHORED": anchored,
                "HAS_GAIN": anchored,
                "HAS_COPY_GAIN": True,
                "PER_SEQUENCE": anchored,
                "HAS_PREVIOUS": anchored,
                "HAS_COPY": True,
            },
            config["warps"],
        )
