"""Projection back into the residual stream in one pass: `x + h @ weight.T + bias`, with what the next norm needs.

For R rows, D columns and K inputs, the stream of a bytes an element, 16-bit operands:

    unfused  GEMM writes the branch; the add reads it and x, writes x                        R D (2 + 2 + 2a)
    fused    reads x, writes x, its 16-bit copy and one sum of squares for each 64 columns  R D (2a + 2 + 4/64)

beside reading h and weight, the same in both. With an fp32 stream 12 -> 10.1 bytes an element; the larger gain is that
the norm that follows need not read x (`norm_linear` counts it). FLOPs are 2 R D K in both. The next GEMM reads the copy
and scales its rows by the norm's 1/rms (`norm_linear`): normed is never stored.

Sums of squares are those of the stream as stored, one fp32 number for each row and 64 columns, each written by one
program: no atomics, and the same bits whatever the tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from .gemm import COMPUTE, GROUP, product, tile_index
from .tuned import Compile


def default_config(rows: int, dtype: str) -> dict[str, int]:
    """Tiles that compile without spills everywhere; small ones where there are few rows."""
    if dtype == "float32":
        return {"block_m": 64, "block_n": 64, "block_k": 32, "warps": 4, "stages": 2, "swath": 8}
    if rows <= 512:
        return {"block_m": 32, "block_n": 64, "block_k": 64, "warps": 4, "stages": 4, "swath": 8}
    return {"block_m": 128, "block_n": 128, "block_k": 64, "warps": 8, "stages": 3, "swath": 8}


@triton.jit(do_not_specialize=["n_rows"])
def linear_residual_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    out_ptr,
    copy_ptr,
    squares_ptr,
    n_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COPY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
):
    row_tile, column_tile = tile_index(n_rows, N, BLOCK_M, BLOCK_N, SWATH)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    branch = product(h_ptr, weight_ptr, rows, cols, n_rows, K, N, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE)
    if HAS_BIAS:
        branch += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]

    inside = (rows < n_rows)[:, None] & (cols < N)[None, :]
    # 64-bit where the tile starts, 32-bit inside it: whole tiles of 64-bit offsets cost registers
    start = row_tile.to(tl.int64) * BLOCK_M * N + column_tile * BLOCK_N
    at = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    stored = (tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32) + branch).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + at, stored, mask=inside)
    if HAS_COPY:
        tl.store(copy_ptr + start + at, stored.to(copy_ptr.dtype.element_ty), mask=inside)

    groups: tl.constexpr = BLOCK_N // GROUP
    n_groups: tl.constexpr = (N + GROUP - 1) // GROUP
    value = tl.where(inside, stored.to(tl.float32), 0.0)
    squares = tl.sum(tl.reshape(value * value, [BLOCK_M, groups, GROUP]), axis=2)
    group = column_tile * groups + tl.arange(0, groups)
    tl.store(
        squares_ptr + rows.to(tl.int64)[:, None] * n_groups + group[None, :],
        squares,
        mask=(rows < n_rows)[:, None] & (group < n_groups)[None, :],
    )


def forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    out: torch.Tensor,
    copy: torch.Tensor | None,
    squares: torch.Tensor,
    config: Mapping[str, int],
    compute: str,
) -> None:
    """Launch: out <- x + h @ weight.T + bias, copy <- out in its dtype, squares <- sums of out² over 64 columns.

    All contiguous and on one device: h [R, K], weight [D, K], bias [D], x, out, copy [R, D], squares fp32
    [R, ceil(D / 64)]. out may be x. `compute`: dtype of the product's operands.
    """
    (n_rows, depth), width = h.shape, weight.shape[0]
    config = {**default_config(n_rows, compute), **config}
    if not n_rows:
        return
    tiles = triton.cdiv(n_rows, config["block_m"]) * triton.cdiv(width, config["block_n"])
    linear_residual_kernel[(tiles,)](
        h,
        weight,
        bias,
        x,
        out,
        copy,
        squares,
        n_rows,
        K=depth,
        N=width,
        GROUP=GROUP,
        HAS_BIAS=bias is not None,
        HAS_COPY=copy is not None,
        COMPUTE=COMPUTE[compute],
        BLOCK_M=config["block_m"],
        BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"],
        SWATH=config["swath"],
        num_warps=config["warps"],
        num_stages=config["stages"],
    )


GATE_SIZES = ({"rows": 256, "dim": 1000, "depth": 1000}, {"rows": 65536, "dim": 768, "depth": 3072})


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    """The stream in fp32 with a copy, as a model runs it; and, for 16-bit operands, the stream in their dtype."""
    config = {**default_config(size["rows"], dtype), **config}
    operand = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    for stream in dict.fromkeys(("*fp32", operand)):
        copy = stream != operand
        pointers = {
            "h": operand,
            "weight": operand,
            "bias": "*fp32",
            "x": stream,
            "out": stream,
            "copy": operand,
            "squares": "*fp32",
        }
        yield Compile(
            linear_residual_kernel,
            {f"{name}_ptr": kind for name, kind in pointers.items()} | {"n_rows": "i32"},
            {
                "K": size["depth"],
                "N": size["dim"],
                "GROUP": GROUP,
                "HAS_BIAS": True,
                "HAS_COPY": copy,
                "COMPUTE": COMPUTE[dtype],
                "BLOCK_M": config["block_m"],
                "BLOCK_N": config["block_n"],
                "BLOCK_K": config["block_k"],
                "SWATH": config["swath"],
            },
            config["warps"],
            config["stages"],
        )
