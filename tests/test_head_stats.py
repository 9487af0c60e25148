"""head_stats against float64 and against itself: the same tokens from the same logits, whatever computes them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.errors import InputError
from loopmdm.ops import head_stats as module
from loopmdm.ops.contract import extension
from loopmdm.ops.head_stats import OP, HeadStats, head_stats, logit_stats

INF, NAN = math.inf, math.nan
CPP = pytest.param("cpp", marks=pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built"))
IMPLS = ["torch", CPP]
BF16, FP32 = torch.bfloat16, torch.float32


def noise(rows: int, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=rng),
        "positions": torch.randint(0, 4096, (rows,), generator=rng),
        "steps": torch.randint(0, 64, (rows,), generator=rng),
    }


def problem(rows: int, dim: int, vocab: int, dtype: torch.dtype = FP32, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(rows + vocab + seed)
    return {
        "hidden": torch.randn(rows, dim, generator=rng).to(dtype),
        "weight": (torch.randn(vocab, dim, generator=rng) * 3 / dim**0.5).to(dtype),
        "bias": torch.randn(vocab, generator=rng),
        **noise(rows),
    }


def awkward(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Ties everywhere, NaN, infinities; rows without a choice."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=rng).mul(3).round().div(2)
    for value in (NAN, -INF, -0.0):
        x[torch.rand(x.shape, generator=rng) < 0.05] = value
    x[1], x[2], x[3, vocab // 2], x[4, : vocab - 1] = NAN, -INF, INF, NAN
    return x


def same(a: HeadStats, b: HeadStats) -> None:
    """Equal in all that decides, close in what is summed."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y) if name in ("token", "logit", "top", "second") else torch.allclose(x, y, atol=2e-5), (
            name
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "rows, dim, vocab",
    [(1, 1, 2), (7, 33, 127), (13, 64, 128), (130, 100, 1100), (6, 31, 515), (28, 40, 300), (44, 33, 140)],
)
def test_numbers_against_float64(rows: int, dim: int, vocab: int, dtype: torch.dtype, impl: str) -> None:
    inputs = problem(rows, dim, vocab, dtype)
    got = head_stats(**inputs, impl=impl)
    x = inputs["hidden"].double() @ inputs["weight"].double().T + inputs["bias"].double()
    p = x.softmax(-1)
    first, second = x.topk(2, dim=-1).values.unbind(-1)
    want = {"logit": first, "top": first, "second": second, "lse": x.logsumexp(-1), "dot": (p * x).sum(-1)}
    want |= {"confidence": p.max(-1).values, "entropy": torch.special.entr(p).sum(-1)}
    best = p.topk(2, dim=-1).values
    want["margin"] = best[:, 0] - best[:, 1]
    assert torch.equal(got.token, x.argmax(-1))
    for name, value in want.items():
        assert torch.allclose(getattr(got, name).double(), value, rtol=1e-5, atol=1e-5), name


@pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
@pytest.mark.parametrize("vocab", [2, 127, 129, 700, 1061])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1e-40},
        {"temperature": 50.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 30},
        {"temperature": 1.4, "top_k": 64, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.5},
    ],
    ids=str,
)
def test_the_same_tokens_from_the_same_logits(vocab: int, options: dict[str, Any]) -> None:
    """Bit for bit, also the draw: integers are summed where a sum decides."""
    x = awkward(25, vocab, seed=vocab)
    options = {"suppressed": (0, vocab - 1) if vocab > 2 else (), **noise(25), **options}
    got, want = (logit_stats(x, **options, impl=impl) for impl in ("cpp", "torch"))
    same(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_judging_given_tokens(temperature: float, impl: str) -> None:
    x, given = awkward(25, 300), torch.arange(25) * 11 - 1
    given[::3] = -1
    got = logit_stats(x, **noise(25), temperature=temperature, suppressed=(21,), tokens=given, impl=impl)
    free = logit_stats(x, **noise(25), temperature=temperature, suppressed=(21,), impl=impl)
    judged = given >= 0
    assert torch.equal(got.token, torch.where(judged, given, free.token))
    clean = x.nan_to_num(-INF, 3.4028234663852886e38, -INF).index_fill(1, torch.tensor([21]), -INF)
    assert torch.equal(got.logit[judged], clean[judged, given[judged]])
    assert float(got.confidence[2]) == 0 and not any(t.isnan().any() for t in (got.confidence, got.margin, got.entropy))


@pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
def test_the_integers_of_a_group_are_the_references() -> None:
    """All the bits of the sums that decide a draw; a token seldom shows the last of them."""
    x, scale = torch.randn(9, 500, generator=torch.Generator().manual_seed(5)) * 3, 0.7
    draw = module.Draw(1 / scale, None, None, None, (), None, None, None, None)
    got = module.Cpp(x, None, None, draw).groups(slice(0, 9))
    blocks = torch.nn.functional.pad(x, (0, 12), value=-INF).unflatten(-1, (4, 128))
    d = blocks - blocks.max(-1, keepdim=True).values
    assert torch.equal(got.total.long() & 0xFFFFFFFF, module.counts(d).sum(-1))
    assert got.tempered is not None
    assert torch.equal(got.tempered.long() & 0xFFFFFFFF, module.counts(d * draw.scale).sum(-1))


@pytest.mark.parametrize("impl", IMPLS)
def test_judged_numbers_against_float64(impl: str) -> None:
    """Of tokens that are not the likeliest, over logits of which some are suppressed."""
    x = torch.randn(9, 400, generator=torch.Generator().manual_seed(4)) * 3
    given, gone = torch.arange(9) * 43, [7, 300]
    got = logit_stats(x, tokens=given, suppressed=gone, impl=impl)
    p = x.double().index_fill(1, torch.tensor(gone), -INF).softmax(-1)
    best = p.topk(2, dim=-1).values
    want = {"confidence": p[torch.arange(9), given], "margin": best[:, 0] - best[:, 1]}
    want["entropy"] = torch.special.entr(p).sum(-1)
    for name, value in want.items():
        assert torch.allclose(getattr(got, name).double(), value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_choice(temperature: float, impl: str) -> None:
    x = torch.stack([torch.full((140,), NAN), torch.full((140,), -INF), torch.zeros(140)])
    got = logit_stats(x, **noise(3), temperature=temperature, impl=impl)
    assert got.token[:2].tolist() == [-1, -1] and 0 <= int(got.token[2]) < 140
    assert got.lse[:2].tolist() == [-INF, -INF] and got.dot[:2].tolist() == [0, 0]
    assert not any(t.isnan().any() for t in (*got, got.confidence, got.margin, got.entropy))
    everything = logit_stats(x, **noise(3), temperature=temperature, suppressed=range(140), impl=impl)
    assert everything.token.tolist() == [-1] * 3 and everything.logit.tolist() == [-INF] * 3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("allowed", [0, 127, 128, 299])
def test_the_one_allowed_id_is_always_chosen(allowed: int, temperature: float, impl: str) -> None:
    x = torch.randn(400, 300, generator=torch.Generator().manual_seed(1)) * 20
    ids = [i for i in range(300) if i != allowed]
    got = logit_stats(x, **noise(400), temperature=temperature, suppressed=ids, impl=impl)
    assert bool((got.token == allowed).all()) and torch.allclose(got.confidence, torch.ones(400))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, impl: str) -> None:
    """Bits of whole rows, whatever shares the batch, for cpp; the reference's product is torch's own."""
    inputs = problem(150, 72, 700, dtype)
    options: dict[str, Any] = {"temperature": 0.9, "suppressed": (4,)}
    whole = head_stats(**inputs, **options, impl=impl)
    shared = {"weight", "bias"}
    for rows in (slice(0, 1), slice(3, 10), slice(100, 150), torch.randperm(150)[:31]):
        part = {name: t if name in shared else t[rows] for name, t in inputs.items()}
        for a, b in zip(head_stats(**part, **options, impl=impl), whole, strict=True):
            assert torch.equal(a, b[rows]) if impl == "cpp" or a.dtype == torch.int64 else torch.allclose(a, b[rows])


@pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
@pytest.mark.parametrize("from_logits", [False, True])
def test_thread_count_does_not_matter(from_logits: bool) -> None:
    inputs = problem(140, 256, 3000)
    if from_logits:
        x = inputs.pop("hidden") @ inputs.pop("weight").T
        inputs = {"logits": x, **{name: t for name, t in inputs.items() if name != "bias"}}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            call = logit_stats if from_logits else head_stats
            results.append(call(**inputs, temperature=0.7, impl="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [0, 1, 9, 20, 99])
def test_rows_beyond_count_are_ignored(count: int, impl: str) -> None:
    inputs = problem(20, 16, 300)
    given = torch.where(torch.arange(20) % 5 == 4, torch.arange(20), -1)
    whole = head_stats(**inputs, temperature=1.0, tokens=given, impl=impl)
    got = head_stats(**inputs, temperature=1.0, tokens=given, count=torch.tensor(count), impl=impl)
    for a, b in zip(got, whole, strict=True):
        assert torch.equal(a[:count], b[:count])
    assert torch.equal(got.token[count:], given[count:]) and bool((got.logit[count:] == -INF).all())
    assert not any(t.isnan().any() for t in got)


@pytest.mark.parametrize("k, p", [(None, None), (3, None), (40, 0.6), (None, 0.3), (9, 0.5), (1, None)])
def test_what_top_k_and_top_p_keep(k: int | None, p: float | None) -> None:
    """Support and frequencies, by one sort in Python: falling probability, equal ones by rising id."""
    x = torch.randn(260, generator=torch.Generator().manual_seed(2)).mul(2).round()
    options: dict[str, Any] = {"temperature": 1.5, "top_k": k, "top_p": p, "impl": "torch"}
    got = logit_stats(x.expand(2000, -1), **noise(2000), **options).token.bincount(minlength=260)
    ranked = sorted(range(260), key=lambda i: (-float(x[i]), i))[:k]
    total, reached, kept = sum(math.exp(float(x[i]) / 1.5) for i in ranked), 0.0, []
    for i in ranked:
        if reached >= (p or 1) * total:
            break
        kept.append(i)
        reached += math.exp(float(x[i]) / 1.5)
    assert int(got.sum()) == int(got[kept].sum())
    for i in (*kept[:5], kept[-1]):  # the last one too: nothing is cut before it
        share = math.exp(float(x[i]) / 1.5) / reached
        assert abs(int(got[i]) - 2000 * share) <= 4.5 * (2000 * share * (1 - share)) ** 0.5
        assert int(got[i]) or 2000 * share < 8


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl: str) -> None:
    check_layouts(impl)


def check_layouts(impl: str) -> None:
    """Strided hidden states and logits, also with stride 0, no rows; what names the noise strided or expanded."""
    inputs = problem(12, 40, 300)
    wide = torch.randn(12, 120)
    wide[:, ::3] = inputs["hidden"]
    padded = torch.full((12, 50), NAN)
    padded[:, :40] = inputs["hidden"]
    want = head_stats(**inputs, temperature=1.0, impl=impl)
    for hidden in (wide[:, ::3], padded[:, :40]):
        same(head_stats(**{**inputs, "hidden": hidden}, temperature=1.0, impl=impl), want)
    row = torch.randn(1, 300)
    same(*(logit_stats(x, **noise(12), temperature=1.0, impl=impl) for x in (row.expand(12, -1), row.repeat(12, 1))))
    empty = {name: t if name in ("weight", "bias") else t[:0] for name, t in inputs.items()}
    assert head_stats(**empty, temperature=1.0, impl=impl).token.shape == (0,)
    views: dict[str, Any] = {name: torch.tensor([9]).expand(12) for name in ("seeds", "steps")}
    views |= {"positions": torch.arange(36)[::3], "tokens": torch.tensor([3, 0, -1, 0] * 6)[::2]}
    dense = {name: t.clone(memory_format=torch.contiguous_format) for name, t in views.items()}
    same(*(head_stats(**{**inputs, **named}, temperature=1.0, impl=impl) for named in (views, dense)))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(40, 16, 300)
    impls = ["torch"] + ["cpp"] * (extension() is not None)
    options: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "count": torch.tensor(33)}
    want = [head_stats(**inputs, **options, impl=impl) for impl in impls]
    monkeypatch.setattr(module, "CHUNK", 10240)
    for impl, whole in zip(impls, want, strict=True):
        same(head_stats(**inputs, **options, impl=impl), whole)


BAD = [
    ({"hidden": torch.zeros(3, 5)}, "hidden is"),
    ({"hidden": torch.zeros(3, 0), "weight": torch.zeros(6, 0)}, "D and V at least 1"),
    ({"hidden": torch.zeros(3, 4).bfloat16()}, "cast one"),
    ({"weight": torch.zeros(6, 4, device="meta")}, "hidden is on cpu and weight on meta"),
    ({"bias": torch.zeros(5)}, "bias is"),
    ({"bias": torch.zeros(6, device="meta")}, "hidden is on cpu and bias on meta"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": NAN}, "temperature"),
    ({"seeds": None}, "seeds and positions"),
    ({"seeds": torch.zeros(2, dtype=torch.int64)}, "seeds is"),
    ({"positions": torch.zeros(3)}, "positions is"),
    ({"steps": -1}, "steps"),
    ({"suppressed": (0, 6)}, "suppressed holds 6"),
    ({"suppressed": (-1,)}, "suppressed holds -1"),
    ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"tokens": torch.tensor([0, 1, 6])}, "tokens holds 6"),
    ({"count": torch.tensor([1, 2])}, "count is"),
    ({"impl": "cppp"}, "did you mean 'cpp'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "temperature": 1.0, **noise(3)}
    with pytest.raises(InputError, match=message):
        head_stats(**{**good, **change})


def test_examples_agree() -> None:
    if extension() is None:
        pytest.skip("loopmdm._C is not built")
    for dtype in (FP32, BF16):
        assert OP.deviation("cpp", torch.device("cpu"), dtype) <= OP.tolerance[dtype]
    with pytest.raises(InputError, match="not for the CPU"):
        head_stats(torch.zeros(1, 2).half(), torch.zeros(3, 2).half(), impl="cpp")


LEVEL = """
import torch
from loopmdm.ops.head_stats import OP, head_stats
from loopmdm.ops.noise import TOKEN, gumbel_rows
for dtype in (torch.float32, torch.bfloat16):
    assert OP.deviation("cpp", torch.device("cpu"), dtype) <= OP.tolerance[dtype], dtype
    for rows, dim, vocab in ((13, 37, 300), (7, 64, 129), (1, 3, 5)):  # whole tiles and rests, an odd depth
        x, w = (torch.randn(n, dim, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (rows, vocab))
        got, want = (head_stats(x, w, impl=impl) for impl in ("cpp", "torch"))
        assert torch.equal(got.token, want.token) and torch.allclose(got.lse, want.lse, rtol=1e-5, atol=1e-5)
n = torch.arange(64)
noise = [gumbel_rows(n, n, n, 5 * n, 300, TOKEN, impl=impl) for impl in ("cpp", "torch")]
assert torch.equal(*noise)
"""


@pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
@pytest.mark.parametrize("level", [1, 3, 4], ids=["plain", "avx2", "avx512"])
def test_older_processors_compute_the_same(level):
    """What this processor has no need of: LOOPMDM_CPU_LEVEL is read when the extension is loaded."""
    environment = os.environ | {"LOOPMDM_CPU_LEVEL": str(level)}
    done = subprocess.run([sys.executable, "-c", LEVEL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
