"""Projection back into the residual stream in one pass: `x + h @ weight.T + bias`, with what the next norm needs.

For R rows, D columns and K inputs, the stream of a bytes an element, 16-bit operands:

    unfused  GEMM writes the branch; the add reads it and x, writes x                        R D (2 + 2 + 2a)
    fused    reads x, writes x, its 16-bit copy and one sum of squares for each 64 columns  R D (2a + 2 + 4/64)

beside reading h and weight, the same in both. With an fp32 stream 12 -> 10.1 bytes an element; the larger gain is that
the norm that follows need not read x (`norm_linear` counts it). FLOPs are 2 R D K in both. The next GEMM reads the copy
and scales its rows by the norm's 1/rms (`norm_linear`): normed is never stored.

The branch may be gated by a vector over columns, and a number a row taken off it. The copy may be scaled by a vector
over columns, the gain of the norm that follows: multiplied into weights of 16 bits it would round them a second time,
here it meets a number that is rounded anyway.

With the product made by cuBLAS (`multiplied`) the kernel is its epilogue alone and moves what "unfused" counts, in one
launch: R D (2 + 2 + 2a + 2 + 4/64).

Sums of squares are those of the stream as stored, one fp32 number for each row and 64 columns, each written by one
program: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from .gemm import COMPUTE, GROUP, default_config, multiplied, product, tile_index, vector
from .gemm import candidates as candidates
from .tuned import Compile

EACH_BLOCK_N = 64  # columns of a tile whose rows have vectors of their own: with 128 its tiles of vectors spill


@triton.jit(do_not_specialize=["n_rows", "period"])
def linear_residual_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    less_ptr,
    gain_ptr,
    x_ptr,
    out_ptr,
    copy_ptr,
    squares_ptr,
    n_rows,
    period,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_LESS: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
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
        branch = multiplied(h_ptr, row_tile, column_tile, n_rows, N, BLOCK_M, BLOCK_N)
    else:
        branch = product(h_ptr, weight_ptr, rows, cols, n_rows, K, N, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE)
    if HAS_BIAS:
        branch += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        branch *= vector(gate_ptr, rows, cols, n_rows, period, N, PER_SEQUENCE)
    if HAS_LESS:
        branch -= tl.load(less_ptr + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]

    inside = (rows < n_rows)[:, None] & (cols < N)[None, :]
    # 64-bit where the tile starts, 32-bit inside it: whole tiles of 64-bit offsets cost registers
    start = row_tile.to(tl.int64) * BLOCK_M * N + column_tile * BLOCK_N
    at = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    stored = (tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32) + branch).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + at, stored, mask=inside)
    value = tl.where(inside, stored.to(tl.float32), 0.0)
    if HAS_COPY:
        scaled = value
        if HAS_GAIN:
            scaled *= vector(gain_ptr, rows, cols, n_rows, period, N, PER_SEQUENCE)
        tl.store(copy_ptr + start + at, scaled.to(copy_ptr.dtype.element_ty), mask=inside)

    groups: tl.constexpr = BLOCK_N // GROUP
    n_groups: tl.constexpr = (N + GROUP - 1) // GROUP
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
    gate: torch.Tensor | None,
    less: torch.Tensor | None,
    gain: torch.Tensor | None,
    x: torch.Tensor,
    out: torch.Tensor,
    copy: torch.Tensor | None,
    squares: torch.Tensor,
    config: Mapping[str, int],
    compute: str,
    ready: bool = False,
) -> None:
    """Launch: out <- x + gate * (h @ weight.T + bias) - less, copy <- out * gain, squares <- sums of out².

    All contiguous and on one device: h [R, K], weight [D, K], bias [D], gate and gain both [D] or both [P, D] for R / P
    rows each, less [R], x, out, copy [R, D], squares fp32 [R, ceil(D / 64)] over 64 columns each. out may be x.
    `compute`: dtype of the product's operands. `ready`: h is the product [R, D].
    """
    n_rows, (width, depth) = len(h), weight.shape
    config = {**default_config(n_rows, compute, ready), **config}
    if not n_rows:
        return
    each = next((v for v in (gate, gain) if v is not None and v.dim() == 2), None)
    if each is not None:
        config["block_n"] = min(config["block_n"], EACH_BLOCK_N)
    tiles = triton.cdiv(n_rows, config["block_m"]) * triton.cdiv(width, config["block_n"])
    linear_residual_kernel[(tiles,)](
        h,
        weight,
        bias,
        gate,
        less,
        gain,
        x,
        out,
        copy,
        squares,
        n_rows,
        1 if each is None else n_rows // len(each),
        K=depth,
        N=width,
        GROUP=GROUP,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_LESS=less is not None,
        HAS_COPY=copy is not None,
        HAS_GAIN=gain is not None,
        PER_SEQUENCE=each is not None,
        MULTIPLIED=ready,
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
    """The stream in fp32 and in bf16, and in bf16 vectors of each sequence's own.

    For the kernel's own tiles the epilogue alone.
    """
    operand = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    forms = [("*fp32", False, False)]
    if dtype == "bfloat16":
        forms += [(operand, False, False), ("*fp32", True, False)]
    if not config and size["rows"] > 512:
        forms.append(("*fp32", True, True))
    for stream, each, ready in forms:
        tile = {**default_config(size["rows"], dtype, ready), **config}
        pointers = {
            "h": operand,
            "weight": operand,
            "bias": "*fp32",
            "gate": "*fp32",
            "less": "*fp32",
            "gain": "*fp32",
            "x": stream,
            "out": stream,
            "copy": operand,
            "squares": "*fp32",
        }
        yield Compile(
            linear_residual_kernel,
            {f"{name}_ptr": kind for name, kind in pointers.items()} | {"n_rows": "i32", "period": "i32"},
            {
                "K": size["depth"],
                "N": size["dim"],
                "GROUP": GROUP,
                "HAS_BIAS": True,
                "HAS_GATE": each,
                "HAS_LESS": each,
                "HAS_COPY": True,
                "HAS_GAIN": True,
                "PER_SEQUENCE": each,
                "MULTIPLIED": ready,
                "COMPUTE": COMPUTE[dtype],
                "BLOCK_M": tile["block_m"],
                "BLOCK_N": min(tile["block_n"], EACH_BLOCK_N) if each else tile["block_n"],
                "BLOCK_K": tile["block_k"],
                "SWATH": tile["swath"],
            },
            tile["warps"],
            tile["stages"],
        )
