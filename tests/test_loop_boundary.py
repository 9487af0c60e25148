"""loop_boundary: the torch implementation against the float64 oracle (the kernel: tests/interpret)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopmdm.errors import InputError
from loopmdm.ops.loop_boundary import loop_boundary

from . import oracle

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {FP64: 1e-14, FP32: 1e-6, FP16: 1e-3, BF16: 8e-3}


def problem(shape: tuple[int, ...], stream: torch.dtype, without: str = "") -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=FP64)

    made = {"x": 2 * draw(*shape) + 1, "x0": draw(*shape), "gain": draw(shape[-1]) + 1, "previous": draw(*shape)}
    made["copy_gain"] = draw(shape[-1]) + 1
    return {name: None if name in without.split() else value.to(stream) for name, value in made.items()}


@pytest.mark.parametrize("without", ["", "gain copy_gain", "previous", "x0 gain", "x0 gain previous copy_gain"])
@pytest.mark.parametrize(
    "stream, copy", [(FP64, FP64), (FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 17, 100), (5, 64), (3, 768), (0, 8)], ids=str)
def test_against_the_oracle(shape: tuple[int, ...], stream: torch.dtype, copy: torch.dtype, without: str) -> None:
    inputs = problem(shape, stream, without)
    got = loop_boundary(**inputs, dtype=copy)  # type: ignore[arg-type]
    truth = oracle.loop_boundary(*(None if t is None else t.double() for t in inputs.values()), 1e-5, stream)  # type: ignore[arg-type]
    assert (got.out.dtype, got.copy.dtype, got.squares.shape) == (stream, copy, (*shape[:-1], -(-shape[-1] // 64)))
    for a, b in zip(got, truth, strict=False):
        assert oracle.error(a, b) <= max(LIMIT[stream], LIMIT[copy])
    assert got.change.shape == ((0,) if inputs["previous"] is None else (*shape[:-1], 2))


def test_a_plain_boundary_hands_the_stream_on() -> None:
    x = torch.randn(3, 8)
    got = loop_boundary(x)
    assert got.out is x and got.copy is x
    gain = torch.randn(3, 8)
    assert torch.equal(loop_boundary(x, copy_gain=gain[0]).copy, x * gain[0])
    assert torch.equal(loop_boundary(x, copy_gain=gain).copy, x * gain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "floating point"),
        ({"x0": torch.zeros(3, 9)}, "x0 is"),
        ({"previous": torch.zeros(3, 8, dtype=BF16)}, "previous is"),
        ({"gain": torch.zeros(9)}, r"it must be \[8\]"),
        ({"x0": None}, "with an anchor"),
        ({"copy_gain": torch.zeros(2, 8)}, r"copy_gain is \[2, 8\]; it must be \[8\]"),
        ({"impl": "cpp"}, "no impl 'cpp'"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loop_boundary(**{**problem((3, 8), FP32), **change})  # type: ignore[arg-type]
