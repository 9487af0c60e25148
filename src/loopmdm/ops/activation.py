"""What an MLP does between its products: silu(gate) * up, gelu or squared relu, in one pass on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, nearest
from . import native
from .contract import Op, extension

ACTS = ("swiglu", "gelu_tanh", "relu2", "gelu")
CPP = ACTS[:3]  # in the order of csrc/layer.h; torch is faster at gelu


def activation(x: Tensor, act: str, up: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """act(x), or silu(x) * up for SwiGLU (Shazeer 2020).

    "cpp" computes in fp32 and rounds once: in bf16 it lacks torch's rounding of silu(x) before the product with up.
    Infinite inputs may give infinities where torch has NaN.

    Args:
        x: [..., I] of any floating dtype; for "swiglu" without `up` the two side by side, [..., 2 I], gate first.
        act: "swiglu", "gelu_tanh" or "gelu" (Hendrycks and Gimpel 2016, the first with tanh), "relu2"
            (So et al. 2021: relu, squared).
        up: [..., I], for "swiglu" alone.
        impl: "auto", "torch", or "cpp" (CPU; float32 and bfloat16, not "gelu").

    Returns:
        [..., I] in x's dtype. Differentiable in x and up.

    Raises:
        InputError: a shape, dtype or name that does not fit, or an `impl` that cannot run here.
    """
    _check(x, act, up)
    if impl == "torch" or (impl == "auto" and (torch.compiler.is_compiling() or not x.is_cpu)):
        return _reference(x, act, up)
    dim = x.shape[-1] // (2 if act == "swiglu" and up is None else 1)
    size = {"numbers": x.numel() // (x.shape[-1] or 1) * dim, "level_below_4": native.level_below_4()}
    size["training"] = int(native.differentiating(x, up))
    if OP.choose(impl, x.device, x.dtype, lambda which: _refuses(which, x, act, up), **size).impl == "cpp":
        if size["training"]:
            return _Native.apply(x, act, up, dim)
        return _cpp(x, act, up, dim)
    return _reference(x, act, up)


def _check(x: Tensor, act: str, up: Tensor | None) -> None:
    if act not in ACTS:
        raise InputError(f"activation has no act {act!r}{nearest(act, ACTS)}")
    if not x.ndim or not x.is_floating_point():
        raise InputError(f"activation: x is {list(x.shape)} {x.dtype}; it must be [..., I] of a floating dtype")
    if up is not None and (act != "swiglu" or up.shape != x.shape or up.dtype != x.dtype):
        raise InputError(
            f"activation: up is {list(up.shape)} {up.dtype} with act {act!r} and x {list(x.shape)} {x.dtype}; it is "
            "for swiglu and must be like x"
        )
    if up is None and act == "swiglu" and x.shape[-1] % 2:
        raise InputError(f"activation: x is {list(x.shape)}; gate and up side by side are an even number")


def _reference(x: Tensor, act: str, up: Tensor | None) -> Tensor:
    if act == "swiglu":
        gate, up = x.chunk(2, dim=-1) if up is None else (x, up)
        return F.silu(gate) * up
    if act == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def _refuses(impl: str, x: Tensor, act: str, up: Tensor | None = None, **_: Any) -> str | None:
    """Why `impl` cannot take this problem, or None."""
    if impl != "cpp":
        return None
    if x.dtype not in native.DTYPES or not x.is_cpu or (up is not None and not up.is_cpu):
        return f"x is {x.dtype}, it takes float32 and bfloat16 on the CPU; use impl='torch'"
    if act not in CPP:
        return f"it has no {act}; use impl='torch'"
    if not x.numel():
        return "x is empty; use impl='torch'"
    return native.watched(x, up, trains=True)


def _cpp(x: Tensor, act: str, up: Tensor | None, dim: int) -> Tensor:
    out = x.new_empty((*x.shape[:-1], dim))
    x, up = native.contiguous(x, up)
    extension().activation_cpu(
        x.data_ptr(),
        _up_at(x, act, up, dim),
        out.data_ptr(),
        out.numel() // dim,
        dim,
        x.shape[-1],
        x.shape[-1],
        CPP.index(act),
        x.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def _up_at(x: Tensor, act: str, up: Tensor | None, dim: int) -> int:
    """Where `up` begins: in a tensor of its own, behind the gate in x, or (nothing reads it) in x."""
    if up is not None:
        return up.data_ptr()
    return x.data_ptr() + (dim * x.element_size() if act == "swiglu" else 0)


class _Native(torch.autograd.Function):
    """ "cpp" with its gradients."""

    @staticmethod
    def forward(ctx, x, act, up, dim):  # type: ignore[no-untyped-def]
        ctx.act, ctx.dim = act, dim
        ctx.save_for_backward(x, up)
        return _cpp(x, act, up, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, up), act, dim = ctx.saved_tensors, ctx.act, ctx.dim
        if native.torch_must_see(grad):
            needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
            dx, dup = native.gradients_by_torch(lambda x, up: _reference(x, act, up), (x, up), (grad,), needs)
            return dx, None, dup, None
        grad, x, up = native.contiguous(grad, x, up)
        dx, dup = torch.empty_like(x), None if up is None else torch.empty_like(up)
        extension().activation_backward_cpu(
            (grad.data_ptr(), x.data_ptr(), _up_at(x, act, up, dim), dx.data_ptr(), _up_at(dx, act, dup, dim)),
            (grad.numel() // dim, dim, x.shape[-1], x.shape[-1]),
            CPP.index(act),
            x.dtype is torch.bfloat16,
            torch.get_num_threads(),
        )
        return dx, None, dup, None


def _example(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, act: str = "swiglu", apart: bool = False
) -> dict[str, Any]:
    """Sizes that no vector divides, values from all parts of the curve."""
    x, up = ((torch.randn(3, 37, 134, generator=rng) * 4).to(device, dtype) for _ in range(2))
    return {"x": x, "act": act, "up": up if apart else None}


def _problem(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, numbers: int = 2**24, act: str = "swiglu"
) -> dict[str, Any]:
    """256 rows, or as many as there are numbers."""
    rows = min(256, numbers)
    x = torch.randn(rows, numbers // rows * (2 if act == "swiglu" else 1), generator=rng)
    return {"x": x.to(device, dtype), "act": act}


OP = Op(
    name="activation",
    call=activation,
    examples=(
        *(functools.partial(_example, act=act) for act in ACTS),
        functools.partial(_example, apart=True),
    ),
    impls=("torch", "cpp"),
    dtypes=native.DTYPES,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 1e-2},
    refuses=_refuses,
    grads=("x", "up"),
    problems=tuple(functools.partial(_problem, act=act) for act in CPP),
    sizes={"cpu": tuple({"numbers": 2**n, "training": t} for t in (0, 1) for n in (12, 15, 18, 21, 24))},
)
