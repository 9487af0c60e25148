"""activation against float64, in every layout it reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from loopmdm.errors import InputError
from loopmdm.ops.activation import ACTS, CPP, activation
from loopmdm.ops.contract import extension

BF16, FP32 = torch.bfloat16, torch.float32
built = pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")


def truth(x: Tensor, act: str, up: Tensor | None) -> Tensor:
    x = x.double()
    if act == "swiglu":
        assert up is not None
        return x / (1 + (-x).exp()) * up.double()
    if act == "relu2":
        return x.clamp(min=0) ** 2
    if act == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=built)])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("width", [1, 15, 16, 67])
def test_against_float64(width: int, act: str, impl: str) -> None:
    if impl == "cpp" and act not in CPP:
        pytest.skip("torch's own")
    rng = torch.Generator().manual_seed(width)
    for dtype, limit in ((FP32, 5e-7), (BF16, 4e-3)):
        x, up = (torch.randn(9, 3, width, generator=rng).mul(5).to(dtype) for _ in range(2))
        x[0, 0, 0], x[1, 0, 0], x[2, 0, 0] = -200.0, 200.0, 0.0
        want = truth(x, act, up)
        ways = [(torch.cat((x, up), -1), None), (x, up)] if act == "swiglu" else [(x, None)]
        ways += [(a.transpose(0, 1).contiguous().transpose(0, 1), b) for a, b in ways]
        for a, b in ways:
            got = activation(a, act, b, impl=impl)
            assert got.dtype == dtype and got.shape == want.shape
            assert float((got.double() - want).abs().max() / want.abs().max()) < limit


@built
def test_bf16_is_rounded_once() -> None:
    """cpp's SwiGLU is nearer to the truth than rounding silu first."""
    rng = torch.Generator().manual_seed(0)
    x, up = (torch.randn(64, 64, generator=rng).to(BF16) for _ in range(2))
    want = truth(x, "swiglu", up)
    ours, theirs = ((activation(x, "swiglu", up, impl=i).double() - want).square().mean() for i in ("cpp", "torch"))
    assert ours < 0.8 * theirs
    assert torch.equal(activation(x, "swiglu", up, impl="cpp"), want.to(BF16)) or ours < 0.6 * theirs


@built
def test_nan_stays_and_threads_do_not_matter() -> None:
    x = torch.randn(40000, 32, generator=torch.Generator().manual_seed(0))
    x[3, 5] = math.nan
    before = torch.get_num_threads()
    try:
        for act in CPP:
            made = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                made.append(activation(x, act, impl="cpp"))
            assert torch.equal(made[0].nan_to_num(), made[1].nan_to_num())
            assert made[0].isnan().sum() == 1
    finally:
        torch.set_num_threads(before)


@built
def test_tangents_transforms_and_default_devices() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    want = activation(x, "relu2", impl="torch")
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(InputError, match="forward-mode"):
        activation(forward_ad.make_dual(x, x), "relu2", impl="cpp")
    with pytest.raises(InputError, match="function transform"):
        torch.func.vmap(lambda row: activation(row, "relu2", impl="cpp"))(x)
    with torch.device("meta"):
        got = activation(x, "relu2", impl="cpp")
    torch.testing.assert_close(got, want)


def test_errors_say_what_to_do() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(InputError, match="no act 'gelu_tan'; did you mean 'gelu_tanh'"):
        activation(x, "gelu_tan")
    with pytest.raises(InputError, match="up is"):
        activation(x, "gelu", x)
    with pytest.raises(InputError, match="even number"):
        activation(torch.ones(2, 3), "swiglu")
    with pytest.raises(InputError, match="floating"):
        activation(torch.ones(2, 4, dtype=torch.int64), "gelu")


@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=built)])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("width", [1, 15, 16, 67])
def test_gradients_against_float64(width: int, act: str, impl: str) -> None:
    if impl == "cpp" and act not in CPP:
        pytest.skip("torch's own")
    rng = torch.Generator().manual_seed(width)
    for dtype, limit in ((FP32, 2e-6), (BF16, 8e-3)):
        x, up, grad = (torch.randn(9, 3, width, generator=rng).mul(5).to(dtype) for _ in range(3))
        x[0, 0, 0], x[1, 0, 0], x[2, 0, 0] = -200.0, 200.0, 0.0
        leaves = [t.double().requires_grad_() for t in ((x, up) if act == "swiglu" else (x,))]
        want = torch.autograd.grad(truth(leaves[0], act, leaves[-1]), leaves, grad.double())
        x, up = x.requires_grad_(), up.requires_grad_()
        both = torch.cat((x, up), -1).detach().requires_grad_()
        # a gradient that is not contiguous
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        if act == "swiglu":
            ways = [torch.autograd.grad(activation(x, act, up, impl=impl), (x, up), grad)]
            ways.append(torch.autograd.grad(activation(both, act, impl=impl), both, grad)[0].chunk(2, -1))
        else:
            ways = [torch.autograd.grad(activation(x, act, impl=impl), x, grad)]
        for way in ways:
            for a, b in zip(way, want, strict=True):
                assert a.dtype == dtype and a.shape == b.shape
                assert float((a.double() - b).abs().max() / b.abs().max()) < limit


@built
def test_far_out_gradients_are_flat() -> None:
    x = torch.tensor([-3e38, -1e19, -1e13, -50.0, 50.0, 1e13, 1e19], requires_grad=True)
    for act in ("swiglu", "gelu_tanh"):
        up = torch.ones(7) if act == "swiglu" else None
        (dx,) = torch.autograd.grad(activation(x, act, up, impl="cpp").sum(), x)
        torch.testing.assert_close(dx, torch.tensor([0.0] * 4 + [1.0] * 3), rtol=1e-6, atol=1e-6)


@built
def test_cpp_gradients_can_be_differentiated_and_batched() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    made = []
    for impl in ("cpp", "torch"):
        leaf = x.clone().requires_grad_()
        out = activation(leaf, "swiglu", impl=impl)
        (first,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), leaf, retain_graph=True)
        rows = torch.eye(16).view(16, 4, 4)
        (batched,) = torch.autograd.grad(out, leaf, rows, is_grads_batched=True)
        made.append((first, second, batched))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@built
def test_cpp_gradients_of_gradients_where_up_comes_from_x() -> None:
    made = []
    for impl in ("cpp", "torch"):
        leaf = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = activation(leaf, "swiglu", leaf * 2, impl=impl)
        (first,) = torch.autograd.grad(out.pow(2).sum(), leaf, create_graph=True)
        made.append((first, *torch.autograd.grad(first.pow(3).sum(), leaf)))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@built
def test_cpp_gives_the_gradients_that_are_wanted() -> None:
    x, up = torch.randn(4, 8), torch.randn(4, 8)
    for wanted in ((x,), (up,), (x, up)):
        leaves = [t.detach().requires_grad_(any(t is w for w in wanted)) for t in (x, up)]
        activation(leaves[0], "swiglu", leaves[1], impl="cpp").sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [any(t is w for w in wanted) for t in (x, up)]


@built
def test_cpp_has_no_gelu() -> None:
    with pytest.raises(InputError, match="it has no gelu"):
        activation(torch.randn(4, 8), "gelu", impl="cpp")
