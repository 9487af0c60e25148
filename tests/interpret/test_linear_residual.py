"""The linear_residual kernel in Triton's interpreter, against the float64 oracle and against torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .harness import launch, need_interpreter

need_interpreter()

from loopmdm.errors import InputError  # noqa: E402
from loopmdm.ops import linear_residual as module  # noqa: E402
from loopmdm.ops.linear_residual import OP, linear_residual, tile_list  # noqa: E402

from .. import oracle  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, FP32), (FP16, FP32), (FP32, FP32), (BF16, BF16)]
SMALL = {"block_m": 16, "block_n": 64, "block_k": 16, "swath": 2, "warps": 4, "stages": 2}


def problem(rows: int, depth: int, dim: int, operand: torch.dtype, stream: torch.dtype) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(rows + dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    made = {"h": draw(rows, depth).to(operand), "weight": (draw(dim, depth) / depth**0.5).to(operand)}
    made |= {"bias": draw(dim), "x": (2 * draw(rows, dim) + 1).to(stream)}
    return made | {"gate": draw(dim), "less": draw(rows), "copy_gain": draw(dim) + 1}


def branch_errors(inputs: dict[str, Any], impl: str) -> list[tuple[float, float]]:
    """(the kernel's error, torch's error) of the branch, of the copy and of the sums."""
    stream = inputs["x"].dtype
    x = inputs["x"].double()
    truth = list(oracle.linear_residual(*(None if t is None else t.double() for t in inputs.values()), stream))
    runs = [list(linear_residual(**inputs, impl=impl)) for impl in (impl, "torch")]
    for run in (truth, *runs):
        run[0] = run[0].double() - x  # relative to what was added, not to the residual that dwarfs it
    return [(oracle.error(a, t), oracle.error(b, t)) for a, b, t in zip(*runs, truth, strict=True)]


@pytest.mark.parametrize("impl", ["triton", "cublas"])
@pytest.mark.parametrize("operand, stream", DTYPES, ids=str)
@pytest.mark.parametrize("rows, depth, dim", [(1, 16, 64), (17, 100, 63), (63, 64, 130), (100, 40, 256)])
def test_as_accurate_as_torch(
    rows: int, depth: int, dim: int, operand: torch.dtype, stream: torch.dtype, impl: str
) -> None:
    for ours, torchs in branch_errors(problem(rows, depth, dim, operand, stream), impl):
        assert ours <= 1.2 * torchs + 1e-6, f"{ours:.2e}, torch {torchs:.2e}"


def test_no_bias_and_fp32_to_the_last_digits() -> None:
    inputs = {**problem(40, 96, 128, FP32, FP32), "bias": None}
    for without in ((), ("gate",), ("less",), ("copy_gain",)):
        assert max(ours for ours, _ in branch_errors({**inputs, **dict.fromkeys(without)}, "triton")) < 1e-6


@pytest.mark.parametrize("impl", ["triton", "cublas"])
@pytest.mark.parametrize("sequences", [1, 3, 5, 45])
def test_vectors_of_each_sequence(sequences: int, impl: str) -> None:
    """45 rows, so that tiles hold parts of several sequences."""
    inputs = problem(45, 32, 130, BF16, FP32)
    inputs |= {name: torch.randn(sequences, 130) for name in ("gate", "copy_gain")}
    ours, torchs = (linear_residual(**inputs, impl=which) for which in (impl, "torch"))
    for a, b in zip(ours, torchs, strict=True):
        assert oracle.error(a, b.double()) < 5e-3


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("operand, stream", DTYPES, ids=str)
@pytest.mark.parametrize("rows, depth, dim", [(1, 17, 63), (40, 33, 200), (100, 16, 64)])
def test_no_races_and_no_stray_accesses(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    depth: int,
    dim: int,
    operand: torch.dtype,
    stream: torch.dtype,
    ready: bool,
) -> None:
    """Of the product and of the epilogue alone (ready)."""
    inputs = problem(rows, depth, dim, operand, stream)
    if ready:
        inputs["h"] = torch.nn.functional.linear(inputs["h"], inputs["weight"])
        inputs |= {name: torch.randn(rows // min(rows, 20), dim) for name in ("gate", "copy_gain")}
    out, copy, squares = launch(monkeypatch, module._fused_op, *inputs.values(), tile_list(SMALL), ready)
    assert (out.dtype, copy.dtype, copy.shape) == (stream, operand, out.shape)
    assert torch.allclose(squares.double(), oracle.square_sums(out.double()), rtol=1e-5)


@pytest.mark.parametrize("swath", [1, 2, 3, 8])
def test_every_tile_is_visited_once(swath: int) -> None:
    """5 x 4 tiles in swaths that do not divide them; a tile left out would leave NaN."""
    inputs = problem(80, 16, 256, FP32, FP32)
    tile = tile_list({**SMALL, "swath": swath})
    out, _, squares = module._fused_op(*inputs.values(), tile, False)
    want = linear_residual(**inputs, impl="torch")
    assert torch.allclose(out, want[0], atol=1e-5) and torch.allclose(squares, want[2], rtol=1e-4)


def test_one_sum_of_squares_whatever_the_tile() -> None:
    inputs = problem(33, 32, 256, BF16, FP32)
    tiles = [{**SMALL, "block_n": n, "block_m": m} for n, m in ((64, 16), (128, 32), (256, 64))]
    results = [module._fused_op(*inputs.values(), tile_list(tile), False) for tile in tiles]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_do() -> None:
    inputs = problem(4, 8, 64, FP32, FP32)
    with pytest.raises(InputError, match="no backward"):
        linear_residual(**{**inputs, "h": inputs["h"].requires_grad_()}, impl="triton")
    with pytest.raises(InputError, match="float64"):
        linear_residual(**{name: t.double() for name, t in inputs.items()}, impl="triton")


def test_registration() -> None:
    for (operand, stream), gain in zip(DTYPES[1:], (True, False, True), strict=True):
        inputs = problem(5, 16, 64, operand, stream) | ({} if gain else dict.fromkeys(("gate", "less", "copy_gain")))
        args = (*inputs.values(), tile_list({}), False)
        torch.library.opcheck(module._fused_op, args, test_utils=("test_schema", "test_faketensor"))


def test_examples_agree() -> None:
    for dtype in OP.dtypes:
        for impl in ("triton", "cublas"):
            assert 0 < OP.deviation(impl, torch.device("cpu"), dtype) <= OP.tolerance[dtype]
