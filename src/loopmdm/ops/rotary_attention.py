"""Attention with rotary positions, from one packed projection to what the next one reads: the layers of a CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, nearest
from . import native
from .contract import Op, extension
from .rotate import LAYOUTS, ROPE_DTYPES, rope_table, rotate

Rope = tuple[Tensor, Tensor]


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | None = None,
    mask: Tensor | None = None,
    *,
    query_rope: Rope | None = None,
    layout: str = "half",
    rope_dtype: str = "float32",
    causal: bool = False,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v with q and k rotated first; grouped key/value heads (Ainslie et al. 2023) allowed.

    B sequences, T keys, R queries, H query heads, G key/value heads of width hd. A query that sees no key gets 0.
    "torch" calls `rotate` and F.scaled_dot_product_attention. "cpp" keeps scores and sums in fp32 and, for
    bf16, rounds the rotated q and k and the probabilities to bf16, as torch does on a CPU; its result is the same bits
    for any number of threads and whatever else is in the batch.

    Args:
        q: [B, R, H, hd]; k, v: [B, T, G, hd], H a multiple of G; one floating dtype. "cpp" reads any strides with a
            contiguous last dimension: views of one packed projection are not copied.
        rope: (cos, sin), each fp32 [T, hd/2] or [1 or B, T, hd/2]; None does not rotate.
        mask: bool (True where a query may look at a key) or additive, broadcastable to [B, 1, R, T].
        query_rope: the queries' own, [R, hd/2] or [1 or B, R, hd/2]; None is `rope`, and then R must be T.
        layout, rope_dtype: as for `rotate`.
        causal: query i sees keys 0 to i; R must be T.
        dropout: probability for the weights, torch implementation only.
        impl: "auto", "torch", or "cpp" (CPU; float32 and bfloat16, an even hd, no gradients).

    Returns:
        [B, R, H * hd] in q's dtype. Differentiable through "torch".

    Raises:
        InputError: a shape, dtype or name that does not fit, or an `impl` that cannot run here.
    """
    _check(q, k, v, rope, mask, query_rope, layout, rope_dtype, causal)
    query_rope = rope if query_rope is None else query_rope
    H, hd, T, G = *q.shape[2:], *k.shape[1:3]
    outside = torch.compiler.is_compiling() or not q.is_cpu or native.differentiating(q, k, v)
    if impl == "torch" or (impl == "auto" and outside):
        chosen = "torch"
    else:

        def refuses(which: str) -> str | None:
            return _refuses(which, q, k, v, rope, mask, query_rope=query_rope, dropout=dropout)

        sizes = {"tokens": T, "head_dim": hd, "level_below_4": native.level_below_4()}
        chosen = OP.choose(impl, q.device, q.dtype, refuses, **sizes).impl
    if chosen == "cpp":
        return _cpp(q, k, v, rope, mask, query_rope, layout, rope_dtype, causal)
    if rope is not None:
        assert query_rope is not None
        which = "torch" if impl == "torch" else "auto"
        q, k = (rotate(x, t, layout, rope_dtype, impl=which) for x, t in ((q, query_rope), (k, rope)))
    if mask is not None:
        mask = mask[None] if mask.ndim < 2 else mask
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=H != G,
    )
    return y.transpose(1, 2).flatten(2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | None,
    mask: Tensor | None,
    query_rope: Rope | None,
    layout: str,
    rope_dtype: str,
    causal: bool,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"rotary_attention: q is {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}; they must be "
            "[B, R, H, hd] and twice [B, T, G, hd]"
        )
    (B, R, H, hd), (T, G) = q.shape, k.shape[1:3]
    if not G or H % G:
        raise InputError(f"rotary_attention: {H} query heads cannot share {G} key/value heads")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise InputError(
            f"rotary_attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; they must be one floating dtype"
        )
    if layout not in LAYOUTS:
        raise InputError(f"rotary_attention has no layout {layout!r}{nearest(layout, LAYOUTS)}")
    if rope_dtype not in ROPE_DTYPES:
        raise InputError(f"rotary_attention has no rope_dtype {rope_dtype!r}{nearest(rope_dtype, ROPE_DTYPES)}")
    if R != T and (causal or (rope is not None and query_rope is None)):
        raise InputError(
            f"rotary_attention: with {R} queries of {T} positions, causal is not defined and rope is not enough"
        )
    if query_rope is not None and rope is None:
        raise InputError("rotary_attention: query_rope is given without rope, so queries alone would rotate")
    for name, table, n in (("rope", rope, T), ("query_rope", query_rope, R)):
        for part in table or ():
            if hd % 2 or part.shape not in ((n, hd // 2), (1, n, hd // 2), (B, n, hd // 2)):
                raise InputError(
                    f"rotary_attention: a table of {name} is {list(part.shape)}; for {n} positions and heads of {hd} "
                    f"it must be [{n}, hd / 2], perhaps with 1 or {B} in front, and hd even"
                )
    if mask is not None:
        if causal:
            raise InputError("rotary_attention: give a mask or causal, not both")
        if mask.device != q.device:
            raise InputError(f"rotary_attention: q is on {q.device} and mask on {mask.device}; move them to one device")
        whole = (B, 1, R, T)
        fits = 0 < mask.ndim <= 4 and all(n in (1, m) for n, m in zip(mask.shape, whole[4 - mask.ndim :], strict=True))
        if not fits:
            raise InputError(f"rotary_attention: mask is {list(mask.shape)}; it must broadcast to {list(whole)}")


def _refuses(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | None = None,
    mask: Tensor | None = None,
    *,
    query_rope: Rope | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> str | None:
    """Why `impl` cannot take this problem, or None."""
    if impl != "cpp":
        return None
    if q.dtype not in native.DTYPES:
        return f"q is {q.dtype}, it takes float32 and bfloat16; use impl='torch'"
    if q.shape[3] % 2 or not (q.numel() and k.numel()):
        return f"q is {list(q.shape)}; it needs an even head_dim and at least one position"
    if mask is not None and mask.dtype != torch.bool:
        return "its mask must be bool; use impl='torch'"
    if dropout:
        return "it has no dropout; use impl='torch'"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != q.dtype:
        return "autocast gives attention another dtype; use impl='torch'"
    tables = [*(rope or ()), *(query_rope or ())]
    if any([pair is not None and pair[0].shape != pair[1].shape for pair in (rope, query_rope)]):
        return "cos and sin of a rotary table must have one shape; use impl='torch'"
    if any([t.dtype != torch.float32 or not t.is_cpu for t in tables]) or not (k.is_cpu and v.is_cpu):
        return "its rotary tables must be float32, and all tensors on the CPU"
    return native.watched(q, k, v, *tables)


def _cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | None,
    mask: Tensor | None,
    query_rope: Rope | None,
    layout: str,
    rope_dtype: str,
    causal: bool,
) -> Tensor:
    (B, R, H, hd), (T, G) = q.shape, k.shape[1:3]
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(B, R, H * hd)
    between = Between(rope, query_rope, mask, (B, R, T))
    extension().rotary_attention_cpu(
        (*(t.data_ptr() for t in (q, k, v, out)), *between.pointers),
        (B, R, T, H, G, hd),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        between.strides,
        (q.dtype == torch.bfloat16, layout == "interleaved", rope_dtype == "input", causal),
        torch.get_num_threads(),
    )
    return out


class Between:
    """Rotary tables and mask as C++ reads them.

    Attributes:
        pointers: of cos, sin, the queries' cos and sin, and the mask; 0 where there is none.
        strides: from one sequence's table of keys to the next one's, of queries, and of the mask's sequences and rows.
    """

    def __init__(
        self, rope: Rope | None, query_rope: Rope | None, mask: Tensor | None, sizes: tuple[int, int, int]
    ) -> None:
        B, R, T = sizes
        tables: tuple[Tensor | None, ...] = (None,) * 4
        if rope is not None and query_rope is not None:
            tables = tuple([t if t.is_contiguous() else t.contiguous() for t in (*rope, *query_rope)])
        each = [0 if t is None or t.ndim == 2 or len(t) == 1 else t.stride(0) for t in (tables[0], tables[2])]
        at = (0, 0)
        if mask is not None:
            if mask.shape[-1] != T or mask.stride(-1) != 1:
                mask = mask.expand(*mask.shape[:-1], T).contiguous()
            mask = mask.expand(B, 1, R, T)
            at = (mask.stride(0), mask.stride(2))
        self._held = (*tables, mask)
        self.pointers = tuple([0 if t is None else t.data_ptr() for t in self._held])
        self.strides = (*each, *at)


def _packed(
    device: torch.device,
    dtype: torch.dtype,
    rng: torch.Generator,
    batch: int = 1,
    tokens: int = 4096,
    heads: int = 4,
    groups: int = 4,
    head_dim: int = 128,
    masked: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Views of one projection, rotated; with `masked` padding of a different length in each sequence."""
    qkv = torch.randn(batch, tokens, heads + 2 * groups, head_dim, generator=rng).to(device, dtype)
    q, k, v = qkv.split((heads, groups, groups), dim=2)
    rope = rope_table(torch.arange(tokens, device=device), head_dim, 10000.0)
    made: dict[str, Any] = {"q": q, "k": k, "v": v, "rope": rope}
    if masked:
        ends = tokens - torch.arange(batch, device=device)[:, None] * tokens // (2 * batch)
        made["mask"] = (torch.arange(tokens, device=device) < ends)[:, None, None]
    return made | options


_padded = functools.partial(_packed, batch=2, tokens=300, heads=4, groups=2, head_dim=24, masked=True)
_causal = functools.partial(_packed, tokens=70, heads=2, groups=2, head_dim=50, causal=True, layout="interleaved")
_long = functools.partial(_packed, tokens=280, heads=1, groups=1, head_dim=80, rope_dtype="input")
_SIZES = ((64, 64), (256, 64), (1024, 64), (1024, 128), (4096, 128))

OP = Op(
    name="rotary_attention",
    call=rotary_attention,
    examples=(_padded, _causal, _long),
    impls=("torch", "cpp"),
    dtypes=native.DTYPES,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    refuses=_refuses,
    problems=(_packed, functools.partial(_packed, masked=True)),
    sizes={"cpu": tuple({"tokens": tokens, "head_dim": head_dim} for tokens, head_dim in _SIZES)},
)
