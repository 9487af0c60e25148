"""One transformer layer of any recognised codebase, computed with this package's ops from the codebase's own modules.

A `Layout` says what a layer is made of and where its tensors are; `run` interprets it. Projections are called as
modules, so that LoRA wrappers, quantised layers and hooks on them stay in force; norms are read for their weights, and
hooks on these or on other inner modules do not run, of which `run` warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..model.block import Context, at
from ..ops.activation import activation
from ..ops.layer import Around, Form, PackedLayer, Visit, through
from ..ops.linear import plain, project
from ..ops.residual_norm import residual_norm
from ..ops.rotary_attention import rotary_attention
from ..ops.rotate import rope_table, rotate
from .passes import current

Rope = tuple[Tensor, Tensor]
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What activations may be in; a weight of another dtype is only stored in it."""


@dataclass(frozen=True)
class Layout:
    """What a layer computes and, as dotted paths inside it, the modules that hold its tensors.

    Attributes:
        heads, groups, head_dim: query heads, key/value heads and their width.
        attn_norm, mlp_norm: modules with `weight` and perhaps `bias`.
        qkv: one module that computes q, k and v side by side, or three.
        out, down: projections back to the residual stream.
        up: one module, or (gate, up) for SwiGLU.
        norm, eps: "rmsnorm" or "layernorm", statistics in fp32.
        activation: "swiglu", "gelu_tanh", "gelu" or "relu2".
        interleaved_qkv: rows of the packed projection lie by query group (q, .., q, k, v), as in lit-gpt.
        rope_layout, rope_dtype: as in `ModelConfig`; the table comes with each call.
        qk_norm: "none", "before_rope" or "after_rope" with the per-head norms `q_norm` and `k_norm`.
        modulation: projection of the conditioning to DiT's six parts (shift, scale, gate; attention, then MLP); "" for
            none.
        dropout, attention_dropout: in training.
        causal: attention is causal where no mask is given.
        tuple_out: whether the layer's own forward returns a tuple.
    """

    heads: int
    groups: int
    head_dim: int
    attn_norm: str
    qkv: tuple[str, ...]
    out: str
    mlp_norm: str
    up: tuple[str, ...]
    down: str
    norm: str = "rmsnorm"
    eps: float = 1e-5
    activation: str = "swiglu"
    interleaved_qkv: bool = False
    rope_layout: str = "half"
    rope_dtype: str = "float32"
    qk_norm: str = "none"
    q_norm: str = ""
    k_norm: str = ""
    modulation: str = ""
    dropout: float = 0.0
    attention_dropout: float = 0.0
    causal: bool = False
    tuple_out: bool = False


@dataclass
class Shared:
    """What all patched layers of one model share, beside the arguments that the codebase passes.

    Attributes:
        ignore_padding: do as a codebase does that drops its padding mask.
        held: while weights are known to stay as they are, what modulation came to in each layer, by its id: the
            conditioning, the six parts, what they fold into; None otherwise.
        tables: the rotary table that layers make for themselves, by (length, head_dim, base, device); the last one.
    """

    ignore_padding: bool = False
    held: dict[int, tuple[Tensor, tuple[Tensor, ...], Around | None]] | None = None
    tables: dict[tuple[int, int, float, torch.device], Rope] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor | None:
        """The mask of this thread's pass."""
        return None if self.ignore_padding else current().mask

    def table(self, length: int, head_dim: int, theta: float, device: torch.device) -> Rope:
        """(cos, sin), each [length, head_dim / 2] in fp32, made once."""
        if torch.compiler.is_compiling():
            return rope_table(torch.arange(length, device=device), head_dim, theta)
        key = (length, head_dim, theta, device)
        if key not in self.tables:
            with torch.inference_mode(False):  # what inference mode makes could not be used in training
                self.tables = {key: rope_table(torch.arange(length, device=device), head_dim, theta)}
        return self.tables[key]


@dataclass
class Patched:
    """What a layer needs to be run by this package; its attribute `_loopmdm`.

    Attributes:
        in_place: put there by `patch`.
        packed: its products for one call, in a copy for inference whose projections allow it.
    """

    family: str
    layout: Layout
    shared: Shared
    in_place: bool = False
    packed: PackedLayer | None = None


_ONLY: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("_ONLY", default=None)


@contextmanager
def only(layer: nn.Module, rows: Tensor) -> Iterator[None]:
    """Let a layer work on some positions alone for a while, in this thread: rows int64 [B, R], its output [B, R, D]."""
    token = _ONLY.set((layer, rows))
    try:
        yield
    finally:
        _ONLY.reset(token)


