"""RMS norm, projection and what follows in one pass: qkv with QK-norm and rotary positions, or up and its activation.

The norm is a scale of each row, and a scale passes through a product: norm(x) @ w.T = rstd * (x @ w.T), the gain being
in x's copy or in w. rstd comes from the sums of squares that `linear_residual` left, so x is read once, in 16 bits.

For R rows, D inputs, N columns (16-bit operands, an fp32 stream), bytes beside w:

    qkv   unfused  norm reads x, writes normed; GEMM reads it, writes N; rotation reads and writes the
                   H + G rotated heads, N' columns                                     R (4D + 2D + 2D + 2N + 4N')
          fused    reads the copy of x, writes N                                       R (2D + 2N)
    up    unfused  norm as above; GEMM writes N; activation reads N and writes N / 2 (gated) or N
                                                                                       R (8D + 2N + 2N + N)
          fused    reads the copy, writes N / 2 (gated) or N                           R (2D + N)

FLOPs are 2 R D N in both. With the product made by cuBLAS (`multiplied`) the kernel is its epilogue alone, which reads
the N columns again: R (2D + 6N) for qkv, R (2D + 5N) for a gated up.

Columns come in pairs (2i, 2i + 1) that one thread holds: the two that rotate together, or a gate and its up.
`loopmdm.model.fold` orders the weights' rows so; attention does not care in what order q and k both keep a head's
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .gemm import COMPUTE, GROUP, default_config, gelu, gelu_tanh, multiplied, product, relu2, tile_index, vector
from .gemm import candidates as candidates
from .tuned import Compile


@triton.jit
def head_norm(y, gain, EPS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr):
    """y [BLOCK_M, BLOCK_N] -> y / rms over each head * gain; gain is [BLOCK_N]."""
    heads = tl.reshape(y, [BLOCK_M, BLOCK_N // HEAD, HEAD])
    rstd = tl.rsqrt(tl.sum(heads * heads, axis=2) / HEAD + EPS)
    return tl.reshape(heads * rstd[:, :, None], [BLOCK_M, BLOCK_N]) * gain[None, :]


@triton.jit
def rotate(y, cos, sin, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Each pair (2i, 2i + 1) of y [BLOCK_M, BLOCK_N] turned by its angle; cos, sin [BLOCK_M, BLOCK_N / 2]."""
    a, b = tl.split(tl.reshape(y, [BLOCK_M, BLOCK_N // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_M, BLOCK_N])


@triton.jit(do_not_specialize=["n_rows", "period", "bias_period"])
def norm_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    squares_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    q_gain_ptr,
    k_gain_ptr,
    n_rows,
    period,
    bias_period,
    eps,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    ACT: tl.constexpr,
    HEAD: tl.constexpr,
    Q_COLS: tl.constexpr,
    QK_COLS: tl.constexpr,
    ROPE: tl.constexpr,
    QK_NORM: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
):
    row_tile, column_tile = tile_index(n_rows, N, BLOCK_M, BLOCK_N, SWATH)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if MULTIPLIED:
        y = multiplied(x_ptr, row_tile, column_tile, n_rows, N, BLOCK_M, BLOCK_N)
    else:
        y = product(x_ptr, weight_ptr, rows, cols, n_rows, K, N, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE)

    in_row = rows < n_rows
    eps = tl.cast(eps, tl.float32)
    if HAS_NORM:
        group = tl.arange(0, GROUPS_BLOCK)
        squares = tl.load(
            squares_ptr + rows.to(tl.int64)[:, None] * GROUPS + group[None, :],
            mask=in_row[:, None] & (group < GROUPS)[None, :],
            other=0.0,
        )
        y *= tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]
    if HAS_BIAS:
        y += vector(bias_ptr, rows, cols, n_rows, bias_period, N, PER_SEQUENCE)

    if QK_NORM:
        within = cols % HEAD
        is_q, is_k = cols < Q_COLS, (cols >= Q_COLS) & (cols < QK_COLS)
        gain = tl.load(q_gain_ptr + within, mask=is_q, other=0.0).to(tl.float32)
        gain += tl.load(k_gain_ptr + within, mask=is_k, other=0.0).to(tl.float32)
        is_qk = (cols < QK_COLS)[None, :]
        if NORM_FIRST:
            y = tl.where(is_qk, head_norm(y, gain, eps, BLOCK_M, BLOCK_N, HEAD), y)
    if ROPE:
        pair = column_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        at = (rows % period).to(tl.int64)[:, None] * (HEAD // 2) + (pair % (HEAD // 2))[None, :]
        turns = in_row[:, None] & (pair < QK_COLS // 2)[None, :]
        cos = tl.load(cos_ptr + at, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + at, mask=turns, other=0.0)
        y = rotate(y, cos, sin, BLOCK_M, BLOCK_N)
    if QK_NORM and not NORM_FIRST:
        y = tl.where(is_qk, head_norm(y, gain, eps, BLOCK_M, BLOCK_N, HEAD), y)

    # 64-bit where the tile starts, 32-bit inside it
    if ACT == "swiglu":
        gate, up = tl.split(tl.reshape(y, [BLOCK_M, BLOCK_N // 2, 2]))
        y = gate * tl.sigmoid(gate) * up
        out_cols = tl.arange(0, BLOCK_N // 2)
        start = row_tile.to(tl.int64) * BLOCK_M * (N // 2) + column_tile * (BLOCK_N // 2)
        at_out = tl.arange(0, BLOCK_M)[:, None] * (N // 2) + out_cols[None, :]
        inside = in_row[:, None] & (column_tile * (BLOCK_N // 2) + out_cols < N // 2)[None, :]
    else:
        if ACT == "gelu_tanh":
            y = gelu_tanh(y)
        elif ACT == "gelu":
            y = gelu(y)
        elif ACT == "relu2":
            y = relu2(y)
        start = row_tile.to(tl.int64) * BLOCK_M * N + column_tile * BLOCK_N
        at_out = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
        inside = in_row[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + start + at_out, y.to(out_ptr.dtype.element_ty), mask=inside)


def forward(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    act: str,
    heads: Any,
    config: Mapping[str, int],
    compute: str,
    ready: bool = False,
) -> None:
    """Launch: out <- act(rstd * (x @ weight.T) + bias), the heads of a qkv projection normalised and rotated.

    All contiguous and on one device: x [R, D], squares fp32 [R, ceil(D / 64)] (None: rstd = 1), weight [N, D],
    bias [N] or [P, N] for R / P rows each, out [R, N], or [R, N / 2] with "swiglu". `heads`:
    `loopmdm.ops.norm_linear.Heads`. `compute`: dtype of the product's operands. `ready`: x is the product [R, N].
    """
    n_rows, (width, depth) = len(x), weight.shape
    config = {**default_config(n_rows, compute, ready), **config}
    if not n_rows:
        return
    if heads is not None and heads.q_gain is not None:
        config["block_n"] = max(config["block_n"], heads.dim)  # a head's norm takes the whole head
    groups = (depth + GROUP - 1) // GROUP
    each = bias is not None and bias.dim() == 2
    tiles = triton.cdiv(n_rows, config["block_m"]) * triton.cdiv(width, config["block_n"])
    turned = heads is not None and heads.cos is not None
    normed = heads is not None and heads.q_gain is not None
    norm_linear_kernel[(tiles,)](
        x,
        weight,
        bias,
        squares,
        out,
        heads.cos if heads else None,
        heads.sin if heads else None,
        heads.q_gain if heads else None,
        heads.k_gain if heads else None,
        n_rows,
        heads.cos.shape[0] if heads and heads.cos is not None else 1,
        n_rows // len(bias) if bias is not None and each else 1,
        eps,
        K=depth,
        N=width,
        GROUPS=groups,
        GROUPS_BLOCK=triton.next_power_of_2(groups),
        HAS_NORM=squares is not None,
        HAS_BIAS=bias is not None,
        PER_SEQUENCE=each,
        ACT=act,
        HEAD=heads.dim if heads else 2,
        Q_COLS=heads.query * heads.dim if heads else 0,
        QK_COLS=(heads.query + heads.key) * heads.dim if heads else 0,
        ROPE=turned,
        QK_NORM=normed,
        NORM_FIRST=heads.norm_first if heads else True,
        MULTIPLIED=ready,
        COMPUTE=COMPUTE[compute],
        BLOCK_M=config["block_m"],
        BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"],
        SWATH=config["swath"],
        num_warps=config["warps"],
        num_stages=config["stages"],
    )


GATE_SIZES = ({"rows": 256, "dim": 1000, "width": 1500}, {"rows": 65536, "dim": 768, "width": 3072})


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    """The widest qkv form, with norms and a rotation, and the up form with a gated and, in bf16, a plain activation.

    For the kernel's own tiles also a rotation alone and, since no row of the table sets theirs, epilogues alone.
    """
    forms = [("none", 128, True, False), ("swiglu", 0, False, False)]
    if dtype == "bfloat16":
        forms.append(("gelu", 0, False, False))  # of the plain activations the one that takes most registers
    if not config and size["rows"] > 512:
        forms += [("none", 64, False, False), ("none", 128, True, True), ("swiglu", 0, False, True)]
    operand = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    fp32 = "*fp32"
    pointers = {"x": operand, "weight": operand, "bias": fp32, "squares": fp32, "out": operand}
    pointers |= {"cos": fp32, "sin": fp32, "q_gain": fp32, "k_gain": fp32}
    signature = {f"{name}_ptr": kind for name, kind in pointers.items()}
    signature |= {"n_rows": "i32", "period": "i32", "bias_period": "i32", "eps": "fp32"}
    groups = (size["dim"] + GROUP - 1) // GROUP
    for act, head, norm, ready in forms:
        tile = {**default_config(size["rows"], dtype, ready), **config}
        yield Compile(
            norm_linear_kernel,
            signature,
            {
                "K": size["dim"],
                "N": 3 * 8 * head if head else size["width"],
                "GROUPS": groups,
                "GROUPS_BLOCK": triton.next_power_of_2(groups),
                "HAS_NORM": True,
                "HAS_BIAS": True,
                "PER_SEQUENCE": True,
                "ACT": act,
                "HEAD": head or 2,
                "Q_COLS": 8 * head,
                "QK_COLS": 16 * head,
                "ROPE": head > 0,
                "QK_NORM": norm,
                "NORM_FIRST": True,
                "MULTIPLIED": ready,
                "COMPUTE": COMPUTE[dtype],
                "BLOCK_M": tile["block_m"],
                "BLOCK_N": max(tile["block_n"], head),
                "BLOCK_K": tile["block_k"],
                "SWATH": tile["swath"],
            },
            tile["warps"],
            tile["stages"],
        )
