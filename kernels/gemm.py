"""What the fused GEMMs share: the order of tiles, the product of one tile, and the activations of an epilogue.

Operands are row-major: a [M, K] as activations lie, w [N, K] as `nn.Linear` keeps its weight. A kernel multiplies for
itself (`product`) or is handed what cuBLAS multiplied (`multiplied`), and is then that product's epilogue alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

GROUP = 64  # columns that one partial sum of squares covers: any tile is a multiple of it, so no tile size shows

# Triton's own names for what a tile is multiplied in; the interpreter has no bf16 product, so it takes fp32 there.
COMPUTE = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


def candidates(dtype: str, size: Mapping[str, int]) -> list[dict[str, int]]:
    """Tiles that `loopmdm tune` tries for a product."""
    tiles = [(64, 64, 32, 4, 2, 8), (64, 128, 32, 8, 2, 8)]
    if dtype != "float32":
        tiles = [(32, 64, 64, 4, 4, 8), (64, 64, 64, 4, 4, 8), (64, 128, 64, 4, 3, 8), (128, 128, 32, 8, 4, 8)]
        tiles += [(128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 8), (128, 256, 64, 8, 3, 8), (256, 128, 64, 8, 3, 8)]
    return [dict(zip(("block_m", "block_n", "block_k", "warps", "stages", "swath"), t, strict=True)) for t in tiles]


def default_config(rows: int, dtype: str, ready: bool = False) -> dict[str, int]:
    """Tiles that compile without spills everywhere; small ones where there are few rows, or (ready) no product."""
    if ready:
        return {"block_m": 16, "block_n": 128, "block_k": 16, "warps": 4, "stages": 1, "swath": 8}
    if dtype == "float32":
        return {"block_m": 64, "block_n": 64, "block_k": 32, "warps": 4, "stages": 2, "swath": 8}
    if rows <= 512:
        return {"block_m": 32, "block_n": 64, "block_k": 64, "warps": 4, "stages": 4, "swath": 8}
    return {"block_m": 128, "block_n": 128, "block_k": 64, "warps": 8, "stages": 3, "swath": 8}


@triton.jit
def tile_index(n_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWATH: tl.constexpr):
    """(row tile, column tile) of this program: SWATH row tiles share each pass over w, so that it stays in L2."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(n_rows, BLOCK_M)
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    swath = pid // (SWATH * column_tiles)
    first = swath * SWATH
    height = tl.minimum(row_tiles - first, SWATH)
    within = pid % (SWATH * column_tiles)
    return first + within % height, within // height


@triton.jit
def product(
    a_ptr,
    w_ptr,
    rows,
    cols,
    n_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """a[rows] @ w[cols].T in fp32 [BLOCK_M, BLOCK_N]; rows and columns beyond the matrices repeat others."""
    depth = tl.arange(0, BLOCK_K)
    # wrapped, not masked: what lies beyond is computed from valid memory and never stored
    a_at = a_ptr + (rows % n_rows).to(tl.int64)[:, None] * K + depth[None, :]
    w_at = w_ptr + (cols % N).to(tl.int64)[None, :] * K + depth[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a, w = tl.load(a_at), tl.load(w_at)
        else:
            a = tl.load(a_at, mask=(start + depth < K)[None, :], other=0.0)
            w = tl.load(w_at, mask=(start + depth < K)[:, None], other=0.0)
        acc = tl.dot(a.to(COMPUTE), w.to(COMPUTE), acc, input_precision="ieee")
        a_at += BLOCK_K
        w_at += BLOCK_K
    return acc


@triton.jit
def multiplied(y_ptr, row_tile, column_tile, n_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This tile of y [n_rows, N] in fp32: what `product` returns, where it has been multiplied before."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (row_tile * BLOCK_M + rows < n_rows)[:, None] & (column_tile * BLOCK_N + cols < N)[None, :]
    start = row_tile.to(tl.int64) * BLOCK_M * N + column_tile * BLOCK_N
    return tl.load(y_ptr + start + rows[:, None] * N + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def vector(ptr, rows, cols, n_rows, period, N: tl.constexpr, PER_SEQUENCE: tl.constexpr):
    """A vector over columns in fp32: ptr [N] as [1, BLOCK_N], or ptr [n_rows / period, N] as [BLOCK_M, BLOCK_N]."""
    if PER_SEQUENCE:
        at = (rows // period)[:, None] * N + cols[None, :]
        inside = (rows < n_rows)[:, None] & (cols < N)[None, :]
    else:
        at = cols[None, :]
        inside = (cols < N)[None, :]
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gelu_tanh(x):
    """x sigmoid(2 z), which is x (1 + tanh z) / 2 with z = 0.79788456 (x + 0.044715 x³); Triton has no tanh."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def relu2(x):
    y = tl.maximum(x, 0.0)
    return y * y
