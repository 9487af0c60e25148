"""What the fused GEMMs share: the order of tiles, the product of one tile, and the activations of an epilogue.

Operands are row-major: a [M, K] as activations lie, w [N, K] as `nn.Linear` keeps its weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 64  # columns that one partial sum of squares covers: any tile is a multiple of it, so no tile size shows

# Triton's own names for what a tile is multiplied in; the interpreter has no bf16 product, so it takes fp32 there.
COMPUTE = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


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
