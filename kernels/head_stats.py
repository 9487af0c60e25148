"""The head without logits: a product whose tile becomes the statistics of groups of 128 ids, then one program a row.

For N rows, V ids, D numbers a hidden state, bytes beside the weight's (read once in both, V D e):

    logits    GEMM writes N V fp32 and every later pass (noise, arg-max, soft-max) reads them           >= 3 * 4 N V
    here      three or four fp32 numbers a group, written and read once                                 4 * 8 N V / 128

and then up to three groups a row are multiplied again, N * 3 * 128 * D of N * V * D.

`head_groups_kernel` leaves of each row and group: the largest logit; the sum of 2^24 exp(logit - largest), rounded to
integers so that the order of a sum cannot show; the same sum weighted by logit - largest; and the first sum at the
temperature. `head_rows_kernel` combines these, draws the group, multiplies it again and draws the token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from .gemm import COMPUTE, product, tile_index
from .noise import exp24, gumbel, launch_options, log_fp32
from .tuned import Compile

SPAN = 128
ROW_K = 32  # numbers of a hidden state that a row's program takes at a time; 64 spill


def default_config(rows: int, dtype: str) -> dict[str, int]:
    if dtype == "float32":
        return {"block_m": 32, "block_k": 32, "warps": 4, "stages": 2, "swath": 8}
    if rows <= 512:
        return {"block_m": 32, "block_k": 64, "warps": 4, "stages": 4, "swath": 8}
    return {"block_m": 128, "block_k": 64, "warps": 8, "stages": 3, "swath": 8}


@triton.jit
def clean(y, cols, inside, bias_ptr, suppressed_ptr, HAS_BIAS: tl.constexpr, SUPPRESSED: tl.constexpr):
    """Logits with their bias; NaN, suppressed ids and those beyond the vocabulary at -inf, +inf as the largest."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(y > 3.4028234663852886e38, 3.4028234663852886e38, y)
    out = ~inside
    if SUPPRESSED:
        out = out | (tl.load(suppressed_ptr + cols, mask=inside, other=1) != 0)
    return tl.where((y == y) & ~out, y, -float("inf"))


@triton.jit(do_not_specialize=["n_rows", "x_stride"])
def head_groups_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    suppressed_ptr,
    count_ptr,
    best_ptr,
    total_ptr,
    dot_ptr,
    tempered_ptr,
    n_rows,
    x_stride,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    TEMPERED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
):
    SPAN: tl.constexpr = 128
    GROUPS: tl.constexpr = (V + SPAN - 1) // SPAN
    row_tile, group = tile_index(n_rows, V, BLOCK_M, SPAN, SWATH)
    if HAS_COUNT:  # noqa: SIM102 (a constant: without it count_ptr is None)
        if row_tile * BLOCK_M >= tl.load(count_ptr):
            return
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = group * SPAN + tl.arange(0, SPAN)
    if HAS_WEIGHT:
        y = product(x_ptr, weight_ptr, rows, cols, n_rows, K, V, BLOCK_M, SPAN, BLOCK_K, COMPUTE)
    else:
        at = (rows % n_rows).to(tl.int64)[:, None] * x_stride + (cols % V)[None, :]
        y = tl.load(x_ptr + at).to(tl.float32)
    cols_ = cols[None, :] + tl.zeros([BLOCK_M, SPAN], tl.int32)
    y = clean(y, cols_, cols_ < V, bias_ptr, suppressed_ptr, HAS_BIAS, SUPPRESSED)

    best = tl.max(y, axis=1)
    t = tl.maximum(tl.where(y > -float("inf"), y - best[:, None], -87.0), -87.0)
    e = tl.where(y > -float("inf"), exp24(t), 0.0)
    at = rows.to(tl.int64) * GROUPS + group
    in_row = rows < n_rows
    tl.store(best_ptr + at, best, mask=in_row)
    tl.store(total_ptr + at, tl.sum((e + 0.5).to(tl.int32), axis=1), mask=in_row)
    tl.store(dot_ptr + at, tl.sum(e * t, axis=1), mask=in_row)
    if TEMPERED:
        scale = tl.cast(scale, tl.float32)
        t = tl.where(y > -float("inf"), (y - best[:, None]) * scale, -87.0)
        e = tl.where(y > -float("inf"), exp24(t), 0.0)
        tl.store(tempered_ptr + at, tl.sum((e + 0.5).to(tl.int32), axis=1), mask=in_row)


