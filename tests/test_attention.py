"""attention: torch's implementation and the calls of libraries against the float64 oracle (kernel: tests/interpret)."""

from __future__ import annotations

import importlib.machinery
import inspect
import itertools
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopmdm.kernels import tuned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loopmdm.errors import InputError
from loopmdm.ops import attention as module
from loopmdm.ops.attention import BACKENDS, FUSED_DTYPES, FUSED_HEAD_DIMS, OP, PACKING, attention
from loopmdm.ops.spans import Spans, packed, spans_of

from . import oracle

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {FP64: 1e-14, FP32: 1e-6, FP16: 1e-3, BF16: 8e-3}
CPU = torch.device("cpu")
# B, T, H, G, head_dim
SHAPES = [(2, 1, 1, 1, 8), (1, 17, 4, 2, 32), (2, 63, 2, 1, 20), (1, 100, 3, 3, 64), (1, 129, 2, 2, 16)]


def draw(shape: tuple[int, int, int, int, int], dtype: torch.dtype = FP64) -> Tensor:
    batch, tokens, heads, groups, head_dim = shape
    rng = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, heads + 2 * groups, head_dim, generator=rng, dtype=FP64).to(dtype)


def layouts(batch: int, tokens: int) -> dict[str, Spans]:
    """Spans of padding left, right and everywhere, and of packed documents."""
    real = {side: torch.ones(batch, tokens, dtype=torch.bool) for side in ("left", "right", "everywhere")}
    real["left"][0, : tokens // 3] = False
    real["right"][-1, tokens - tokens // 3 - 1 :] = False
    real["everywhere"][0] = False
    ids = (torch.arange(tokens) * 4 // tokens).expand(batch, tokens)
    found = {side: spans_of(mask) for side, mask in real.items()} | {"documents": spans_of(None, ids)}
    return {name: spans for name, spans in found.items() if spans is not None}


def both_errors(qkv: Tensor, heads: int, groups: int, spans: Any = None, **options: Any) -> dict[str, float]:
    first, last = (None, None) if spans is None else spans[:2]
    scale = options.get("scale")
    return oracle.errors(
        lambda qkv: (attention(qkv, heads, groups, spans, **options),),
        lambda qkv: oracle.attention(qkv, heads, groups, first, last, scale)[:1],
        {"qkv": qkv},
    )


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    for name, value in both_errors(draw(shape, dtype), *shape[2:4]).items():
        assert value <= LIMIT[dtype] * (2 if name == "dqkv" else 1), f"{name}: {value:.1e}"


@pytest.mark.parametrize("layout", ["left", "right", "everywhere", "documents"])
@pytest.mark.parametrize("dtype", [FP64, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_spans(shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: str) -> None:
    spans = layouts(*shape[:2])[layout]
    for name, value in both_errors(draw(shape, dtype), *shape[2:4], spans).items():
        assert value <= LIMIT[dtype] * (2 if name == "dqkv" else 1), f"{name}: {value:.1e}"


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_any_ranges(kind: torch.dtype) -> None:
    """Queries outside their own range, ranges that cross, ends beyond the sequence, ranges turned round."""
    first = torch.randint(-3, 20, (2, 17), dtype=kind)
    last = first + torch.randint(-4, 9, (2, 17), dtype=kind)
    got = both_errors(draw((2, 17, 4, 2, 16)), 4, 2, (first, last), scale=-0.3)
    assert max(got.values()) < LIMIT[FP64]


def test_a_query_without_keys_gets_zero_and_gives_no_gradient() -> None:
    qkv = draw((2, 9, 2, 2, 8), FP32).requires_grad_()
    spans = spans_of(torch.zeros(2, 9, dtype=torch.bool))
    out = attention(qkv, 2, 2, spans)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(out, torch.zeros(2, 9, 16)) and torch.equal(grad, torch.zeros_like(qkv))


def test_no_tokens() -> None:
    assert attention(torch.zeros(2, 0, 6, 8), 2, 2).shape == (2, 0, 16)
    assert attention(torch.zeros(0, 5, 6, 8), 2, 2).shape == (0, 5, 16)


def test_a_view_is_as_good_as_its_copy() -> None:
    wide = torch.randn(2, 12, 9, 8)
    view = wide[:, 2:, 1:7]
    assert torch.equal(attention(view, 2, 2), attention(view.contiguous(), 2, 2))


# Spans


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=7, max_size=7), min_size=1, max_size=3))
def test_spans_are_the_real_tokens_of_the_run(rows: list[list[tuple[bool, int]]]) -> None:
    real = torch.tensor([[r for r, _ in row] for row in rows])
    ids = torch.tensor([[i for _, i in row] for row in rows])
    spans = spans_of(real, ids, check=False)
    assert spans is not None
    for b, row in enumerate(rows):
        for i in range(7):
            begin, end = i, i + 1
            while begin and row[begin - 1] == row[i]:
                begin -= 1
            while end < 7 and row[end] == row[i]:
                end += 1
            assert (int(spans.first[b, i]), int(spans.last[b, i])) == (begin, end if row[i][0] else begin)
    again = packed(spans)
    runs = [list(zip(*s, strict=True)) for s in zip(again.first.tolist(), again.last.tolist(), strict=True)]
    starts = [7 * b + i for b, run in enumerate(runs) for i in range(7) if i == 0 or run[i] != run[i - 1]]
    assert again.cu_seqlens is not None and again.cu_seqlens.tolist() == [*starts, 7 * len(rows)]
    assert again.longest == max(b - a for a, b in zip(starts, [*starts[1:], 7 * len(rows)], strict=True))


def test_no_mask_and_no_documents_are_no_spans() -> None:
    assert spans_of() is None
    spans = spans_of(torch.tensor([[0, 1, 1, 0]]))
    assert spans is not None and (spans.first.dtype, spans.last.dtype) == (torch.int32, torch.int32)
    assert (spans.first.tolist(), spans.last.tolist()) == ([[0, 1, 1, 3]], [[0, 3, 3, 3]])


@pytest.mark.parametrize(
    "mask, ids, token",
    [
        ([1, 0, 1, 1], None, 2),
        ([0, 1, 0, 0, 1], None, 4),
        ([1, 1, 0, 1], [5, 6, 6, 6], 3),
        ([1, 1, 0, 1], [5, 6, 7, 6], 3),
    ],
)
def test_a_hole_is_an_error(mask: list[int], ids: list[int] | None, token: int) -> None:
    masks = torch.tensor([[1] * len(mask), mask]).bool()
    documents = None if ids is None else torch.tensor([[0] * len(mask), ids])
    with pytest.raises(InputError, match=f"has a hole: sequence 1 is padding before token {token} and real before"):
        spans_of(masks, documents)


def test_padding_between_documents_is_no_hole() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()
    spans = spans_of(mask, torch.tensor([[0, 0, 0, 0, 1, 2, 2]]))
    assert spans is not None
    assert (spans.first.tolist(), spans.last.tolist()) == ([[0, 1, 1, 3, 4, 5, 6]], [[0, 3, 3, 3, 5, 6, 6]])


def test_packing_is_for_what_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name says so itself; "auto" asks the table what it would prefer for these spans, and whether that runs here."""
    size = {"head_dim": 64, "tokens": 128, "batch": 2}
    asked: list[Any] = []
    preferred: str | None = None

    def best(op: str, arch: str, dtype: torch.dtype, size: dict[str, int], **how: bool) -> tuned.Row | None:
        asked.append((op, arch, size["spans"], how))
        return tuned.Row(op, preferred, arch) if preferred else None

    monkeypatch.setattr(tuned, "best", best)
    monkeypatch.setattr(module, "_unavailable", lambda impl, device: None)
    for impl in ("varlen", "flash_attn", "triton", "torch"):
        assert module.packs(impl, CPU, torch.bfloat16, **size) == (impl in module.PACKING)
    assert not asked
    for name, packs in ((None, False), ("triton", False), ("varlen", True)):
        preferred = name
        assert module.packs("auto", CPU, torch.bfloat16, **size) is packs
    assert asked == [("attention", "cpu", 1, {"measured_only": True})] * 3
    monkeypatch.setattr(module, "_unavailable", lambda impl, device: "no")
    assert not module.packs("auto", CPU, torch.bfloat16, **size)


def test_only_runs_can_be_packed() -> None:
    for first, last in [([0, 0, 0], [3, 3, 2]), ([0, 0, 1], [2, 2, 3]), ([0, 0, 2], [3, 3, 3])]:
        with pytest.raises(InputError, match="only a partition into runs can be packed"):
            packed((torch.tensor([first]), torch.tensor([last])))


def test_wrong_masks_are_errors() -> None:
    for args in [(torch.ones(4).bool(), None), (torch.ones(2, 4).bool(), torch.zeros(2, 3, dtype=torch.int64))]:
        with pytest.raises(InputError, match=r"they must be \[B, T\]"):
            spans_of(*args)


# Implementations


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
def test_flash_on_cpu_is_the_same(dtype: torch.dtype) -> None:
    for name, value in both_errors(draw(SHAPES[1], dtype), 4, 2, impl="flash").items():
        assert value <= 2 * LIMIT[dtype], f"{name}: {value:.1e}"


def test_backends_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the one backend, for this call alone."""
    asked: list[Any] = []
    really = torch.nn.attention.sdpa_kernel

    def recorded(backends: Any) -> Any:
        asked.append(backends)
        return really(torch.nn.attention.SDPBackend.MATH)

    monkeypatch.setattr(module, "sdpa_kernel", recorded)
    monkeypatch.setattr(type(OP), "unavailable", lambda self, impl, device: None)
    qkv = draw((1, 17, 2, 2, 16), BF16)
    for impl, backend in BACKENDS.items():
        out = attention(qkv, 2, 2, impl=impl)
        assert asked.pop() is backend and not asked
        assert oracle.error(out, oracle.attention(qkv.double(), 2, 2)[0]) < LIMIT[BF16]
    out = attention(qkv, 2, 2, layouts(1, 17)["documents"], impl="efficient")
    assert oracle.error(out, oracle.attention(qkv.double(), 2, 2, *layouts(1, 17)["documents"][:2])[0]) < LIMIT[BF16]
    attention(qkv, 2, 2)
    assert asked == [BACKENDS["efficient"]]


def by_runs(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float) -> Tensor:
    """What a kernel for sequences of varying length computes, [tokens, heads, head_dim] in and out."""
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q) == len(k) == len(v)
    assert longest == int(ends.diff().max()) and (ends.diff() > 0).all()
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    parts = []
    for begin, end in zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True):
        run = torch.cat((q, k, v), 1)[None, begin:end]
        parts.append(attention(run, q.shape[1], k.shape[1], scale=scale, impl="torch")[0].unflatten(-1, q.shape[1:]))
    return torch.cat(parts)


