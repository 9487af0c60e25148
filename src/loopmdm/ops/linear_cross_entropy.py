"""Vocabulary projection and cross-entropy of chosen rows, without ever holding their logits whole."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, whole
from ..kernels import tuned
from .constants import constant
from .contract import Op, unavailable

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF = (torch.bfloat16, torch.float16)
# Logits of one chunk. On two CPU cores products of 512 rows at V = 32k were the fastest; below 256 rows the
# accumulation of the weight's gradient, which reads and writes [V, D] once a chunk, costs more than a cache saves.
CHUNK_BYTES = {"cpu": 1 << 26}
CHUNK_BYTES_ELSEWHERE = 1 << 28
CHUNK_ROWS = 256


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    suppressed: Sequence[int] = (),
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of the rows of a linear head, and each row's own.

        logits = hidden weight.T + bias, suppressed ids at -inf
        nll_i = -log softmax(logits_i)[targets_i]        loss = sum_i weights_i nll_i

    With per-row weights known beforehand the gradients are formed while a chunk of rows has its logits (Hsu et al.,
    arXiv 2410.10989, section 3.2; there with one weight for all): three products in all, where recomputing the logits
    in the backward takes four. The backward multiplies by the gradient of `loss`. What each impl does:

        torch         the definition: all logits, differentiable any number of times
        chunked       chunks of rows, gradients in the forward, torch's own operations
        triton        the same with one kernel between the products; bfloat16, float16, float32
        torch_native  `F.linear_cross_entropy`, torch 2.13 or later; recomputes
        liger         liger-kernel on CUDA (extra `bench`); recomputes; suppressed ids only at the end of the vocabulary
        cce           cut-cross-entropy on CUDA (extra `bench`); recomputes; 16 bits, no bias, suppressed ids likewise

    Under autocast hidden and the head are cast as `F.linear` casts them, but chunked and triton add the gradient of
    `weight` in fp32 over the chunks and round once, to its own dtype.

    Args:
        hidden: the head's input at the rows that count [N, D], any floating dtype. N may be 0.
        weight: [V, D], hidden's dtype unless autocast casts both.
        targets: int64 [N], ids in [0, V), checked on CPU. A suppressed target costs infinity.
        bias: [V], weight's dtype, or None.
        weights: one factor a row [N], None for 1; fp32 is enough. It gets a gradient too where it asks for one.
        suppressed: ids that have no probability and no gradient.
        chunk_rows: rows whose logits chunked and triton hold at once; None is what the table or the default says.
        impl: "auto" or one of the names above.

    Returns:
        loss, a scalar that may be differentiated, and nll [N], detached: nats, fp32 (float64 where hidden is).

    Raises:
        InputError: a shape, dtype or id that does not fit; an `impl` that cannot run here or cannot take this; a second
            derivative of chunked or triton.
    """
    _check(hidden, weight, targets, bias, weights, suppressed)
    if chunk_rows is not None:
        whole("chunk_rows", chunk_rows)
    dtype = _compute_dtype(hidden)
    choice = OP.choose(
        impl,
        hidden.device,
        dtype,
        lambda name: _refuses(name, hidden, weight, targets, bias, weights, suppressed),
        rows=hidden.shape[0],
        dim=hidden.shape[1],
        vocab=weight.shape[0],
    )
    wide = torch.promote_types(dtype, torch.float32)
    if weights is not None:
        weights = weights.to(wide)
    if choice.impl == "torch":
        nll = _reference(hidden, weight, targets, bias, suppressed)
    elif choice.impl in ("chunked", "triton"):
        taken = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        config = [chunk_rows or choice.config.get("chunk", 0), *(choice.config.get(n, 0) for n in ("block", "warps"))]
        fused = choice.impl == "triton"
        return _chunked_op(hidden.to(dtype), weight, targets, bias, weights, list(suppressed), taken, fused, config)[:2]
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            nll = _library(choice.impl, hidden.to(dtype), weight.to(dtype), targets, bias, suppressed).to(wide)
    return (nll.sum() if weights is None else (nll * weights).sum()), nll.detach()


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    suppressed: Sequence[int],
) -> None:
    def said(t: Tensor) -> str:
        return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"

    if hidden.ndim != 2 or not hidden.shape[1] or not hidden.dtype.is_floating_point:
        raise InputError(f"linear_cross_entropy: hidden is {said(hidden)}; it must be [N, D] and floating point")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise InputError(
            f"linear_cross_entropy: weight is {said(weight)}; for hidden {list(hidden.shape)} it must be "
            f"[V, {hidden.shape[1]}]"
        )
    vocab = weight.shape[0]
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise InputError(f"linear_cross_entropy: targets is {said(targets)}; it must be int64 [{hidden.shape[0]}]")
    if bias is not None and (bias.shape != (vocab,) or bias.dtype != weight.dtype):
        raise InputError(f"linear_cross_entropy: bias is {said(bias)}; it must be [{vocab}] in {weight.dtype}")
    if weights is not None and (weights.shape != targets.shape or not weights.dtype.is_floating_point):
        raise InputError(
            f"linear_cross_entropy: weights is {said(weights)}; it must be floating point [{hidden.shape[0]}], "
            "one factor a row"
        )
    if weight.dtype != hidden.dtype and _compute_dtype(hidden) != _compute_dtype(weight):
        raise InputError(
            f"linear_cross_entropy: hidden is {hidden.dtype} and weight {weight.dtype}; cast one or use torch.autocast"
        )
    for other in (weight, targets, bias, weights):
        if other is not None and other.device != hidden.device:
            raise InputError(
                f"linear_cross_entropy: hidden is on {hidden.device} and another tensor on {other.device}; "
                "move them to one device"
            )
    for one in suppressed:
        if not 0 <= one < vocab:
            raise InputError(f"linear_cross_entropy: suppressed id {one} is outside the vocabulary of {vocab}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= vocab:
            raise InputError(
                f"linear_cross_entropy: targets reach from {low} to {high}, outside the vocabulary of {vocab}; "
                "leave rows without a target out"
            )


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """What `F.linear` would compute a tensor of this dtype in."""
    kind = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, suppressed: Sequence[int]
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if suppressed:
        logits.index_fill_(-1, constant(suppressed, logits.device), float("-inf"))
    return F.cross_entropy(logits, targets, reduction="none")


def _chunk_rows(rows: int, vocab: int, device: torch.device, given: int) -> int:
    """Rows of a chunk: about equal ones, within the memory that a chunk may take."""
    limit = given or max(CHUNK_ROWS, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (4 * vocab))
    return -(-rows // -(-rows // limit))


@torch.library.custom_op("loopmdm::linear_cross_entropy", mutates_args=())
def _chunked_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    suppressed: list[int],
    taken: list[bool],
    fused: bool,
    config: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll, dhidden, dweight, dbias).

    taken: which of hidden, weight, bias get a gradient; those of the others are empty. That of hidden is in its dtype,
    the others in fp32 (float64). config: rows of a chunk, block and warps of the kernel, 0 for the default.
    """
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    nll = hidden.new_empty(rows, dtype=wide)
    dhidden = hidden.new_empty(hidden.shape if taken[0] else 0)
    dweight = hidden.new_empty(weight.shape if taken[1] else 0, dtype=wide)
    dbias = hidden.new_zeros(vocab if taken[2] else 0, dtype=wide)
    if not rows:
        return hidden.new_zeros((), dtype=wide), nll, dhidden, dweight.zero_(), dbias
    step = _chunk_rows(rows, vocab, hidden.device, config[0])
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, targets = hidden.contiguous(), targets.contiguous()
        weights = None if weights is None else weights.contiguous()
        table, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        banned = constant(suppressed, hidden.device) if suppressed else None
        buffer = hidden.new_empty(step, vocab)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            h, factor = hidden[part], None if weights is None else weights[part]
            logits = buffer[: len(h)]
            if offset is None:
                torch.mm(h, table.t(), out=logits)
            else:
                torch.addmm(offset, h, table.t(), out=logits)
            if banned is not None:
                logits.index_fill_(-1, banned, float("-inf"))
            if fused:
                from ..kernels import linear_cross_entropy as kernel

                tile = {name: value for name, value in zip(("block", "warps"), config[1:], strict=True) if value}
                with torch.cuda.device_of(logits):
                    kernel.softmax_minus_onehot_(logits, targets[part], factor, nll[part], any(taken), tile)
            else:
                _softmax_minus_onehot_(logits, targets[part], factor, nll[part], any(taken), banned)
            if taken[0]:
                torch.mm(logits, table, out=dhidden[part])
            if taken[1] and dtype == wide:
                torch.addmm(dweight, logits.t(), h, beta=int(start > 0), out=dweight)
            elif taken[1]:
                product = torch.mm(logits.t(), h)
                dweight = dweight.add_(product) if start else dweight.copy_(product)
            if taken[2]:
                dbias += logits.sum(0, dtype=wide)
        loss = nll.sum() if weights is None else (nll * weights).sum()
    return loss, nll, dhidden, dweight, dbias


def _softmax_minus_onehot_(
    logits: Tensor, targets: Tensor, weights: Tensor | None, nll: Tensor, grads: bool, banned: Tensor | None
) -> None:
    """What the kernel does, by torch: writes nll, and where `grads` its gradient in the logits over the logits."""
    column = targets[:, None]
    x = logits.to(nll.dtype)  # itself in fp32, and then all below is in place
    at, top = x.gather(1, column), x.amax(-1, keepdim=True)
    torch.softmax(x, -1, out=x)
    # the largest probability is at least 1/V, so its logarithm is exact where that of the target's may underflow
    torch.sub(top - x.amax(-1, keepdim=True).log(), at, out=nll[:, None])
    if not grads:
        return
    x.scatter_(1, column, x.gather(1, column) - 1)
    if banned is not None:
        x.index_fill_(-1, banned, 0.0)
    if weights is not None:
        torch.mul(x, weights[:, None], out=logits)
    elif x is not logits:
        logits.copy_(x)


@_chunked_op.register_fake
def _(hidden, weight, targets, bias, weights, suppressed, taken, fused, config):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if taken[0] else 0),
        hidden.new_empty(weight.shape if taken[1] else 0, dtype=wide),
        hidden.new_empty(weight.shape[0] if taken[2] else 0, dtype=wide),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, weight, _, bias, weights, _, ctx.taken, _, _ = inputs
    _, nll, *grads = output
    ctx.save_for_backward(nll if weights is not None and weights.requires_grad else None, *grads)
    ctx.mark_non_differentiable(nll, *grads)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 9
    if dloss is None:
        return nothing
    nll, dhidden, dweight, dbias = ctx.saved_tensors
    # create_graph=True: what is saved here are numbers, which would pass for constants
    if torch.is_grad_enabled() and type(dloss) is Tensor and not torch.compiler.is_compiling():
        raise InputError(
            "linear_cross_entropy has no second derivative by this impl; use impl='torch', or leave out create_graph"
        )
    weight_dtype, bias_dtype = ctx.dtypes
    return (
        dhidden * dloss if ctx.taken[0] else None,
        (dweight * dloss).to(weight_dtype) if ctx.taken[1] else None,
        None,
        (dbias * dloss).to(bias_dtype) if ctx.taken[2] else None,
        None if nll is None else nll * dloss,
        *nothing[5:],
    )


_chunked_op.register_autograd(_backward, setup_context=_setup_context)


def _library(
    impl: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, suppressed: Sequence[int]
) -> Tensor:
    """nll [N] by another library's kernel."""
    bias = None if bias is None else bias.to(hidden.dtype)
    if impl == "torch_native":
        if suppressed:
            offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
            bias = offset.index_fill(0, constant(suppressed, hidden.device), float("-inf"))
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none", options=options)
    keep = weight.shape[0] - len(set(suppressed))
    weight, bias = weight[:keep], None if bias is None else bias[:keep]
    if impl == "cce":
        theirs = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return theirs(hidden, weight, targets, reduction="none", filter_eps=None)
    theirs = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = theirs.LigerFusedLinearCrossEntropyFunction
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # positional, as an autograd.Function wants: bias, ce_weight, ignore_index, lse_square_scale, label_smoothing,
    # reduction, softcap, return_z_loss, accum_dtype
    return function.apply(hidden, weight, targets, bias, None, -100, 0.0, 0.0, "none", None, False, wide)[0]


def _refuses(
    impl: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    suppressed: Sequence[int] = (),
    chunk_rows: int | None = None,
) -> str | None:
    """Why `impl` cannot take this problem, or None."""
    if impl in ("torch", "chunked", "auto"):
        return None
    dtype = _compute_dtype(hidden)
    if impl == "triton":
        if dtype not in FUSED_DTYPES:
            return f"hidden is {dtype}, the kernel takes bfloat16, float16 and float32; use impl='chunked'"
        return None
    if not targets.numel():
        return "there are no rows; use impl='chunked'"
    if impl == "torch_native":
        return None
    vocab = weight.shape[0]
    if sorted(set(suppressed)) != list(range(vocab - len(set(suppressed)), vocab)):
        return f"it cannot suppress ids {tuple(suppressed)}, only the last of the {vocab}; use impl='chunked'"
    if impl == "cce":
        if dtype not in HALF:
            return f"hidden is {dtype}, it takes bfloat16 and float16; use impl='chunked'"
        if bias is not None:
            return "it takes no bias; use impl='chunked'"
    elif dtype not in FUSED_DTYPES:
        return f"hidden is {dtype}, it takes bfloat16, float16 and float32; use impl='chunked'"
    return None


LIGER_ARGUMENTS = (
    *("_input", "weight", "target", "bias", "ce_weight", "ignore_index", "lse_square_scale", "label_smoothing"),
    *("reduction", "softcap", "return_z_loss", "accum_dtype"),
)


@tuned.constant_in_graphs
def _unavailable(impl: str, device: torch.device) -> str | None:
    """Why an impl that is none of the contract's own cannot run on `device`, or None."""
    if impl == "chunked":
        return None
    if impl == "torch_native":
        has = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
        return None if has else "this torch has no chunked linear_cross_entropy; torch 2.13 has"
    package, name = {"liger": ("liger_kernel", "liger-kernel"), "cce": ("cut_cross_entropy", "cut-cross-entropy")}[impl]
    if importlib.util.find_spec(package) is None:
        return f"{name} is not installed (pip install {name})"
    if device.type != "cuda":
        return f"it needs CUDA, the tensors are on {device.type}"
    if impl == "liger":
        theirs = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        found = inspect.signature(theirs.LigerFusedLinearCrossEntropyFunction.forward).parameters
        if tuple(found)[1 : len(LIGER_ARGUMENTS) + 1] != LIGER_ARGUMENTS:
            return "this liger-kernel takes other arguments; 0.8.5 is known to fit"
        if not hasattr(theirs, "dispatch"):
            return "this liger-kernel does not know losses by row; 0.8.5 does"
    return unavailable("triton", device)


def _draw(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int, dim: int, vocab: int, *without: str
) -> dict[str, Any]:
    problem = {
        "hidden": torch.randn(rows, dim, generator=rng),
        "weight": torch.randn(vocab, dim, generator=rng) * dim**-0.5,
        "bias": torch.randn(vocab, generator=rng),
        "weights": 1 / torch.rand(rows, generator=rng).clamp(min=0.05),
    }
    made: dict[str, Any] = {
        name: None if name in without else value.to(device, torch.float32 if name == "weights" else dtype)
        for name, value in problem.items()
    }
    made["targets"] = torch.randint(vocab - 2, (rows,), generator=rng).to(device)
    return made


def _several_chunks(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """Several chunks, a bias, weights, ids suppressed here and there."""
    made = _draw(device, dtype, rng, 113, 24, 1237)
    ids = (7, 400, 1236)
    targets = made["targets"]
    return {
        **made,
        "targets": torch.where((targets == 7) | (targets == 400), 8, targets),
        "suppressed": ids,
        "chunk_rows": 50,
    }


def _mask_last(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """No bias, and only the last id suppressed: what every library takes."""
    return {**_draw(device, dtype, rng, 83, 32, 501, "bias"), "suppressed": (500,)}


def _plain(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """No weights, nothing suppressed."""
    return _draw(device, dtype, rng, 5, 16, 67, "weights")


def _masked_rows(
    device: torch.device,
    dtype: torch.dtype,
    rng: torch.Generator,
    rows: int = 32768,
    dim: int = 2048,
    vocab: int = 131072,
) -> dict[str, Any]:
    """Masked rows of a batch with their 1/t weights; the mask's own id has no logit."""
    hidden = torch.randn(rows, dim, generator=rng).to(device, dtype)
    weight = (torch.randn(vocab, dim, generator=rng) / dim**0.5).to(device, dtype)
    targets = torch.randint(0, vocab - 1, (rows,), generator=rng).to(device)
    weights = (1 / (0.05 + torch.rand(rows, generator=rng)) / rows).to(device)
    return {"hidden": hidden, "weight": weight, "targets": targets, "weights": weights, "suppressed": (vocab - 1,)}


OP = Op(
    name="linear_cross_entropy",
    call=linear_cross_entropy,
    examples=(_several_chunks, _mask_last, _plain),
    impls=("torch", "chunked", "triton", "torch_native", "liger", "cce"),
    dtypes=FUSED_DTYPES,
    tolerance={torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5},
    grads=("hidden", "weight", "bias", "weights"),
    library=_unavailable,
    refuses=_refuses,
    problems=(_masked_rows,),
    sizes={
        "cpu": tuple({"rows": rows, "dim": 256, "vocab": 8192} for rows in (128, 512, 2048)),
        "cuda": tuple(
            {"rows": rows, "dim": dim, "vocab": vocab}
            for rows in (2048, 16384)
            for dim, vocab in ((768, 32768), (1024, 65536), (2048, 131072))
        ),
    },
)
