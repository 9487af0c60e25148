"""Projection back into the residual stream: attention's output and the MLP's second half, with the next norm's sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .contract import Op, interpreting, unavailable

GROUP = 64
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = ("block_m", "block_n", "block_k", "warps", "stages", "swath")


def linear_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    *,
    gate: Tensor | None = None,
    less: Tensor | None = None,
    copy_gain: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a projection to the residual stream, and take the sums that RMS norm needs of the result.

        out = x + gate * (h @ weight.T + bias) - less

    Forward only: a plan's inner step, not a layer. The sum is formed in fp32 and stored in x's dtype.

    Args:
        h: [..., K], the projection's input, any floating dtype.
        weight: [D, K] in h's dtype, row-major as `nn.Linear` keeps it.
        bias: [D] of any floating dtype, None for 0.
        x: residual stream [..., D], often float32 beside a 16-bit h.
        gate: [D] of any floating dtype, or [P, D]: the rows of x, flattened, are P sequences of one length, each with
            its own; None for 1.
        less: fp32 [...], a number a row to take off what is added, such as its mean in a stream kept at mean 0.
        copy_gain: of the norm that reads out next, in the form of gate; None for 1. If there are both, in one form.
        impl: "auto", "torch", "triton" or "cublas", which has torch multiply and does the rest in one kernel (on a CPU
            in torch's); both kernels take bfloat16, float16 and float32.

    Returns:
        out [..., D] in x's dtype; its copy out * copy_gain in h's dtype (out itself where that is the same); and
        `square_sums(out)`, without the gain, fp32 [..., ceil(D / 64)].

    Raises:
        InputError: a shape or dtype that does not fit, or an `impl` that cannot run here.
    """
    _check(h, weight, bias, x)
    check_vectors("linear_residual", x, gate=gate, copy_gain=copy_gain)
    if less is not None and less.shape != x.shape[:-1]:
        raise InputError(
            f"linear_residual: less is {list(less.shape)}; it must be {list(x.shape[:-1])}, a number a row"
        )
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    choice = OP.choose(impl, x.device, h.dtype, rows=rows, dim=dim, depth=h.shape[-1])
    if not by_kernel(choice.impl, x):
        return _reference(h, weight, bias, x, gate, less, copy_gain)
    reason = not_fused(h, weight, bias, x, gate, less, copy_gain)
    if reason is not None:
        if impl != "auto":
            raise InputError(f"linear_residual: impl={impl!r} cannot run: {reason}")
        return _reference(h, weight, bias, x, gate, less, copy_gain)
    ready = choice.impl == "cublas"
    if ready:
        h = F.linear(h, weight)
    out, copy, squares = _fused_op(h, weight, bias, x, gate, less, copy_gain, tile_list(choice.config), ready)
    return out, (out if h.dtype == x.dtype and copy_gain is None else copy), squares


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


def by_kernel(impl: str, x: Tensor) -> bool:
    """Whether `impl` launches a kernel of ours: "cublas" has nothing but torch for its epilogue on a CPU."""
    return impl == "triton" or (impl == "cublas" and (x.is_cuda or interpreting()))


def no_cublas(impl: str, device: torch.device) -> str | None:
    """Why "cublas" cannot run there: `Op.library` of the ops that multiply."""
    return unavailable("triton", device) if device.type == "cuda" else None


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


