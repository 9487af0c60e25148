"""float64 truth: every op written out once more, plainly, and sharing no code with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    stream: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(summed, normed); the statistics are those of the sum formed in fp32 and stored as `stream`, x's real dtype."""
    summed = x
    if branch is not None:
        summed = stored(stored(x + branch, torch.promote_types(stream, torch.float32)), stream)
    mean = summed.sum(-1, keepdim=True) / summed.shape[-1] if kind == "layernorm" else 0.0
    spread = ((summed - mean) ** 2).sum(-1, keepdim=True) / summed.shape[-1]
    normed = (summed - mean) / torch.sqrt(spread + eps)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return summed, normed


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` after a round trip through `dtype`; the gradient passes as if it had not been rounded."""
    return value + (value.to(dtype).double() - value).detach()


def errors(
    ours: Callable[..., Outputs], truth: Callable[..., Outputs], inputs: Mapping[str, Tensor | None], seed: int = 7
) -> dict[str, float]:
    """Relative error of every output ("out0", ...) and every gradient ("dweight", ...), by name.

    `truth` is called on float64 copies of the inputs, `ours` on the inputs; both by keyword.
    """
    floating = [name for name, value in inputs.items() if value is not None and value.is_floating_point()]
    got_in, want_in = dict(inputs), dict(inputs)
    for name in floating:
        value = inputs[name].detach()  # type: ignore[union-attr]
        got_in[name], want_in[name] = value.requires_grad_(), value.clone().double().detach().requires_grad_()
    got, want = ours(**got_in), truth(**want_in)
    rng = torch.Generator().manual_seed(seed)
    # drawn in the output's dtype, so that both sides differentiate the same sum
    weights = [torch.randn(o.shape, generator=rng).to(o) for o in got]
    got_grads = torch.autograd.grad(got, [got_in[name] for name in floating], weights)  # type: ignore[arg-type]
    want_grads = torch.autograd.grad(want, [want_in[name] for name in floating], [w.double() for w in weights])  # type: ignore[arg-type]

    named = {f"out{i}": pair for i, pair in enumerate(zip(got, want, strict=True))}
    named |= {f"d{n}": pair for n, *pair in zip(floating, got_grads, want_grads, strict=True)}  # type: ignore[misc]
    for name, (a, b) in named.items():
        assert a.shape == b.shape, f"{name} is {list(a.shape)}, should be {list(b.shape)}"
    for name, grad in zip(floating, got_grads, strict=True):
        assert grad.dtype == inputs[name].dtype, f"d{name} is {grad.dtype}"  # type: ignore[union-attr]
    return {name: error(a.detach(), b.detach()) for name, (a, b) in named.items()}


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    gap, size = (got.double() - want).norm(), want.norm()
    return float(gap / size) if size else float(gap)
