"""The loop_boundary kernel in Triton's interpreter, against the float64 oracle and against torch's own error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .harness import launch, need_interpreter

need_interpreter()

from loopmdm.errors import InputError  # noqa: E402
from loopmdm.ops import loop_boundary as module  # noqa: E402
from loopmdm.ops.loop_boundary import OP, loop_boundary  # noqa: E402

from .. import oracle  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16)]
SHAPES = [(1, 1), (17, 63), (5, 130), (41, 64), (2, 17, 100)]


def problem(shape: tuple[int, ...], stream: torch.dtype, without: str = "") -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    made = {"x": 2 * draw(*shape) + 1, "x0": draw(*shape), "gain": draw(shape[-1]) + 1, "previous": draw(*shape)}
    made["copy_gain"] = draw(shape[-1]) + 1
    return {name: None if name in without.split() else value.to(stream) for name, value in made.items()}


@pytest.mark.parametrize("without", ["", "gain copy_gain", "x0 gain", "previous", "x0 gain previous copy_gain"])
@pytest.mark.parametrize("stream, copy", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape: tuple[int, ...], stream: torch.dtype, copy: torch.dtype, without: str) -> None:
    inputs = problem(shape, stream, without)
    truth = oracle.loop_boundary(*(None if t is None else t.double() for t in inputs.values()), 1e-5, stream)  # type: ignore[arg-type]
    ours, torchs = (loop_boundary(**inputs, dtype=copy, impl=impl) for impl in ("triton", "torch"))  # type: ignore[arg-type]
    for i, want in enumerate(truth):
        assert ours[i].dtype == torchs[i].dtype
        assert oracle.error(ours[i], want) <= 1.2 * oracle.error(torchs[i], want) + 1e-6


@pytest.mark.parametrize("sequences", [1, 3, 6])
@pytest.mark.parametrize("stream, copy", DTYPES, ids=str)
def test_a_copy_gain_of_each_sequence(stream: torch.dtype, copy: torch.dtype, sequences: int) -> None:
    inputs = problem((2, 9, 100), stream)
    inputs["copy_gain"] = torch.randn(sequences, 100)
    ours, torchs = (loop_boundary(**inputs, dtype=copy, impl=impl) for impl in ("triton", "torch"))  # type: ignore[arg-type]
    assert oracle.error(ours.copy, torchs.copy.double()) < (1e-6 if stream == FP32 == copy else 2e-3)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("stream, copy", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_no_races_and_no_stray_accesses(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], stream: torch.dtype, copy: torch.dtype, rows: int
) -> None:
    inputs = problem(shape, stream)
    inputs["copy_gain"] = torch.randn(shape[0], shape[-1])
    out, half, squares, change = launch(monkeypatch, module._fused_op, *inputs.values(), 1e-5, copy, rows, 4)
    assert out.dtype == stream and half.shape == out.shape and half.dtype == copy
    assert squares.shape == (*shape[:-1], -(-shape[-1] // 64)) and change.shape == (*shape[:-1], 2)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="rows of up to 4096"):
        loop_boundary(torch.zeros(1, 4097), impl="triton")
    with pytest.raises(InputError, match="no backward"):
        loop_boundary(torch.zeros(1, 8, requires_grad=True), impl="triton")


def test_registration() -> None:
    for without in ("", "x0 gain previous copy_gain"):
        args = (*problem((5, 64), FP32, without).values(), 1e-5, BF16, 0, 0)
        torch.library.opcheck(module._fused_op, args, test_utils=("test_schema", "test_faketensor"))


def test_examples_agree() -> None:
    for dtype in OP.dtypes:
        assert OP.deviation("triton", torch.device("cpu"), dtype) <= OP.tolerance[dtype]