@triton.jit
def inside_of(
    x_ptr,
    weight_ptr,
    bias_ptr,
    suppressed_ptr,
    row,
    x_stride,
    group,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The 128 logits of a row's group, as a matrix of one row."""
    SPAN: tl.constexpr = 128
    cols = group * SPAN + tl.arange(0, SPAN)
    row = row.to(tl.int64)
    if HAS_WEIGHT:
        depth = tl.arange(0, BLOCK_K)
        w_at = weight_ptr + (cols % V).to(tl.int64)[:, None] * K + depth[None, :]
        acc = tl.zeros([SPAN, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            here = start + depth < K
            x = tl.load(x_ptr + row * x_stride + start + depth, mask=here, other=0.0).to(tl.float32)
            w = tl.load(w_at + start, mask=here[None, :], other=0.0).to(tl.float32)
            acc += w * x[None, :]
        y = tl.sum(acc, axis=1)
    else:
        y = tl.load(x_ptr + row * x_stride + cols % V).to(tl.float32)
    return clean(y, cols, cols < V, bias_ptr, suppressed_ptr, HAS_BIAS, SUPPRESSED)


@triton.jit(do_not_specialize=["x_stride", "per"])
def head_inside_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    suppressed_ptr,
    group_ptr,
    out_ptr,
    x_stride,
    per,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SPAN: tl.constexpr = 128
    at = tl.program_id(0)
    group = tl.load(group_ptr + at).to(tl.int32)
    y = inside_of(
        x_ptr, weight_ptr, bias_ptr, suppressed_ptr, at // per, x_stride, group, K, V, HAS_WEIGHT, HAS_BIAS,
        SUPPRESSED, BLOCK_K,
    )  # fmt: skip
    tl.store(out_ptr + at.to(tl.int64) * SPAN + tl.arange(0, SPAN), y)


@triton.jit
def lowest_best(key, number):
    """The number of the largest key, of equal ones the lowest."""
    return tl.min(tl.where(key == tl.max(key, axis=0), number, 0x7FFFFFFF), axis=0)


@triton.jit(do_not_specialize=["x_stride"])
def head_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    suppressed_ptr,
    count_ptr,
    best_ptr,
    total_ptr,
    dot_ptr,
    tempered_ptr,
    seeds_ptr,
    steps_ptr,
    positions_ptr,
    judged_ptr,
    token_ptr,
    values_ptr,
    n_rows,
    x_stride,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    DRAWN: tl.constexpr,
    JUDGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
):
    """values fp32 [5, n_rows]: logit, top, second, lse, dot."""
    SPAN: tl.constexpr = 128
    GROUPS: tl.constexpr = (V + SPAN - 1) // SPAN
    NOTHING: tl.constexpr = -float("inf")
    row = tl.program_id(0).to(tl.int64)
    if HAS_COUNT:  # noqa: SIM102
        if row >= tl.load(count_ptr):
            return
    groups, ids = tl.arange(0, GROUPS_BLOCK), tl.arange(0, SPAN)
    at, there = row * GROUPS + groups, groups < GROUPS
    best = tl.load(best_ptr + at, mask=there, other=NOTHING)
    total = tl.load(total_ptr + at, mask=there, other=0).to(tl.uint32, bitcast=True).to(tl.float32)
    dot = tl.load(dot_ptr + at, mask=there, other=0.0)
    top = tl.max(best, axis=0)
    alive = top > NOTHING
    share = tl.where(best > NOTHING, best - top, -3.4028234663852886e38)
    mass = tl.exp(tl.maximum(share, -1000.0)) * 5.960464477539063e-08
    z = tl.sum(mass * total, axis=0)
    safe = tl.where(alive, z, 1.0)
    lse = tl.where(alive, top + tl.log(safe), NOTHING)
    mean = tl.where(alive, top + tl.sum(mass * (tl.maximum(share, -1000.0) * total + dot), axis=0) / safe, 0.0)

    likeliest = lowest_best(best, groups)
    y = inside_of(
        x_ptr, weight_ptr, bias_ptr, suppressed_ptr, row, x_stride, likeliest, K, V, HAS_WEIGHT, HAS_BIAS, SUPPRESSED,
        BLOCK_K,
    )  # fmt: skip
    first = lowest_best(y, ids)
    second = tl.maximum(
        tl.max(tl.where(groups == likeliest, NOTHING, best), axis=0), tl.max(tl.where(ids == first, NOTHING, y), axis=0)
    )
    token = likeliest * SPAN + first
    logit = tl.max(y, axis=0)
    if DRAWN:
        seed, step, position = tl.load(seeds_ptr + row), tl.load(steps_ptr + row), tl.load(positions_ptr + row)
        scale = tl.cast(scale, tl.float32)
        sums = tl.load(tempered_ptr + at, mask=there, other=0).to(tl.uint32, bitcast=True).to(tl.float32)
        level = share * scale + log_fp32(tl.maximum(sums, 1.0) * 5.960464477539063e-08)
        key = tl.where(best > NOTHING, level + gumbel(seed, step, position, groups, 11), NOTHING)
        group = lowest_best(key, groups)
        y = inside_of(
            x_ptr, weight_ptr, bias_ptr, suppressed_ptr, row, x_stride, group, K, V, HAS_WEIGHT, HAS_BIAS, SUPPRESSED,
            BLOCK_K,
        )  # fmt: skip
        key = tl.where(y > NOTHING, (y - top) * scale, NOTHING) + gumbel(seed, step, position, group * SPAN + ids, 12)
        chosen = lowest_best(key, ids)
        token = group * SPAN + chosen
        logit = tl.max(tl.where(ids == chosen, y, NOTHING), axis=0)
    token = tl.where(alive, token, -1)
    if JUDGED:
        judged = tl.load(judged_ptr + row).to(tl.int32)
        group = tl.maximum(judged, 0) // SPAN
        y = inside_of(
            x_ptr, weight_ptr, bias_ptr, suppressed_ptr, row, x_stride, group, K, V, HAS_WEIGHT, HAS_BIAS, SUPPRESSED,
            BLOCK_K,
        )  # fmt: skip
        given = tl.max(tl.where(group * SPAN + ids == judged, y, NOTHING), axis=0)
        logit = tl.where(judged >= 0, given, logit)
        token = tl.where(judged >= 0, judged, token)
    out = values_ptr + row
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(out, logit)
    tl.store(out + n_rows, top)
    tl.store(out + 2 * n_rows, second)
    tl.store(out + 3 * n_rows, lse)
    tl.store(out + 4 * n_rows, mean)


def groups(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    suppressed: torch.Tensor | None,
    count: torch.Tensor | None,
    vocab: int,
    scale: float,
    best: torch.Tensor,
    total: torch.Tensor,
    dot: torch.Tensor,
    tempered: torch.Tensor | None,
    config: Mapping[str, int],
    compute: str,
) -> None:
    """Launch: best, dot fp32 and total, tempered int32, all [N, ceil(V / 128)], of logits x @ weight.T + bias.

    x [N, D] contiguous or, where there is no weight, logits [N, V] of unit stride in a row. weight [V, D], suppressed
    int8 [V], count int64 [1]: rows at or beyond it are left as they were.
    """
    n_rows, depth = x.shape
    config = {**default_config(n_rows, compute), **config}
    if weight is None:
        config["block_m"] = 16
    tiles = triton.cdiv(n_rows, config["block_m"]) * triton.cdiv(vocab, SPAN)
    head_groups_kernel[(tiles,)](
        x, weight, bias, suppressed, count, best, total, dot, tempered, n_rows, x.stride(0), scale,
        K=depth,
        V=vocab,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SUPPRESSED=suppressed is not None,
        HAS_COUNT=count is not None,
        TEMPERED=tempered is not None,
        COMPUTE=COMPUTE[compute],
        BLOCK_M=config["block_m"],
        BLOCK_K=config["block_k"],
        SWATH=config["swath"],
        num_warps=config["warps"],
        num_stages=config["stages"],
        **launch_options,
    )  # fmt: skip


def inside(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    suppressed: torch.Tensor | None,
    vocab: int,
    group: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Launch: out fp32 [N, m, 128] <- logits of the groups int64 [N, m]."""
    head_inside_kernel[(group.numel(),)](
        x, weight, bias, suppressed, group, out, x.stride(0), group.shape[1],
        K=x.shape[1],
        V=vocab,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SUPPRESSED=suppressed is not None,
        BLOCK_K=ROW_K,
        num_warps=4,
        **launch_options,
    )  # fmt: skip


def rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    suppressed: torch.Tensor | None,
    count: torch.Tensor | None,
    vocab: int,
    scale: float,
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    noise: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    judged: torch.Tensor | None,
    token: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Launch: token int64 [N] and values fp32 [5, N] (logit, top, second, lse, dot) from what `groups` left.

    noise: seeds, steps, positions int64 [N], None for the arg-max. judged int64 [N]: where >= 0, the token.
    """
    seeds, steps, positions = noise or (None, None, None)
    head_rows_kernel[(len(x),)](
        x, weight, bias, suppressed, count, *statistics, seeds, steps, positions, judged, token, values, len(x),
        x.stride(0), scale,
        K=x.shape[1],
        V=vocab,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SUPPRESSED=suppressed is not None,
        HAS_COUNT=count is not None,
        DRAWN=noise is not None,
        JUDGED=judged is not None,
        BLOCK_K=ROW_K,
        GROUPS_BLOCK=triton.next_power_of_2(triton.cdiv(vocab, SPAN)),
        num_warps=4,
        **launch_options,
    )  # fmt: skip


GATE_SIZES = ({"rows": 256, "dim": 1000, "vocab": 50258}, {"rows": 65536, "dim": 768, "vocab": 126464})


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    """The product with everything on, logits alone, and the program of a row with and without noise."""
    config = {**default_config(size["rows"], dtype), **config}
    operand = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    pointers = {"x": operand, "weight": operand, "bias": "*fp32", "suppressed": "*i8", "count": "*i64"}
    pointers |= {"best": "*fp32", "total": "*i32", "dot": "*fp32", "tempered": "*i32"}
    rest = {"n_rows": "i32", "x_stride": "i32", "scale": "fp32"}
    flags = {"HAS_BIAS": True, "SUPPRESSED": True, "HAS_COUNT": True}
    for weight in (True, False):
        constants = {"K": size["dim"], "V": size["vocab"], "HAS_WEIGHT": weight, **flags, "TEMPERED": True}
        tile = {"COMPUTE": COMPUTE[dtype], "BLOCK_M": config["block_m"] if weight else 16}
        tile |= {"BLOCK_K": config["block_k"], "SWATH": config["swath"]}
        signature = {f"{name}_ptr": kind for name, kind in pointers.items()} | rest
        yield Compile(head_groups_kernel, signature, constants | tile, config["warps"], config["stages"])
    within = {"x": operand, "weight": operand, "bias": "*fp32", "suppressed": "*i8", "group": "*i64", "out": "*fp32"}
    constants = {"K": size["dim"], "V": size["vocab"], "HAS_WEIGHT": True, "HAS_BIAS": True, "SUPPRESSED": True}
    signature = {f"{name}_ptr": kind for name, kind in within.items()} | {"x_stride": "i32", "per": "i32"}
    yield Compile(head_inside_kernel, signature, constants | {"BLOCK_K": ROW_K}, 4, 3)
    names = ("seeds", "steps", "positions", "judged", "token")
    signature = {f"{name}_ptr": kind for name, kind in (pointers | dict.fromkeys(names, "*i64")).items()}
    signature |= {"values_ptr": "*fp32", **rest}
    for drawn in (True, False):
        constants = {"K": size["dim"], "V": size["vocab"], "HAS_WEIGHT": True, **flags, "DRAWN": drawn, "JUDGED": True}
        tile = {"BLOCK_K": ROW_K, "GROUPS_BLOCK": triton.next_power_of_2(triton.cdiv(size["vocab"], SPAN))}
        yield Compile(head_rows_kernel, signature, constants | tile, 4, 3)
