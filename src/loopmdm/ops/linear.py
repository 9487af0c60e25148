"""x @ weight.T + bias in inference on a CPU: oneDNN's product where torch would take MKL's, weights laid out for it."""

from __future__ import annotations

import functools
import math
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import native
from .contract import Op

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """x @ weight.T + bias.

    torch multiplies fp32 on a CPU with MKL, which on processors that are not Intel's takes 1.1 to 1.4 times as long as
    oneDNN on the same cores; and it lays out bf16 weights anew in each call.

    Args:
        x: [..., K], any floating dtype.
        weight: [N, K] in x's dtype.
        bias: [N] in x's dtype, or None.
        packed: what `pack` made of `weight`, whose numbers are then not read. Needs "onednn"; not within a graph of
            torch.compile.
        impl: "auto", "torch", or "onednn" (CPU, fp32 and bf16, no gradients, no autocast to another dtype).

    Returns:
        [..., N] in x's dtype.

    Raises:
        InputError: an `impl` that cannot run here or cannot take this.
    """
    if packed is None and impl == "auto" and (torch.compiler.is_compiling() or not x.is_cpu):
        return F.linear(x, weight, bias)
    if packed is not None and torch.compiler.is_compiling():  # outside fullgraph, dynamo then runs this as it is
        raise InputError("linear: packed weights cannot be compiled")
    if packed is not None and not x.numel():
        return x.new_empty((*x.shape[:-1], len(weight)))
    if packed is not None and x.stride(-1) != 1:
        x = x.contiguous()
    refused = _refuses("onednn", x, weight if packed is None else packed, bias)
    if packed is not None:
        if refused or impl not in ("auto", "onednn"):
            raise InputError(f"linear: packed weights are for onednn alone: {refused or f'impl is {impl!r}'}")
    elif impl == "auto" and (refused or (x.dtype == torch.float32 and intel()) or native.watched(x, weight, bias)):
        return F.linear(x, weight, bias)
    else:
        work = x.numel() * len(weight)
        if OP.choose(impl, x.device, x.dtype, lambda name: _refuses(name, x, weight, bias), work=work).impl == "torch":
            return F.linear(x, weight, bias)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # oneDNN reads it as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight if packed is None else packed, bias, "none", [], "")


def pack(weight: Tensor, rows: int = 256) -> Tensor | None:
    """`weight` [N, K] once more in the layout of oneDNN's product; None where that cannot run.

    Opaque: for `linear(packed=)` alone. `rows` is the number of rows for which the layout is chosen; any may be used.
    """
    if not weight.is_cpu or _no_onednn("onednn", weight.device) or weight.dtype not in ONEDNN_DTYPES:
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`; through `linear` where the module is an nn.Linear that nothing was added to.

    Wrappers, quantised layers, hooks and replaced forwards stay in force.
    """
    if plain(module):
        return linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    return module(x)


def plain(module: nn.Module) -> bool:
    """Whether calling `module` is a product of its weight, plus its bias, and nothing else."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        and not (module._backward_hooks or module._backward_pre_hooks or nn.modules.module._has_any_global_hook())
    )


@functools.cache
def intel() -> bool:
    """Whether MKL is at home here; True where nothing is known."""
    try:
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" not in file.read()
    except OSError:
        return platform.machine() in ("x86_64", "AMD64", "i386")


@functools.cache
def _no_onednn(impl: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is for CPUs"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch was built without oneDNN"
    return None


def _refuses(impl: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> str | None:
    """Why `impl` cannot take this problem, or None."""
    if impl in ("torch", "auto"):
        return None
    if x.dtype not in ONEDNN_DTYPES or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"x is {x.dtype} and weight {weight.dtype}, onednn takes float32 or bfloat16 of one kind"
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 product"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype:
        return "autocast is on, which would give it another dtype"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return "it has no backward; use impl='torch' or torch.no_grad()"
    if native.forward_gradients():
        return "it has no forward-mode gradient; use impl='torch'"
    if x.shape[-1:] != weight.shape[1:]:
        return f"x is {list(x.shape)} and weight {list(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"weight is {list(weight.shape)} and bias {list(bias.shape)}"
    if not weight.is_cpu or (bias is not None and not bias.is_cpu):
        return "weight or bias is on another device"
    if not x.numel() or x.stride(-1) != 1:
        return "x is empty or not contiguous in its last dimension"
    return None


def _problem(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, work: int = 2**30, biased: bool = True
) -> dict[str, Any]:
    """256 rows and a square weight of what `work`, rows K N, leaves."""
    side = math.isqrt(work // 256)
    x, bias = torch.randn(256, side, generator=rng), torch.randn(side, generator=rng)
    made = {"x": x, "weight": torch.randn(side, side, generator=rng) / side**0.5, "bias": bias if biased else None}
    return {name: None if t is None else t.to(device, dtype) for name, t in made.items()}


def _odd(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """Sizes that no vector divides, rows in two dimensions, no bias."""
    x, weight = torch.randn(2, 33, 67, generator=rng), torch.randn(131, 67, generator=rng) / 8
    return {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}


_WORK = (2**18, 2**21, 2**24, 2**27)

OP = Op(
    name="linear",
    call=linear,
    examples=(functools.partial(_problem, work=2**21), _odd),
    impls=("torch", "onednn"),
    dtypes=(torch.float32, torch.bfloat16),
    tolerance={torch.float32: 2e-6, torch.bfloat16: 8e-3},
    library=_no_onednn,
    refuses=_refuses,
    problems=(_problem, functools.partial(_problem, biased=False)),
    sizes={"cpu": (*({"work": work} for work in _WORK), {})},
)
