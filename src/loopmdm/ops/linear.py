"""x @ weight.T + bias in inference on a CPU: oneDNN's product where torch takes MKL's, or ours of laid out weights."""

from __future__ import annotations

import functools
import math
import platform
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import native
from .contract import Op, extension

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Panels:
    """A bf16 weight [cols, depth] in the layout of csrc/product.h; `parts` of its rows lie in panels of their own."""

    words: Tensor
    cols: int
    depth: int
    parts: int = 1

    def fill(self, weight: Tensor) -> None:
        """Lay out `weight`, bf16 [cols, depth], in the memory that is there."""
        weight = weight.detach().contiguous()
        sizes = (self.cols, self.depth, self.parts)
        extension().pack_weight_cpu(weight.data_ptr(), *sizes, self.words.data_ptr(), torch.get_num_threads())


Packing = Tensor | Panels


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Packing | None = None, impl: str = "auto"
) -> Tensor:
    """x @ weight.T + bias.

    torch multiplies fp32 on a CPU with MKL, which on processors that are not Intel's takes 1.1 to 1.4 times as long as
    oneDNN on the same cores; and it lays out bf16 weights anew in each call.

    Args:
        x: [..., K], any floating dtype.
        weight: [N, K] in x's dtype.
        bias: [N] in x's dtype, or None.
        packed: what `pack` made of `weight`, whose numbers are then not read. Only for the implementation that it was
            made for; not within a graph of torch.compile.
        impl: "auto", "torch", "onednn" (CPU, fp32 and bf16) or "cpp" (CPU with AVX-512's bf16 products, bf16; lays out
            the weight in each call unless it is packed). The last two without gradients or autocast to another dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        InputError: an `impl` that cannot run here or cannot take this.
    """
    if packed is not None:
        return _packed(x, weight, bias, packed, impl)
    if impl == "auto":
        outside = torch.compiler.is_compiling() or not x.is_cpu or (x.dtype == torch.float32 and intel())
        if outside or native.differentiating(x, weight, bias):
            return F.linear(x, weight, bias)
        if _refuses("onednn", x, weight, bias) or native.watched(x, weight, bias):
            return F.linear(x, weight, bias)
    work = x.numel() * len(weight)

    def refuses(name: str) -> str | None:
        if (impl, name) == ("auto", "cpp"):
            return "it would lay out the weight in each call"
        return _refuses(name, x, weight, bias)

    chosen = OP.choose(impl, x.device, x.dtype, refuses, work=work).impl
    if chosen == "cpp":
        made = pack(weight, impl="cpp")
        assert isinstance(made, Panels)
        return _cpp(x, bias, made)
    return F.linear(x, weight, bias) if chosen == "torch" else _onednn(x, weight, bias)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packing, impl: str) -> Tensor:
    _uncompiled()
    if not x.numel():
        return x.new_empty((*x.shape[:-1], len(weight)))
    if x.stride(-1) != 1:
        x = x.contiguous()
    made_for = "cpp" if isinstance(packed, Panels) else "onednn"
    refused = _refuses(made_for, x, weight if isinstance(packed, Panels) else packed, bias, laid_out=True)
    if refused or impl not in ("auto", made_for):
        raise InputError(f"linear: these packed weights are for {made_for} alone: {refused or f'impl is {impl!r}'}")
    return _cpp(x, bias, packed) if isinstance(packed, Panels) else _onednn(x, packed, bias)


def _uncompiled() -> None:
    """Outside fullgraph, dynamo then runs the calling function as it is, but looks at those that it calls."""
    if torch.compiler.is_compiling():
        raise InputError("linear: packed weights cannot be compiled")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _uncompiled()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # oneDNN reads it as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _cpp(x: Tensor, bias: Tensor | None, weight: Panels) -> Tensor:
    _uncompiled()
    rows = x.reshape(-1, weight.depth)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.cols)
    extension().packed_linear_cpu(
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        weight.words.data_ptr(),
        weight.cols,
        weight.depth,
        weight.parts,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def room(weight: Tensor, parts: int = 1) -> int:
    """How many int32 numbers `pack` needs for `weight` in our layout."""
    return int(extension().packed_words(*weight.shape, parts))


def pack(
    weight: Tensor, rows: int = 256, parts: int = 1, impl: str = "auto", words: Tensor | None = None
) -> Packing | None:
    """`weight` [N, K] once more in the layout of a product on this CPU; None where there is none for it.

    Opaque: for `linear(packed=)` and `layer`.

    Args:
        rows: the number of rows for which oneDNN's layout is chosen; any may be used.
        parts: how many weights lie in it side by side (gate and up); ours keeps their columns apart.
        impl: "onednn", "cpp", or "auto": for bf16 ours where the processor has AVX-512's bf16 products (but oneDNN's
            where it has Intel's AMX), else oneDNN's.
        words: int32 [`room`], where ours is to lie.
    """
    if not weight.is_cpu or weight.dtype not in ONEDNN_DTYPES:
        return None
    ours = weight.dtype == torch.bfloat16 and native.multiplies_bf16()
    if impl == "cpp" or (impl == "auto" and ours and not native.multiplies_matrices()):
        if not ours:
            return None
        sizes = (*weight.shape, parts)
        made = Panels(torch.empty(room(weight, parts), dtype=torch.int32) if words is None else words, *sizes)
        made.fill(weight)
        return made
    if _library("onednn", weight.device):
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
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and unhooked(module)


def unhooked(module: nn.Module) -> bool:
    """Whether calling `module` is its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
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
def _library(impl: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is for CPUs"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch was built without oneDNN"
    return None


def _refuses(
    impl: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, laid_out: bool = False, **_: Any
) -> str | None:
    """Why `impl` cannot take this problem, or None. With `laid_out` it has the weights, wherever `weight` is."""
    if impl in ("torch", "auto"):
        return None
    if x.dtype not in ONEDNN_DTYPES or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"x is {x.dtype} and weight {weight.dtype}, onednn takes float32 or bfloat16 of one kind, cpp bfloat16"
    if impl == "cpp" and (x.dtype != torch.bfloat16 or not native.multiplies_bf16()):
        return f"x is {x.dtype}; it needs bfloat16 and a processor with AVX-512's bf16 products"
    if impl == "onednn" and x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 product"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype:
        return "autocast is on, which would give it another dtype"
    if native.differentiating(x, weight, bias):
        return "it has no backward; use impl='torch' or torch.no_grad()"
    if native.forward_gradients():
        return "it has no forward-mode gradient; use impl='torch'"
    if x.shape[-1:] != weight.shape[1:]:
        return f"x is {list(x.shape)} and weight {list(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"weight is {list(weight.shape)} and bias {list(bias.shape)}"
    if not (weight.is_cpu or laid_out) or not x.is_cpu or (bias is not None and not bias.is_cpu):
        return "x, weight or bias is on another device"
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
    impls=("torch", "onednn", "cpp"),
    dtypes=(torch.float32, torch.bfloat16),
    tolerance={torch.float32: 2e-6, torch.bfloat16: 8e-3},
    library=_library,
    refuses=_refuses,
    problems=(_problem, functools.partial(_problem, biased=False)),
    sizes={"cpu": (*({"work": work} for work in _WORK), {})},
)
