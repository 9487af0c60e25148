"""Bidirectional attention over a packed qkv projection: our kernel, torch's backends, flash-attn, chosen by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import InputError
from ..kernels import tuned
from .contract import Op, interpreting
from .spans import Spans, packed, spans_of

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUSED_HEAD_DIMS = (32, 64, 128)
HALF = (torch.bfloat16, torch.float16)
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PACKING = ("varlen", "flash_attn")
TILE = ("block_m", "block_n", "warps", "stages")


def attention(
    qkv: Tensor,
    heads: int,
    groups: int,
    spans: Spans | tuple[Tensor, Tensor] | None = None,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale q k.T) v, every query over a range of keys.

    Query head h reads key and value head h // (H / G) (Ainslie et al. 2023, grouped queries). What each impl takes:

        torch       everything; float64 too; differentiable. torch chooses the backend
        triton      bfloat16, float16, float32; head_dim 32, 64 or 128; any spans; scale above 0; no gradients
        cudnn       bfloat16, float16 on CUDA; no spans
        flash       bfloat16, float16 on CUDA, any floating dtype on CPU; no spans
        efficient   bfloat16, float16, float32 on CUDA; any spans, through a mask [B, 1, T, T]; H = G
        varlen      bfloat16, float16 on CUDA; spans that `packed` made; torch 2.11 or later
        flash_attn  the same, by the flash-attn package (extra `flash`)

    All but triton are differentiable where the library's kernel is. varlen and flash_attn let runs of padding attend to
    themselves and discard the result.

    Args:
        qkv: [B, T, H + 2G, head_dim], query heads, then key heads, then value heads, any floating dtype.
        heads, groups: H, and G, which divides H.
        spans: (first, last), int32 or int64 [B, T] (`spans_of` makes them of masks and document ids): query i attends
            to the keys first <= j < last; None is all. A query without a key gets 0.
        scale: of the scores; head_dim^-0.5 by default.
        impl: "auto" or one of the names above. "auto" takes the first measured row of the table that takes the problem.

    Returns:
        [B, T, H head_dim] in qkv's dtype.

    Raises:
        InputError: a shape or dtype that does not fit, or an `impl` that cannot run here or cannot take this.
    """
    _check(qkv, heads, groups, spans)
    batch, tokens, _, head_dim = qkv.shape
    scale = head_dim**-0.5 if scale is None else scale
    choice = OP.choose(
        impl,
        qkv.device,
        qkv.dtype,
        lambda name: _refuses(name, qkv, heads, groups, spans, scale),
        head_dim=head_dim,
        tokens=tokens,
        batch=batch,
        spans=int(spans is not None),
    )
    first, last = (None, None) if spans is None else spans[:2]
    if choice.impl == "triton":
        return _fused_op(qkv, first, last, heads, groups, scale, False, _tile_list(choice.config))[0]
    q, k, v = qkv.split((heads, groups, groups), dim=2)
    if choice.impl in PACKING:
        out = _packing(choice.impl, q, k, v, spans, scale)
    elif choice.impl == "torch":
        out = _sdpa(q, k, v, spans, scale)
    else:
        with sdpa_kernel(BACKENDS[choice.impl]):
            out = _sdpa(q, k, v, spans, scale)
    if first is not None and last is not None:
        out = torch.where((_range(first, last, tokens) > 0)[..., None, None], out, 0.0)
    return out.flatten(2)


def _check(qkv: Tensor, heads: int, groups: int, spans: Spans | tuple[Tensor, Tensor] | None) -> None:
    if heads < 1 or groups < 1 or heads % groups:
        raise InputError(
            f"attention: {heads} query heads and {groups} key heads; the first must be a multiple of the second"
        )
    if qkv.ndim != 4 or qkv.shape[2] != heads + 2 * groups or not qkv.shape[3]:
        raise InputError(
            f"attention: qkv is {list(qkv.shape)}; with {heads} query and {groups} key heads it must be "
            f"[B, T, {heads + 2 * groups}, head_dim]"
        )
    if not qkv.dtype.is_floating_point:
        raise InputError(f"attention: qkv is {qkv.dtype}; it must be floating point")
    for end in () if spans is None else spans[:2]:
        if end.shape != qkv.shape[:2] or end.dtype not in (torch.int32, torch.int64) or end.device != qkv.device:
            raise InputError(
                f"attention: spans hold {end.dtype} {list(end.shape)} on {end.device}; they must be two int32 or int64 "
                f"tensors {list(qkv.shape[:2])} on {qkv.device}"
            )


def _range(first: Tensor, last: Tensor, tokens: int) -> Tensor:
    """[B, T], how many keys each query may look at; below 1 where there are none."""
    return last.clamp(max=tokens) - first.clamp(min=0)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans | tuple[Tensor, Tensor] | None, scale: float
) -> Tensor:  # q [B, T, H, hd], k and v [B, T, G, hd] -> [B, T, H, hd]
    mask = None
    if spans is not None:
        first, last = spans[:2]
        keys = torch.arange(q.shape[1], device=q.device)
        # a query without a key sees them all here, so that no softmax of nothing makes NaN, and is zeroed later
        none = _range(first, last, q.shape[1]) < 1
        mask = ((first[..., None] <= keys) & (keys < last[..., None]) | none[..., None])[:, None]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouped)
    return y.transpose(1, 2)


