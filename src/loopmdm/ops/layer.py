"""Whole transformer layers in one call on a CPU, activations in the processor's cache from one product to the next."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import native
from .activation import CPP, activation
from .contract import Op, extension
from .linear import Panels, pack, unhooked
from .residual_norm import residual_norm
from .rotary_attention import Between, Rope, rotary_attention
from .rotate import rope_table


class Form(NamedTuple):
    """What a layer computes beside its products.

    Attributes:
        heads, groups, head_dim: query heads, key/value heads, their width.
        activation: as `ops.activation`'s act.
        norm, eps: as `ops.residual_norm`'s kind and eps.
        layout, rope_dtype: as for `ops.rotate.rotate`.
    """

    heads: int
    groups: int
    head_dim: int
    activation: str = "swiglu"
    norm: str = "rmsnorm"
    eps: float = 1e-5
    layout: str = "half"
    rope_dtype: str = "float32"


class Weights(NamedTuple):
    """A layer's products, each (weight [N, K], bias [N] or None): N is q, k and v or gate and up side by side."""

    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


class Around(NamedTuple):
    """What the two norms and the two residual adds multiply with or add, each [D] or None. The gates are fp32."""

    attn_gain: Tensor | None = None
    attn_bias: Tensor | None = None
    attn_gate: Tensor | None = None
    mlp_gain: Tensor | None = None
    mlp_bias: Tensor | None = None
    mlp_gate: Tensor | None = None

    def modulated(self, parts: Sequence[Tensor]) -> Around:
        """With DiT's six of one sequence, each [D]: shift, scale and gate for attention, then for the MLP."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part.float() for part in parts)
        folded = []
        for gain, bias, shift, scale in (
            (self.attn_gain, self.attn_bias, shift_a, scale_a),
            (self.mlp_gain, self.mlp_bias, shift_m, scale_m),
        ):
            scale = 1 + scale
            folded.append((scale if gain is None else gain * scale, shift if bias is None else bias * scale + shift))
        return Around(*folded[0], gate_a, *folded[1], gate_m)


def layer(
    x: Tensor,
    weights: Weights,
    form: Form,
    around: Around,
    rope: Rope | None = None,
    mask: Tensor | None = None,
    *,
    query_rope: Rope | None = None,
    rows: Tensor | None = None,
    causal: bool = False,
    packed: PackedLayer | None = None,
    impl: str = "auto",
) -> Tensor:
    """x + gate * Attention(norm(x)), and of that the same with the MLP: a DiT or Llama layer without dropout.

    "cpp" keeps the residual stream in fp32 between the two halves and does not round what the projections out and
    down compute before adding it; q, k, v, the attention's output and the MLP's inner activations are rounded to bf16.
    Its result is the same bits for any number of threads and whatever else is in the batch. It does not write the
    activations of an MLP to memory: 512 of their columns exist at a time, for 128 rows.

    Args:
        x: residual stream [B, T, D], any floating dtype.
        weights: of one dtype, in which the products compute.
        rope, mask, query_rope, causal: as for `rotary_attention`; the mask is of the queries.
        rows: int64 [B, R], the positions that come out; they attend to all. None is all of them. With `rope` it needs
            `query_rope`, the table at these positions.
        packed: `weights` once more; without it "cpp" lays them out in each call.
        impl: "auto", "torch", or "cpp" (CPU with AVX-512's bf16 products; bf16 weights, D and H * hd multiples of 16,
            no gradients).

    Returns:
        [B, T or R, D] in x's dtype. Differentiable through "torch".

    Raises:
        InputError: an `impl` that cannot run here or cannot take this problem.
    """
    if x.ndim != 3 or (rows is not None and (rows.ndim != 2 or len(rows) != len(x))):
        raise InputError(
            f"layer: x is {list(x.shape)} and rows {None if rows is None else list(rows.shape)}; they must be "
            "[B, T, D] and [B, R]"
        )
    if causal and (mask is not None or rows is not None):
        raise InputError("layer: causal goes with neither a mask nor rows")
    if packed is not None and (packed.form != form or packed.dim != len(weights.out[0])):
        raise InputError("layer: packed was made of another layer")
    query_rope = rope if query_rope is None else query_rope
    problem = (x, around, rope, mask, query_rope, rows)
    if impl == "torch" or (impl == "auto" and (torch.compiler.is_compiling() or not x.is_cpu)):
        return _reference(*problem, causal, weights, form)

    def refuses(which: str) -> str | None:
        return _refuses(which, x, weights, form, around, rope, mask, query_rope, rows)

    if OP.choose(impl, x.device, weights.qkv[0].dtype, refuses, rows=x.shape[0] * x.shape[1]).impl == "cpp":
        made = packed or PackedLayer.of(weights, form)
        return _through([(made, around)], x, rope, mask, query_rope, mask, rows, causal)
    return _reference(*problem, causal, weights, form)


class PackedLayer:
    """A layer's products in the layout of "cpp", made once.

    Args:
        form: what the layer computes.
        qkv: one weight, or those of q, k and v; up: one (gate and up in two parts for SwiGLU), or gate and up.
        biases: bf16 or None, in the order of the weights. They are read where they lie, as the panels are.
        modules: whose weights these are.
    """

    def __init__(
        self,
        form: Form,
        qkv: Sequence[Panels],
        out: Panels,
        up: Sequence[Panels],
        down: Panels,
        biases: Sequence[Tensor | None],
        modules: tuple[nn.Module, ...] = (),
    ) -> None:
        self.form, self.dim, self.modules = form, out.cols, modules
        weights = (*qkv, out, *up, down)
        self._held = (weights, biases)
        found = [(w.words.data_ptr(), 0 if b is None else b.data_ptr()) for w, b in zip(weights, biases, strict=True)]
        none = (0, 0)
        triple = [*found[: len(qkv)], none, none][:3]
        gate, *rest = found[len(qkv) + 1 : -1]
        if form.activation == "swiglu" and not rest:
            word, bias = gate
            rest = [(word + up[0].words.numel() * 2, bias and bias + up[0].cols)]  # half of 4 bytes, and of 2
        self.weights = extension().LayerWeights(
            [pointer for pair in (*triple, found[len(qkv)], gate, *(rest or [none]), found[-1]) for pointer in pair],
            (self.dim, form.heads, form.groups, form.head_dim, down.depth),
            CPP.index(form.activation),
            form.norm == "layernorm",
            form.eps,
        )

    @classmethod
    def of(cls, weights: Weights, form: Form) -> PackedLayer:
        """Lay out dense bf16 weights."""
        parts = (1, 1, 2 if form.activation == "swiglu" else 1, 1)
        qkv, out, up, down = (pack(w, parts=n, impl="cpp") for (w, _), n in zip(weights, parts, strict=True))
        biases = [None if b is None else b.detach().contiguous() for _, b in weights]
        return cls(form, (qkv,), out, (up,), down, biases)  # type: ignore[arg-type]

    @classmethod
    def of_modules(
        cls, form: Form, qkv: Sequence[nn.Linear], out: nn.Linear, up: Sequence[nn.Linear], down: nn.Linear
    ) -> PackedLayer | None:
        """Of modules whose `packed` are `Panels` (`model.packed.Packed`); None where one of them is something else, or
        the layer is not one that "cpp" takes."""
        modules = (*qkv, out, *up, down)
        found = [getattr(module, "packed", None) for module in modules]
        panels = [p for p in found if isinstance(p, Panels)]
        if len(panels) < len(modules) or len(qkv) not in (1, 3) or _unfit(form, out.out_features):
            return None
        if form.activation == "swiglu" and len(up) == 1 and panels[-2].parts != 2:
            return None
        if any(m.bias is not None and m.bias.dtype != torch.bfloat16 for m in modules):
            return None
        n, dim, inner, kv = len(qkv), out.out_features, form.heads * form.head_dim, form.groups * form.head_dim
        wide = panels[-1].depth * (2 if form.activation == "swiglu" and len(up) == 1 else 1)
        cols = [inner, kv, kv] if n == 3 else [inner + 2 * kv]
        sizes = [*((c, dim) for c in cols), (dim, inner), *((wide, dim) for _ in up), (dim, panels[-1].depth)]
        if [(p.cols, p.depth) for p in panels] != sizes:
            return None
        biases = [module.bias for module in modules]
        return cls(form, panels[:n], panels[n], panels[n + 1 : -1], panels[-1], biases, modules)


class Visit(NamedTuple):
    """A layer on the way of `through`: what it was packed to, the modules that it is made of now, and its norms."""

    packed: PackedLayer
    modules: tuple[nn.Module, ...]
    around: Around


def through(
    visits: Sequence[Visit],
    x: Tensor,
    rope: Rope | None,
    mask: Tensor | None,
    *,
    query_rope: Rope | None = None,
    query_mask: Tensor | None = None,
    rows: Tensor | None = None,
    causal: bool = False,
) -> Tensor | None:
    """Layers one after the other in one call, as `layer` each, of the last one the positions `rows` alone.

    Returns None where they must be called one by one, and their weights used one by one: no evidence that this is
    faster, a problem that "cpp" cannot take, or modules that are no longer those that were packed or have got hooks.

    Args:
        query_rope, query_mask: those of `rows`, without which they are not read.
    """
    if rows is None:
        query_rope, query_mask = rope, mask
    first = visits[0].packed

    def refuses(impl: str) -> str | None:
        seen = set()
        for packed, modules, around in visits:
            if id(packed) in seen:
                continue
            seen.add(id(packed))
            same = len(modules) == len(packed.modules) and all(
                [a is b and unhooked(a) for a, b in zip(modules, packed.modules, strict=True)]
            )
            if not same or packed.form != first.form or packed.dim != first.dim:
                return "modules were replaced or have hooks, or the layers are not of one form"
            refused = _refuses_around(around, first.dim)
            if refused:
                return refused
        full = None if mask is None else _refuses_mask(mask, (len(x), 1, x.shape[1], x.shape[1]))
        return full or _refuses_call(x, first.dim, first.form, rope, query_mask, query_rope, rows)

    if OP.choose("auto", x.device, torch.bfloat16, refuses, rows=x.shape[0] * x.shape[1]).impl != "cpp":
        return None
    return _through([(v.packed, v.around) for v in visits], x, rope, mask, query_rope, query_mask, rows, causal)


def _unfit(form: Form, dim: int) -> str | None:
    if dim % 16 or form.heads * form.head_dim % 16 or form.head_dim % 2:
        return f"D is {dim} and H * hd {form.heads * form.head_dim}; they must be multiples of 16, hd even"
    if form.activation not in CPP:
        return f"it has no {form.activation}; use impl='torch'"
    return None


def _refuses(
    impl: str,
    x: Tensor,
    weights: Weights,
    form: Form,
    around: Around = Around(),  # noqa: B008 (a tuple)
    rope: Rope | None = None,
    mask: Tensor | None = None,
    query_rope: Rope | None = None,
    rows: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why `impl` cannot take this problem, or None."""
    if impl != "cpp":
        return None
    own = [t for pair in weights for t in pair if t is not None]
    if any(t.dtype != torch.bfloat16 or not t.is_cpu for t in own):
        return "its weights must be bfloat16; use impl='torch'"
    if torch.is_grad_enabled() and any(t.requires_grad for t in own):
        return "it has no backward; use impl='torch' or torch.no_grad()"
    dim, inner, hidden = len(weights.out[0]), form.heads * form.head_dim, weights.down[0].shape[-1]
    wide = hidden * (2 if form.activation == "swiglu" else 1)
    sizes = ((inner + 2 * form.groups * form.head_dim, dim), (dim, inner), (wide, dim), (dim, hidden))
    for (w, b), size in zip(weights, sizes, strict=True):
        if w.shape != size or (b is not None and b.shape != size[:1]) or form.heads % form.groups:
            return f"weights {[list(w.shape) for w, _ in weights]} or biases do not fit {form}"
    query_rope = rope if query_rope is None else query_rope
    refused = _unfit(form, dim) or _refuses_around(around, dim)
    return refused or _refuses_call(x, dim, form, rope, mask, query_rope, rows)


