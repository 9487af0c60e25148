"""What the C++ implementations for CPUs share: when a problem is theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import tuned
from .contract import extension

DTYPES = (torch.float32, torch.bfloat16)


@tuned.constant_in_graphs
def level_below_4() -> int:
    """How far this processor's instructions are below AVX-512 (0: they have it; 3: neither AVX2).

    A size of the ops: where the shipped rows were measured it was 0, and they say so; `loopmdm tune` makes rows for
    others.
    """
    built = extension()
    return 0 if built is None else max(0, 4 - built.cpu_level())


@tuned.constant_in_graphs
def multiplies_bf16() -> bool:
    """Whether the C++ products of packed bf16 weights run here: AVX-512 with its bf16 products."""
    built = extension()
    return built is not None and built.cpu_level() >= 5


@tuned.constant_in_graphs
def multiplies_matrices() -> bool:
    """Whether the processor has units for whole matrices of bf16 (Intel's AMX), which oneDNN uses and we do not."""
    try:
        with open("/proc/cpuinfo") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


def on_huge_pages(made: Tensor) -> Tensor:
    """A tensor just made and not yet written, on pages of 2 MiB where the system has some."""
    built = extension()
    if built is not None and made.is_cpu:
        built.huge_pages(made.data_ptr(), made.nbytes)
    return made


def forward_gradients() -> bool:
    """Whether forward-mode differentiation is on: a tensor may have a tangent without `requires_grad`."""
    return torch.autograd.forward_ad._current_level >= 0


def watched(*tensors: Tensor | None) -> str | None:
    """Why only torch's own operations will do, or None: gradients, or a tracer, transform, mode or subclass."""
    if torch.compiler.is_compiling():
        return "torch.compile must see its operations; use impl='torch'"
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return "it has no backward; use impl='torch' or torch.no_grad()"
    if forward_gradients():
        return "it has no forward-mode gradient; use impl='torch'"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a function transform must see its operations; use impl='torch'"
    if not all([t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors]):
        return "a tensor is of a subclass; use impl='torch'"
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return "a dispatch mode or a tracer must see its operations; use impl='torch'"
    return None
