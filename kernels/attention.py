"""Bidirectional attention in one pass: softmax(scale q k.T) v over a contiguous range of keys for every query.

Bytes for one sequence of T tokens, H query and G key heads of d numbers of e bytes:

    unfused  scores written, read by the softmax, its result written and read    (2H + 2G) T d e + 4 H T² e
    fused    scores stay in registers, a tile of queries at a time               (2H + 2G) T d e

At T = 1024, H = G = 12, d = 64 in bf16 that is 107 -> 6.3 MB. Each tile of queries reads its keys again, but for the
first from L2. FLOPs are 4 H T² d in both where every query sees every key. Padding and packed documents are
ranges of keys, and there the fused one needs 4 H d times the sum of the ranges, up to whole key blocks: blocks that no
query of a tile may look at are never read, and those that all of its queries see whole are not masked.

The softmax is the online one (Milakov and Gimelshein 2018; Dao 2023, algorithm 1) in base 2; maxima, sums and the
result are fp32. A query without a key gets 0, and -inf for its log-sum-exp. One program writes each number: two runs
give the same bits.

As compiled for bf16 (registers a thread, shared memory; with spans), no spills:

    T above 128, d 64    128 queries, 64 keys, 8 warps    sm_80 179, 48 KB    sm_90 112, 64 KB    sm_120 192, 48 KB
    T above 128, d 128   128 queries, 64 keys, 8 warps    sm_80 221, 64 KB    sm_90 200, 96 KB    sm_120 219, 64 KB
    T to 128, d 64        64 queries, 64 keys, 4 warps    sm_80 192, 24 KB    sm_90 124, 40 KB    sm_120 202, 24 KB
    T to 128, d 128       64 queries, 32 keys, 4 warps    sm_80 254, 36 KB    sm_90 149, 48 KB    sm_120 226, 36 KB
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from .gemm import COMPUTE
from .tuned import Compile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 128)


def default_config(tokens: int, head_dim: int, dtype: str) -> dict[str, int]:
    """Tiles that compile without spills; short sequences have their own, since most of a long tile would idle."""
    if dtype == "float32":
        return {"block_m": 32, "block_n": 32 if head_dim < 128 else 16, "warps": head_dim // 8, "stages": 1}
    if tokens <= 128:
        return {"block_m": 64, "block_n": 64 if head_dim == 64 else 32, "warps": 4, "stages": 2}
    return {"block_m": 128, "block_n": 64, "warps": 8, "stages": 2 if head_dim == 128 else 3}


def candidates(dtype: str, size: Mapping[str, int]) -> Iterable[dict[str, int]]:
    """Tiles that `loopmdm tune` tries."""
    tiles = [(32, 32, 8, 1), (32, 16, 4, 1), (64, 32, 8, 1)]
    if dtype != "float32":
        tiles = [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3)]
        tiles += [(128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
    return [dict(zip(("block_m", "block_n", "warps", "stages"), tile, strict=True)) for tile in tiles]


@triton.jit
def attend(
    acc,
    top,
    total,
    q,
    k_ptr,
    v_ptr,
    block,
    first,
    last,
    end,
    log2_scale,
    STRIDE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(acc, top, total) -> the same with one block of keys; masked: first <= j < last of each row, all below end."""
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD)
    # 64-bit where the block starts, 32-bit inside it
    start = tl.cast(block, tl.int64) * (BLOCK_N * STRIDE)
    k_at = k_ptr + start + keys[None, :] * STRIDE + dims[:, None]
    v_at = v_ptr + start + keys[:, None] * STRIDE + dims[None, :]
    if MASKED:
        at = block * BLOCK_N + keys
        k = tl.load(k_at, mask=(at < end)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
    scores = tl.dot(q, k.to(COMPUTE), input_precision="ieee")
    if MASKED:
        seen = (at[None, :] >= first[:, None]) & (at[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1) * log2_scale)
    # a row that has seen no key yet has -inf for its maximum, and -inf - -inf is no number
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * log2_scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    v = tl.load(v_at, mask=(at < end)[:, None], other=0.0) if MASKED else tl.load(v_at)
    acc = tl.dot(weights.to(v.dtype).to(COMPUTE), v.to(COMPUTE), acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit(do_not_specialize=["n_tokens"])
def attention_kernel(
    qkv_ptr,
    first_ptr,
    last_ptr,
    out_ptr,
    lse_ptr,
    n_tokens,
    log2_scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_H: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(n_tokens, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % HEADS
    batch = tl.program_id(0) // (tiles * HEADS)
    group = head // (HEADS // GROUPS)
    log2_scale = tl.cast(log2_scale, tl.float32)

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD)
    in_row = tile * BLOCK_M + rows < n_tokens
    sequence = batch.to(tl.int64) * n_tokens
    row = sequence + tile * BLOCK_M
    q_at = rows[:, None] * STRIDE_T + dims[None, :]
    q = tl.load(qkv_ptr + row * STRIDE_T + head * STRIDE_H + q_at, mask=in_row[:, None], other=0.0).to(COMPUTE)
    k_ptr = qkv_ptr + sequence * STRIDE_T + (HEADS + group) * STRIDE_H
    v_ptr = k_ptr + GROUPS * STRIDE_H

    if HAS_SPANS:
        first = tl.maximum(tl.load(first_ptr + row + rows, mask=in_row, other=0).to(tl.int32), 0)
        last = tl.minimum(tl.load(last_ptr + row + rows, mask=in_row, other=0).to(tl.int32), n_tokens)
        some = first < last
        # every key that some row sees lies in [begin, end), and every row sees all of [whole_begin, whole_end)
        begin = tl.min(tl.where(some, first, n_tokens), axis=0)
        end = tl.max(tl.where(some, last, 0), axis=0)
        whole_begin = tl.max(tl.where(some, first, 0), axis=0)
        whole_end = tl.min(tl.where(some, last, n_tokens), axis=0)
    else:
        first = tl.zeros([BLOCK_M], dtype=tl.int32)
        last = first + n_tokens
        begin, end, whole_begin, whole_end = 0, n_tokens, 0, n_tokens
    begin_block = begin // BLOCK_N
    end_block = tl.maximum(tl.cdiv(end, BLOCK_N), begin_block)
    whole_block = tl.minimum(tl.cdiv(whole_begin, BLOCK_N), end_block)
    beyond_block = tl.minimum(tl.maximum(whole_end // BLOCK_N, whole_block), end_block)

    acc = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for block in range(whole_block, beyond_block):
        acc, top, total = attend(
            acc, top, total, q, k_ptr, v_ptr, block, first, last, end, log2_scale,
            STRIDE_T, HEAD, BLOCK_N, COMPUTE, False,
        )  # fmt: skip
    before = whole_block - begin_block
    for edge in range(0, before + end_block - beyond_block):
        block = tl.where(edge < before, begin_block + edge, beyond_block + edge - before)
        acc, top, total = attend(
            acc, top, total, q, k_ptr, v_ptr, block, first, last, end, log2_scale,
            STRIDE_T, HEAD, BLOCK_N, COMPUTE, True,
        )  # fmt: skip

    # an empty row that shares its tile with others has met the whole blocks too
    found = (first < last) & (total > 0.0)
    out = tl.where(found[:, None], acc / tl.where(found, total, 1.0)[:, None], 0.0)
    out_at = rows[:, None] * (HEADS * HEAD) + dims[None, :]
    out_row = out_ptr + row * (HEADS * HEAD) + head * HEAD
    tl.store(out_row + out_at, out.to(out_ptr.dtype.element_ty), mask=in_row[:, None])
    if HAS_LSE:
        lse = tl.where(found, (top + tl.log2(tl.where(found, total, 1.0))) * 0.6931471805599453, float("-inf"))
        tl.store(lse_ptr + (batch.to(tl.int64) * HEADS + head) * n_tokens + tile * BLOCK_M + rows, lse, mask=in_row)


def forward(
    qkv: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    heads: int,
    groups: int,
    scale: float,
    with_lse: bool,
    config: Mapping[str, int],
    compute: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch: (out [B, T, H d], lse fp32 [B, H, T], empty unless asked for).

    qkv [B, T, H + 2G, d] with stride(3) = 1 and stride(0) = T stride(1); first and last contiguous [B, T], int32 or
    int64; all on one device; scale > 0. `compute`: dtype of the products' operands.
    """
    batch, tokens, _, head_dim = qkv.shape
    config = {**default_config(tokens, head_dim, str(qkv.dtype).removeprefix("torch.")), **config}
    out = torch.empty((batch, tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, heads, tokens) if with_lse else 0, dtype=torch.float32, device=qkv.device)
    if out.numel():
        attention_kernel[(triton.cdiv(tokens, config["block_m"]) * heads * batch,)](
            qkv,
            first,
            last,
            out,
            lse,
            tokens,
            scale * 1.4426950408889634,
            HEADS=heads,
            GROUPS=groups,
            HEAD=head_dim,
            STRIDE_T=qkv.stride(1),
            STRIDE_H=qkv.stride(2),
            HAS_SPANS=first is not None,
            HAS_LSE=with_lse,
            COMPUTE=COMPUTE[compute],
            BLOCK_M=config["block_m"],
            BLOCK_N=config["block_n"],
            num_warps=config["warps"],
            num_stages=config["stages"],
        )
    return out, lse


GATE_SIZES = tuple({"tokens": tokens, "head_dim": head_dim} for tokens in (128, 65536) for head_dim in HEAD_DIMS)


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    """Plain, and with spans and log-sum-exps, grouped heads in both."""
    head_dim = size["head_dim"]
    config = {**default_config(size["tokens"], head_dim, dtype), **config}
    operand = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    signature = {"qkv_ptr": operand, "first_ptr": "*i32", "last_ptr": "*i32", "out_ptr": operand, "lse_ptr": "*fp32"}
    signature |= {"n_tokens": "i32", "log2_scale": "fp32"}
    for everything in (False, True):
        yield Compile(
            attention_kernel,
            signature,
            {
                "HEADS": 12,
                "GROUPS": 4,
                "HEAD": head_dim,
                "STRIDE_T": 20 * head_dim,
                "STRIDE_H": head_dim,
                "HAS_SPANS": everything,
                "HAS_LSE": everything,
                "COMPUTE": COMPUTE[dtype],
                "BLOCK_M": config["block_m"],
                "BLOCK_N": config["block_n"],
            },
            config["warps"],
            config["stages"],
        )
