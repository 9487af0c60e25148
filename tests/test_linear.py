"""linear: oneDNN's product and ours are torch's and take what they can; modules that are more are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopmdm.kernels import tuned
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.errors import InputError
from loopmdm.ops import linear as ops_linear
from loopmdm.ops import native
from loopmdm.ops.linear import Panels, linear, pack, plain, project

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(ops_linear._library("onednn", CPU) is not None, reason="torch has no oneDNN here")


runs = pytest.mark.skipif(not native.multiplies_bf16(), reason="this CPU or build has no bf16 products of its own")
no_bf16 = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
WAYS = [
    pytest.param("onednn", FP32, id="onednn-fp32"),
    pytest.param(
        "onednn", BF16, id="onednn-bf16", marks=pytest.mark.skipif(no_bf16, reason="torch has no bf16 product")
    ),
    pytest.param("cpp", BF16, id="cpp-bf16", marks=runs),
]


def problem(rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, rows, inner, generator=rng), torch.randn(outer, inner, generator=rng) / inner**0.5
    return x.to(dtype), w.to(dtype), torch.randn(outer, generator=rng).to(dtype)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("impl, dtype", WAYS)
@pytest.mark.parametrize("size", [(1, 64, 64), (33, 67, 131), (256, 512, 1536), (3, 1344, 512), (5, 1, 1)], ids=str)
def test_against_float64(size: tuple[int, int, int], impl: str, dtype: torch.dtype, biased: bool, packs: bool) -> None:
    x, w, b = problem(*size, dtype)
    bias = b if biased else None
    got = linear(x, w, bias, packed=pack(w, impl=impl) if packs else None, impl=impl)
    want = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double() - want).abs().max() / want.abs().max()
    theirs = (F.linear(x, w, bias).double() - want).abs().max() / want.abs().max()
    assert error <= max(1.2 * theirs, 3e-6)


@runs
@pytest.mark.parametrize("rows", [*range(1, 14), 127, 129, 300])
def test_any_number_of_rows_is_the_same_bits(rows: int) -> None:
    """Whatever tile a row falls into, whatever is beside it, and how many threads there are."""
    x, w, b = problem(150, 67, 131, BF16)
    x, held = x.flatten(0, 1), pack(w, impl="cpp")
    whole, before = linear(x, w, b, packed=held), torch.get_num_threads()
    assert (whole.double() - F.linear(x.double(), w.double(), b.double())).abs().max() < 0.02
    for first in (0, 300 - rows):
        assert torch.equal(linear(x[first : first + rows], w, b, packed=held), whole[first : first + rows])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x[:rows], w, b, packed=held), whole[:rows])
            assert torch.equal(pack(w, impl="cpp").words, held.words)
    finally:
        torch.set_num_threads(before)


@runs
@pytest.mark.parametrize("cols, parts", [(2 * 100, 2), (2 * 64, 2), (2 * 1, 2), (3 * 65, 3), (2 * 1091, 2)])
def test_parts_come_out_side_by_side(cols: int, parts: int) -> None:
    """Gate and up lie in panels of their own, each filled up; what comes out has no gap."""
    x, w, b = problem(9, 80, cols, BF16)
    held, whole = pack(w, parts=parts, impl="cpp"), pack(w, impl="cpp")
    for bias in (b, None):
        assert torch.equal(linear(x, w, bias, packed=held), linear(x, w, bias, packed=whole))
    each = [pack(part, impl="cpp").words for part in w.split(cols // parts)]
    assert torch.equal(held.words, torch.cat(each))


@runs
def test_panels_are_filled_where_they_lie() -> None:
    x, w, b = problem(9, 67, 2 * 70, BF16)
    held = pack(w, parts=2, impl="cpp")
    assert isinstance(held, Panels)
    at, before = held.words.data_ptr(), linear(x, w, b, packed=held)
    other = problem(9, 67, 2 * 70, BF16, seed=1)[1]
    held.fill(other)
    assert held.words.data_ptr() == at
    assert torch.equal(linear(x, w, b, packed=held), linear(x, other, b, impl="cpp"))
    held.fill(w.T.contiguous().T)
    assert torch.equal(linear(x, w, b, packed=held), before)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("impl, dtype", WAYS)
def test_any_strides(impl: str, dtype: torch.dtype, packs: bool) -> None:
    x, w, b = problem(6, 64, 64, dtype)
    double = torch.stack((b, b + 7), dim=-1)[:, 0]
    inside = torch.cat((x, x, x), -1)[..., 64:128]
    every = [
        (x[:, ::2], w, b),
        (x[:1].expand(3, 6, 64), w.T, double),
        (x, w, b[:1].expand(64)),
        (inside, w, b),
        (inside[0, 3], w, b),
    ]
    for left, right, bias in every:
        got = linear(left, right, bias, packed=pack(right, impl=impl) if packs else None, impl=impl)
        want = F.linear(left.double(), right.double(), bias.double())
        assert (got.double() - want).norm() <= (1e-5 if dtype == FP32 else 1e-2) * want.norm()


@pytest.mark.parametrize("impl, dtype", WAYS)
def test_packed_takes_what_torch_does(impl: str, dtype: torch.dtype) -> None:
    x, w, b = problem(6, 64, 96, dtype)
    held = pack(w, impl=impl)
    assert linear(x[:0], w, b, packed=held).shape == (0, 6, 96)
    turned = x[0].T.contiguous().T
    limit = 1e-5 if dtype == FP32 else 0.03
    torch.testing.assert_close(linear(turned, w, b, packed=held), F.linear(turned, w, b), rtol=limit, atol=limit)
    # the weight only tells its shape
    assert torch.equal(linear(x, w.to("meta"), b, packed=held), linear(x, w, b, packed=held))


def test_no_tangent_is_lost() -> None:
    x, w, _ = problem(6, 64, 64, FP32)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(InputError, match="forward-mode"):
        linear(forward_ad.make_dual(x, x), w, impl="onednn")


@pytest.mark.parametrize("impl, dtype", WAYS)
def test_packed_weights_are_what_is_multiplied(impl: str, dtype: torch.dtype) -> None:
    x, w, b = problem(16, 64, 96, dtype)
    held = pack(w, impl=impl)
    want = F.linear(x, w, b)
    w.zero_()
    limit = 1e-5 if dtype == FP32 else 0.03
    torch.testing.assert_close(linear(x, w, b, packed=held), want, rtol=limit, atol=limit)


def test_auto_takes_it_for_large_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.ops.mkldnn._linear_pointwise

    class Spy:
        @staticmethod
        def _linear_pointwise(x: Tensor, *rest: Any) -> Tensor:
            calls.append(x.numel())
            return real(x, *rest)

        _is_mkldnn_bf16_supported = torch.ops.mkldnn._is_mkldnn_bf16_supported

    monkeypatch.setattr(ops_linear, "intel", lambda: False)
    monkeypatch.setattr(ops_linear.torch.ops, "mkldnn", Spy)
    small, large = problem(8, 64, 64, FP32), problem(512, 512, 512, FP32)
    linear(*large)  # its self-check too
    calls.clear()
    linear(*small)
    assert not calls
    linear(*large)
    assert calls == [large[0].numel()]
    with FlopCounterMode(display=False) as counter:
        linear(*large)
    assert counter.get_total_flops() == 2 * large[0].numel() * 512 and len(calls) == 1
    x, w, b = (t.requires_grad_() for t in large)
    assert linear(x, w, b).requires_grad and len(calls) == 1
    monkeypatch.setattr(ops_linear, "intel", lambda: True)
    with torch.no_grad():
        linear(*large)
    assert len(calls) == 1


def test_refusals() -> None:
    x, w, _ = problem(8, 64, 64, FP32)
    with pytest.raises(InputError, match="float32 or bfloat16"):
        linear(x.double(), w.double(), impl="onednn")
    with pytest.raises(InputError, match="no backward"):
        linear(x, w.clone().requires_grad_(), impl="onednn")
    with pytest.raises(InputError, match="packed weights are for onednn alone: impl is 'torch'"):
        linear(x, w, packed=pack(w), impl="torch")
    with pytest.raises(InputError, match="packed weights are for onednn alone: impl is 'cpp'"):
        linear(x, w, packed=pack(w), impl="cpp")
    with pytest.raises(InputError, match=r"packed weights.*one kind"):
        linear(x.double(), w, packed=pack(w))
    with torch.autocast("cpu"), pytest.raises(InputError, match="autocast"):
        linear(x, w, impl="onednn")
    with pytest.raises(InputError, match="bias"):
        linear(x, w, w[0, :1], impl="onednn")
    with pytest.raises(InputError, match="another device"):
        linear(x, w.to("meta"), impl="onednn")
    with pytest.raises(InputError, match="packed weights"):
        linear(x[..., 1:], w, packed=pack(w))
    assert pack(w.double()) is None and pack(w.to("meta")) is None and pack(w, impl="cpp") is None


@runs
def test_refusals_of_ours() -> None:
    x, w, b = problem(8, 64, 64, BF16)
    held = pack(w, impl="cpp")
    with pytest.raises(InputError, match="packed weights are for cpp alone: impl is 'onednn'"):
        linear(x, w, packed=held, impl="onednn")
    with pytest.raises(InputError, match="it needs bfloat16"):
        linear(x.float(), w.float(), impl="cpp")
    with pytest.raises(InputError, match=r"packed weights are for cpp alone: x is torch\.float32"):
        linear(x.float(), w, packed=held)
    with pytest.raises(InputError, match="no backward"):
        linear(x.clone().requires_grad_(), w, packed=held)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(InputError, match="autocast"):
        linear(x, w, packed=held)
    with pytest.raises(InputError, match="bias"):
        linear(x, w, b[:-1], packed=held)
    with pytest.raises(InputError, match="x is"):
        linear(x[..., 1:], w, packed=held)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(linear(x, w, b, packed=held), linear(x, w, b, impl="cpp"))


def test_which_layout_a_processor_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours for bf16 where AVX-512 multiplies it, oneDNN's where there are units for matrices, and for fp32."""
    w = problem(8, 64, 64, BF16)[1]
    assert not isinstance(pack(w.float()), Panels)
    if native.multiplies_bf16():
        monkeypatch.setattr(native, "multiplies_matrices", lambda: False)
        assert isinstance(pack(w), Panels)
        monkeypatch.setattr(native, "multiplies_matrices", lambda: True)
        assert isinstance(pack(w), Tensor) and isinstance(pack(w, impl="cpp"), Panels)
    monkeypatch.setattr(native, "multiplies_bf16", lambda: False)
    assert isinstance(pack(w), Tensor | None) and pack(w, impl="cpp") is None


