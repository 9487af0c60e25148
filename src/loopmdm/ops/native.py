"""What the C++ implementations for CPUs share: when a problem is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def differentiating(*tensors: Tensor | None) -> bool:
    """Whether torch records what is done with these tensors."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def transformed() -> str | None:
    """Why an operation must be made of torch's own, or None: torch.compile, forward mode or a function transform."""
    if torch.compiler.is_compiling():
        return "torch.compile must see its operations; use impl='torch'"
    if forward_gradients():
        return "it has no forward-mode gradient; use impl='torch'"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a function transform must see its operations; use impl='torch'"
    return None


def watched(*tensors: Tensor | None, trains: bool = False) -> str | None:
    """Why only torch's operations will do, or None: a tracer, transform, mode, subclass; gradients unless `trains`."""
    reason = transformed()
    if reason is not None:
        return reason
    if not trains and differentiating(*tensors):
        return "it has no backward; use impl='torch' or torch.no_grad()"
    if not all([t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors]):
        return "a tensor is of a subclass; use impl='torch'"
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return "a dispatch mode or a tracer must see its operations; use impl='torch'"
    return None


def contiguous(*tensors: Any) -> list[Any]:
    """The tensors, copied where they are not contiguous."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def torch_must_see(*grads: Tensor | None) -> bool:
    """In a backward: whether gradients must be made of torch's operations, to be differentiated or made in batches."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    batch = any([g is not None and batched(g) for g in grads])
    return torch.is_grad_enabled() or batch or watched(*grads) is not None


def gradients_by_torch(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """In a backward, the gradients in `inputs` of `reference(*inputs)`, differentiable where they will be."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # each a place of its own in the graph: one may come from another, and their own graph is still wanted
        given = [
            None if t is None else t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
            for t in inputs
        ]
        made = reference(*given)
        outputs = made if isinstance(made, tuple) else (made,)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [t for t, need in zip(given, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=again))
    return tuple(next(found) if need and t is not None else None for t, need in zip(given, needed, strict=True))
