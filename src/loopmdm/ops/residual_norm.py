"""Residual add and norm: between attention and MLP of every block, and at an anchored loop boundary."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, nearest
from . import native
from .contract import Op, extension

KINDS = ("rmsnorm", "layernorm")
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUSED_MAX_DIM = 4096


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rmsnorm",
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

        summed = x + branch
        normed = norm(summed) * weight + bias

    The sum is formed in fp32 and stored in x's dtype; the statistics are fp32 and those of the *stored* sum.
    float64 inputs are computed in float64 (torch implementation only). Differentiable through both outputs in x,
    branch, weight and bias ("triton" once); the backward reads summed, which must not be changed before it.

    Args:
        x: residual stream [..., D], any floating dtype, often float32.
        branch: what attention or the MLP adds, x's shape, any floating dtype; None adds nothing.
        weight: gain [D], None for 1.
        bias: [D], None for 0.
        kind: "rmsnorm", s / sqrt(mean(s²) + eps) (Zhang and Sennrich 2019, equation 4), or "layernorm",
            (s - mean(s)) / sqrt(var(s) + eps) with the biased variance (Ba et al. 2016, equations 3 and 4).
        eps: added to the mean square or variance, in their unit (that of s squared).
        out_dtype: dtype of normed; x's by default.
        impl: "auto", "torch", "triton" (bfloat16, float16, float32; D up to 4096) or "cpp" (CPU; bfloat16 and float32
            in any mixture).

    Returns:
        summed [..., D] in x's dtype (x itself where branch is None) and normed [..., D] in out_dtype.

    Raises:
        InputError: a shape, dtype or name that does not fit, or an `impl` that cannot run here.
    """
    out_dtype = out_dtype or x.dtype
    _check(x, branch, weight, bias, kind, eps, out_dtype)
    dim = x.shape[-1]
    training = native.differentiating(x, branch, weight, bias)
    size = {"numbers": x.numel(), "rows": x.numel() // dim, "dim": dim, "centred": int(kind == "layernorm")}
    size |= {"training": int(training), "level_below_4": native.level_below_4()}

    def refuses(which: str) -> str | None:
        return _refuses(which, x, branch, weight, bias, out_dtype=out_dtype)

    choice = OP.choose(impl, x.device, x.dtype, refuses, **size)
    if choice.impl == "cpp":
        if training:
            summed, normed = _Native.apply(x, branch, weight, bias, kind, eps, out_dtype)
            return (x if branch is None else summed), normed
        return _cpp(x, branch, weight, bias, kind == "layernorm", eps, out_dtype)
    if choice.impl == "triton":
        reason = _not_fused(x, branch, weight, bias)
        if reason is None:
            rows, warps = choice.config.get("rows", 0), choice.config.get("warps", 0)
            summed, normed, _, _ = _forward_op(
                x, branch, weight, bias, kind == "layernorm", eps, out_dtype, rows, warps
            )
            return (x if branch is None else summed), normed
        if impl != "auto":
            raise InputError(f"residual_norm: impl='triton' cannot run: {reason}")
    return _reference(x, branch, weight, bias, kind, eps, out_dtype)


def _check(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    shape = x.shape
    if not shape or not shape[-1]:
        raise InputError(f"residual_norm: x is {list(shape)}; it must be [..., D] with D of at least 1")
    if not (x.dtype.is_floating_point and out_dtype.is_floating_point):
        raise InputError(f"residual_norm: x is {x.dtype} and out_dtype {out_dtype}; both must be floating point")
    if branch is not None and branch.shape != shape:
        raise InputError(
            f"residual_norm: branch is {list(branch.shape)} and x is {list(shape)}; they must be equal, "
            "expand the branch first"
        )
    if weight is not None and weight.shape != shape[-1:]:
        raise InputError(f"residual_norm: weight is {list(weight.shape)}; for x {list(shape)} it must be [{shape[-1]}]")
    if bias is not None and bias.shape != shape[-1:]:
        raise InputError(f"residual_norm: bias is {list(bias.shape)}; for x {list(shape)} it must be [{shape[-1]}]")
    if kind not in KINDS:
        raise InputError(f"residual_norm has no kind {kind!r}{nearest(kind, KINDS)}")
    if eps < 0:
        raise InputError(f"residual_norm: eps is {eps}; it must not be negative")


def _refuses(
    impl: str,
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    **_: Any,
) -> str | None:
    """Why "cpp" cannot take this problem, or None; what "triton" cannot take is said by `_not_fused`."""
    if impl != "cpp":
        return None
    for t in (x, branch, weight, bias):
        if t is not None and not (t.dtype in native.DTYPES and t.is_cpu):
            return f"a tensor is {t.dtype} on {t.device}, it takes bfloat16 and float32 on the CPU; use impl='torch'"
    if out_dtype is not None and out_dtype not in native.DTYPES:
        return f"out_dtype is {out_dtype}, it gives bfloat16 and float32; use impl='torch'"
    if not x.numel():
        return "x is empty; use impl='torch'"
    return native.watched(x, branch, weight, bias, trains=True)


def _cpp(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centre: bool,
    eps: float,
    out_dtype: torch.dtype,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """stats, fp32 [rows, 2], receives what the backward needs."""
    summed = x
    if branch is not None:
        x, branch = x.contiguous(), branch.contiguous()
        summed = torch.empty_like(x)
    x, at = _rows_of(x)
    weight, bias = native.contiguous(weight, bias)
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    extension().residual_norm_cpu(
        _pointers(x, branch, weight, bias, None if branch is None else summed, normed, stats),
        at,
        eps,
        (centre, *[t is not None and t.dtype is torch.bfloat16 for t in (x, branch, weight, bias, normed)]),
        torch.get_num_threads(),
    )
    return summed, normed


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _rows_of(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """x, copied where two strides cannot say where its rows are; outer and inner rows, D, and the rows' strides."""
    dim = x.shape[-1]
    if not x.is_contiguous():
        found = _two_strides(x)
        if found is not None:
            return x, (found[0], found[1], dim, found[2], found[3])
        x = x.contiguous()
    return x, (1, x.numel() // dim, dim, 0, dim)


def _two_strides(x: Tensor) -> tuple[int, int, int, int] | None:
    """(outer rows, inner rows, outer's stride, inner's) of x [.., H, D], heads inside a projection, or None."""
    if x.ndim < 3 or x.stride(-1) != 1:
        return None
    outer = 1
    for i in range(x.ndim - 2):
        if i < x.ndim - 3 and x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return None
        outer *= x.shape[i]
    return outer, x.shape[-2], x.stride(-3), x.stride(-2)


def _not_fused(x: Tensor, *others: Tensor | None) -> str | None:
    tensors = [x, *(t for t in others if t is not None)]
    if x.shape[-1] > FUSED_MAX_DIM:
        return f"D is {x.shape[-1]}, the kernel holds rows of up to {FUSED_MAX_DIM}; use impl='torch'"
    for t in tensors:
        if t.dtype not in FUSED_DTYPES:
            return f"a tensor is {t.dtype}, the kernel takes bfloat16, float16 and float32; use impl='torch'"
        if t.device != x.device:
            return f"x is on {x.device} and another tensor on {t.device}; move them to one device"
    return None


def _reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    summed = x if branch is None else _to(x + branch, x.dtype)
    dim = x.shape[-1:]
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    same = x.dtype is out_dtype and all(t is None or t.dtype is x.dtype for t in (weight, bias))
    if same and not x.is_cpu and (kind == "layernorm" or bias is None):
        # torch's own GPU norms take statistics in fp32 and round once, so 16 bits need no fp32 copy;
        # its CPU layer norm adds the gradients of weight and bias in 16 bits, and a bias after RMS rounds twice
        compute = x.dtype
    wide = _to(summed, compute)
    weight = None if weight is None else _to(weight, compute)
    bias = None if bias is None else _to(bias, compute)
    if kind == "layernorm":
        normed = F.layer_norm(wide, dim, weight, bias, eps)
    elif x.is_cpu and torch.is_grad_enabled() and not native.transformed():
        normed = _RMSNorm.apply(wide, weight, bias, eps)
    else:
        normed = _rms_norm(wide, weight, bias, eps)
    return summed, _to(normed, out_dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # a Tensor.to that changes nothing costs as much as a small kernel
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


class _RMSNorm(torch.autograd.Function):
    """RMS norm whose backward borrows layer norm's fused CPU kernel.

    torch has no fused RMS norm on CPU and differentiates its parts: 4 to 6 times the time of layer norm's
    backward. With mean = 0 that kernel returns dweight and dbias as they are, and dx short of one term,
    since it also removes the mean of dnormed * weight: rstd * mean(dnormed * weight) is added back.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * rstd
        if weight is not None:
            normed *= weight
        if bias is not None:
            normed += bias
        ctx.save_for_backward(x, weight, bias, rstd)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, bias, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = functools.partial(_rms_norm, eps=ctx.eps)
            return *native.gradients_by_torch(formula, (x, weight, bias), (grad,), ctx.needs_input_grad[:3]), None
        wanted = [True, weight is not None, bias is not None]
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], torch.zeros_like(rstd), rstd, weight, bias, wanted
        )
        removed = grad.sum(-1, keepdim=True) if weight is None else (grad @ weight).unsqueeze(-1)
        return dx.add_(removed.mul_(rstd).div_(x.shape[-1])), dweight, dbias, None


class _Native(torch.autograd.Function):
    """ "cpp" with its gradients."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, kind, eps, out_dtype):  # type: ignore[no-untyped-def]
        stats = x.new_empty(x.numel() // x.shape[-1], 2, dtype=torch.float32)
        summed, normed = _cpp(x, branch, weight, bias, kind == "layernorm", eps, out_dtype, stats)
        ctx.save_for_backward(summed, weight, bias, stats)
        ctx.kind, ctx.eps, ctx.branch_dtype = kind, eps, None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        if branch is None:
            return None, normed
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(summed)
        return summed, normed

    @staticmethod
    def backward(ctx, dsummed, dnormed):  # type: ignore[no-untyped-def]
        summed, weight, bias, stats = ctx.saved_tensors
        needs, (kind, eps, branch_dtype) = ctx.needs_input_grad, (ctx.kind, ctx.eps, ctx.branch_dtype)
        rest = (None, None, None)
        if dnormed is None:
            dbranch = None if dsummed is None or branch_dtype is None else _to(dsummed, branch_dtype)
            return dsummed, dbranch, None, None, *rest
        if native.torch_must_see(dsummed, dnormed):
            dx, _, dweight, dbias = native.gradients_by_torch(
                functools.partial(_reference, kind=kind, eps=eps, out_dtype=dnormed.dtype),
                (summed, None, weight, bias),
                (dsummed, dnormed),
                (any(needs[:2]), False, *needs[2:4]),
            )
            dbranch = None if branch_dtype is None or dx is None else _to(dx, branch_dtype)
            return dx, dbranch, dweight, dbias, *rest
        x, at = _rows_of(summed)
        dsummed, dnormed, weight = native.contiguous(dsummed, dnormed, weight)
        dx = x.new_empty(x.shape)
        dbranch = None if branch_dtype in (None, x.dtype) else x.new_empty(x.shape, dtype=branch_dtype)
        dweight, dbias = (stats.new_empty(at[2]) if need else None for need in needs[2:4])
        extension().residual_norm_backward_cpu(
            _pointers(x, weight, stats, dsummed, dnormed, dx, dbranch, dweight, dbias),
            at,
            (
                kind == "layernorm",
                *[t is not None and t.dtype is torch.bfloat16 for t in (x, dbranch, weight, dnormed)],
            ),
            torch.get_num_threads(),
        )
        if branch_dtype is not None and dbranch is None:
            dbranch = dx
        dweight, dbias = (g if g is None else _to(g, t.dtype) for g, t in ((dweight, weight), (dbias, bias)))
        return dx, dbranch, dweight, dbias, *rest


@torch.library.custom_op("loopmdm::residual_norm", mutates_args=())
def _forward_op(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centre: bool,
    eps: float,
    out_dtype: torch.dtype,
    rows: int,
    warps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(summed, normed, mean, rstd): summed empty without a branch, mean without centring. rows, warps 0: default."""
    from ..kernels import residual_norm as kernel

    branch, weight, bias = (None if t is None else t.contiguous() for t in (branch, weight, bias))
    with torch.cuda.device_of(x):
        return kernel.forward(x.contiguous(), branch, weight, bias, centre, eps, out_dtype, _config(rows, warps))


@_forward_op.register_fake
def _(x, branch, weight, bias, centre, eps, out_dtype, rows, warps):  # type: ignore[no-untyped-def]
    n_rows = x.numel() // x.shape[-1]
    summed = x.new_empty(0 if branch is None else x.shape)
    mean = x.new_empty(n_rows if centre else 0, dtype=torch.float32)
    return summed, x.new_empty(x.shape, dtype=out_dtype), mean, x.new_empty(n_rows, dtype=torch.float32)


@torch.library.custom_op("loopmdm::residual_norm_backward", mutates_args=())
def _backward_op(
    dsummed: Tensor | None,
    dnormed: Tensor,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    centre: bool,
    has_bias: bool,
    branch_dtype: torch.dtype | None,
    rows: int,
    warps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dweight, dbias), empty where there is none; branch_dtype None: dbranch would equal dx."""
    from ..kernels import residual_norm as kernel

    dsummed = None if dsummed is None else dsummed.contiguous()
    weight = None if weight is None else weight.contiguous()
    with torch.cuda.device_of(summed):
        return kernel.backward(
            dsummed,
            dnormed.contiguous(),
            summed.contiguous(),
            weight,
            mean,
            rstd,
            centre,
            has_bias,
            branch_dtype,
            _config(rows, warps),
        )


@_backward_op.register_fake
def _(dsummed, dnormed, summed, weight, mean, rstd, centre, has_bias, branch_dtype, rows, warps):  # type: ignore[no-untyped-def]
    dim = summed.shape[-1]
    dbranch = summed.new_empty(0 if branch_dtype is None else summed.shape, dtype=branch_dtype or summed.dtype)
    dweight = summed.new_empty(0 if weight is None else dim, dtype=torch.float32)
    return summed.new_empty(summed.shape), dbranch, dweight, summed.new_empty(dim * has_bias, dtype=torch.float32)


def _config(rows: int, warps: int) -> dict[str, int]:
    return {name: value for name, value in (("rows", rows), ("warps", warps)) if value}


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, branch, weight, bias, ctx.centre, _, _, ctx.rows, ctx.warps = inputs
    summed, _, mean, rstd = output
    ctx.save_for_backward(x if branch is None else summed, weight, mean, rstd)
    ctx.mark_non_differentiable(*([summed] if branch is None else []), mean, rstd)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, weight, bias)]
    # an anchored loop boundary uses normed alone: no zeros to write and read for the other
    ctx.set_materialize_grads(False)


def _backward(ctx, dsummed, dnormed, *_):  # type: ignore[no-untyped-def]
    summed, weight, mean, rstd = ctx.saved_tensors
    x_dtype, branch_dtype, weight_dtype, bias_dtype = ctx.dtypes
    rest = (None,) * 5
    if dnormed is None:
        dbranch = None if dsummed is None or branch_dtype is None else dsummed.to(branch_dtype)
        return dsummed, dbranch, None, None, *rest
    own_dtype = None if branch_dtype == x_dtype else branch_dtype
    dx, dbranch, dweight, dbias = _backward_op(
        dsummed, dnormed, summed, weight, mean, rstd, ctx.centre, bias_dtype is not None, own_dtype, ctx.rows, ctx.warps
    )
    if own_dtype is None:
        dbranch = None if branch_dtype is None else dx
    dweight = None if weight_dtype is None else dweight.to(weight_dtype)
    dbias = None if bias_dtype is None else dbias.to(bias_dtype)
    return dx, dbranch, dweight, dbias, *rest


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _uniform(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """RMS norm, everything in one dtype."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    problem = {"x": 2 * draw(3, 37, 100) + 1, "branch": draw(3, 37, 100), "weight": draw(100) + 1, "bias": draw(100)}
    return {name: value.to(device, dtype) for name, value in problem.items()}


def _as_trained(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """Layer norm without bias on an fp32 stream, branch and result in `dtype`: a DiT block under mixed precision."""
    problem = _uniform(device, torch.float32, rng)
    return {**problem, "branch": problem["branch"].to(dtype), "bias": None, "kind": "layernorm", "out_dtype": dtype}


def _norm_alone(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """Layer norm with nothing to add."""
    return {**_uniform(device, dtype, rng), "branch": None, "kind": "layernorm"}


def _stream(
    device: torch.device,
    dtype: torch.dtype,
    rng: torch.Generator,
    rows: int = 65536,
    dim: int = 4096,
    numbers: int | None = None,
    centred: int = 0,
) -> dict[str, Any]:
    """As between attention and MLP: on a GPU a 16-bit branch and result beside an fp32 stream, else one dtype.

    With numbers, rows of 512 or as many as there are.
    """
    if numbers is not None:
        dim = min(512, numbers)
        rows = numbers // dim
    half = torch.bfloat16 if dtype == torch.float32 and device.type == "cuda" else dtype
    x, branch = (torch.randn(rows, dim, generator=rng) for _ in range(2))
    weight = torch.rand(dim, generator=rng) + 0.5
    made = {"x": x.to(device, dtype), "branch": branch.to(device, half), "weight": weight.to(device), "out_dtype": half}
    return made | ({"kind": "layernorm"} if centred else {})


OP = Op(
    name="residual_norm",
    call=residual_norm,
    examples=(_uniform, _as_trained, _norm_alone),
    impls=("torch", "triton", "cpp"),
    dtypes=FUSED_DTYPES,
    refuses=_refuses,
    tolerance={torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5},
    grads=("x", "branch", "weight", "bias"),
    problems=(_stream,),
    sizes={
        "cuda": tuple({"rows": rows, "dim": dim} for rows in (512, 8192) for dim in (512, 1024, 2048, 4096))
        + tuple({"dim": dim} for dim in (512, 1024, 2048, 4096)),
        "cpu": tuple(
            {"numbers": 2**n, "centred": centred, "training": training}
            for training in (0, 1)
            for centred in (0, 1)
            for n in (14, 16, 18, 21, 25)
        ),
    },
)