def _packing(
    impl: str, q: Tensor, k: Tensor, v: Tensor, spans: Spans | tuple[Tensor, Tensor] | None, scale: float
) -> Tensor:
    batch, tokens = q.shape[:2]
    if impl == "flash_attn" and spans is None:
        return importlib.import_module("flash_attn").flash_attn_func(q, k, v, softmax_scale=scale)
    if isinstance(spans, Spans) and spans.cu_seqlens is not None:
        ends, longest = spans.cu_seqlens, spans.longest
    else:
        ends, longest = torch.arange(0, batch * tokens + 1, tokens, device=q.device, dtype=torch.int32), tokens
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    if impl == "flash_attn":
        varlen = importlib.import_module("flash_attn").flash_attn_varlen_func
        out = varlen(*flat, ends, ends, longest, longest, softmax_scale=scale)
    else:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        out = varlen(*flat, ends, ends, longest, longest, scale=scale, enable_gqa=True)
    return out.unflatten(0, (batch, tokens))


def _refuses(
    impl: str,
    qkv: Tensor,
    heads: int,
    groups: int,
    spans: Spans | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> str | None:
    """Why `impl` cannot take this problem, or None."""
    head_dim = qkv.shape[3]
    if impl in ("torch", "auto"):
        return None
    if impl == "triton":
        if qkv.dtype not in FUSED_DTYPES:
            return f"qkv is {qkv.dtype}, the kernel takes bfloat16, float16 and float32; use impl='torch'"
        if head_dim not in FUSED_HEAD_DIMS:
            return f"head_dim is {head_dim}, the kernel has 32, 64 and 128; use impl='torch'"
        if scale is not None and not scale > 0:
            return f"scale is {scale}, the kernel needs one above 0; use impl='torch'"
        if torch.is_grad_enabled() and qkv.requires_grad:
            return "it has no backward; use impl='torch' or torch.no_grad()"
        return None
    wide = (*HALF, torch.float32) if impl == "efficient" else HALF
    if qkv.dtype not in wide and not (impl == "flash" and qkv.device.type == "cpu"):
        return (
            f"qkv is {qkv.dtype}, it takes {', '.join(str(d).removeprefix('torch.') for d in wide)}; use impl='torch'"
        )
    if impl == "efficient" and heads != groups:
        return f"it has no grouped heads, and there are {heads} query and {groups} key heads; use impl='torch'"
    if impl in ("cudnn", "flash") and spans is not None:
        return "it takes no spans; use impl='triton', 'varlen' or 'torch'"
    if impl in PACKING:
        if spans is not None and not (isinstance(spans, Spans) and spans.cu_seqlens is not None):
            return "its spans must be packed; call packed(spans) once a pass, or use impl='triton'"
        if head_dim % 8 or head_dim > 256:
            return f"head_dim is {head_dim}, it takes multiples of 8 up to 256; use impl='torch'"
    if not qkv.numel():
        return "there are no tokens; use impl='torch'"
    if impl in BACKENDS and qkv.device.type == "cuda" and not torch.compiler.is_compiling():
        return _torch_refuses(impl, qkv, heads, groups, spans)
    return None


def _torch_refuses(impl: str, qkv: Tensor, heads: int, groups: int, spans: Any) -> str | None:
    q, k, v = (t.transpose(1, 2) for t in qkv.split((heads, groups, groups), dim=2))
    mask = None
    if spans is not None:  # its shape, dtype and last stride are all that is asked for
        batch, _, tokens, _ = q.shape
        mask = torch.ones((1, 1, 1, tokens), dtype=torch.bool, device=q.device).expand(batch, 1, tokens, tokens)
    params = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, heads != groups)
    can = getattr(torch.backends.cuda, f"can_use_{impl}_attention")
    if can(params):
        return None
    return f"torch's {impl} attention does not take it; torch.backends.cuda.can_use_{impl}_attention says why"


@tuned.constant_in_graphs
def _unavailable(impl: str, device: torch.device) -> str | None:
    """Why a library's kernel cannot run on `device`, or None."""
    if impl == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'loopmdm[flash]')"
    if impl == "varlen":
        reason = _varlen_missing()
        if reason is not None:
            return reason
    if device.type != "cuda":
        return None if impl == "flash" and device.type == "cpu" else f"it needs CUDA, the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0) and impl != "efficient":
        return f"it needs sm_80 or later, this is {tuned.arch(device)}"
    return None


def _varlen_missing() -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no varlen_attn; torch 2.11 has"
    found = inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters
    missing = {"scale", "enable_gqa"} - set(found)
    return (
        f"the varlen_attn of this torch has no {' and no '.join(sorted(missing))}; a later one has" if missing else None
    )


