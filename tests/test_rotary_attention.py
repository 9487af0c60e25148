"""rotary_attention against float64, and csrc/layer_cpu.cpp at every level: the same bits whatever shares the batch."""

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
from loopmdm.ops.contract import extension
from loopmdm.ops.rotary_attention import OP, rotary_attention
from loopmdm.ops.rotate import rope_table, rotate

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
built = pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
IMPLS = ["torch", pytest.param("cpp", marks=built)]
CPU = torch.device("cpu")


def problem(
    batch: int, tokens: int, heads: int, groups: int, dim: int, dtype: torch.dtype = FP32, seed: int = 0
) -> dict[str, Any]:
    """Views of one projection, angles of each sequence's own."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, tokens, heads + 2 * groups, dim, generator=rng).to(dtype).split([heads, groups, groups], 2)
    )
    places = torch.arange(tokens) + torch.arange(batch)[:, None] * 3
    return {"q": q, "k": k, "v": v, "rope": rope_table(places, dim, 1000.0)}


def truth(q: Tensor, k: Tensor, v: Tensor, rope: Any, mask: Tensor | None = None, layout: str = "half") -> Tensor:
    """In float64, pair by pair, without torch's attention."""

    def turned(x: Tensor) -> Tensor:
        cos, sin = (t.double()[:, :, None] for t in rope)
        half = x.shape[-1] // 2
        first = slice(0, half) if layout == "half" else slice(0, None, 2)
        second = slice(half, None) if layout == "half" else slice(1, None, 2)
        y = torch.empty_like(x)
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y

    q, k, v = turned(q.double()), turned(k.double()), v.double()
    each = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2), (2, 7, 2, 1, 6), (1, 65, 4, 2, 34), (2, 300, 2, 2, 64), (1, 530, 2, 1, 80)], ids=str
)
def test_against_float64(shape: tuple[int, ...], impl: str, layout: str) -> None:
    p = problem(*shape)
    want = truth(**p, layout=layout)
    assert error(rotary_attention(**p, layout=layout, impl=impl), want) < 1e-6
    p = problem(*shape, dtype=BF16)
    want = truth(**p, layout=layout)
    theirs = error(rotary_attention(**p, layout=layout, impl="torch"), want)
    assert error(rotary_attention(**p, layout=layout, impl=impl), want) <= 1.05 * theirs + 1e-4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_masks(dtype: torch.dtype, impl: str) -> None:
    """Padding, a mask of each query's own, causal; a query that sees nothing gets 0."""
    p = problem(2, 290, 2, 1, 16, dtype)
    limit = 1e-6 if dtype == FP32 else 6e-3
    ends = torch.arange(290) < torch.tensor([[290], [31]])
    own = torch.rand(2, 1, 290, 290, generator=torch.Generator().manual_seed(1)) < 0.2
    own[1, 0, 5] = False
    for mask in (ends[:, None, None], own, own[:1, :, :1], ends[1], torch.ones(1, 1, dtype=torch.bool)):
        got = rotary_attention(**p, mask=mask, impl=impl)
        assert error(got, truth(**p, mask=mask)) < limit
    assert rotary_attention(**p, mask=own, impl=impl)[1, 5].eq(0).all()
    below = torch.ones(290, 290, dtype=torch.bool).tril()
    assert error(rotary_attention(**p, causal=True, impl=impl), truth(**p, mask=below)) < limit


@pytest.mark.parametrize("impl", IMPLS)
def test_some_queries_are_those_of_all(impl: str) -> None:
    p = problem(2, 130, 4, 2, 32)
    at = torch.tensor([0, 5, 77, 129])
    some = p | {"q": p["q"][:, at], "query_rope": tuple(t[:, at] for t in p["rope"])}
    assert torch.allclose(rotary_attention(**some, impl=impl), rotary_attention(**p, impl=impl)[:, at], atol=1e-6)