def _refuses_call(
    x: Tensor,
    dim: int,
    form: Form,
    rope: Rope | None,
    query_mask: Tensor | None,
    query_rope: Rope | None,
    rows: Tensor | None,
) -> str | None:
    if not x.is_cpu or not x.numel() or x.dtype not in native.DTYPES or not native.multiplies_bf16():
        return f"x is {x.dtype} {list(x.shape)} on {x.device}; it takes float32 and bfloat16 on CPUs that multiply bf16"
    (B, T, D), R = x.shape, x.shape[1] if rows is None else rows.shape[1]
    if dim != D:
        return f"x is {list(x.shape)}, which the weights do not fit"
    if rows is not None and (rows.dtype != torch.int64 or not R or int(rows.min()) < 0 or int(rows.max()) >= T):
        return f"rows must be int64, at least one of them, from 0 to {T - 1}"
    refused = None if query_mask is None else _refuses_mask(query_mask, (B, 1, R, T))
    if refused:
        return refused
    if (rope is None) != (query_rope is None):
        return "rope and query_rope must come together"
    half = form.head_dim // 2
    for pair, n in ((rope, T), (query_rope, R)):
        for t in pair or ():
            if t.dtype != torch.float32 or not t.is_cpu or t.shape[-2:] != (n, half) or t.shape != pair[0].shape:  # type: ignore[index]
                return "its rotary tables must be float32 on the CPU, for each position and half a head"
            if t.ndim > 3 or (t.ndim == 3 and len(t) not in (1, B)):
                return "its rotary tables must be one for all or one a sequence"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast is on, which would give its products another dtype"
    return native.watched(x, *(rope or ()), *(query_rope or ()))