def _tile_list(config: Any) -> list[int]:
    """A table row's configuration as numbers, which is what an op's schema can carry; 0 is the kernel's own choice."""
    return [config.get(name, 0) for name in TILE]


@torch.library.custom_op("loopmdm::attention", mutates_args=())
def _fused_op(
    qkv: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    heads: int,
    groups: int,
    scale: float,
    with_lse: bool,
    tile: list[int],
) -> tuple[Tensor, Tensor]:
    """(out, lse): lse fp32 [B, H, T], natural logarithms, empty unless asked for."""
    from ..kernels import attention as kernel

    if qkv.stride(3) != 1 or qkv.stride(0) != qkv.shape[1] * qkv.stride(1):
        qkv = qkv.contiguous()
    first, last = (None if t is None else t.contiguous() for t in (first, last))
    config = {name: number for name, number in zip(TILE, tile, strict=True) if number}
    # 16-bit products are garbage in the interpreter
    compute = "float32" if interpreting() else str(qkv.dtype).removeprefix("torch.")
    with torch.cuda.device_of(qkv):
        return kernel.forward(qkv, first, last, heads, groups, scale, with_lse, config, compute)


@_fused_op.register_fake
def _(qkv, first, last, heads, groups, scale, with_lse, tile):  # type: ignore[no-untyped-def]
    batch, tokens, _, head_dim = qkv.shape
    lse = qkv.new_empty((batch, heads, tokens) if with_lse else 0, dtype=torch.float32)
    return qkv.new_empty((batch, tokens, heads * head_dim)), lse


def _draw(device: torch.device, dtype: torch.dtype, rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng).to(device, dtype)


def _grouped(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """More than one tile of queries and a part of one, grouped heads."""
    return {"qkv": _draw(device, dtype, rng, 1, 145, 4, 64), "heads": 2, "groups": 1}


def _short(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """A short sequence of narrow heads, sharper than usual."""
    return {"qkv": _draw(device, dtype, rng, 3, 37, 6, 32), "heads": 2, "groups": 2, "scale": 0.4}


def _documents(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """Packed documents, padding left, right and everywhere; spans are constants, which a captured graph may keep."""
    tokens = 150
    real = torch.ones(4, tokens, dtype=torch.bool)
    real[0, :70], real[1, 90:], real[2] = False, False, False
    ids = torch.zeros(4, tokens, dtype=torch.int64)
    ids[3, 20:] += 1
    ids[3, 135:] += 1
    spans = spans_of(real, ids)
    assert spans is not None
    qkv = _draw(device, dtype, rng, 4, tokens, 3, 128)
    return {"qkv": qkv, "heads": 1, "groups": 1, "spans": packed(spans).to(device)}


def _sequences(
    device: torch.device,
    dtype: torch.dtype,
    rng: torch.Generator,
    head_dim: int = 128,
    tokens: int = 8192,
    batch: int = 0,
    spans: int = 1,
) -> dict[str, Any]:
    """Heads of a model about 1024 wide, 16k tokens or more; with spans every other sequence is half padding."""
    heads, groups = max(1, 1024 // head_dim), max(1, 1024 // head_dim // (4 if head_dim == 128 else 1))
    batch = batch or max(8, 16384 // tokens)
    qkv = _draw(device, dtype, rng, batch, tokens, heads + 2 * groups, head_dim)
    problem = {"qkv": qkv, "heads": heads, "groups": groups}
    if not spans:
        return problem
    real = torch.ones(batch, tokens, dtype=torch.bool)
    real[::2, tokens // 2 :] = False
    ranges = spans_of(real)
    assert ranges is not None
    return problem | {"spans": packed(ranges).to(device)}


def packs(impl: str, device: torch.device, dtype: torch.dtype, *, head_dim: int, tokens: int, batch: int) -> bool:
    """Whether spans should be `packed` for `attention(impl=impl)`: it, or what "auto" prefers there, needs them so."""
    if impl != "auto":
        return impl in PACKING
    size = {"head_dim": head_dim, "tokens": tokens, "batch": batch, "spans": 1}
    row = tuned.best("attention", tuned.arch(device), dtype, size, measured_only=True)
    return row is not None and row.impl in PACKING and _unavailable(row.impl, device) is None


OP = Op(
    name="attention",
    call=attention,
    examples=(_grouped, _short, _documents),
    impls=("torch", "triton", *BACKENDS, *PACKING),
    dtypes=FUSED_DTYPES,
    tolerance={torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5},
    library=_unavailable,
    refuses=_refuses,
    problems=(_sequences,),
    sizes={
        "cuda": tuple(
            {"head_dim": head_dim, "tokens": tokens, "spans": spans} | few
            for spans in (0, 1)
            for head_dim in FUSED_HEAD_DIMS
            for tokens in (128, 512, 2048, 8192)
            for few in ({"batch": 4}, {})
        )
    },
)