def test_project_calls_what_is_more_than_a_product() -> None:
    x = problem(4, 64, 32, FP32)[0]

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own = Doubled(64, 32)
    hooked = nn.Linear(64, 32)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    replaced = nn.Linear(64, 32)
    replaced.forward = lambda x: x[..., :32]  # type: ignore[method-assign]
    before = nn.Linear(64, 32)
    before.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    for module in (own, hooked, replaced, before):
        assert not plain(module)
        assert torch.equal(project(module, x), module(x))
    usual = nn.Linear(64, 32)
    assert plain(usual) and torch.equal(project(usual, x), usual(x))


def test_compiles() -> None:
    x, w, b = problem(64, 64, 64, FP32)
    torch._dynamo.reset()  # other tests compiled it too, and there is a limit to how often
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, w, b), F.linear(x, w, b))


def test_auto_lays_out_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for "cpp" is about its product, not about laying out the weight in each call."""
    if not native.multiplies_bf16():
        pytest.skip("no bf16 products here")
    row = tuned.Row("linear", "cpp", "cpu", "bfloat16", {}, {}, "measured: x")
    monkeypatch.setattr(tuned, "best", lambda *_, but=(), **__: None if "cpp" in but else row)
    x, w, b = problem(4, 64, 64, BF16)
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))
    calls: list[int] = []
    monkeypatch.setattr(ops_linear, "pack", lambda *_, **__: calls.append(1) or pack(w, impl="cpp"))
    linear(x, w, b)
    assert not calls
    linear(x, w, b, impl="cpp")
    assert calls