def run(
    block: Any,
    x: Tensor,
    rope: Rope | None,
    mask: Tensor | None = None,
    cond: Tensor | None = None,
    causal: bool | None = None,
) -> Tensor:
    """x [B, T, D] -> [B, T, D] in x's dtype.

    Args:
        block: a layer that has its `Patched` record; within `only`, some positions alone come out.
        rope: (cos, sin), each [T, head_dim / 2] or [1 or B, T, head_dim / 2].
        mask: bool or additive, broadcastable to [B, 1, T, T]; a mask in `Shared` is added to it.
        cond: [1 or B, C], read only with modulation. One row folds the modulation into the norms' gain and bias, made
            anew in each call.
        causal: whether attention is causal where no mask is given; None is the layout's.

    Raises:
        InputError: a modulated layer without `cond`.
    """
    record: Patched = block._loopmdm
    layout = record.layout
    if not torch.compiler.is_compiling():
        _warn_of_hooks(block, (*layout.qkv, layout.out, *layout.up, layout.down, layout.modulation))
    causal = layout.causal if causal is None else causal
    if causal and mask is None and record.shared.mask is not None:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
    mask = _both(mask, record.shared.mask)
    causal = causal and mask is None
    p = layout.dropout if block.training else 0.0
    per_head = mask is not None and (mask.dim() != 4 or mask.shape[1] > 1)
    some = None if torch.compiler.is_compiling() else _ONLY.get()
    rows = some[1] if some is not None and some[0] is block and not (causal or per_head) else None
    context, was = Context(rope, mask), x
    parts: tuple[Tensor, ...] = ()
    if layout.modulation:
        if cond is None:
            raise InputError("this layer is modulated; its forward needs the conditioning c, [B, cond_dim]")
        parts, around = _modulation(block, record, _one_row(cond))
    else:
        around = _around(block, layout)
    if around is not None and record.packed is not None and not (p or (layout.attention_dropout and block.training)):
        query_rope, query_mask = context.queries(rows)
        visit = Visit(record.packed, projections(block, layout), around)
        out = through([visit], x, rope, mask, query_rope=query_rope, query_mask=query_mask, rows=rows, causal=causal)
        if out is not None:
            return out
    x = x if rows is None else at(x, rows)
    if around is not None:
        a = around
        work = _work(block, layout, was)
        h = _norm(layout, was, None, a.attn_gain, a.attn_bias, work)[1]
        branch = _drop(_attention(block, layout, h, context, causal, rows), p)
        x, h = _norm(layout, x, branch if a.attn_gate is None else a.attn_gate * branch, a.mlp_gain, a.mlp_bias, work)
        branch = _drop(_mlp(block, layout, h), p)
        return x + branch if a.mlp_gate is None else torch.addcmul(x, a.mlp_gate, branch).to(x.dtype)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part[:, None].float() for part in parts)
    a = _around(block, layout)
    work = _work(block, layout, was)
    h = (_norm(layout, was, None, a.attn_gain, a.attn_bias, was.dtype)[1] * (1 + scale_a) + shift_a).to(work)
    branch = gate_a * _drop(_attention(block, layout, h, context, causal, rows), p)
    x, h = _norm(layout, x, branch, a.mlp_gain, a.mlp_bias, x.dtype)
    h = (h * (1 + scale_m) + shift_m).to(work)
    return x + (gate_m * _drop(_mlp(block, layout, h), p)).to(x.dtype)


def _warn_of_hooks(module: nn.Module, called: tuple[str, ...], path: str = "") -> None:
    """Say which modules inside a layer have hooks and are neither called by `run` nor part of one that is."""
    for name, child in module._modules.items():
        if child is None or path + name in called:
            continue
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            warnings.warn(
                f"the hooks on {path}{name} do not run: of its modules a patched layer calls its projections alone; "
                "hook these or the layer, or unpatch the model",
                stacklevel=2,
            )
        _warn_of_hooks(child, called, f"{path}{name}.")


def projections(block: nn.Module, layout: Layout) -> tuple[nn.Linear, ...]:
    """The modules of a layer's products: qkv, out, up, down."""
    return tuple([_at(block, path) for path in (*layout.qkv, layout.out, *layout.up, layout.down)])


def at_once(block: Any) -> None:
    """Let a layer whose projections are packed compute in one call what it can (`ops.layer`)."""
    layout: Layout = block._loopmdm.layout
    if layout.qk_norm != "none" or (layout.interleaved_qkv and layout.groups != 1):
        return
    form = Form(
        layout.heads,
        layout.groups,
        layout.head_dim,
        layout.activation,
        layout.norm,
        layout.eps,
        layout.rope_layout,
        layout.rope_dtype,
    )
    modules = projections(block, layout)
    n = len(layout.qkv)
    block._loopmdm.packed = PackedLayer.of_modules(form, modules[:n], modules[n], modules[n + 1 : -1], modules[-1])


