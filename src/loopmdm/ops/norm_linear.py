"""RMS norm and the projection that reads it, with what follows: qkv's rotation, or the MLP's activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, nearest
from .contract import Op
from .linear_residual import (
    FUSED_DTYPES,
    GROUP,
    by_kernel,
    check_vectors,
    compute_dtype,
    no_cublas,
    not_fused,
    of_rows,
    square_sums,
    tile_config,
    tile_list,
)

ACTS = ("none", "swiglu", "gelu_tanh", "gelu", "relu2")


class Heads(NamedTuple):
    """The columns of a qkv projection: `query` heads, `key` key heads, `key` value heads, each of `dim` numbers.

    The numbers of a q or k head come in pairs (2i, 2i + 1) that rotate together, whatever the model's own layout:
    scores do not change when q and k are permuted alike (`loopmdm.model.fold` does that once, to the weights).

    Attributes:
        query, key, dim: H, G and head_dim (even).
        cos, sin: fp32 [P, dim / 2]; row r of x reads row r % P. None does not rotate.
        q_gain, k_gain: [dim], gains of an RMS norm of each head, in the order of the pairs; None does not normalise.
        norm_first: normalise before the rotation (Qwen3), or after it.
    """

    query: int
    key: int
    dim: int
    cos: Tensor | None = None
    sin: Tensor | None = None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    norm_first: bool = True


def norm_linear(
    x: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    heads: Heads | None = None,
    impl: str = "auto",
) -> Tensor:
    """RMS norm, a projection and what follows it, reading the residual stream once.

        out = act(rms(x) @ weight.T + bias),   rms(x) = x / sqrt(mean(x²) + eps)

    A norm's gain belongs into x (`copy_gain` of the op that wrote it) or into `weight` (W diag(g)), and what precedes
    the projection as a shift into `bias`. The scale is applied after the product, rms(x) W = rstd (x W). Forward only:
    a plan's inner step.

    Args:
        x: residual stream, or its 16-bit copy, [..., D].
        squares: `square_sums` of the stream (not of the copy), fp32 [..., ceil(D / 64)]; None where x is normalised
            already, then rms(x) = x.
        weight: [N, D] in x's dtype.
        bias: [N] of any floating dtype, or [P, N]: the rows of x, flattened, are P sequences of one length, each with
            its own; None for 0.
        eps: added to the mean square.
        act: "none", "swiglu" (columns in pairs gate, up; silu(gate) * up; N even), "gelu_tanh", "gelu" or "relu2".
        heads: for a qkv projection, what to do with its q and k columns; `act` must be "none".
        impl: "auto", "torch", "triton" or "cublas", which has torch multiply and does the rest in one kernel (on a CPU
            in torch's); both kernels take bfloat16, float16 and float32.

    Returns:
        [..., N], or [..., N / 2] with "swiglu", in x's dtype.

    Raises:
        InputError: a shape, dtype or name that does not fit, or an `impl` that cannot run here.
    """
    _check(x, squares, weight, bias, act, heads)
    choice = OP.choose(impl, x.device, x.dtype, rows=x.numel() // x.shape[-1], dim=x.shape[-1], width=weight.shape[0])
    if not by_kernel(choice.impl, x):
        return _reference(x, squares, weight, bias, eps, act, heads)
    reason = _not_fused(x, squares, weight, bias, heads)
    if reason is not None:
        if impl != "auto":
            raise InputError(f"norm_linear: impl={impl!r} cannot run: {reason}")
        return _reference(x, squares, weight, bias, eps, act, heads)
    each, ready = heads or Heads(0, 0, 0), choice.impl == "cublas"
    if ready:
        x = F.linear(x, weight)
    numbers = tile_list(choice.config)
    return _fused_op(x, squares, weight, bias, eps, act, list(each[:3]), *each[3:7], each.norm_first, numbers, ready)


def _check(
    x: Tensor, squares: Tensor | None, weight: Tensor, bias: Tensor | None, act: str, heads: Heads | None
) -> None:
    if not x.dtype.is_floating_point or weight.dtype != x.dtype:
        raise InputError(f"norm_linear: x is {x.dtype} and weight {weight.dtype}; they must be one floating dtype")
    if weight.ndim != 2 or not x.ndim or weight.shape[1] != x.shape[-1]:
        raise InputError(f"norm_linear: weight is {list(weight.shape)}; for x {list(x.shape)} it must be [N, D]")
    if squares is not None and squares.shape != (*x.shape[:-1], -(-x.shape[-1] // GROUP)):
        raise InputError(f"norm_linear: squares is {list(squares.shape)}; take square_sums of x {list(x.shape)}")
    check_vectors("norm_linear", x[..., :1].expand(*x.shape[:-1], len(weight)), bias=bias)
    if act not in ACTS:
        raise InputError(f"norm_linear has no act {act!r}{nearest(act, ACTS)}")
    if act == "swiglu" and weight.shape[0] % 2:
        raise InputError(f"norm_linear: swiglu takes pairs of columns, not {weight.shape[0]}")
    if heads is None:
        return
    if act != "none":
        raise InputError(f"norm_linear: a qkv projection has no activation, not {act!r}")
    if weight.shape[0] != (heads.query + 2 * heads.key) * heads.dim or heads.dim % 2:
        raise InputError(
            f"norm_linear: {heads.query} + 2 x {heads.key} heads of {heads.dim} (an even number) are not the "
            f"{weight.shape[0]} columns of weight"
        )
    tables = [t for t in (heads.cos, heads.sin) if t is not None]
    if len(tables) == 1 or any(
        t.ndim != 2 or t.shape[1] != heads.dim // 2 or (not len(t) and x.numel()) for t in tables
    ):
        raise InputError(f"norm_linear: cos and sin must both be [P, {heads.dim // 2}] or both None")
    if len(tables) == 2 and tables[0].shape != tables[1].shape:
        raise InputError(f"norm_linear: cos is {list(tables[0].shape)} and sin {list(tables[1].shape)}")
    gains = [t for t in (heads.q_gain, heads.k_gain) if t is not None]
    if len(gains) == 1 or any(t.shape != (heads.dim,) for t in gains):
        raise InputError(f"norm_linear: q_gain and k_gain must both be [{heads.dim}] or both None")


def _not_fused(
    x: Tensor, squares: Tensor | None, weight: Tensor, bias: Tensor | None, heads: Heads | None
) -> str | None:
    if heads is not None and heads.q_gain is not None and (heads.dim & (heads.dim - 1) or heads.dim > 256):
        return f"heads of {heads.dim} are normalised only where that is a power of 2 up to 256; use impl='torch'"
    return not_fused(x, weight, squares, bias, *(heads or Heads(0, 0, 0))[3:7])


def _reference(
    x: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    act: str,
    heads: Heads | None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x, weight).to(wide)
    if squares is not None:
        y = y * (squares.sum(-1, keepdim=True).to(wide) / x.shape[-1] + eps).rsqrt()
    if bias is not None:
        y = y + of_rows(bias.to(wide), y)
    if heads is not None:
        y = _turn(y, heads, eps)
    elif act == "swiglu":
        gate, up = y.unflatten(-1, (-1, 2)).unbind(-1)
        y = F.silu(gate) * up
    elif act == "relu2":
        y = F.relu(y).square()
    elif act != "none":
        y = F.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")
    return y.to(x.dtype)


def _turn(y: Tensor, heads: Heads, eps: float) -> Tensor:
    """Normalise and rotate the q and k heads of y [..., (H + 2G) dim]."""
    shape, (H, G) = y.shape, heads[:2]
    y = y.reshape(-1, H + 2 * G, heads.dim)
    parts = list(y.split((H, G, G), dim=1))
    for i, gain in enumerate((heads.q_gain, heads.k_gain)):
        if gain is not None and heads.norm_first:
            parts[i] = F.rms_norm(parts[i], (heads.dim,), gain.to(y), eps)
        if heads.cos is not None and heads.sin is not None:
            row = torch.arange(len(y), device=y.device) % max(1, len(heads.cos))
            cos, sin = heads.cos[row, None].to(y), heads.sin[row, None].to(y)
            a, b = parts[i].unflatten(-1, (-1, 2)).unbind(-1)
            parts[i] = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        if gain is not None and not heads.norm_first:
            parts[i] = F.rms_norm(parts[i], (heads.dim,), gain.to(y), eps)
    return torch.cat(parts, dim=1).reshape(shape)


@torch.library.custom_op("loopmdm::norm_linear", mutates_args=())
def _fused_op(
    x: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    act: str,
    shape: list[int],
    cos: Tensor | None,
    sin: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    norm_first: bool,
    tile: list[int],
    ready: bool,
) -> Tensor:
    """shape: [H, G, head_dim], zeros where the projection is not qkv. ready: x is the product."""
    from ..kernels import norm_linear as kernel

    width = weight.shape[0]
    out = torch.empty(*x.shape[:-1], width // 2 if act == "swiglu" else width, dtype=x.dtype, device=x.device)
    cos, sin, q_gain, k_gain = (None if t is None else t.contiguous() for t in (cos, sin, q_gain, k_gain))
    H, G, dim = shape
    with torch.cuda.device_of(x):
        kernel.forward(
            x.contiguous().view(-1, x.shape[-1]),
            None if squares is None else squares.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            eps,
            act,
            Heads(H, G, dim, cos, sin, q_gain, k_gain, norm_first) if dim else None,
            tile_config(tile),
            compute_dtype(x),
            ready,
        )
    return out


@_fused_op.register_fake
def _(x, squares, weight, bias, eps, act, shape, cos, sin, q_gain, k_gain, norm_first, tile, ready):  # type: ignore[no-untyped-def]
    width = weight.shape[0]
    return x.new_empty(*x.shape[:-1], width // 2 if act == "swiglu" else width)


def _up(act: str, bias: bool, normed: bool = False, each: bool = False) -> Any:
    """The MLP's first projection, of a stream or of what is normed already; sizes that no tile divides."""

    def example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
        x = 2 * torch.randn(3, 37, 100, generator=rng) + 1
        made: dict[str, Any] = {"x": x.to(device, dtype)}
        made["weight"] = (torch.randn(136, 100, generator=rng) / 10).to(device, dtype)
        made |= {"squares": None if normed else square_sums(x).to(device), "eps": 1e-5, "act": act}
        return made | {"bias": torch.randn([3] * each + [136], generator=rng).to(device) if bias else None}

    return example


def _qkv(dim: int, norm_first: bool, period: int | None) -> Any:
    """qkv with grouped keys, per-head norms and a rotation whose table is one sequence's, or the whole batch's."""

    def example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
        x = 2 * torch.randn(2, 37, 96, generator=rng)
        angle = 6 * torch.rand(period or 74, dim // 2, generator=rng)
        gains = [torch.rand(dim, generator=rng) + 0.5 for _ in range(2)]
        cos, sin, q_gain, k_gain = (t.to(device) for t in (angle.cos(), angle.sin(), *gains))
        weight = torch.randn((4 + 2 * 2) * dim, 96, generator=rng) / 10
        return {
            "x": x.to(device, dtype),
            "squares": square_sums(x).to(device),
            "weight": weight.to(device, dtype),
            "bias": torch.randn(len(weight), generator=rng).to(device),
            "heads": Heads(4, 2, dim, cos, sin, q_gain, k_gain, norm_first),
        }

    return example


def _wide_up(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 65536, dim: int = 2048
) -> dict[str, Any]:
    """A SwiGLU's first projection, 8/3 as wide as the stream."""
    x = torch.randn(rows, dim, generator=rng).to(device, dtype)
    width = 2 * round(dim * 8 / 3 / 64) * 64
    weight = (torch.randn(width, dim, generator=rng) / dim**0.5).to(device, dtype)
    return {"x": x, "squares": square_sums(x), "weight": weight, "act": "swiglu"}


def _wide_qkv(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 65536, dim: int = 2048
) -> dict[str, Any]:
    """q, k and v of heads of 64, rotated, in sequences of 512."""
    x = torch.randn(rows, dim, generator=rng).to(device, dtype)
    weight = (torch.randn(3 * dim, dim, generator=rng) / dim**0.5).to(device, dtype)
    angle = 6 * torch.rand(min(rows, 512), 32, generator=rng).to(device)
    heads = Heads(dim // 64, dim // 64, 64, angle.cos(), angle.sin())
    return {"x": x, "squares": square_sums(x), "weight": weight, "heads": heads}


OP = Op(
    name="norm_linear",
    call=norm_linear,
    examples=(
        _up("swiglu", False),
        _up("none", True, normed=True),
        _up("swiglu", True, each=True),
        *(_up(act, True) for act in ACTS),
        _qkv(32, True, 37),
        _qkv(64, False, None),
        _qkv(128, True, 37),
    ),
    impls=("torch", "triton", "cublas"),
    dtypes=FUSED_DTYPES,
    tolerance={torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5},
    library=no_cublas,
    problems=(_wide_up, _wide_qkv),
    sizes={
        "cuda": tuple({"rows": rows, "dim": dim} for rows in (512, 8192) for dim in (512, 1024, 2048))
        + tuple({"dim": dim} for dim in (512, 1024, 2048))
    },
)
