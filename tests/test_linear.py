"""linear: oneDNN's product is torch's, takes only what it can, and a module that is more than its weight is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.errors import InputError
from loopmdm.ops import linear as ops_linear
from loopmdm.ops.linear import linear, pack, plain, project

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(ops_linear._no_onednn("onednn", CPU) is not None, reason="torch has no oneDNN here")


def dtypes() -> list[torch.dtype]:
    return [FP32, BF16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [FP32]


def problem(rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, rows, inner, generator=rng), torch.randn(outer, inner, generator=rng) / inner**0.5
    return x.to(dtype), w.to(dtype), torch.randn(outer, generator=rng).to(dtype)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("size", [(1, 64, 64), (33, 67, 131), (256, 512, 1536), (3, 1344, 512)])
def test_against_float64(size: tuple[int, int, int], dtype: torch.dtype, biased: bool, packs: bool) -> None:
    x, w, b = problem(*size, dtype)
    bias = b if biased else None
    got = linear(x, w, bias, packed=pack(w) if packs else None, impl="onednn")
    want = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double() - want).abs().max() / want.abs().max()
    theirs = (F.linear(x, w, bias).double() - want).abs().max() / want.abs().max()
    assert error <= max(1.2 * theirs, 3e-6)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("dtype", dtypes())
def test_any_strides(dtype: torch.dtype, packs: bool) -> None:
    x, w, b = problem(6, 64, 64, dtype)
    double = torch.stack((b, b + 7), dim=-1)[:, 0]
    for left, right, bias in ((x[:, ::2], w, b), (x[:1].expand(3, 6, 64), w.T, double), (x, w, b[:1].expand(64))):
        got = linear(left, right, bias, packed=pack(right) if packs else None, impl="onednn")
        want = F.linear(left.double(), right.double(), bias.double())
        assert (got.double() - want).norm() <= (1e-5 if dtype == FP32 else 1e-2) * want.norm()


def test_packed_takes_what_torch_does() -> None:
    x, w, b = problem(6, 64, 96, FP32)
    held = pack(w)
    assert linear(x[:0], w, b, packed=held).shape == (0, 6, 96)
    turned = x[0].T.contiguous().T
    torch.testing.assert_close(linear(turned, w, b, packed=held), F.linear(turned, w, b), rtol=1e-5, atol=1e-5)


def test_no_tangent_is_lost() -> None:
    x, w, _ = problem(6, 64, 64, FP32)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(InputError, match="forward-mode"):
        linear(forward_ad.make_dual(x, x), w, impl="onednn")


def test_packed_weights_are_what_is_multiplied() -> None:
    x, w, b = problem(16, 64, 96, FP32)
    held = pack(w)
    want = F.linear(x, w, b)
    w.zero_()
    torch.testing.assert_close(linear(x, w, b, packed=held), want, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(InputError, match="packed weights are for onednn alone"):
        linear(x, w, packed=pack(w), impl="torch")
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
    assert pack(w.double()) is None


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
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, w, b), F.linear(x, w, b))
