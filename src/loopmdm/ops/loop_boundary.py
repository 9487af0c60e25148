"""Between two visits of the looped block: the next visit's input in every form that it is read in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .contract import Op
from .linear_residual import FUSED_DTYPES, GROUP, check_vectors, copy_of, not_fused, square_sums

FUSED_MAX_DIM = 4096


class Boundary(NamedTuple):
    """What `loop_boundary` returns.

    Attributes:
        out: [..., D] in x's dtype, the next visit's residual stream (x itself without an anchor).
        copy: out * copy_gain in the dtype of the next projection.
        squares: `square_sums(out)`, fp32 [..., ceil(D / 64)].
        change: fp32 [..., 2], each token's sums of (x - previous)² and x²; empty without `previous`.
    """

    out: Tensor
    copy: Tensor
    squares: Tensor
    change: Tensor


def loop_boundary(
    x: Tensor,
    x0: Tensor | None = None,
    gain: Tensor | None = None,
    previous: Tensor | None = None,
    *,
    copy_gain: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Boundary:
    """Close a visit of the looped block and open the next one.

        out = rms(x + x0) * gain     with an anchor x0,     out = x     without

    rms is RMS norm (Zhang and Sennrich 2019, equation 4) of the sum as stored. Without x0 and previous it is also
    how a stack of layers is entered. Forward only: a plan's inner step.

    Args:
        x: [..., D], the output of visit k.
        x0: the looped block's input, x's shape and dtype; None is the plain boundary.
        gain: [D], of the anchored boundary's norm; None for 1.
        previous: the output of visit k - 1, x's shape and dtype, for the early exit's relative change; or None.
        copy_gain: [D] of any floating dtype, of the norm that reads out next, or [P, D]: the rows of x, flattened, are
            P sequences of one length, each with its own; None for 1.
        eps: added to the mean square.
        dtype: of the copy; x's by default (without a copy_gain the copy then is out).
        impl: "auto", "torch" or "triton" (bfloat16, float16, float32; D up to 4096).

    Raises:
        InputError: a shape or dtype that does not fit, or an `impl` that cannot run here.
    """
    dtype = dtype or x.dtype
    _check(x, x0, gain, previous, copy_gain, dtype)
    dim = x.shape[-1]
    choice = OP.choose(impl, x.device, x.dtype, rows=x.numel() // dim, dim=dim)
    if choice.impl == "torch":
        return _reference(x, x0, gain, previous, copy_gain, eps, dtype)
    reason = _not_fused(x, x0, gain, previous, copy_gain)
    if reason is not None:
        if impl != "auto":
            raise InputError(f"loop_boundary: impl={impl!r} cannot run: {reason}")
        return _reference(x, x0, gain, previous, copy_gain, eps, dtype)
    rows, warps = choice.config.get("rows", 0), choice.config.get("warps", 0)
    out, copy, squares, change = _fused_op(x, x0, gain, previous, copy_gain, eps, dtype, rows, warps)
    out = x if x0 is None else out
    return Boundary(out, out if dtype == x.dtype and copy_gain is None else copy, squares, change)


def _check(
    x: Tensor,
    x0: Tensor | None,
    gain: Tensor | None,
    previous: Tensor | None,
    copy_gain: Tensor | None,
    dtype: torch.dtype,
) -> None:
    if not x.ndim or not x.shape[-1] or not x.dtype.is_floating_point or not dtype.is_floating_point:
        raise InputError(f"loop_boundary: x is {x.dtype} {list(x.shape)}; it must be floating point [..., D]")
    for name, t in (("x0", x0), ("previous", previous)):
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype):
            raise InputError(
                f"loop_boundary: {name} is {t.dtype} {list(t.shape)}; it must be {x.dtype} {list(x.shape)}"
            )
    if gain is not None and (x0 is None or gain.shape != x.shape[-1:]):
        raise InputError(f"loop_boundary: gain is {list(gain.shape)}; with an anchor x0 it must be [{x.shape[-1]}]")
    check_vectors("loop_boundary", x, copy_gain=copy_gain)


def _not_fused(x: Tensor, *others: Tensor | None) -> str | None:
    if x.shape[-1] > FUSED_MAX_DIM:
        return f"D is {x.shape[-1]}, the kernel holds rows of up to {FUSED_MAX_DIM}; use impl='torch'"
    return not_fused(x, *others)


def _reference(
    x: Tensor,
    x0: Tensor | None,
    gain: Tensor | None,
    previous: Tensor | None,
    copy_gain: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Boundary:
    wide = torch.promote_types(x.dtype, torch.float32)
    out, change = x, x.new_empty(0, dtype=wide)
    if previous is not None:
        moved = (x.to(wide) - previous.to(wide)).square().sum(-1)
        change = torch.stack((moved, x.to(wide).square().sum(-1)), dim=-1)
    if x0 is not None:
        summed = (x.to(wide) + x0.to(wide)).to(x.dtype).to(wide)
        out = F.rms_norm(summed, x.shape[-1:], None if gain is None else gain.to(wide), eps).to(x.dtype)
    return Boundary(out, copy_of(out, copy_gain, dtype), square_sums(out), change)


@torch.library.custom_op("loopmdm::loop_boundary", mutates_args=())
def _fused_op(
    x: Tensor,
    x0: Tensor | None,
    gain: Tensor | None,
    previous: Tensor | None,
    copy_gain: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    rows: int,
    warps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, copy, squares, change); out is empty without x0, copy where out serves, change without previous."""
    from ..kernels import loop_boundary as kernel

    dim, x = x.shape[-1], x.contiguous()
    x0, gain, previous, copy_gain = (None if t is None else t.contiguous() for t in (x0, gain, previous, copy_gain))
    has_copy = dtype != x.dtype or copy_gain is not None
    out = torch.empty(x.shape if x0 is not None else 0, dtype=x.dtype, device=x.device)
    copy = torch.empty(x.shape if has_copy else 0, dtype=dtype, device=x.device)
    squares = torch.empty(*x.shape[:-1], -(-dim // GROUP), dtype=torch.float32, device=x.device)
    change = torch.empty((*x.shape[:-1], 2) if previous is not None else 0, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernel.forward(
            x.view(-1, dim),
            x0,
            gain,
            copy_gain,
            previous,
            out if x0 is not None else None,
            copy if has_copy else None,
            squares,
            change if previous is not None else None,
            eps,
            {name: value for name, value in (("rows", rows), ("warps", warps)) if value},
        )
    return out, copy, squares, change


@_fused_op.register_fake
def _(x, x0, gain, previous, copy_gain, eps, dtype, rows, warps):  # type: ignore[no-untyped-def]
    out = x.new_empty(x.shape if x0 is not None else 0)
    copy = x.new_empty(x.shape if dtype != x.dtype or copy_gain is not None else 0, dtype=dtype)
    squares = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // GROUP), dtype=torch.float32)
    return out, copy, squares, x.new_empty((*x.shape[:-1], 2) if previous is not None else 0, dtype=torch.float32)


def _example(anchored: bool, exits: bool, stream: torch.dtype | None, copy_gain: tuple[int, ...] = ()) -> Any:
    def example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
        kind = stream or dtype

        def draw(*shape: int) -> Tensor:
            return (2 * torch.randn(shape, generator=rng) + 1).to(device, kind)

        made = {"x": draw(3, 37, 168), "dtype": dtype}
        made |= {"x0": draw(3, 37, 168), "gain": draw(168).float()} if anchored else {}
        made |= {"copy_gain": draw(*copy_gain).float()} if copy_gain else {}
        return made | ({"previous": draw(3, 37, 168)} if exits else {})

    return example


def _anchored(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 65536, dim: int = 4096
) -> dict[str, Any]:
    """An anchored boundary with an exit rule; a 16-bit copy of an fp32 stream."""
    made = {n: torch.randn(rows, dim, generator=rng).to(device, dtype) for n in ("x", "x0", "previous")}
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    return made | {"gain": (torch.rand(dim, generator=rng) + 0.5).to(device), "dtype": half}


OP = Op(
    name="loop_boundary",
    call=loop_boundary,
    examples=(
        _example(True, True, torch.float32, (3, 168)),
        _example(True, False, None),
        _example(False, True, torch.float32),
        _example(False, False, None, (168,)),
    ),
    impls=("torch", "triton"),
    dtypes=FUSED_DTYPES,
    tolerance={torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5},
    problems=(_anchored,),
    sizes={
        "cuda": tuple({"rows": rows, "dim": dim} for rows in (512, 8192) for dim in (512, 1024, 2048, 4096))
        + tuple({"dim": dim} for dim in (512, 1024, 2048, 4096))
    },
)