def _refuses_mask(mask: Tensor, whole: tuple[int, ...]) -> str | None:
    fits = mask.ndim == 4 and all([n in (1, m) for n, m in zip(mask.shape, whole, strict=True)])
    if fits and mask.dtype == torch.bool and mask.is_cpu:
        return None
    return f"its mask must be bool and broadcast to {list(whole)}; use impl='torch'"


def _refuses_around(around: Around, dim: int) -> str | None:
    for t in around:
        if t is not None and (
            t.shape != (dim,) or t.dtype not in native.DTYPES or not (t.is_contiguous() and t.is_cpu)
        ):
            return "gains, biases and gates must be contiguous [D], float32 or bfloat16, on the CPU"
    if any([t is not None and t.dtype != torch.float32 for t in (around.attn_gate, around.mlp_gate)]):
        return "gates must be float32"
    return native.watched(*around)


def _through(
    visits: Sequence[tuple[PackedLayer, Around]],
    x: Tensor,
    rope: Rope | None,
    mask: Tensor | None,
    query_rope: Rope | None,
    query_mask: Tensor | None,
    rows: Tensor | None,
    causal: bool,
) -> Tensor:
    """Layers of one form one after the other; query_rope and query_mask are those of the last one."""
    x = x if x.is_contiguous() else x.contiguous()
    (B, T, D), R = x.shape, x.shape[1] if rows is None else rows.shape[1]
    rows = None if rows is None else rows.contiguous()
    out = x.new_empty(B, R, D)
    given = []
    for packed, (attn_gain, attn_bias, attn_gate, mlp_gain, mlp_bias, mlp_gate) in visits:
        norms = (attn_gain, attn_bias, mlp_gain, mlp_bias)
        pointers = [0 if t is None else t.data_ptr() for t in (*norms, attn_gate, mlp_gate)]
        given.append((packed.weights, pointers, [t is not None and t.dtype is torch.bfloat16 for t in norms]))
    last = Between(rope, query_rope, query_mask, (B, R, T))
    first = last if len(visits) == 1 else Between(rope, rope, mask, (B, T, T))
    form = visits[0][0].form
    extension().layers_cpu(
        given,
        (x.data_ptr(), out.data_ptr(), 0 if rows is None else rows.data_ptr()),
        (first.pointers, (B, T, T), first.strides),
        (last.pointers, (B, R, T), last.strides),
        (x.dtype is torch.bfloat16, form.layout == "interleaved", form.rope_dtype == "input", causal),
        torch.get_num_threads(),
    )
    return out


