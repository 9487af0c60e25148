"""float64 truth: every op written out once more, plainly, and sharing no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

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


def square_sums(x: Tensor) -> Tensor:
    """Sums of squares over runs of 64 columns, the last run shorter."""
    return torch.stack([(part * part).sum(-1) for part in x.split(64, dim=-1)], dim=-1)


def linear_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    less: Tensor | None,
    copy_gain: Tensor | None,
    stream: torch.dtype,
) -> Outputs:
    """(out, its copy, sums of squares); out is stored as `stream`, x's real dtype."""
    branch = h @ weight.T
    branch = branch if bias is None else branch + bias
    branch = branch if gate is None else branch * gate
    branch = branch if less is None else branch - less[..., None]
    out = stored(x + branch, stream)
    return out, out if copy_gain is None else out * copy_gain, square_sums(out)


def norm_linear(
    stream: Tensor, weight: Tensor, bias: Tensor | None, eps: float | None, act: str, heads: Any = None
) -> Tensor:
    """From the stream itself: normalise (eps None: it is already), project, then rotate pair by pair or activate."""
    normed = stream
    if eps is not None:
        normed = stream / torch.sqrt((stream**2).sum(-1, keepdim=True) / stream.shape[-1] + eps)
    y = normed @ weight.T
    y = y if bias is None else y + bias
    if act == "swiglu":
        gate, up = y[..., 0::2], y[..., 1::2]
        return gate / (1 + torch.exp(-gate)) * up
    if act == "relu2":
        return torch.where(y > 0, y * y, torch.zeros_like(y))
    if act == "gelu":
        return y * (1 + torch.erf(y / math.sqrt(2))) / 2
    if act == "gelu_tanh":
        return y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
    return y if heads is None else _heads(y, heads, eps)


def _heads(y: Tensor, heads: Any, eps: float) -> Tensor:
    rows = y.reshape(-1, y.shape[-1]).clone()
    for r, row in enumerate(rows):
        for head in range(heads.query + heads.key):
            part = row[head * heads.dim : (head + 1) * heads.dim].clone()
            gain = heads.q_gain if head < heads.query else heads.k_gain
            if gain is not None and heads.norm_first:
                part = part / torch.sqrt((part**2).mean() + eps) * gain.double()
            if heads.cos is not None:
                cos, sin = (table[r % len(table)].double() for table in (heads.cos, heads.sin))
                turned = torch.view_as_complex(part.reshape(-1, 2)) * torch.complex(cos, sin)
                part = torch.view_as_real(turned).reshape(-1)
            if gain is not None and not heads.norm_first:
                part = part / torch.sqrt((part**2).mean() + eps) * gain.double()
            rows[r, head * heads.dim : (head + 1) * heads.dim] = part
    return rows.reshape(y.shape)


def loop_boundary(
    x: Tensor,
    x0: Tensor | None,
    gain: Tensor | None,
    previous: Tensor | None,
    copy_gain: Tensor | None,
    eps: float,
    stream: torch.dtype,
) -> Outputs:
    """(out, its copy, sums of squares, (x - previous)² and x² of each token, where there is a previous)."""
    out = x
    if x0 is not None:
        summed = stored(x + x0, stream)
        normed = summed / torch.sqrt((summed**2).mean(-1, keepdim=True) + eps)
        out = stored(normed if gain is None else normed * gain, stream)
    change = [] if previous is None else [torch.stack((((x - previous) ** 2).sum(-1), (x**2).sum(-1)), dim=-1)]
    return out, out if copy_gain is None else out * copy_gain, square_sums(out), *change


def attention(
    qkv: Tensor,
    heads: int,
    groups: int,
    first: Tensor | None = None,
    last: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H hd], log-sum-exp [B, H, T]), one query at a time over the keys it may look at."""
    batch, tokens, _, head_dim = qkv.shape
    scale = head_dim**-0.5 if scale is None else scale
    outs, lses = [], []
    for b in range(batch):
        for i in range(tokens):
            begin, end = (0, tokens) if first is None or last is None else (max(int(first[b, i]), 0), int(last[b, i]))
            for h in range(heads):
                key = heads + h // (heads // groups)
                seen = qkv[b, begin : max(begin, end)]
                scores = scale * (seen[:, key] @ qkv[b, i, h])
                lses.append(torch.logsumexp(scores, 0) if len(seen) else scores.new_full((), -torch.inf))
                outs.append(torch.softmax(scores, 0) @ seen[:, key + groups] if len(seen) else 0 * qkv[b, i, h])
    out = torch.stack(outs).view(batch, tokens, heads * head_dim)
    return out, torch.stack(lses).view(batch, tokens, heads).transpose(1, 2)


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
