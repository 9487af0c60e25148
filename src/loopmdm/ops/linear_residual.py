"""Projection back into the residual stream: attention's output and the MLP's second half, with the next norm's sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .contract import Op, interpreting

GROUP = 64
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = ("block_m", "block_n", "block_k", "warps", "stages", "swath")


def linear_residual(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a projection to the residual stream, and take the sums that RMS norm needs of the result.

        out = x + h @ weight.T + bias

    Forward only: a plan's inner step, not a layer. The sum is formed in fp32 and stored in x's dtype.

    Args:
        h: [..., K], the projection's input, any floating dtype.
        weight: [D, K] in h's dtype, row-major as `nn.Linear` keeps it.
        bias: [D] of any floating dtype, None for 0.
        x: residual stream [..., D], often float32 beside a 16-bit h.
        impl: "auto", "torch" or "triton" (bfloat16, float16, float32).

    Returns:
        out [..., D] in x's dtype; its copy in h's dtype (out itself where the dtypes are one); and `square_sums(out)`,
        fp32 [..., ceil(D / 64)].

    Raises:
        InputError: a shape or dtype that does not fit, or an `impl` that cannot run here.
    """
    _check(h, weight, bias, x)
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    choice = OP.choose(impl, x.device, h.dtype, rows=rows, dim=dim, depth=h.shape[-1])
    if choice.impl == "torch":
        return _reference(h, weight, bias, x)
    reason = not_fused(h, weight, bias, x)
    if reason is not None:
        if impl != "auto":
            raise InputError(f"linear_residual: impl={impl!r} cannot run: {reason}")
        return _reference(h, weight, bias, x)
    out, copy, squares = _fused_op(h, weight, bias, x, tile_list(choice.config))
    return out, (out if h.dtype == x.dtype else copy), squares


def square_sums(x: Tensor) -> Tensor:
    """Sums of squares over runs of 64 columns: x [..., D] -> fp32 (float64 if x is) [..., ceil(D / 64)]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    return F.pad(wide, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)).sum(-1)


def tile_list(config: Mapping[str, int]) -> list[int]:
    """A table row's configuration as numbers, which is what an op's schema can carry; 0 is the kernel's own choice."""
    return [config.get(name, 0) for name in TILE]


def tile_config(numbers: list[int]) -> dict[str, int]:
    """The inverse of `tile_list`."""
    return {name: number for name, number in zip(TILE, numbers, strict=True) if number}


def compute_dtype(tensor: Tensor) -> str:
    """What a kernel multiplies in: the operands' dtype; fp32 in the interpreter, whose 16-bit products are wrong."""
    return "float32" if interpreting() else str(tensor.dtype).removeprefix("torch.")


def _check(h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    if not all(t.dtype.is_floating_point for t in (h, x)) or weight.dtype != h.dtype:
        raise InputError(
            f"linear_residual: h is {h.dtype}, weight {weight.dtype} and x {x.dtype}; all must be floating point and "
            "weight in h's dtype"
        )
    if weight.ndim != 2 or h.shape[-1:] != weight.shape[1:] or h.shape[:-1] + weight.shape[:1] != x.shape:
        raise InputError(
            f"linear_residual: h {list(h.shape)} @ weight {list(weight.shape)}.T does not fit x {list(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"linear_residual: bias is {list(bias.shape)}; it must be [{weight.shape[0]}]")


def not_fused(*tensors: Tensor | None) -> str | None:
    """Why a forward kernel of 16 or 32 bits cannot take these tensors, or None; the ops of a layer share it."""
    present = [t for t in tensors if t is not None]
    for t in present:
        if t.dtype not in FUSED_DTYPES:
            return f"a tensor is {t.dtype}, the kernel takes bfloat16, float16 and float32; use impl='torch'"
        if t.device != present[0].device:
            return f"one tensor is on {present[0].device} and another on {t.device}; move them to one device"
        if torch.is_grad_enabled() and t.requires_grad:
            return "it has no backward; use impl='torch' or torch.no_grad()"
    return None


def _reference(h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    branch = F.linear(h, weight)
    wide = torch.promote_types(torch.promote_types(branch.dtype, x.dtype), torch.float32)
    branch = branch.to(wide) if bias is None else branch.to(wide) + bias.to(wide)
    out = (x.to(wide) + branch).to(x.dtype)
    return out, (out if h.dtype == x.dtype else out.to(h.dtype)), square_sums(out)


@torch.library.custom_op("loopmdm::linear_residual", mutates_args=())
def _fused_op(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, tile: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, copy, squares); copy is empty where out is one already."""
    from ..kernels import linear_residual as kernel

    x = x.contiguous()
    depth, dim = h.shape[-1], x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copy = torch.empty(x.shape if h.dtype != x.dtype else 0, dtype=h.dtype, device=x.device)
    squares = torch.empty(*x.shape[:-1], -(-dim // GROUP), dtype=torch.float32, device=x.device)
    kernel.forward(
        h.contiguous().view(-1, depth),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        x,
        out,
        copy if h.dtype != x.dtype else None,
        squares,
        tile_config(tile),
        compute_dtype(h),
    )
    return out, copy, squares


@_fused_op.register_fake
def _(h, weight, bias, x, tile):  # type: ignore[no-untyped-def]
    copy = x.new_empty(x.shape if h.dtype != x.dtype else 0, dtype=h.dtype)
    squares = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // GROUP), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), copy, squares


def _as_run(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """An fp32 stream beside operands in `dtype`, with a bias, sizes that no tile divides."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    problem = {"h": draw(3, 37, 100), "weight": draw(168, 100) / 10}
    return {n: t.to(device, dtype) for n, t in problem.items()} | {
        "bias": draw(168).to(device),
        "x": (3 * draw(3, 37, 168) + 1).to(device),
    }


def _one_dtype(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """The stream in the operands' dtype, no bias, more rows than one tile of any size."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    return {"h": draw(700, 64), "weight": draw(128, 64) / 8, "bias": None, "x": draw(700, 128)}


OP = Op(
    name="linear_residual",
    call=linear_residual,
    examples=(_as_run, _one_dtype),
    impls=("torch", "triton"),
    dtypes=FUSED_DTYPES,
    tolerance={torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5},
)
