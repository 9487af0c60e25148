"""From a chunk of logits to its loss and the gradient of that loss, in place: one program a row, two passes.

    nll = lse(x) - x[target]
    x  <- (softmax(x) - onehot(target)) * weight        where the gradient is wanted; 0 where x is -inf

For R rows of V columns of e bytes:

    unfused  softmax reads, writes; scatter of the target; the product with the weights reads, writes; the cast
             from fp32 to 16 bits reads, writes                                 R V (4e + 12) in 16 bits, 16 in fp32
    fused    reads twice, writes once; the second read of a row that fits L2 costs no DRAM           R V (2 to 3) e
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from .tuned import Compile


def candidates(dtype: str, size: Mapping[str, int]) -> Iterable[dict[str, int]]:
    """Blocks and warps that `loopmdm tune` tries: 4 to 32 numbers a thread, no block twice as long as a row."""
    longest = triton.next_power_of_2(size.get("vocab", 8192))
    tries = ((block, warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16))
    return [{"block": b, "warps": w} for b, w in tries if b <= max(1024, longest) and 4 <= b // (32 * w) <= 32]


def default_config(vocab: int) -> dict[str, int]:
    block = min(4096, triton.next_power_of_2(vocab))
    return {"block": block, "warps": max(1, min(8, block // 256))}


@triton.jit
def softmax_minus_onehot_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    nll_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_GRADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    at = logits_ptr + row * VOCAB
    target = tl.load(targets_ptr + row)
    # before the first reduction: after the last one other threads may have overwritten it
    chosen = tl.load(at + target).to(tl.float32)

    top = -float("inf")
    total = 0.0
    for start in range(0, VOCAB, BLOCK):
        x = tl.load(at + start + cols, mask=start + cols < VOCAB, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), axis=0)
        top = higher
    lse = top + tl.log(total)
    tl.store(nll_ptr + row, lse - chosen)

    if HAS_GRADS:
        for start in range(0, VOCAB, BLOCK):
            inside = start + cols < VOCAB
            x = tl.load(at + start + cols, mask=inside, other=-float("inf")).to(tl.float32)
            grad = tl.exp(x - lse) - tl.where(start + cols == target, 1.0, 0.0)
            if HAS_WEIGHTS:
                grad *= tl.load(weights_ptr + row)
            grad = tl.where(x == -float("inf"), 0.0, grad)
            tl.store(at + start + cols, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def softmax_minus_onehot_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    nll: torch.Tensor,
    grads: bool,
    config: Mapping[str, int],
) -> None:
    """Launch. All contiguous and on one device: logits [R, V], targets int64 [R], weights and nll fp32 [R]."""
    rows, vocab = logits.shape
    config = {**default_config(vocab), **config}
    if not rows:
        return
    softmax_minus_onehot_kernel[(rows,)](
        logits,
        targets,
        weights,
        nll,
        VOCAB=vocab,
        BLOCK=config["block"],
        HAS_WEIGHTS=weights is not None,
        HAS_GRADS=grads,
        num_warps=config["warps"],
    )


GATE_SIZES = tuple({"vocab": vocab} for vocab in (11, 1000, 32000, 126464))


def gate(dtype: str, size: Mapping[str, int], config: Mapping[str, int]) -> Iterable[Compile]:
    """With weights and gradients; and neither."""
    config = {**default_config(size["vocab"]), **config}
    kind = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    signature = {"logits_ptr": kind, "targets_ptr": "*i64", "weights_ptr": "*fp32", "nll_ptr": "*fp32"}
    for wanted in (True, False):
        yield Compile(
            softmax_minus_onehot_kernel,
            signature,
            {"VOCAB": size["vocab"], "BLOCK": config["block"], "HAS_WEIGHTS": wanted, "HAS_GRADS": wanted},
            config["warps"],
        )