def check_vectors(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """Vectors over the columns of x, [D] or [P, D] for P sequences of rows, all in one form."""
    given = {name: v for name, v in vectors.items() if v is not None}
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    for name, v in given.items():
        if v.shape[-1:] != (dim,) or v.dim() > 2 or (v.dim() == 2 and (rows % len(v) if len(v) else rows)):
            raise InputError(
                f"{op}: {name} is {list(v.shape)}; it must be [{dim}], or [P, {dim}] P a divisor of the {rows} rows"
            )
    if len({v.shape for v in given.values()}) > 1:
        raise InputError(
            f"{op}: {' and '.join(given)} must have one shape, not {[list(v.shape) for v in given.values()]}"
        )


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


def of_rows(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [D], or [P, D] of P sequences, as what x [..., D] can be multiplied with."""
    if vector.dim() == 1:
        return vector
    each = x.shape[:-1].numel() // max(1, len(vector))
    return vector.repeat_interleave(each, dim=0).view(*x.shape[:-1], vector.shape[-1])


def copy_of(out: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """out * gain in dtype, the product taken in at least fp32; out itself where nothing changes."""
    if gain is None:
        return out.to(dtype)
    wide = torch.promote_types(out.dtype, torch.float32)
    return (out.to(wide) * of_rows(gain.to(wide), out)).to(dtype)


def _reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    less: Tensor | None,
    copy_gain: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    branch = F.linear(h, weight)
    wide = torch.promote_types(torch.promote_types(branch.dtype, x.dtype), torch.float32)
    branch = branch.to(wide) if bias is None else branch.to(wide) + bias.to(wide)
    if gate is not None:
        branch = branch * of_rows(gate.to(wide), x)
    if less is not None:
        branch = branch - less[..., None].to(wide)
    out = (x.to(wide) + branch).to(x.dtype)
    return out, copy_of(out, copy_gain, h.dtype), square_sums(out)


@torch.library.custom_op("loopmdm::linear_residual", mutates_args=())
def _fused_op(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    less: Tensor | None,
    copy_gain: Tensor | None,
    tile: list[int],
    ready: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, copy, squares); copy is empty where out is one already. ready: h is the product."""
    from ..kernels import linear_residual as kernel

    x, dim = x.contiguous(), x.shape[-1]
    has_copy = h.dtype != x.dtype or copy_gain is not None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copy = torch.empty(x.shape if has_copy else 0, dtype=h.dtype, device=x.device)
    squares = torch.empty(*x.shape[:-1], -(-dim // GROUP), dtype=torch.float32, device=x.device)
    bias, gate, less, copy_gain = (None if t is None else t.contiguous() for t in (bias, gate, less, copy_gain))
    with torch.cuda.device_of(x):
        kernel.forward(
            h.contiguous().view(-1, h.shape[-1]),
            weight.contiguous(),
            bias,
            gate,
            less,
            copy_gain,
            x,
            out,
            copy if has_copy else None,
            squares,
            tile_config(tile),
            compute_dtype(h),
            ready,
        )
    return out, copy, squares


@_fused_op.register_fake
def _(h, weight, bias, x, gate, less, copy_gain, tile, ready):  # type: ignore[no-untyped-def]
    copy = x.new_empty(x.shape if h.dtype != x.dtype or copy_gain is not None else 0, dtype=h.dtype)
    squares = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // GROUP), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), copy, squares


def _as_run(vectors: str) -> Any:
    """An fp32 stream beside operands in `dtype`, with a bias, sizes that no tile divides.

    vectors: "none", a "gain" for all rows, gain, gate and less of "each" sequence.
    """

    def example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng)

        problem = {"h": draw(3, 37, 100), "weight": draw(168, 100) / 10}
        return {n: t.to(device, dtype) for n, t in problem.items()} | {
            "bias": draw(168).to(device),
            "x": (3 * draw(3, 37, 168) + 1).to(device),
            "gate": draw(3, 168).to(device) if vectors == "each" else None,
            "less": draw(3, 37).to(device) if vectors == "each" else None,
            "copy_gain": None if vectors == "none" else draw(*[3] * (vectors == "each"), 168).to(device),
        }

    return example


def _one_dtype(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """The stream in the operands' dtype, no bias, more rows than one tile of any size."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    return {"h": draw(700, 64), "weight": draw(128, 64) / 8, "bias": None, "x": draw(700, 128)}


def _out(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 65536, dim: int = 2048, wider: float = 1
) -> dict[str, Any]:
    """Attention's projection into an fp32 stream."""
    depth = round(dim * wider / 64) * 64
    h = torch.randn(rows, depth, generator=rng).to(device, dtype)
    weight = (torch.randn(dim, depth, generator=rng) / depth**0.5).to(device, dtype)
    return {"h": h, "weight": weight, "bias": None, "x": torch.randn(rows, dim, generator=rng).to(device)}


def _down(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 65536, dim: int = 2048
) -> dict[str, Any]:
    """The MLP's, from 8/3 of the stream's width."""
    return _out(device, dtype, rng, rows, dim, 8 / 3)


OP = Op(
    name="linear_residual",
    call=linear_residual,
    examples=(_as_run("each"), _as_run("gain"), _as_run("none"), _one_dtype),
    impls=("torch", "triton", "cublas"),
    dtypes=FUSED_DTYPES,
    tolerance={torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5},
    library=no_cublas,
    problems=(_out, _down),
    sizes={
        "cuda": tuple({"rows": rows, "dim": dim} for rows in (512, 8192) for dim in (512, 1024, 2048))
        + tuple({"dim": dim} for dim in (512, 1024, 2048))
    },
)
