"""Rotary positions: angles of positions, and heads turned by them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, nearest
from . import native
from .contract import Op, extension

LAYOUTS, ROPE_DTYPES = ("half", "interleaved"), ("float32", "input")


def rope_table(
    positions: Tensor, head_dim: int, theta: float, sign: int = 1, dtype: str = "float32"
) -> tuple[Tensor, Tensor]:
    """positions [...], any integer dtype -> (cos, sin), each [..., head_dim/2] in fp32 (RoFormer, eq. 34).

    dtype "bfloat16" rounds the numbers to it.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = sign * positions[..., None].float() * frequency
    if dtype == "bfloat16":
        return angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor], layout: str, rope_dtype: str, *, impl: str = "auto") -> Tensor:
    """Rotate pairs of each head by the angles of its position (RoFormer, equation 34).

    "cpp" gives torch's bits.

    Args:
        x: [B, T, heads, hd] of any floating dtype, hd even. "cpp" reads any strides with a contiguous last dimension.
        table: (cos, sin), each [T, hd/2] or [1 or B, T, hd/2].
        layout: "half" pairs i with i + hd/2 (GPT-NeoX, Llama in transformers); "interleaved" pairs 2i with 2i + 1.
        rope_dtype: "float32", or "input" to turn in x's own dtype, each operation rounded to it.
        impl: "auto", "torch", or "cpp" (CPU; float32 and bfloat16 with an fp32 table).

    Returns:
        [B, T, heads, hd] in x's dtype. Differentiable; in the table through "torch".

    Raises:
        InputError: a name that does not fit, or an `impl` that cannot run here.
    """
    if layout not in LAYOUTS:
        raise InputError(f"rotate has no layout {layout!r}{nearest(layout, LAYOUTS)}")
    if rope_dtype not in ROPE_DTYPES:
        raise InputError(f"rotate has no rope_dtype {rope_dtype!r}{nearest(rope_dtype, ROPE_DTYPES)}")
    if impl == "torch" or (impl == "auto" and (torch.compiler.is_compiling() or not x.is_cpu)):
        return _reference(x, *table, layout, rope_dtype)
    training = native.differentiating(x)
    size = {"numbers": x.numel(), "training": int(training), "level_below_4": native.level_below_4()}
    if OP.choose(impl, x.device, x.dtype, lambda which: _refuses(which, x, table), **size).impl != "cpp":
        return _reference(x, *table, layout, rope_dtype)
    if training:
        return _Native.apply(x, *table, layout, rope_dtype)
    return _cpp(x, *table, layout, rope_dtype)


def _reference(x: Tensor, cos: Tensor, sin: Tensor, layout: str, rope_dtype: str) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32) if rope_dtype == "float32" else x.dtype
    cos, sin = (part.to(work).unsqueeze(-2) for part in (cos, sin))  # [.., T, 1, hd/2]
    y = x.to(work)
    if layout == "half":
        a, b = y.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    a, b = y[..., 0::2], y[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).reshape(x.shape).to(x.dtype)


def _refuses(impl: str, x: Tensor, table: tuple[Tensor, Tensor], *_names: Any, **_given: Any) -> str | None:
    """Why `impl` cannot take this problem, or None."""
    if impl != "cpp":
        return None
    if x.dtype not in native.DTYPES or not x.is_cpu:
        return f"x is {x.dtype} on {x.device}, it takes float32 and bfloat16 on the CPU; use impl='torch'"
    if x.ndim != 4 or x.shape[3] % 2 or not x.numel():
        return f"x is {list(x.shape)}; it must be [B, T, heads, hd] with an even hd and not empty"
    B, T, _, hd = x.shape
    for part in table:
        if part.dtype != torch.float32 or not part.is_cpu:
            return "its table must be float32 on the CPU; use impl='torch'"
        if part.shape != table[0].shape or part.shape not in ((T, hd // 2), (1, T, hd // 2), (B, T, hd // 2)):
            return f"x is {list(x.shape)} and a table {list(part.shape)}; not [{T}, {hd // 2}] or one a sequence"
    return native.watched(*table) or native.watched(x, trains=True)


def _cpp(x: Tensor, cos: Tensor, sin: Tensor, layout: str, rope_dtype: str, back: bool = False) -> Tensor:
    """With `back` by the same angles the other way round."""
    if x.stride(3) != 1:
        x = x.contiguous()
    cos, sin = native.contiguous(cos, sin)
    out = x.new_empty(x.shape)
    extension().rotate_cpu(
        [t.data_ptr() for t in (x, cos, sin, out)],
        (*x.shape, *x.stride()[:3], 0 if cos.ndim == 2 or len(cos) == 1 else cos.stride(0)),
        (x.dtype is torch.bfloat16, layout == "interleaved", rope_dtype == "input", back),
        torch.get_num_threads(),
    )
    return out


class _Native(torch.autograd.Function):
    """ "cpp" with its gradient, which is turned back."""

    @staticmethod
    def forward(ctx, x, cos, sin, layout, rope_dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.how = layout, rope_dtype
        return _cpp(x, cos, sin, layout, rope_dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (cos, sin), (layout, rope_dtype) = ctx.saved_tensors, ctx.how
        if native.torch_must_see(grad):
            dx = _reference(grad, cos, -sin, layout, rope_dtype)
        else:
            dx = _cpp(grad, cos, sin, layout, rope_dtype, back=True)
        return dx, None, None, None, None


def _heads(
    device: torch.device,
    dtype: torch.dtype,
    rng: torch.Generator,
    batch: int = 1,
    numbers: int = 2**22,
    heads: int = 4,
    head_dim: int = 64,
    **options: str,
) -> dict[str, Any]:
    """Heads inside a packed projection, each sequence at its own positions."""
    tokens = max(1, numbers // (batch * heads * head_dim))
    packed = torch.randn(batch, tokens, 3 * heads, head_dim, generator=rng).to(device, dtype)
    places = torch.arange(tokens, device=device) + 3 * torch.arange(batch, device=device)[:, None]
    how = {"layout": "half", "rope_dtype": "float32"} | options
    return {"x": packed[:, :, heads : 2 * heads], "table": rope_table(places, head_dim, 10000.0), **how}


OP = Op(
    name="rotate",
    call=rotate,
    examples=(
        functools.partial(_heads, batch=3, numbers=9000, heads=3, head_dim=50),
        functools.partial(
            _heads, batch=2, numbers=9000, heads=2, head_dim=24, layout="interleaved", rope_dtype="input"
        ),
    ),
    impls=("torch", "cpp"),
    dtypes=native.DTYPES,
    tolerance={torch.float32: 0.0, torch.bfloat16: 0.0},
    grads=("x",),
    refuses=_refuses,
    problems=(_heads, functools.partial(_heads, layout="interleaved", rope_dtype="input")),
    sizes={"cpu": tuple({"numbers": 2**n, "training": t} for t in (0, 1) for n in (12, 15, 18, 21, 24))},
)
