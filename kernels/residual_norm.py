"""Residual add and norm in one pass: `summed = x + branch`, `normed = norm(summed) * weight + bias`.

Traffic for R rows of D columns, residual stream of a bytes, branch of b, normed of c bytes an element (weight
and bias are D long and stay in cache; rstd is R fp32 numbers):

    forward   unfused  add reads x, branch and writes summed; norm reads summed and writes normed     R D (3a + b + c)
              fused    the sum stays in registers                                                     R D (2a + b + c)
    backward  unfused  norm backward reads summed, dnormed for dx and again for dweight, writes dnorm;
                       the add of dsummed reads both and writes dx; dbranch is one cast of it         R D (7a + b + 2c)
              fused    reads summed, dsummed, dnormed once, writes dx and, in another dtype, dbranch  R D (3a + b + c)

With the fp32 stream and a bf16 branch (a = 4, b = c = 2): 16 -> 12 bytes an element forward, 34 -> 16 backward.
FLOPs are the same before and after, about 6 an element forward and 10 backward: below one FLOP a byte, so
memory traffic is the time. Where branch is None nothing is added or written: R D (a + c).

Statistics are those of the sum as stored (rounded to x's dtype), so that the backward, which reads the
stored sum, sees exactly the numbers that the forward normalised.

Gradients of weight and bias: every program sums its rows in fp32 and writes one partial row; torch
adds the partial rows. No atomics: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from .tuned import Compile

MAX_DIM = 4096  # a row is one tile in registers, and the backward's spills beyond
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def candidates(dtype: str, size: Mapping[str, int]) -> Iterable[dict[str, int]]:
    """Rows and warps that `loopmdm tune` tries: a warp takes 64 to 1024 numbers of a tile."""
    block = triton.next_power_of_2(size.get("dim", MAX_DIM))
    tries = ((rows, warps) for rows in (1, 2, 4, 8) for warps in (2, 4, 8, 16))
    return [{"rows": rows, "warps": warps} for rows, warps in tries if 64 <= rows * block // warps <= 1024]


def default_config(dim: int) -> dict[str, int]:
    """Rows a program and warps: 8 fp32 values a thread and tile. With 16 some GPUs spill in the backward."""
    block = triton.next_power_of_2(dim)
    return {"rows": max(1, min(8, 1024 // block)), "warps": max(4, block // 256)}


# Row counts vary from step to step: a count of 1, or a multiple of 16, must not compile a kernel of its own.
@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    summed_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    eps,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    rows = tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    in_row = first + rows < n_rows
    inside = in_row[:, None] & (cols < DIM)[None, :]
    # 64-bit where a program starts, 32-bit inside its tile: whole tiles of 64-bit offsets cost registers
    start = first * DIM
    at = rows[:, None] * DIM + cols[None, :]

    summed = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        stored = (summed + branch).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + start + at, stored, mask=inside)
        summed = stored.to(tl.float32)
    if CENTRE:
        mean = tl.sum(summed, axis=1) / DIM
        tl.store(mean_ptr + first + rows, mean, mask=in_row)
        # two passes over registers: E[x²] - E[x]² loses every digit when the mean dwarfs the spread
        summed = tl.where(inside, summed - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(summed * summed, axis=1) / DIM + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + first + rows, rstd, mask=in_row)
    normed = summed * rstd[:, None]
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + cols, mask=cols < DIM, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        normed += tl.load(bias_ptr + cols, mask=cols < DIM, other=0.0).to(tl.float32)[None, :]
    tl.store(normed_ptr + start + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def backward_kernel(
    dsummed_ptr,
    dnormed_ptr,
    summed_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dweight_ptr,
    dbias_ptr,
    n_rows,
    n_blocks,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_DSUMMED: tl.constexpr,
    HAS_DBRANCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    in_col = cols < DIM
    at = rows[:, None] * DIM + cols[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_col, other=0.0).to(tl.float32)
        # whole tiles, added over rows once at the end: no exchange between warps inside the loop
        dweight = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    if HAS_BIAS:
        dbias = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)

    for block in range(0, n_blocks):
        first = (tl.program_id(0).to(tl.int64) * n_blocks + block) * BLOCK_R
        start = first * DIM
        in_row = first + rows < n_rows
        inside = in_row[:, None] & in_col[None, :]

        xhat = tl.load(summed_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dnormed_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + first + rows, mask=in_row, other=0.0)
        if CENTRE:
            xhat -= tl.load(mean_ptr + first + rows, mask=in_row, other=0.0)[:, None]
        # beyond DIM xhat is -mean, but grad is 0 wherever it meets it and dx is masked
        xhat *= rstd[:, None]
        if HAS_BIAS:
            dbias += grad
        if HAS_WEIGHT:
            dweight += grad * xhat
            grad *= weight[None, :]
        dx = grad - xhat * (tl.sum(grad * xhat, axis=1) / DIM)[:, None]
        if CENTRE:
            dx -= (tl.sum(grad, axis=1) / DIM)[:, None]
        dx *= rstd[:, None]
        if HAS_DSUMMED:
            dx += tl.load(dsummed_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_DBRANCH:
            tl.store(dbranch_ptr + start + at, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)

    partial = tl.program_id(0).to(tl.int64) * DIM + cols
    if HAS_WEIGHT:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=in_col)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=in_col)


def forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    centre: bool,
    eps: float,
    out_dtype: torch.dtype,
    config: Mapping[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward: (summed, normed, mean, rstd); summed and mean are empty where there is none.

    All tensors contiguous and on one device; x and branch [..., D], weight and bias [D], mean and rstd [R].
    """
    dim = x.shape[-1]
    n_rows = x.numel() // dim
    config = {**default_config(dim), **config}
    summed = torch.empty_like(x) if branch is not None else x.new_empty(0)
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = torch.empty(n_rows if centre else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows:
        forward_kernel[(triton.cdiv(n_rows, config["rows"]),)](
            x,
            branch,
            weight,
            bias,
            summed,
            normed,
            mean,
            rstd,
            n_rows,
            eps,
            DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_R=config["rows"],
            CENTRE=centre,
            HAS_BRANCH=branch is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            num_warps=config["warps"],
        )
    return summed, normed, mean, rstd


def backward(
    dsummed: torch.Tensor | None,
    dnormed: torch.Tensor,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    centre: bool,
    has_bias: bool,
    branch_dtype: torch.dtype | None,
    config: Mapping[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward: (dx, dbranch, dweight, dbias), the last two fp32 [D]; empty where not asked for.

    `branch_dtype` is None where branch has x's dtype (its gradient is dx) or there is no branch.
    """
    dim = summed.shape[-1]
    n_rows = summed.numel() // dim
    config = {**default_config(dim), **config}
    programs, n_blocks = partition(n_rows, config["rows"])
    dx = torch.empty_like(summed)
    dbranch = torch.empty(
        summed.shape if branch_dtype is not None else 0, dtype=branch_dtype or dx.dtype, device=dx.device
    )
    partial = (programs, dim)
    dweight = torch.empty(partial if weight is not None else 0, dtype=torch.float32, device=dx.device)
    dbias = torch.empty(partial if has_bias else 0, dtype=torch.float32, device=dx.device)
    if n_rows:
        backward_kernel[(programs,)](
            dsummed,
            dnormed,
            summed,
            weight,
            mean,
            rstd,
            dx,
            dbranch,
            dweight,
            dbias,
            n_rows,
            n_blocks,
            DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_R=config["rows"],
            CENTRE=centre,
            HAS_DSUMMED=dsummed is not None,
            HAS_DBRANCH=branch_dtype is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=has_bias,
            num_warps=config["warps"],
        )
    return dx, dbranch, dweight.sum(0) if weight is not None else dweight, dbias.sum(0) if has_bias else dbias


def partition(n_rows: int, rows: int, most: int = 512) -> tuple[int, int]:
    """(programs, row blocks of each): few enough partial rows to add cheaply, enough programs for any GPU.

    A function of the shape alone, so that gradients do not depend on the device's number of multiprocessors.
    """
    blocks = triton.cdiv(n_rows, rows)
    n_blocks = max(1, triton.cdiv(blocks, most))
    return triton.cdiv(blocks, n_blocks), n_blocks


GATE_SIZES = tuple({"dim": dim} for dim in (64, 1000, MAX_DIM))


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    """What must compile without spills: both kernels, both norms, in the widest form.

    A 16-bit `dtype` is tried as the model runs it: branch and normed in it, the stream in fp32.
    """
    dim = size["dim"]
    config = {**default_config(dim), **config}
    half = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    fp32 = "*fp32"
    for centre in (False, True):
        shape = {"DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "BLOCK_R": config["rows"], "CENTRE": centre}
        pointers = {"x": fp32, "branch": half, "weight": fp32, "bias": fp32}
        pointers |= {"summed": fp32, "normed": half, "mean": fp32, "rstd": fp32}
        yield Compile(
            forward_kernel,
            {f"{name}_ptr": kind for name, kind in pointers.items()} | {"n_rows": "i32", "eps": "fp32"},
            shape | {"HAS_BRANCH": True, "HAS_WEIGHT": True, "HAS_BIAS": True},
            config["warps"],
        )
        pointers = {"dsummed": fp32, "dnormed": half, "summed": fp32, "weight": fp32, "mean": fp32, "rstd": fp32}
        pointers |= {"dx": fp32, "dbranch": half, "dweight": fp32, "dbias": fp32}
        yield Compile(
            backward_kernel,
            {f"{name}_ptr": kind for name, kind in pointers.items()} | {"n_rows": "i32", "n_blocks": "i32"},
            shape | {"HAS_DSUMMED": True, "HAS_DBRANCH": True, "HAS_WEIGHT": True, "HAS_BIAS": True},
            config["warps"],
        )