def _reference(
    x: Tensor,
    around: Around,
    rope: Rope | None,
    mask: Tensor | None,
    query_rope: Rope | None,
    rows: Tensor | None,
    causal: bool,
    weights: Weights,
    form: Form,
) -> Tensor:
    B, T, _ = x.shape
    H, G, dtype = form.heads, form.groups, weights.qkv[0].dtype

    def norm(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        return residual_norm(x, None, gain, bias, kind=form.norm, eps=form.eps, out_dtype=dtype, impl="torch")[1]

    def add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        return (x + (branch if gate is None else gate * branch)).to(x.dtype)

    h = F.linear(norm(x, around.attn_gain, around.attn_bias), *weights.qkv)
    q, k, v = h.view(B, T, H + 2 * G, form.head_dim).split((H, G, G), dim=2)
    if rows is not None:
        sequence = torch.arange(B, device=x.device)[:, None]
        q, x = q[sequence, rows], x[sequence, rows]
    y = rotary_attention(
        q, k, v, rope, mask, query_rope=query_rope, layout=form.layout, rope_dtype=form.rope_dtype, causal=causal,
        impl="torch",
    )  # fmt: skip
    x = add(x, F.linear(y, *weights.out), around.attn_gate)
    u = activation(F.linear(norm(x, around.mlp_gain, around.mlp_bias), *weights.up), form.activation, impl="torch")
    return add(x, F.linear(u, *weights.down), around.mlp_gate)


def _problem(
    device: torch.device,
    dtype: torch.dtype,
    rng: torch.Generator,
    rows: int = 1024,
    batch: int = 1,
    form: Form = Form(8, 8, 64),  # noqa: B008 (a tuple)
    hidden: int = 1344,
    biased: bool = False,
    gated: bool = False,
    masked: bool = False,
    some: bool = False,
) -> dict[str, Any]:
    """`rows` positions in `batch` sequences; the width is that of the query heads together."""
    D, T = form.heads * form.head_dim, rows // batch

    def product(n: int, k: int) -> tuple[Tensor, Tensor | None]:
        bias = torch.randn(n, generator=rng) / 2 if biased else None
        made = torch.randn(n, k, generator=rng) / k**0.5
        return made.to(device, dtype), None if bias is None else bias.to(device, dtype)

    weights = Weights(
        product((form.heads + 2 * form.groups) * form.head_dim, D),
        product(D, D),
        product(hidden * (2 if form.activation == "swiglu" else 1), D),
        product(D, hidden),
    )
    vectors = [torch.rand(D, generator=rng).to(device) + 0.5 for _ in range(6)]
    around = Around(vectors[0], None, None, vectors[3])
    if gated:
        around = Around(*vectors)
    x = torch.randn(batch, T, D, generator=rng).to(device)
    rope = rope_table(torch.arange(T, device=device), form.head_dim, 10000.0)
    made: dict[str, Any] = {"x": x, "weights": weights, "form": form, "around": around, "rope": rope}
    if masked:
        ends = T - torch.arange(batch, device=device)[:, None] * T // (2 * batch)
        made["mask"] = (torch.arange(T, device=device) < ends)[:, None, None]
    if some:
        made["rows"] = torch.stack([torch.randperm(T, generator=rng)[: T // 3] for _ in range(batch)]).to(device)
        made["query_rope"] = (rope[0][made["rows"]], rope[1][made["rows"]])
    return made


def _ready(device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 1024) -> dict[str, Any]:
    """A problem whose weights are laid out already, if they can be."""
    made = _problem(device, dtype, rng, rows)
    if dtype == torch.bfloat16 and native.multiplies_bf16():
        made["packed"] = PackedLayer.of(made["weights"], made["form"])
    return made


_llama = functools.partial(_problem, rows=66, batch=2, form=Form(4, 2, 24), hidden=100, masked=True, some=True)
_dit = functools.partial(
    _problem, rows=150, form=Form(2, 2, 40, "gelu_tanh", "layernorm"), hidden=600, biased=True, gated=True
)
_biased = functools.partial(
    _problem, rows=21, batch=3, form=Form(3, 1, 16, layout="interleaved", rope_dtype="input"), hidden=70, biased=True
)

OP = Op(
    name="layer",
    call=layer,
    examples=(_llama, _dit, _biased),
    impls=("torch", "cpp"),
    dtypes=(torch.bfloat16,),
    tolerance={torch.bfloat16: 1e-2},
    refuses=_refuses,
    problems=(_ready,),
    sizes={"cpu": (*({"rows": rows} for rows in (16, 64, 256)), {})},
)
