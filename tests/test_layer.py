"""A whole layer in one call: against float64, the same bits whatever is beside it, and what it does not take."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from loopmdm.errors import InputError
from loopmdm.model.packed import Recast
from loopmdm.ops import layer as ops_layer
from loopmdm.ops import native
from loopmdm.ops.layer import OP, Around, Form, PackedLayer, Visit, Weights, layer, through
from loopmdm.ops.rotate import rope_table, rotate

BF16, FP32, F64 = torch.bfloat16, torch.float32, torch.float64
runs = pytest.mark.skipif(not native.multiplies_bf16(), reason="this CPU or build has no bf16 products of its own")
LLAMA, GQA = Form(4, 4, 16), Form(4, 2, 24)
DIT = Form(3, 3, 32, "gelu_tanh", "layernorm")
MINGLED = Form(3, 1, 16, "relu2", "layernorm", 1e-6, "interleaved", "input")


def problem(
    form: Form,
    tokens: int,
    batch: int = 2,
    dim: int = 0,
    hidden: int = 100,
    biased: bool = False,
    around: str = "gains",
    mask: str = "",
    rows: int = 0,
    causal: bool = False,
    rope: str = "shared",
    dtype: torch.dtype = FP32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `layer`, everything drawn. The width D is that of the heads unless given."""
    rng = torch.Generator().manual_seed(seed)
    inner = form.heads * form.head_dim
    dim = dim or inner

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    def product(n: int, k: int) -> tuple[Tensor, Tensor | None]:
        return (draw(n, k) / k**0.5).to(BF16), (draw(n) / 2).to(BF16) if biased else None

    weights = Weights(
        product(inner + 2 * form.groups * form.head_dim, dim),
        product(dim, inner),
        product(hidden * (2 if form.activation == "swiglu" else 1), dim),
        product(dim, hidden),
    )
    gain, bias, gate = ([1 + draw(dim) / 3, 1 + draw(dim) / 3] for _ in range(3))
    surroundings = {
        "none": Around(),
        "gains": Around(gain[0], None, None, gain[1]),
        "bf16": Around(gain[0].to(BF16), bias[0].to(BF16), None, gain[1].to(BF16), bias[1]),
        "gates": Around(gain[0], bias[0], gate[0], gain[1], bias[1], gate[1]),
    }
    positions = torch.arange(tokens).expand(batch, -1) + (torch.arange(batch) * 5)[:, None]
    table = rope_table(positions if rope == "each" else positions[0], form.head_dim, 100.0)
    made: dict[str, Any] = {
        "x": draw(batch, tokens, dim).to(dtype),
        "weights": weights,
        "form": form,
        "around": surroundings[around],
        "rope": table if rope else None,
        "causal": causal,
    }
    if mask == "padding":
        made["mask"] = (torch.arange(tokens) < tokens - tokens // 3 * torch.arange(batch)[:, None])[:, None, None]
    if mask == "full":
        made["mask"] = torch.rand(batch, 1, tokens, tokens, generator=rng) < 0.5
    if rows:
        made = part(made, torch.stack([torch.randperm(tokens, generator=rng)[:rows] for _ in range(batch)]))
    return made


def part(made: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The same, of the positions rows [B, R] alone."""
    rope, mask, sequence = made["rope"], made.get("mask"), torch.arange(len(rows))[:, None]
    if rope is not None:
        made = made | {"query_rope": tuple(t[rows] if t.ndim == 2 else t[sequence, rows] for t in rope)}
    if mask is not None and mask.shape[2] > 1:
        made = made | {"mask": mask[sequence, 0, rows][:, None]}
    return made | {"rows": rows}


def wide(t: Tensor) -> Tensor:
    return t.double()


def truth(
    x: Tensor,
    weights: Weights,
    form: Form,
    around: Around,
    rope: Any = None,
    mask: Tensor | None = None,
    query_rope: Any = None,
    rows: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """In float64, with one loop over heads."""
    (B, T, _), (H, G, hd) = x.shape, form[:3]
    everywhere = torch.arange(T).expand(B, T)
    rows = everywhere if rows is None else rows
    sequence = torch.arange(B)[:, None]
    x, query_rope = wide(x), rope if query_rope is None else query_rope
    (qkv, a), (out, b), (up, c), (down, d) = [
        (wide(w), torch.zeros(len(w), dtype=F64) if bias is None else wide(bias)) for w, bias in weights
    ]
    attn_gain, attn_bias, attn_gate, mlp_gain, mlp_bias, mlp_gate = around

    def norm(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        if form.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + form.eps).sqrt()
        x = x if gain is None else x * wide(gain)
        return x if bias is None else x + wide(bias)

    def turned(x: Tensor, table: Any) -> Tensor:
        if table is None:
            return x
        return rotate(x[:, :, None], tuple(wide(t) for t in table), form.layout, "float32")[:, :, 0]

    columns = (norm(x, attn_gain, attn_bias) @ qkv.T + a).split(hd, dim=-1)
    seen = torch.ones(B, len(rows[0]), T, dtype=torch.bool)
    if mask is not None:
        seen = mask.expand(B, 1, len(rows[0]), T)[:, 0]
    if causal:
        seen = rows[:, :, None] >= torch.arange(T)
    heads = []
    for h in range(H):
        q, k, v = columns[h], columns[H + h * G // H], columns[H + G + h * G // H]
        scores = turned(q[sequence, rows], query_rope) @ turned(k, rope).transpose(1, 2) / hd**0.5
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ v)
    branch = torch.cat(heads, -1) @ out.T + b
    x = x[sequence, rows] + (branch if attn_gate is None else branch * wide(attn_gate))
    h = norm(x, mlp_gain, mlp_bias) @ up.T + c
    if form.activation == "swiglu":
        gate, h = h.chunk(2, -1)
        h = gate * torch.sigmoid(gate) * h
    else:
        h = F.gelu(h, approximate="tanh") if form.activation == "gelu_tanh" else h.clamp(min=0) ** 2
    branch = h @ down.T + d
    return x + (branch if mlp_gate is None else branch * wide(mlp_gate))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


CASES = {
    "llama": dict(form=LLAMA, tokens=129),
    "llama, one position": dict(form=LLAMA, tokens=1),
    "one sequence of one position": dict(form=GQA, tokens=1, batch=1, biased=True),
    "five": dict(form=LLAMA, tokens=5, batch=1, hidden=67),
    "six": dict(form=GQA, tokens=6, batch=1, hidden=64),
    "seven": dict(form=DIT, tokens=7, batch=1, around="gates"),
    "dit": dict(form=DIT, tokens=129, biased=True, around="gates"),
    "dit, 300": dict(form=DIT, tokens=300, batch=1, biased=True, around="gates", hidden=640),
    "gqa, padded": dict(form=GQA, tokens=130, hidden=67, mask="padding"),
    "gqa, full mask": dict(form=GQA, tokens=33, hidden=513, mask="full"),
    "over a chunk, odd": dict(form=LLAMA, tokens=30, hidden=1091, biased=True),
    "wider than its heads": dict(form=LLAMA, tokens=30, dim=176, biased=True, around="gates"),
    "narrower than its heads": dict(form=GQA, tokens=30, dim=16, hidden=16),
    "mingled": dict(form=MINGLED, tokens=70, biased=True, around="bf16"),
    "rounded rope": dict(form=Form(4, 2, 16, rope_dtype="input"), tokens=70),
    "interleaved rope of each": dict(form=Form(2, 2, 40, layout="interleaved"), tokens=70, rope="each"),
    "no rope, no gains": dict(form=LLAMA, tokens=40, rope="", around="none"),
    "causal": dict(form=GQA, tokens=140, causal=True),
    "rows": dict(form=GQA, tokens=131, rows=9, mask="padding"),
    "rows of each": dict(form=DIT, tokens=66, rows=30, rope="each", mask="full", biased=True, around="gates"),
    "more rows than a block": dict(form=LLAMA, tokens=300, rows=200, hidden=64),
    "bf16 stream": dict(form=LLAMA, tokens=129, dtype=BF16),
    "bf16 stream, rows": dict(form=DIT, tokens=65, rows=7, dtype=BF16, biased=True, around="bf16"),
}


@runs
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    p = problem(**CASES[name])
    want, got = truth(**p), layer(**p, impl="cpp")
    assert got.shape == want.shape and got.dtype == p["x"].dtype
    assert error(got, want) <= 1.2 * error(layer(**p, impl="torch"), want)
    # what the layer adds, not what it was given
    x = p["x"] if "rows" not in p else p["x"][torch.arange(len(p["x"]))[:, None], p["rows"]]
    assert error(got, want) < 0.03 * error(x, want)


@pytest.mark.parametrize("name", ["dit", "gqa, padded", "mingled", "rows of each", "causal"])
def test_the_reference_is_the_truth(name: str) -> None:
    p = problem(**CASES[name])
    exact = Weights(*((w.double(), b if b is None else b.double()) for w, b in p["weights"]))
    around = Around(*(t if t is None else t.double() for t in p["around"]))
    form = p["form"]._replace(rope_dtype="float32")
    got = layer(**(p | {"x": p["x"].double(), "weights": exact, "around": around, "form": form}), impl="torch")
    assert error(got, truth(**p)) < 1e-6


@runs
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_whatever_else_is_computed(dtype: torch.dtype) -> None:
    """Threads, the batch, strides and which other positions come out."""
    p = problem(DIT, 150, 3, biased=True, around="gates", mask="full", rope="each", dtype=dtype, hidden=600)
    want, before = layer(**p, impl="cpp"), torch.get_num_threads()
    rows = torch.tensor([[0, 149, 7, 77], [5, 6, 1, 0], [148, 3, 3, 60]])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(layer(**p, impl="cpp"), want)
            some = layer(**part(p, rows), impl="cpp")
            assert torch.equal(some, want[torch.arange(3)[:, None], rows])
    finally:
        torch.set_num_threads(before)
    for i in range(3):
        alone = p | {
            "x": p["x"][i : i + 1],
            "mask": p["mask"][i : i + 1],
            "rope": tuple(t[i : i + 1] for t in p["rope"]),
        }
        assert torch.equal(layer(**alone, impl="cpp"), want[i : i + 1])
    assert torch.equal(layer(**(p | {"x": p["x"].transpose(0, 1).contiguous().transpose(0, 1)}), impl="cpp"), want)
    everything = torch.arange(150).repeat(3, 2)[:, ::2]  # a stride of two
    assert torch.equal(layer(**part(p, everything), impl="cpp"), want[torch.arange(3)[:, None], everything])
    assert torch.equal(layer(**p, packed=PackedLayer.of(p["weights"], DIT), impl="cpp"), want)


@runs
def test_what_nobody_sees_changes_nothing() -> None:
    """Numbers behind the mask; those of a sequence do not reach another one."""
    p = problem(GQA, 60, mask="padding")
    want = layer(**p, impl="cpp")
    x = p["x"].clone()
    x[1, 40:] = torch.nan
    assert torch.equal(layer(**(p | {"x": x}), impl="cpp")[0], want[0])
    x[1, 40:] = 7.0
    assert torch.equal(layer(**(p | {"x": x}), impl="cpp")[1, :40], want[1, :40])


class Parts(nn.Module):
    """A layer's projections as modules: qkv as one or three, gate and up as one or two."""

    def __init__(self, p: dict[str, Any], apart: bool) -> None:
        super().__init__()
        form, weights = p["form"], p["weights"]
        (qkv, qkv_bias), out, (up, up_bias), down = weights
        q, kv = form.heads * form.head_dim, form.groups * form.head_dim
        sizes = [q, kv, kv] if apart else [q + 2 * kv]
        halves = [len(up) // 2] * 2 if apart and form.activation == "swiglu" else [len(up)]
        every: list[tuple[Tensor, Tensor | None]] = []
        for weight, bias, split in ((qkv, qkv_bias, sizes), (*out, None), (up, up_bias, halves), (*down, None)):
            pieces = [len(weight)] if split is None else split
            biases = [None] * len(pieces) if bias is None else bias.split(pieces)
            every += zip(weight.split(pieces), biases, strict=True)
        self.all = nn.ModuleList()
        for weight, bias in every:
            module = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
            with torch.no_grad():
                module.weight.copy_(weight)
                if bias is not None:
                    module.bias.copy_(bias)
            self.all.append(module)
        self.cut = len(sizes)
        self.gated = form.activation == "swiglu" and not apart


def packed_of(p: dict[str, Any], apart: bool) -> tuple[PackedLayer | None, list[nn.Module], Recast[Parts]]:
    """What `Recast` and `PackedLayer.of_modules` make of such a layer."""
    parts = Parts(p, apart)
    numbers = [2 if parts.gated and i == parts.cut + 1 else 1 for i in range(len(parts.all))]
    recast = Recast(parts, zip(parts.all, numbers, strict=True), (), BF16)
    modules = list(recast.copy.all)
    n = parts.cut
    return PackedLayer.of_modules(p["form"], modules[:n], modules[n], modules[n + 1 : -1], modules[-1]), modules, recast


def at_once(visits: list[Visit], p: dict[str, Any], **changes: Any) -> Tensor | None:
    """`through` the visits with the arguments of `layer`."""
    p = p | changes
    rest = {name: p[name] for name in ("query_rope", "rows", "causal") if name in p}
    mask = p.get("mask")
    everyone = p.get("everyone", mask)  # the mask of layers that are not the last one
    return through(visits, p["x"], p["rope"], everyone, query_mask=mask, **rest)


@runs
@pytest.mark.skipif(native.multiplies_matrices(), reason="the projections are packed for oneDNN here")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["llama", "over a chunk, odd", "gqa, padded", "rows", "mingled", "causal"])
def test_modules_of_one_weight_or_of_each(name: str, apart: bool) -> None:
    """q, k, v and gate, up apart are the same bits; `refresh` reaches them where they lie."""
    p = problem(**CASES[name])
    whole, modules, recast = packed_of(p, apart)
    assert whole is not None
    visits = [Visit(whole, tuple(modules), p["around"])]
    with torch.no_grad():
        got = at_once(visits, p)
        assert got is not None and torch.equal(got, layer(**p, impl="cpp"))
        for weight, _, _ in recast._packs:
            weight.mul_(0.5)
        recast.refresh()
        smaller = at_once(visits, p)
        halved = Weights(*((w * 0.5, b) for w, b in p["weights"]))
        assert smaller is not None and torch.equal(smaller, layer(**(p | {"weights": halved}), impl="cpp"))


@runs
@pytest.mark.skipif(native.multiplies_matrices(), reason="the projections are packed for oneDNN here")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("mask", ["", "padding", "full"])
@pytest.mark.parametrize("tokens, batch", [(20, 3), (140, 1), (3, 50)])
def test_layers_in_turn_are_layer_by_layer(tokens: int, batch: int, mask: str, rows: bool, dtype: torch.dtype) -> None:
    """One call of three visits, two of one layer, is three calls; only the last one's positions are chosen."""
    every = [
        problem(GQA, tokens, batch, mask=mask, around=a, dtype=dtype, seed=i) for i, a in enumerate(("gates", "bf16"))
    ]
    made = [packed_of(p, apart) for p, apart in zip(every, (False, True), strict=True)]
    visits = [Visit(whole, tuple(modules), p["around"]) for p, (whole, modules, _) in zip(every, made, strict=True)]
    first, last = every
    last = last | {name: first[name] for name in ("rope", "mask") if name in first}
    some = torch.stack([torch.randperm(tokens)[: 1 + tokens // 4] for _ in range(batch)])
    end = part(last, some) if rows else last
    with torch.no_grad():
        want = layer(**first, impl="cpp")
        want = layer(**(first | {"x": want}), impl="cpp")
        want = layer(**(end | {"x": want}), impl="cpp")
        got = at_once([visits[0], visits[0], visits[1]], end, x=first["x"], everyone=first.get("mask"))
    assert got is not None and got.dtype == dtype
    assert torch.equal(got, want)


@runs
@pytest.mark.skipif(native.multiplies_matrices(), reason="the projections are packed for oneDNN here")
def test_layers_leave_what_they_cannot_take() -> None:
    """None instead of a result: hooks, other modules, gradients, and problems that "cpp" refuses."""
    p = problem(GQA, 12, rows=4)
    whole, modules, _ = packed_of(p, False)
    assert whole is not None

    def now(mine: Any = modules, around: Around = p["around"], **changes: Any) -> Tensor | None:
        # among visits of the same layer and with another one before
        one = Visit(whole, tuple(mine), around)
        alone, both = at_once([one], p, **changes), at_once([other, one, one], p, **changes)
        assert (alone is None) == (both is None)
        return alone

    theirs = packed_of(problem(GQA, 12, seed=1), True)
    assert theirs[0] is not None
    other = Visit(theirs[0], tuple(theirs[1]), p["around"])
    assert now() is not None
    for i in range(4):
        for add in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
            handle = add(modules[i], lambda *_: None)
            assert now() is None
            handle.remove()
        assert now() is not None
        assert now([*modules[:i], nn.Linear(96, 96), *modules[i + 1 :]]) is None
    modules[2].forward = lambda x: x  # type: ignore[method-assign]
    assert now() is None
    del modules[2].forward
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert now() is None
    everywhere.remove()
    assert now(modules[:3]) is None
    x = p["x"].clone().requires_grad_()
    assert now(x=x) is None
    with torch.no_grad():
        assert now(x=x) is not None
    gain = p["around"].attn_gain
    assert now(around=p["around"]._replace(attn_gain=gain.clone().requires_grad_())) is None
    assert now(around=p["around"]._replace(attn_gain=gain.double())) is None
    assert now(mask=torch.zeros(1, 1, 1, 12)) is None
    assert now(x=p["x"].double()) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert now() is None
    with torch.autocast("cpu", dtype=BF16):
        assert now() is not None
    assert torch.compile(lambda: now() is None, backend="eager")()
    narrow = problem(DIT, 12)
    another = packed_of(narrow, False)
    assert another[0] is not None
    mixed = [Visit(whole, tuple(modules), p["around"]), Visit(another[0], tuple(another[1]), narrow["around"])]
    assert at_once(mixed, p) is None  # of one width, not of one form
    assert at_once([mixed[0]], p) is not None


@runs
@pytest.mark.skipif(native.multiplies_matrices(), reason="the projections are packed for oneDNN here")
def test_modules_that_make_no_packed_layer() -> None:
    p = problem(LLAMA, 5)
    whole, (qkv, out, up, down), _ = packed_of(p, False)
    assert whole is not None
    of = PackedLayer.of_modules
    assert of(LLAMA, [qkv], out, [up], down) is not None
    assert of(LLAMA, [qkv], out, [up], nn.Linear(100, 64)) is None
    assert of(LLAMA, [qkv, qkv], out, [up], down) is None
    assert of(LLAMA._replace(activation="gelu"), [qkv], out, [up], down) is None
    assert of(LLAMA._replace(head_dim=9), [qkv], out, [up], down) is None
    up.packed = dataclasses.replace(up.packed, parts=1)
    assert of(LLAMA, [qkv], out, [up], down) is None


REFUSED = {
    "takes float32 and bfloat16": lambda p: p | {"x": p["x"].half()},
    "its weights must be bfloat16": lambda p: p | {"weights": Weights(*((w.float(), b) for w, b in p["weights"]))},
    "D is 40": lambda p: problem(LLAMA, 9, dim=40),
    "H \\* hd 72": lambda p: problem(Form(3, 3, 24), 9, dim=64),
    "it has no gelu": lambda p: problem(DIT, 9) | {"form": DIT._replace(activation="gelu")},
    "it has no backward; use impl='torch' or torch.no_grad\\(\\)": lambda p: (
        p | {"weights": Weights(*((w.clone().requires_grad_(), b) for w, b in p["weights"]))}
    ),
    "which the weights do not fit": lambda p: p | {"x": p["x"][..., :32]},
    "rows must be int64": lambda p: (
        part(p, torch.tensor([[0, 9], [1, 2]]) % 9) | {"rows": torch.tensor([[0, 9], [1, 2]])}
    ),
    "its mask must be bool": lambda p: p | {"mask": torch.zeros(2, 1, 1, 9)},
    "must come together": lambda p: p | {"rope": None, "query_rope": p["rope"]},
    "tables must be float32 on the CPU": lambda p: p | {"rope": tuple(t[:, :-1] for t in p["rope"])},
    "one for all or one a sequence": lambda p: p | {"rope": tuple(t.expand(3, -1, -1) for t in p["rope"])},
    "gains, biases and gates must be contiguous": lambda p: (
        p | {"around": p["around"]._replace(mlp_bias=torch.ones(128)[::2])}
    ),
    "gates must be float32": lambda p: p | {"around": p["around"]._replace(attn_gate=torch.ones(64, dtype=BF16))},
}


@runs
@pytest.mark.parametrize("why", REFUSED)
def test_refusals(why: str) -> None:
    p = REFUSED[why](problem(LLAMA, 9))
    with pytest.raises(InputError, match=f"layer: impl='cpp' cannot run: .*{why}"):
        layer(**p, impl="cpp")


@runs
def test_refuses_under_modes() -> None:
    p = problem(LLAMA, 9)
    x = p["x"].clone().requires_grad_()
    with pytest.raises(InputError, match="no backward"):
        layer(**(p | {"x": x}), impl="cpp")
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(InputError, match="autocast"):
        layer(**p, impl="cpp")
    with forward_ad.dual_level(), pytest.raises(InputError, match="forward-mode"):
        layer(**(p | {"x": forward_ad.make_dual(p["x"], p["x"])}), impl="cpp")
    for x in (p["x"][0], p["x"][None]):
        with pytest.raises(InputError, match=r"they must be \[B, T, D\]"):
            layer(**(p | {"x": x}))
    with pytest.raises(InputError, match=r"they must be \[B, T, D\]"):
        layer(**(p | {"rows": torch.zeros(3, 2, dtype=torch.int64)}))


@runs
@pytest.mark.parametrize(
    "weights",
    [
        lambda w: w._replace(qkv=(w.qkv[0][:-16], None)),
        lambda w: w._replace(qkv=(w.qkv[0], w.down[0][0, :16])),
        lambda w: w._replace(up=(w.up[0][:-2], None)),
        lambda w: w._replace(down=(w.down[0][:-16], None)),
        lambda w: w._replace(out=(w.out[0][:, :-16], None)),
        lambda w: w._replace(out=(w.out[0], w.out[0][0, :1])),
    ],
)
def test_weights_of_other_sizes_are_not_read(weights: Any) -> None:
    p = problem(LLAMA, 9)
    with pytest.raises(InputError, match="do not fit"):
        layer(**(p | {"weights": weights(p["weights"])}), impl="cpp")


@runs
def test_causal_rows_and_packed_of_another_layer() -> None:
    p = problem(LLAMA, 9)
    with pytest.raises(InputError, match="causal"):
        layer(**(part(p, torch.tensor([[1, 2], [3, 4]])) | {"causal": True}), impl="cpp")
    with pytest.raises(InputError, match="causal"):
        layer(**(p | {"causal": True, "mask": torch.ones(1, 1, 1, 9, dtype=torch.bool)}), impl="cpp")
    with pytest.raises(InputError, match="packed"):
        layer(**p, packed=PackedLayer.of(problem(GQA, 9)["weights"], GQA), impl="cpp")


@runs
def test_auto_takes_it_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = ops_layer._through
    monkeypatch.setattr(ops_layer, "_through", lambda *given: (calls.append(1), real(*given))[1])
    p = problem(LLAMA, 40)
    layer(**p)  # its self-check too
    calls.clear()
    assert torch.equal(layer(**p), layer(**p, impl="cpp")) and calls == [1, 1]
    x = p["x"].clone().requires_grad_()
    layer(**(p | {"x": x})).sum().backward()
    assert x.grad is not None and x.grad.std() > 0 and calls == [1, 1]
    odd = problem(LLAMA, 40, dim=40)
    assert torch.equal(layer(**odd), layer(**odd, impl="torch")) and calls == [1, 1]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**p), layer(**p, impl="torch")) and calls == [1, 1]


def test_modulated_is_dit() -> None:
    """Folding shift and scale into gain and bias is norm * (1 + scale) + shift."""
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(32, generator=rng) for _ in range(6)]
    gain, bias, normed = (torch.randn(32, generator=rng) for _ in range(3))
    for g, b in ((gain, bias), (None, None), (gain, None)):
        around = Around(g, b, None, g, b).modulated(parts)
        own = normed * (1 if g is None else g) + (0 if b is None else b)
        for i, (weight, shift, gate) in enumerate((around[:3], around[3:])):
            want = own * (1 + parts[3 * i + 1]) + parts[3 * i]
            got = normed * weight + shift
            torch.testing.assert_close(got, want)
            assert torch.equal(gate, parts[3 * i + 2])


def test_tolerance_sees_an_error() -> None:
    """The self-check's examples reach every branch: each argument changes their result."""
    for example in OP.examples:
        p = example(torch.device("cpu"), BF16, torch.Generator().manual_seed(0))
        base = layer(**p, impl="torch")
        for name in ("mask", "rope"):
            if p.get(name) is not None and not (name == "rope" and "rows" in p):
                other = layer(**(p | {name: None}), impl="torch")
                assert (base - other).abs().max() > 2 * OP.tolerance[BF16] * base.abs().max()


@runs
def test_a_large_call_keeps_no_memory() -> None:
    """The activations between the products of 65536 tokens are 64 MiB."""
    code = (
        "import resource, torch\n"
        "from loopmdm.ops.layer import Around, Form, Weights, layer\n"
        "def held(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "def product(n, k): return torch.ones(n, k, dtype=torch.bfloat16), None\n"
        "weights = Weights(product(384, 128), product(128, 128), product(64, 128), product(128, 64))\n"
        "def call(n): layer(torch.ones(n, 16, 128), weights, Form(8, 8, 16, 'relu2'), Around(), impl='cpp')\n"
        "call(1)\n"
        "before = held()\n"
        "call(4096)\n"
        "assert held() - before < 32 << 20, held() - before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