def _around(block: Any, layout: Layout) -> Around:
    """Gains and biases of the two norms."""
    a, m = _at(block, layout.attn_norm), _at(block, layout.mlp_norm)
    gains = [getattr(module, name, None) for module in (a, m) for name in ("weight", "bias")]
    return Around(gains[0], gains[1], None, gains[2], gains[3], None)


def _norm(
    layout: Layout, x: Tensor, branch: Tensor | None, gain: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return residual_norm(x, branch, gain, bias, kind=layout.norm, eps=layout.eps, out_dtype=out_dtype)


def _attention(
    block: Any, layout: Layout, x: Tensor, context: Context, causal: bool, rows: Tensor | None
) -> Tensor:  # [B, T, D] -> [B, T or R, D]
    B, T, _ = x.shape
    H, G, hd = layout.heads, layout.groups, layout.head_dim
    if len(layout.qkv) == 3:
        q, k, v = (project(_at(block, path), x).view(B, T, -1, hd) for path in layout.qkv)
    else:
        qkv = project(_at(block, layout.qkv[0]), x)
        if layout.interleaved_qkv:
            q, k, v = qkv.view(B, T, G, H // G + 2, hd).split((H // G, 1, 1), dim=3)
            q, k, v = q.reshape(B, T, H, hd), k.squeeze(3), v.squeeze(3)
        else:
            q, k, v = qkv.view(B, T, H + 2 * G, hd).split((H, G, G), dim=2)
    if layout.qk_norm == "before_rope":
        q, k = _head_norm(block, layout.q_norm, layout, q), _head_norm(block, layout.k_norm, layout, k)
    rope, mask = context.queries(rows)
    if rows is not None:
        q = at(q, rows)
    tables = (context.rope, rope)  # of the keys and of the queries
    if layout.qk_norm == "after_rope":
        if rope is not None and context.rope is not None:
            q, k = (rotate(u, t, layout.rope_layout, layout.rope_dtype) for u, t in ((q, rope), (k, context.rope)))
        tables = (None, None)
        q, k = _head_norm(block, layout.q_norm, layout, q), _head_norm(block, layout.k_norm, layout, k)
    y = rotary_attention(
        q,
        k,
        v,
        tables[0],
        mask,
        query_rope=tables[1],
        layout=layout.rope_layout,
        rope_dtype=layout.rope_dtype,
        causal=causal,
        dropout=layout.attention_dropout if block.training else 0.0,
    )
    return project(_at(block, layout.out), y)


def _head_norm(block: Any, path: str, layout: Layout, x: Tensor) -> Tensor:
    return residual_norm(x, None, _at(block, path).weight, kind="rmsnorm", eps=layout.eps)[1]


def _mlp(block: Any, layout: Layout, x: Tensor) -> Tensor:
    h, *up = [project(_at(block, path), x) for path in layout.up]
    h = activation(h, layout.activation, *up)
    return project(_at(block, layout.down), h)


def _at(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name)
    return block


def _work(block: Any, layout: Layout, x: Tensor) -> torch.dtype:
    """The dtype that the projections compute in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    weight = getattr(_at(block, layout.qkv[0]), "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in COMPUTED else x.dtype


def _drop(branch: Tensor, p: float) -> Tensor:
    return F.dropout(branch, p, True) if p else branch


def _modulation(block: Any, record: Patched, cond: Tensor) -> tuple[tuple[Tensor, ...], Around | None]:
    """cond [1 or B, C] -> DiT's six parts, each [1 or B, D], and where it is one row what they fold into."""
    module = _at(block, record.layout.modulation)
    held = record.shared.held if cond.is_cpu and not torch.is_grad_enabled() and plain(module) else None
    before = None if held is None else held.get(id(block))
    if before is not None and torch.equal(before[0], cond):
        return before[1:]
    parts = tuple(module(cond).chunk(6, dim=-1))
    around = _around(block, record.layout).modulated([part[0] for part in parts]) if len(parts[0]) == 1 else None
    if held is not None:
        held[id(block)] = (cond, parts, around)
    return parts, around


def _one_row(cond: Tensor) -> Tensor:
    """The conditioning, as one row [1, C] where all sequences are known to have the same.

    Values are compared on the CPU only, since on a GPU that would wait for it, and only without gradients, which are
    those of each row.
    """
    if len(cond) == 1 or torch.compiler.is_compiling() or (torch.is_grad_enabled() and cond.requires_grad):
        return cond
    if cond.stride(0) == 0 or (cond.is_cpu and bool((cond == cond[:1]).all())):
        return cond[:1]
    return cond


def _both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A mask that hides what either hides; `other` is bool."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & other
    return mask.masked_fill(~other, torch.finfo(mask.dtype).min)
