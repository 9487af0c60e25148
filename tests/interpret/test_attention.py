"""The attention kernel in Triton's interpreter, against the float64 oracle and against torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .harness import guarded, launch, need_interpreter

need_interpreter()

from loopmdm.kernels import attention as kernel  # noqa: E402

from loopmdm.ops import attention as module  # noqa: E402
from loopmdm.ops.attention import FUSED_DTYPES, FUSED_HEAD_DIMS, OP, attention  # noqa: E402
from loopmdm.ops.spans import Spans, spans_of  # noqa: E402

from .. import oracle  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# B, T, H, G, head_dim
SHAPES = [(2, 1, 1, 1, 32), (1, 17, 4, 2, 64), (2, 63, 1, 1, 32), (1, 100, 2, 1, 64), (1, 129, 1, 1, 128)]
LAYOUTS = ("left", "right", "everywhere", "documents", "any", "earlier", "later")
WIDE = [64, 64, 0, 0]  # block_m, block_n: few programs, since each step of one takes the interpreter 20 ms


def draw(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Tensor:
    batch, tokens, heads, groups, head_dim = shape
    rng = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, heads + 2 * groups, head_dim, generator=rng).to(dtype)


def layout(name: str, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    if name == "any":
        rng = torch.Generator().manual_seed(tokens)
        first = torch.randint(-5, tokens + 5, (batch, tokens), generator=rng)
        return first, first + torch.randint(-5, tokens, (batch, tokens), generator=rng)
    if name in ("earlier", "later"):  # ranges that share whole blocks and end row by row
        steps, zeros = torch.arange(tokens).expand(batch, tokens), torch.zeros(batch, tokens, dtype=torch.int64)
        return (zeros, steps + 1) if name == "earlier" else (steps, zeros + tokens)
    real, ids = torch.ones(batch, tokens, dtype=torch.bool), torch.zeros(batch, tokens, dtype=torch.int64)
    if name == "left":
        real[0, : tokens // 3] = False
    elif name == "right":
        real[-1, tokens - tokens // 3 :] = False
    elif name == "everywhere":
        real[0] = False
    else:
        ids += torch.arange(tokens) * 4 // tokens
    spans = spans_of(real, ids)
    assert spans is not None
    return spans[:2]


def errors(
    qkv: Tensor, heads: int, groups: int, spans: tuple[Tensor, Tensor] | None, tile: list[int], scale: float = 0.2
) -> tuple[float, float, float]:
    """(the kernel's error, torch's error, the largest error of the log-sum-exps)."""
    first, last = (None, None) if spans is None else spans
    truth, lses = oracle.attention(qkv.double(), heads, groups, first, last, scale)
    qkv, first, last = (None if t is None else guarded(t) for t in (qkv, first, last))
    ours, lse = module._fused_op(qkv, first, last, heads, groups, scale, True, tile)
    torchs = attention(qkv, heads, groups, spans, scale=scale, impl="torch")
    assert ours.dtype == qkv.dtype and lse.dtype == FP32
    gap = torch.where(lse == lses, 0.0, (lse - lses) / lses.abs().clamp(min=1)).abs().max()
    return oracle.error(ours, truth), oracle.error(torchs, truth), float(gap)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    ours, torchs, lse = errors(draw(shape, dtype), *shape[2:4], None, WIDE if dtype == FP32 else [0, 0, 0, 0])
    assert ours <= 1.2 * torchs + 5e-7, f"{ours:.2e}, torch {torchs:.2e}"
    assert lse < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype, tile", [(FP32, [16, 16, 0, 0]), (BF16, [32, 16, 0, 0]), (FP32, WIDE)], ids=str)
def test_spans(dtype: torch.dtype, tile: list[int], name: str) -> None:
    """Whole blocks, blocks at the edges, tiles of several documents, and rows that see nothing among rows that do."""
    ours, torchs, lse = errors(draw((2, 50, 1, 1, 32), dtype), 1, 1, layout(name, 2, 50), tile)
    assert ours <= 1.2 * torchs + 5e-7, f"{ours:.2e}, torch {torchs:.2e}"
    assert lse < 1e-5


@pytest.mark.parametrize("name", [None, "left", "documents", "any"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_no_races_and_no_stray_accesses(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str | None) -> None:
    qkv = draw((2, 37, 2, 1, 32), dtype)
    first, last = (None, None) if name is None else layout(name, 2, 37)
    config = {"block_m": 32, "block_n": 16}
    out, lse = launch(monkeypatch, kernel.forward, qkv, first, last, 2, 1, 0.2, True, config, "float32")
    assert (out.shape, out.dtype, lse.shape) == ((2, 37, 64), dtype, (2, 2, 37))
    with_none = launch(monkeypatch, kernel.forward, qkv, first, last, 2, 1, 0.2, False, config, "float32")
    assert torch.equal(out, with_none[0]) and with_none[1].shape == (0,)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_both_integers(kind: torch.dtype) -> None:
    first, last = (t.to(kind) for t in layout("any", 1, 20))
    ours, torchs, _ = errors(draw((1, 20, 1, 1, 32), FP32), 1, 1, (first, last), [16, 16, 0, 0])
    assert ours <= 1.2 * torchs + 5e-7


def test_padding_may_hold_anything() -> None:
    """Keys that no query of a tile may look at are not read."""
    qkv = draw((1, 48, 1, 1, 32), FP32)
    real = torch.arange(48)[None] < 20
    want = attention(qkv, 1, 1, spans_of(real), impl="torch")
    qkv[:, 32:, 1:] = float("nan")
    first, last = spans_of(real)[:2]  # type: ignore[index]
    out, _ = module._fused_op(qkv, first, last, 1, 1, 32**-0.5, False, [16, 16, 0, 0])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    """|q k| about 1000: exponentials of that size are no fp32 number."""
    qkv = draw((1, 40, 1, 1, 32), dtype)
    qkv[:, :, :2] *= 30
    ours, torchs, lse = errors(qkv, 1, 1, None, [16, 16, 0, 0], scale=0.5)
    assert ours <= 1.2 * torchs + 2e-4 and lse < 1e-5, f"{ours:.2e}, torch {torchs:.2e}"


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_scores_of_minus_infinity(spans: bool) -> None:
    """All of a row's scores overflow downwards: 0, and never NaN; the first block alone: the others decide."""
    qkv = draw((1, 40, 1, 1, 32), FP32)
    qkv[:, :, 0], qkv[:, :, 1] = 1e20, -1e20
    ends = torch.zeros(1, 40, dtype=torch.int32), torch.full((1, 40), 39, dtype=torch.int32)
    first, last = ends if spans else (None, None)
    out, lse = module._fused_op(qkv, first, last, 1, 1, 0.2, True, [16, 16, 0, 0])
    assert torch.equal(out, torch.zeros_like(out)) and (lse == float("-inf")).all()
    qkv[:, 20:, 1] = 0.0
    out, lse = module._fused_op(qkv, first, last, 1, 1, 0.2, True, [16, 16, 0, 0])
    mean = qkv[:, 20 : 39 if spans else 40, 2].mean(1)
    torch.testing.assert_close(out, mean[:, None].expand(1, 40, 32))