# the signatures of flash-attn 2, as its documentation gives them
def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (q.ndim, k.ndim, v.ndim) == (4, 4, 4) and q.dtype in module.HALF
    assert (dropout_p, causal, window_size, softcap) == (0.0, False, (-1, -1), 0.0) and isinstance(softmax_scale, float)
    out = attention(torch.cat((q, k, v), 2), q.shape[2], k.shape[2], scale=softmax_scale, impl="torch")
    return out.unflatten(-1, q.shape[2:])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert (q.ndim, k.ndim, v.ndim) == (3, 3, 3) and q.dtype in module.HALF
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    assert (dropout_p, causal, window_size) == (0.0, False, (-1, -1))
    return by_runs(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert query.shape[1] == key.shape[1] or enable_gqa
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    return by_runs(query, key, value, cu_seq_q, max_q, scale)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A recorded flash_attn and varlen_attn, on any device; yields the names of what was called."""
    called: list[str] = []

    def record(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            called.append(function.__name__)
            return function(*args, **kwargs)

        return call

    fake = types.ModuleType("flash_attn")
    fake.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    fake.flash_attn_func, fake.flash_attn_varlen_func = record(flash_attn_func), record(flash_attn_varlen_func)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", record(varlen_attn))
    monkeypatch.setattr(type(OP), "unavailable", lambda self, impl, device: None)
    tuned.forget()
    yield called
    monkeypatch.undo()
    tuned.forget()


@pytest.mark.parametrize("impl", PACKING)
@pytest.mark.parametrize("layout", [None, "left", "right", "everywhere", "documents"])
def test_packing_libraries(libraries: list[str], impl: str, layout: str | None) -> None:
    qkv = draw((2, 17, 4, 2, 16), BF16)
    spans = None if layout is None else packed(layouts(2, 17)[layout])
    names = {"varlen": "varlen_attn", "flash_attn": "flash_attn_varlen_func" if layout else "flash_attn_func"}
    got = both_errors(qkv, 4, 2, spans, scale=0.3, impl=impl)
    assert libraries == [names[impl]]
    assert got["out0"] < LIMIT[BF16] and got["dqkv"] < 2 * LIMIT[BF16]


def test_varlen_is_called_as_this_torch_has_it() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    ours, theirs = (inspect.signature(f).parameters for f in (varlen_attn, varlen.varlen_attn))
    assert {name: p.kind for name, p in ours.items()}.items() <= {name: p.kind for name, p in theirs.items()}.items()


def test_flash_attn_is_called_as_it_is_installed() -> None:
    library = pytest.importorskip("flash_attn")
    for ours in (flash_attn_func, flash_attn_varlen_func):
        theirs = inspect.signature(getattr(library, ours.__name__)).parameters
        assert list(inspect.signature(ours).parameters)[:9] == list(theirs)[:9]


@pytest.mark.parametrize("impl", PACKING)
def test_spans_must_be_packed_before(libraries: list[str], impl: str) -> None:
    with pytest.raises(InputError, match=rf"impl='{impl}' cannot run: its spans must be packed; call packed\(spans\)"):
        attention(draw((2, 17, 2, 2, 16), BF16), 2, 2, layouts(2, 17)["left"], impl=impl)
    assert not libraries


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    "impl, shape, dtype, options, sentence",
    [
        ("triton", (1, 5, 2, 2, 64), FP64, {}, "qkv is torch.float64, the kernel takes bfloat16"),
        ("triton", (1, 5, 2, 2, 48), BF16, {}, "head_dim is 48, the kernel has 32, 64 and 128"),
        ("triton", (1, 5, 2, 2, 64), BF16, {"scale": 0.0}, "scale is 0.0, the kernel needs one above 0"),
        ("cudnn", (1, 5, 2, 2, 64), FP32, {}, "it takes bfloat16, float16;"),
        ("cudnn", (1, 5, 2, 2, 64), BF16, {"spans": "left"}, "it takes no spans"),
        ("flash", (1, 5, 2, 2, 64), BF16, {"spans": "left"}, "it takes no spans"),
        ("efficient", (1, 5, 4, 2, 64), BF16, {}, "no grouped heads, and there are 4 query and 2 key heads"),
        ("efficient", (1, 5, 2, 2, 64), FP64, {}, "it takes bfloat16, float16, float32;"),
        ("varlen", (1, 5, 2, 2, 20), BF16, {}, "head_dim is 20, it takes multiples of 8"),
        ("flash_attn", (1, 5, 2, 2, 16), FP32, {}, "it takes bfloat16, float16;"),
        ("flash", (1, 0, 2, 2, 16), BF16, {}, "there are no tokens"),
    ],
)
def test_what_an_implementation_refuses(
    impl: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, options: dict[str, Any], sentence: str
) -> None:
    if "spans" in options:
        options = {"spans": layouts(*shape[:2])[options["spans"]]}
    with pytest.raises(InputError, match=f"attention: impl={impl!r} cannot run: .*{sentence}"):
        attention(draw(shape, dtype), *shape[2:4], **options, impl=impl)


@pytest.mark.usefixtures("libraries")
def test_the_kernel_refuses_gradients() -> None:
    qkv = draw((1, 5, 2, 2, 64), FP32).requires_grad_()
    with pytest.raises(InputError, match=r"it has no backward; use impl='torch' or torch.no_grad\(\)"):
        attention(qkv, 2, 2, impl="triton")


def test_auto_takes_the_first_measured_row_that_takes_the_problem(
    libraries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"impl": "flash", "arch": "cpu", "upto": {"tokens": 64}},
        {"impl": "varlen", "arch": "cpu", "dtype": "bfloat16", "upto": {"head_dim": 64, "batch": 2}},
    ]
    rows = [row | {"evidence": "measured: results.json"} for row in rows]
    (tmp_path / "attention.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    tuned.forget()
    calls: list[str] = []
    really = OP.choose

    def chosen(impl: str, *args: Any, **size: int) -> Any:
        choice = really(impl, *args, **size)
        calls.extend([choice.impl] if impl == "auto" else [])
        return choice

    monkeypatch.setattr(module, "OP", types.SimpleNamespace(choose=chosen))
    spans = layouts(2, 17)["documents"]
    for spans_now, dtype, wanted in [
        (None, BF16, "flash"),
        (packed(spans), BF16, "varlen"),
        (spans, BF16, "torch"),  # not packed, so neither takes it
        (packed(spans), FP32, "torch"),
    ]:
        qkv = draw((2, 17, 2, 2, 16), dtype)
        out = attention(qkv, 2, 2, spans_now)
        assert calls[-1] == wanted
        first, last = spans_now[:2] if spans_now else (None, None)
        assert oracle.error(out, oracle.attention(qkv.double(), 2, 2, first, last)[0]) < LIMIT[dtype]
    attention(draw((3, 65, 2, 2, 16), BF16), 2, 2)
    assert calls[-1] == "torch", "rows hold inside their bounds"


@pytest.mark.parametrize("layout", [None, "documents"])
def test_compiles_in_one_graph_for_any_shape(layout: str | None) -> None:
    torch.compiler.reset()
    traced = torch.compile(attention, backend="eager", fullgraph=True, dynamic=True)
    for batch, tokens in [(2, 17), (3, 33), (4, 40)]:
        qkv = draw((batch, tokens, 4, 2, 16), FP32)
        spans = layouts(batch, tokens)[layout] if layout else None
        torch.testing.assert_close(traced(qkv, 4, 2, spans), attention(qkv, 4, 2, spans))


def test_spans_compile_in_one_graph() -> None:
    torch.compiler.reset()
    mask, ids = torch.ones(2, 9).bool(), torch.arange(9).expand(2, 9) // 4
    traced = torch.compile(spans_of, backend="eager", fullgraph=True)(mask, ids)
    for a, b in zip(traced[:2], spans_of(mask, ids)[:2], strict=True):  # type: ignore[index]
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_lse", [False, True])
def test_fake_outputs(with_lse: bool) -> None:
    """What torch.compile is told about the kernel. (opcheck runs the kernel: tests/interpret.)"""
    with FakeTensorMode() as mode:
        qkv = mode.from_tensor(draw((2, 17, 4, 2, 32), BF16))
        out, lse = module._fused_op(qkv, None, None, 4, 2, 0.3, with_lse, [0, 0, 0, 0])
        assert (out.shape, out.dtype) == ((2, 17, 128), BF16)
        assert (lse.shape, lse.dtype) == ((2, 4, 17) if with_lse else (0,), FP32)


GOOD = torch.zeros(2, 5, 6, 8)
ENDS = torch.zeros(2, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    "args, sentence",
    [
        ((GOOD, 3, 2), "3 query heads and 2 key heads; the first must be a multiple of the second"),
        ((GOOD, 0, 3), "0 query heads and 3 key heads"),
        ((GOOD, 4, 2), r"qkv is \[2, 5, 6, 8\]; with 4 query and 2 key heads it must be \[B, T, 8, head_dim\]"),
        ((GOOD[0], 2, 2), r"qkv is \[5, 6, 8\]"),
        ((GOOD.long(), 2, 2), "qkv is torch.int64; it must be floating point"),
        ((GOOD, 2, 2, (ENDS, ENDS[:1])), r"spans hold torch.int32 \[1, 5\] on cpu; they must be two int32 or int64"),
        ((GOOD, 2, 2, (ENDS.float(), ENDS)), "spans hold torch.float32"),
        ((GOOD, 2, 2, (ENDS, ENDS.to("meta"))), "on meta"),
    ],
)
def test_errors_say_what_to_do(args: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        attention(*args)
    assert "\n" not in str(caught.value)


def test_unavailable_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no impl 'cudn'; did you mean 'cudnn'"):
        attention(GOOD, 2, 2, impl="cudn")
    tuned.forget()
    assert module._unavailable("flash", CPU) is None
    assert module._unavailable("cudnn", CPU) == "it needs CUDA, the tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = torch.device("cuda", 0)
    assert module._unavailable("flash", cuda) == "it needs sm_80 or later, this is sm_75"
    assert module._unavailable("efficient", cuda) is None
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    tuned.forget()
    assert module._unavailable("varlen", cuda) == "this torch has no varlen_attn; torch 2.11 has"
    assert "pip install 'loopmdm[flash]'" in (module._unavailable("flash_attn", cuda) or "")
    monkeypatch.undo()

    def without_scale(query: Tensor, enable_gqa: bool = False) -> Tensor:
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", without_scale)
    tuned.forget()
    assert module._unavailable("varlen", CPU) == "the varlen_attn of this torch has no scale; a later one has"
    monkeypatch.undo()
    tuned.forget()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
def test_every_head_dim_has_a_row_of_its_own(dtype: torch.dtype, arch: str) -> None:
    """The gate compiles a row at its bounds: one that covered narrower heads too would not be proven for them."""
    for head_dim, tokens in itertools.product(FUSED_HEAD_DIMS, (1, 128, 129, 65536)):
        row = tuned.best("attention", arch, dtype, {"head_dim": head_dim, "tokens": tokens}, impl="triton")
        assert row is not None and row.upto["head_dim"] == head_dim


def test_examples_that_an_implementation_takes() -> None:
    """The self-check passes over what an implementation refuses, and never calls nothing a success."""
    assert [e.__name__ for e in OP.taken("triton", CPU, BF16)] == ["_grouped", "_short", "_documents"]
    assert [e.__name__ for e in OP.taken("cudnn", CPU, BF16)] == ["_grouped", "_short"]
    assert [e.__name__ for e in OP.taken("efficient", CPU, FP32)] == ["_short", "_documents"]
    assert [e.__name__ for e in OP.taken("varlen", CPU, FP16)] == ["_grouped", "_short", "_documents"]
    assert OP.taken("cudnn", CPU, FP32) == ()
    assert "takes no example in torch.float32" in (OP.verify("cudnn", CPU, FP32) or "")
    assert OP.verify("flash", CPU, FP32) is None
    for impl in ("torch", "flash"):
        assert all(OP.deviation(impl, CPU, dtype) <= OP.tolerance[dtype] for dtype in FUSED_DTYPES)


def test_import_loads_no_triton() -> None:
    code = "import sys, loopmdm.ops.attention; print('triton' in sys.modules, 'flash_attn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


@pytest.mark.parametrize("spans", [False, True])
def test_asks_torch_about_the_mask_that_it_will_get(spans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its efficient kernel refuses a mask whose last stride is not 1."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *given: given)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda given: asked.append(given) or True)
    assert module._torch_refuses("efficient", torch.zeros(3, 5, 6, 8), 2, 2, spans or None) is None
    mask = asked[0][3]
    if spans:
        assert mask.shape == (3, 1, 5, 5) and mask.dtype == torch.bool and mask.stride(-1) == 1
    else:
        assert mask is None
