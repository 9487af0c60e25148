"""norm_linear: the torch implementation against the float64 oracle (the kernel: tests/interpret)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.errors import InputError
from loopmdm.ops.linear_residual import square_sums
from loopmdm.ops.norm_linear import ACTS, Heads, norm_linear

from . import oracle

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {FP64: 1e-13, FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}


def problem(rows: tuple[int, ...], dim: int, width: int, dtype: torch.dtype, mean: float = 1.0) -> dict[str, Any]:
    """`stream` is what was normalised; x is its copy in `dtype`."""
    rng = torch.Generator().manual_seed(dim + width)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=FP64)

    stream = (draw(*rows, dim) + mean).to(torch.promote_types(dtype, FP32))
    made = {"x": stream.to(dtype), "squares": square_sums(stream), "weight": (draw(width, dim) / dim**0.5).to(dtype)}
    return made | {"bias": draw(width).to(torch.promote_types(dtype, FP32)), "stream": stream}


def heads(dim: int, period: int, norms: bool = True, norm_first: bool = True, turned: bool = True) -> Heads:
    rng = torch.Generator().manual_seed(dim)
    angle = 7 * torch.rand(period, dim // 2, generator=rng, dtype=FP64)
    tables = (angle.cos(), angle.sin()) if turned else (None, None)
    gains = [torch.rand(dim, generator=rng, dtype=FP64) + 0.5 for _ in range(2)] if norms else [None, None]
    return Heads(3, 1, dim, *tables, *gains, norm_first)


def gap(inputs: dict[str, Any], **options: Any) -> float:
    inputs = dict(inputs)
    stream = inputs.pop("stream").double()
    bias = None if inputs["bias"] is None else inputs["bias"].double()
    truth = oracle.norm_linear(stream, inputs["weight"].double(), bias, 1e-5, **{"act": "none", **options})
    got = norm_linear(**inputs, **options)
    assert torch.equal(got, norm_linear(**inputs, **options, impl="cublas"))  # which on a CPU is torch throughout
    assert got.dtype == inputs["x"].dtype and got.shape == truth.shape
    return oracle.error(got, truth)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("rows, dim, width", [((1,), 1, 2), ((2, 17), 100, 62), ((5,), 128, 64), ((0,), 8, 8)])
def test_activations(rows: tuple[int, ...], dim: int, width: int, dtype: torch.dtype, act: str) -> None:
    inputs = problem(rows, dim, width, dtype)
    assert gap(inputs, act=act) <= LIMIT[dtype]
    assert gap({**inputs, "bias": None}, act=act) <= 2 * LIMIT[dtype]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("norms, turned", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("dim, period", [(8, 17), (2, 34), (24, 1)])
@pytest.mark.parametrize("dtype", [FP64, BF16], ids=str)
def test_heads(dtype: torch.dtype, dim: int, period: int, norms: bool, turned: bool, norm_first: bool) -> None:
    """Tables of one sequence (17), of the whole batch (34), of one row for all (1)."""
    inputs = problem((2, 17), 48, 5 * dim, dtype)
    assert gap(inputs, heads=heads(dim, period, norms, norm_first, turned)) <= LIMIT[dtype]


@pytest.mark.parametrize("mean", [0, 1, 10, 100])
def test_a_mean_that_dwarfs_the_spread(mean: float) -> None:
    """Nothing is subtracted, so nothing cancels."""
    assert gap(problem((7, 9), 96, 64, FP32, mean), act="swiglu") <= LIMIT[FP32]
    assert gap(problem((7, 9), 96, 64, BF16, mean), act="swiglu") <= 2 * LIMIT[BF16]


@pytest.mark.parametrize("dtype", [FP64, BF16], ids=str)
def test_what_is_normalised_already(dtype: torch.dtype) -> None:
    """squares=None: the sums of x itself would divide it once more."""
    inputs = problem((7, 9), 96, 80, dtype)
    truth = oracle.norm_linear(inputs["x"].double(), inputs["weight"].double(), inputs["bias"].double(), None, "swiglu")
    for impl in ("torch", "cublas"):
        got = norm_linear(inputs["x"], None, inputs["weight"], inputs["bias"], act="swiglu", impl=impl)
        assert oracle.error(got, truth) <= LIMIT[dtype]


def test_a_bias_of_each_sequence() -> None:
    inputs = problem((2, 17), 48, 62, FP32)
    del inputs["stream"]
    inputs["bias"] = torch.randn(2, 62)
    got = norm_linear(**inputs, act="swiglu")
    for i in range(2):
        part = {name: inputs[name][i] for name in ("x", "squares", "bias")}
        torch.testing.assert_close(got[i], norm_linear(**{**inputs, **part}, act="swiglu"), rtol=0, atol=1e-6)


def test_tiny_rows_are_held_up_by_eps() -> None:
    inputs = problem((3,), 64, 32, FP32)
    inputs["stream"] *= 1e-4
    inputs |= {"x": inputs["stream"], "squares": square_sums(inputs["stream"])}
    assert gap(inputs) <= LIMIT[FP32]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(10, 15)}, r"must be \[N, D\]"),
        ({"weight": torch.zeros(10, 16, dtype=BF16)}, "one floating dtype"),
        ({"squares": torch.zeros(4, 2)}, "take square_sums"),
        ({"bias": torch.zeros(9)}, "bias is"),
        ({"bias": torch.zeros(3, 10)}, "a divisor of the 4 rows"),
        ({"act": "geglu"}, "no act 'geglu'"),
        ({"act": "swiglu", "weight": torch.zeros(9, 16), "bias": None}, "pairs of columns"),
        ({"act": "gelu", "heads": Heads(3, 1, 2)}, "no activation"),
        ({"heads": Heads(2, 1, 2)}, "are not the 10 columns"),
        ({"heads": Heads(3, 1, 2, torch.zeros(4, 1))}, "must both be"),
        ({"heads": Heads(3, 1, 2, torch.zeros(4, 2), torch.zeros(4, 2))}, "must both be"),
        ({"heads": Heads(3, 1, 2, torch.zeros(4, 1), torch.zeros(3, 1))}, "cos is"),
        ({"heads": Heads(3, 1, 2, q_gain=torch.zeros(2))}, "q_gain and k_gain"),
        ({"impl": "cuda"}, "no impl 'cuda'"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    inputs = problem((4,), 16, 10, FP32)
    del inputs["stream"]
    with pytest.raises(InputError, match=message):
        norm_linear(**{**inputs, **change})


def test_auto_compiles_whole() -> None:
    inputs = problem((4,), 16, 10, FP32)
    del inputs["stream"]
    torch._dynamo.reset()
    compiled = torch.compile(norm_linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs, act="swiglu"), norm_linear(**inputs, act="swiglu", impl="torch"))