@built
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_whatever_else_is_computed(dtype: torch.dtype) -> None:
    """Threads, the batch, strides, and which other queries are there."""
    p = problem(3, 300, 4, 2, 48, dtype)
    want = rotary_attention(**p, impl="cpp")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 4):  # 3 take two key heads each, 4 share them all
            torch.set_num_threads(threads)
            assert torch.equal(rotary_attention(**p, impl="cpp"), want)
    finally:
        torch.set_num_threads(before)
    alone = {name: t[1:2].clone() for name, t in p.items() if name != "rope"}
    assert torch.equal(rotary_attention(**alone, rope=tuple(t[1:2] for t in p["rope"]), impl="cpp"), want[1:2])
    turned = {name: p[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    assert torch.equal(rotary_attention(**(p | turned), impl="cpp"), want)
    some = p | {"q": p["q"][:, 100:107], "query_rope": tuple(t[:, 100:107] for t in p["rope"])}
    assert torch.equal(rotary_attention(**some, impl="cpp"), want[:, 100:107])


@built
@pytest.mark.parametrize("dim", [2, 10, 32, 62])
@pytest.mark.parametrize("rope_dtype", ["float32", "input"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rotates_to_the_same_bits_as_torch(dtype: torch.dtype, layout: str, rope_dtype: str, dim: int) -> None:
    p = problem(1, 70, 1, 1, dim, dtype)
    turned = {name: rotate(p[name], p["rope"], layout, rope_dtype, impl="torch") for name in "qk"}
    got = rotary_attention(**p, layout=layout, rope_dtype=rope_dtype, impl="cpp")
    assert torch.equal(got, rotary_attention(**turned, v=p["v"], impl="cpp"))


@built
def test_numbers_that_are_none() -> None:
    """NaN reaches the queries that see it, and no others."""
    p = problem(1, 40, 1, 1, 16)
    p["k"][0, 7, 0, 3] = math.nan
    seen = torch.ones(40, 40, dtype=torch.bool)
    seen[:20, 7] = False
    got = rotary_attention(**p, mask=seen, impl="cpp")[0]
    assert got[20:].isnan().all() and not got[:20].isnan().any()


@built
@pytest.mark.parametrize("level", [1, 3, 4, 5])
def test_every_level(level: int) -> None:
    code = (
        "import torch; from loopmdm.ops.contract import all_ops, extension\n"
        f"assert extension().cpu_level() <= {level}\n"
        "for name in ('rotary_attention', 'rotate', 'residual_norm', 'activation'):\n"
        "    op = all_ops()[name]\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        gap = op.deviation('cpp', torch.device('cpu'), dtype)\n"
        "        assert gap <= op.tolerance[dtype], (name, dtype, gap)\n"
    )
    env = os.environ | {"LOOPMDM_CPU_LEVEL": str(level)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@built
def test_a_long_call_keeps_no_memory() -> None:
    """Keys and values of 65536 positions are packed into 64 MiB."""
    code = (
        "import resource, torch\n"
        "from loopmdm.ops.rotary_attention import rotary_attention\n"
        "def held(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "k = torch.ones(1, 65536, 1, 128)\n"
        "rotary_attention(k[:, :1], k[:, :64], k[:, :64], impl='cpp')\n"
        "before = held()\n"
        "rotary_attention(k[:, :1], k, k, impl='cpp')\n"
        "assert held() - before < 32 << 20, held() - before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("batch, tokens, heads, groups, dim", [(2, 9, 4, 2, 8), (1, 33, 2, 2, 50), (3, 5, 1, 1, 32)])
def test_gradients_against_float64(batch: int, tokens: int, heads: int, groups: int, dim: int, layout: str) -> None:
    p = problem(batch, tokens, heads, groups, dim)
    mask = torch.rand(batch, 1, tokens, tokens, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    leaves = {n: p[n].detach().requires_grad_() for n in "qkv"}
    wide = {n: p[n].detach().double().requires_grad_() for n in "qkv"}
    out = rotary_attention(**p | leaves, mask=mask, layout=layout)
    true = truth(**p | wide, mask=mask, layout=layout)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    assert error(out.detach(), true.detach()) < 1e-6
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    for got, want in zip(found, torch.autograd.grad(true, list(wide.values()), grad.double()), strict=True):
        assert error(got, want) < 2e-6


@built
def test_auto_and_gradients() -> None:
    """auto goes to torch where a gradient is wanted; cpp refuses by name."""
    p = problem(1, 9, 2, 2, 8)
    p["q"] = p["q"].detach().requires_grad_()
    rotary_attention(**p).sum().backward()
    assert p["q"].grad is not None
    with pytest.raises(InputError, match="no backward"):
        rotary_attention(**p, impl="cpp")
    with pytest.raises(InputError, match="mask must be bool"):
        rotary_attention(**problem(1, 9, 2, 2, 8), mask=torch.zeros(9, 9), impl="cpp")
    with pytest.raises(InputError, match="float32 and bfloat16"):
        rotary_attention(**problem(1, 9, 2, 2, 8, FP64), impl="cpp")
    with torch.autocast("cpu", dtype=BF16), pytest.raises(InputError, match="autocast"):
        rotary_attention(**problem(1, 9, 2, 2, 8), impl="cpp")
    p = problem(2, 9, 2, 2, 8)
    with pytest.raises(InputError, match="one shape"):
        rotary_attention(**p | {"rope": (p["rope"][0][0], p["rope"][1])}, impl="cpp")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"k": torch.ones(1, 4, 3, 8), "v": torch.ones(1, 4, 3, 8)}, "2 query heads cannot share 3"),
        ({"v": torch.ones(1, 5, 2, 8)}, "they must be"),
        ({"v": torch.ones(1, 4, 2, 8, dtype=FP64)}, "one floating dtype"),
        ({"layout": "halve"}, "did you mean 'half'"),
        ({"rope_dtype": "inputs"}, "did you mean 'input'"),
        ({"q": torch.ones(1, 3, 2, 8)}, "with 3 queries of 4 positions"),
        ({"rope": (torch.ones(3, 4), torch.ones(3, 4))}, "table of rope is"),
        ({"mask": torch.ones(1, 2, 4, 4, dtype=torch.bool)}, "must broadcast"),
        ({"mask": torch.ones((), dtype=torch.bool)}, "must broadcast"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool, device="meta")}, "q is on cpu and mask on meta"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool), "causal": True}, "not both"),
        ({"rope": None, "query_rope": (torch.ones(4, 4), torch.ones(4, 4))}, "without rope"),
    ],
)
def test_errors_say_what_to_do(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        rotary_attention(**(problem(1, 4, 2, 2, 8) | change))
    assert "\n" not in str(caught.value)


def test_self_check_agrees_with_itself() -> None:
    assert OP.deviation("torch", CPU, FP32) == 0.0
