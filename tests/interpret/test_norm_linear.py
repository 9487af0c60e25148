"""The norm_linear kernel in Triton's interpreter, against the float64 oracle and against torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .harness import launch, need_interpreter

need_interpreter()

from loopmdm.errors import InputError  # noqa: E402
from loopmdm.ops import norm_linear as module  # noqa: E402
from loopmdm.ops.linear_residual import square_sums, tile_list  # noqa: E402
from loopmdm.ops.norm_linear import ACTS, OP, Heads, norm_linear  # noqa: E402

from .. import oracle  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"block_m": 16, "block_n": 64, "block_k": 16, "swath": 2, "warps": 4, "stages": 2}


def problem(rows: int, dim: int, width: int, dtype: torch.dtype, mean: float = 1.0) -> tuple[dict[str, Any], Tensor]:
    """(arguments, the stream that they stand for)."""
    rng = torch.Generator().manual_seed(rows + width)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    stream = draw(rows, dim) + mean
    made = {"x": stream.to(dtype), "squares": square_sums(stream), "weight": (draw(width, dim) / dim**0.5).to(dtype)}
    return made | {"bias": draw(width)}, stream


def heads(dim: int, period: int, norms: bool = True, norm_first: bool = True, turned: bool = True) -> Heads:
    rng = torch.Generator().manual_seed(dim)
    angle = 7 * torch.rand(period, dim // 2, generator=rng)
    tables = (angle.cos(), angle.sin()) if turned else (None, None)
    gains = [torch.rand(dim, generator=rng) + 0.5 for _ in range(2)] if norms else [None, None]
    return Heads(2, 1, dim, *tables, *gains, norm_first)


def both_errors(inputs: dict[str, Any], stream: Tensor, impl: str = "triton", **options: Any) -> tuple[float, float]:
    bias = None if inputs["bias"] is None else inputs["bias"].double()
    truth = oracle.norm_linear(stream.double(), inputs["weight"].double(), bias, 1e-5, **{"act": "none", **options})
    ours, torchs = (oracle.error(norm_linear(**inputs, **options, impl=i), truth) for i in (impl, "torch"))
    return ours, torchs


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("rows, dim, width", [(1, 16, 64), (17, 100, 62), (63, 64, 200), (100, 130, 128)])
def test_activations(rows: int, dim: int, width: int, dtype: torch.dtype, act: str) -> None:
    ours, torchs = both_errors(*problem(rows, dim, width, dtype), act=act)
    assert ours <= 1.2 * torchs + 1e-6, f"{ours:.2e}, torch {torchs:.2e}"


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("norms, turned", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dim, period", [(16, 17), (32, 34), (128, 1)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_heads(dtype: torch.dtype, dim: int, period: int, norms: bool, turned: bool, norm_first: bool) -> None:
    options = {"heads": heads(dim, period, norms, norm_first, turned)}
    ours, torchs = both_errors(*problem(34, 48, 4 * dim, dtype), **options)
    assert ours <= 1.2 * torchs + 1e-6, f"{ours:.2e}, torch {torchs:.2e}"


@pytest.mark.parametrize("dim", [6, 24, 80])
def test_heads_of_any_even_size_rotate(dim: int) -> None:
    ours, _ = both_errors(*problem(20, 48, 4 * dim, FP32), heads=heads(dim, 10, norms=False))
    assert ours < 1e-6


@pytest.mark.parametrize("kind", [*ACTS, "norm first", "norm after"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_epilogue_of_a_product_that_torch_made(dtype: torch.dtype, kind: str) -> None:
    options = {"heads": heads(32, 17, norm_first=kind == "norm first")} if kind[:4] == "norm" else {"act": kind}
    ours, torchs = both_errors(*problem(34, 48, 128, dtype), impl="cublas", **options)
    assert ours <= 1.2 * torchs + 1e-6, f"{ours:.2e}, torch {torchs:.2e}"


@pytest.mark.parametrize("impl", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_what_is_normalised_already(dtype: torch.dtype, impl: str) -> None:
    inputs, _ = problem(17, 48, 62, dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    truth = oracle.norm_linear(x.double(), weight.double(), bias.double(), None, "none")
    ours, torchs = (oracle.error(norm_linear(x, None, weight, bias, impl=i), truth) for i in (impl, "torch"))
    assert ours <= 1.2 * torchs + 1e-6


@pytest.mark.parametrize("mean", [0, 1, 10, 100])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_mean_that_dwarfs_the_spread(dtype: torch.dtype, mean: float) -> None:
    ours, torchs = both_errors(*problem(40, 128, 64, dtype, mean), act="swiglu")
    assert ours <= 1.2 * torchs + 1e-6


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("rows, dim, width", [(1, 17, 64), (40, 33, 200), (100, 64, 66)])
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "qkv"])
def test_no_races_and_no_stray_accesses(
    monkeypatch: pytest.MonkeyPatch, rows: int, dim: int, width: int, dtype: torch.dtype, kind: str, ready: bool
) -> None:
    """Of the product and of the epilogue alone (ready)."""
    inputs, _ = problem(rows, dim, 128 if kind == "qkv" else width, dtype)
    shape, tables = ([2, 1, 32], heads(32, 20)[3:7]) if kind == "qkv" else ([0, 0, 0], (None,) * 4)
    act = "none" if kind == "qkv" else kind
    if ready:
        inputs["x"] = torch.nn.functional.linear(inputs["x"], inputs["weight"])
        inputs["bias"] = torch.randn(rows // min(rows, 20), len(inputs["weight"]))
    args = (*inputs.values(), 1e-5, act, shape, *tables, True, tile_list(SMALL), ready)
    (out,) = launch(monkeypatch, lambda *a: (module._fused_op(*a),), *args)
    assert out.shape == (rows, (128 if kind == "qkv" else width) // (2 if kind == "swiglu" else 1))


def test_value_heads_are_left_alone() -> None:
    inputs, _ = problem(34, 48, 64, FP32)
    plain = norm_linear(**inputs, impl="triton")
    turned = norm_linear(**inputs, heads=heads(16, 17), impl="triton")
    assert torch.allclose(turned[:, 48:], plain[:, 48:], atol=1e-6) and not torch.allclose(
        turned[:, :48], plain[:, :48]
    )


def test_refuses_what_it_cannot_do() -> None:
    inputs, _ = problem(4, 16, 96, FP32)
    with pytest.raises(InputError, match="power of 2"):
        norm_linear(**inputs, heads=heads(24, 4), impl="triton")
    with pytest.raises(InputError, match="no backward"):
        norm_linear(**{**inputs, "weight": inputs["weight"].requires_grad_()}, impl="triton")


def test_registration() -> None:
    inputs, _ = problem(5, 16, 64, BF16)
    args = (*inputs.values(), 1e-5, "swiglu", [0, 0, 0], None, None, None, None, True, tile_list({}), False)
    torch.library.opcheck(module._fused_op, args, test_utils=("test_schema", "test_faketensor"))
    args = (*inputs.values(), 1e-5, "none", [2, 1, 16], *heads(16, 5)[3:7], True, tile_list({}), False)
    torch.library.opcheck(module._fused_op, args, test_utils=("test_schema", "test_faketensor"))


def test_examples_agree() -> None:
    for dtype in OP.dtypes:
        for impl in ("triton", "cublas"):
            assert 0 < OP.deviation(impl, torch.device("cpu"), dtype) <= OP.tolerance[dtype]