def test_views() -> None:
    """A projection's slice is read where it lies; another layout is copied."""
    wide = draw((2, 20, 2, 2, 32), FP32).repeat(1, 1, 2, 1)
    want = attention(wide[:, :, 3:9].contiguous(), 2, 2, impl="triton")
    assert torch.equal(attention(wide[:, :, 3:9], 2, 2, impl="triton"), want)
    turned = wide[:, :, 3:9].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert torch.equal(attention(turned, 2, 2, impl="triton"), want)
    part = torch.cat((wide.flip(1), wide), 1)[:, 20:, 3:9]
    assert torch.equal(attention(part, 2, 2, impl="triton"), want)


def test_no_tokens() -> None:
    assert attention(torch.zeros(2, 0, 6, 32), 2, 2, impl="triton").shape == (2, 0, 64)
    assert attention(torch.zeros(0, 5, 6, 32), 2, 2, impl="triton").shape == (0, 5, 64)


def test_nothing_compiles_anew_for_another_batch_or_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile-time arguments depend on the model and on which of two tiles a length takes. (The others: tests/gate.)"""
    seen: list[dict[str, Any]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *args, **constants: seen.append(constants)

    monkeypatch.setattr(kernel, "attention_kernel", Recorded())
    for batch, tokens in [(1, 1), (2, 16), (3, 17), (2, 128), (1, 129), (4, 1000)]:
        attention(torch.zeros(batch, tokens, 6, 64, dtype=BF16), 2, 2, impl="triton")
    assert seen[0] == seen[1] == seen[2] == seen[3] and seen[4] == seen[5]


@pytest.mark.parametrize("spans", [False, True])
def test_opcheck(spans: bool) -> None:
    """Schema, fake tensors and dynamic shapes as torch itself checks them."""
    first, last = layout("left", 2, 5) if spans else (None, None)
    torch.library.opcheck(
        module._fused_op, (draw((2, 5, 2, 1, 32), FP32), first, last, 2, 1, 0.2, spans, [16, 16, 0, 0])
    )


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_self_check_passes(dtype: torch.dtype) -> None:
    assert OP.deviation("triton", torch.device("cpu"), dtype) <= OP.tolerance[dtype]


def test_same_limits_on_both_sides() -> None:
    assert (kernel.HEAD_DIMS, kernel.DTYPES) == (FUSED_HEAD_DIMS, FUSED_DTYPES)
    assert isinstance(OP.examples[2](torch.device("cpu"), BF16, torch.Generator())["spans"], Spans)
