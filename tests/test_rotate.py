"""rotate: C++ gives the bits of torch's operations, forwards and back (these against a formula: test_model)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from loopmdm.errors import InputError
from loopmdm.ops.contract import extension
from loopmdm.ops.rotate import LAYOUTS, OP, ROPE_DTYPES, rope_table, rotate

BF16, FP32 = torch.bfloat16, torch.float32
built = pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
CPU = torch.device("cpu")


def problem(dim: int, dtype: torch.dtype, each: bool = True, tokens: int = 40) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Heads inside a projection, with angles of each sequence's own or of all."""
    rng = torch.Generator().manual_seed(dim)
    packed = torch.randn(3, tokens, 7, dim, generator=rng).to(dtype)
    places = torch.arange(tokens) * 5 + torch.arange(3)[:, None] * 3
    return packed[:, :, 2:6], rope_table(places if each else places[0], dim, 100.0)


@built
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("turned", ROPE_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dim", [2, 16, 18, 34, 50, 64, 128])
def test_torch_s_bits(dim: int, dtype: torch.dtype, layout: str, turned: str, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for each in (True, False):
            heads, table = problem(dim, dtype, each, 400 if threads > 1 else 40)
            other = heads.transpose(1, 2).contiguous().transpose(1, 2)
            for x in (heads, other, heads[..., None].expand(*heads.shape, 2)[..., 0], heads[:1]):
                own = tuple(t[: len(x)] if t.ndim == 3 else t for t in table)
                grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
                made = []
                for impl in ("cpp", "torch"):
                    leaf = x.detach().requires_grad_()
                    out = rotate(leaf, own, layout, turned, impl=impl)
                    made.append(
                        (out, *torch.autograd.grad(out, leaf, grad.transpose(1, 2).contiguous().transpose(1, 2)))
                    )
                    with torch.no_grad():
                        assert torch.equal(rotate(x, own, layout, turned, impl=impl), out)
                assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(*made, strict=True))
    finally:
        torch.set_num_threads(before)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_can_be_differentiated_and_batched(layout: str) -> None:
    x, table = problem(8, FP32, tokens=5)
    rows = torch.randn(6, *x.shape, generator=torch.Generator().manual_seed(1))
    made = []
    for impl in ("cpp", "torch"):
        leaf = x.detach().requires_grad_()
        out = rotate(leaf, table, layout, "float32", impl=impl)
        (first,) = torch.autograd.grad(out.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf, retain_graph=True)
        made.append((first, second, *torch.autograd.grad(out, leaf, rows, is_grads_batched=True)))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@built
def test_what_cpp_does_not_take() -> None:
    x, table = problem(8, FP32)
    for change, sentence in (
        ({"x": x.double()}, "it takes float32 and bfloat16"),
        ({"x": x[0]}, r"it must be \[B, T, heads, hd\]"),
        ({"x": x[:0]}, "not empty"),
        ({"table": (table[0].double(), table[1])}, "table must be float32"),
        ({"table": (table[0][:2], table[1][:2])}, "or one a sequence"),
        ({"table": (table[0][0], table[1])}, "or one a sequence"),
        ({"table": (table[0].clone().requires_grad_(), table[1])}, "no backward"),
    ):
        with pytest.raises(InputError, match=sentence):
            rotate(**{"x": x, "table": table, "layout": "half", "rope_dtype": "float32"} | change, impl="cpp")  # type: ignore[arg-type]
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(InputError, match="forward-mode"):
        rotate(forward_ad.make_dual(x, x), table, "half", "float32", impl="cpp")
    with pytest.raises(InputError, match="function transform"):
        torch.func.vmap(lambda y: rotate(y, table, "half", "float32", impl="cpp"))(x[None])


def test_errors_say_what_to_do() -> None:
    x, table = problem(8, FP32)
    with pytest.raises(InputError, match="no layout 'halve'; did you mean 'half'"):
        rotate(x, table, "halve", "float32")
    with pytest.raises(InputError, match="no rope_dtype 'inputs'; did you mean 'input'"):
        rotate(x, table, "half", "inputs")


def test_tables_may_have_gradients() -> None:
    """Whoever trains them gets torch's."""
    x, table = problem(8, FP32)
    cos = table[0].clone().requires_grad_()
    rotate(x, (cos, table[1]), "half", "float32").sum().backward()
    assert cos.grad is not None and float(cos.grad.abs().sum()) > 0


def test_self_check_agrees_with_itself() -> None:
    assert OP.deviation("torch", CPU, FP32) == 0.0
