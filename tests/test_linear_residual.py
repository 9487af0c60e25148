"""linear_residual: the torch implementation against the float64 oracle (the kernel: tests/interpret)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopmdm.errors import InputError
from loopmdm.ops.linear_residual import OP, linear_residual, square_sums, tile_config, tile_list

from . import oracle

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {FP64: 1e-14, FP32: 1e-6, FP16: 6e-4, BF16: 5e-3}


def problem(
    rows: tuple[int, ...], depth: int, dim: int, operand: torch.dtype, stream: torch.dtype
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(depth + dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=FP64)

    made = {"h": draw(*rows, depth).to(operand), "weight": (draw(dim, depth) / depth**0.5).to(operand)}
    made |= {"bias": draw(dim).to(stream), "x": (2 * draw(*rows, dim) + 1).to(stream)}
    gain, gate, less = draw(dim).to(stream) + 1, draw(dim).to(stream), draw(*rows).to(stream)
    return made | {"gate": gate, "less": less, "copy_gain": gain}


@pytest.mark.parametrize("impl", ["torch", "cublas"])
@pytest.mark.parametrize("without", [(), ("bias", "gate", "less", "copy_gain")], ids=["all", "bare"])
@pytest.mark.parametrize(
    "operand, stream", [(FP64, FP64), (FP32, FP32), (BF16, FP32), (FP16, FP32), (BF16, BF16)], ids=str
)
@pytest.mark.parametrize(
    "rows, depth, dim", [((1,), 1, 1), ((2, 17), 100, 63), ((5,), 64, 128), ((0,), 8, 8), ((3,), 40, 200)]
)
def test_against_the_oracle(
    rows: tuple[int, ...],
    depth: int,
    dim: int,
    operand: torch.dtype,
    stream: torch.dtype,
    without: tuple[str, ...],
    impl: str,
) -> None:
    """impl="cublas" is torch's own product everywhere, and torch's epilogue on a CPU."""
    inputs = problem(rows, depth, dim, operand, stream) | dict.fromkeys(without)  # type: ignore[operator]
    got = linear_residual(**inputs, impl=impl)
    truth = oracle.linear_residual(*(None if t is None else t.double() for t in inputs.values()), stream)  # type: ignore[arg-type]
    assert [t.dtype for t in got[:2]] == [stream, operand] and got[2].shape == (*rows, -(-dim // 64))
    for a, b in zip(got, truth, strict=True):
        assert oracle.error(a, b) <= max(LIMIT[operand], LIMIT[stream])


def test_the_branch_is_not_lost_in_a_large_stream() -> None:
    """Errors are judged against the branch: a residual of 1000 would hide anything."""
    inputs = problem((9,), 64, 128, BF16, FP32)
    inputs["x"] += 1000
    branch = linear_residual(**inputs)[0].double() - inputs["x"].double()
    truth = oracle.linear_residual(*(t.double() for t in inputs.values()), FP64)[0] - inputs["x"].double()
    assert oracle.error(branch, truth) < 5e-3


def test_vectors_of_each_sequence() -> None:
    """The rows of x lie sequence by sequence, however they are shaped."""
    inputs = problem((2, 3, 5), 8, 16, FP32, FP32)
    each = {"gate": torch.randn(6, 16), "copy_gain": torch.randn(6, 16)}
    got = linear_residual(**{**inputs, **each})
    for i, (a, b) in enumerate((a, b) for a in range(2) for b in range(3)):
        part = {n: inputs[n][a, b] for n in ("h", "x", "less")} | {n: v[i] for n, v in each.items()}
        for whole, one in zip(got, linear_residual(**{**inputs, **part}), strict=True):
            torch.testing.assert_close(whole[a, b], one, rtol=0, atol=1e-6)


def test_the_copy_is_the_stream_where_they_share_a_dtype() -> None:
    """And no gain comes between them."""
    inputs = problem((4,), 8, 16, FP32, FP32)
    out, copy, _ = linear_residual(**{**inputs, "copy_gain": None})
    assert copy is out
    out, copy, _ = linear_residual(**inputs)
    assert torch.equal(copy, out * inputs["copy_gain"]) and not torch.equal(copy, out)


def test_square_sums_of_a_16_bit_stream_are_those_of_what_is_stored() -> None:
    out, _, squares = linear_residual(**problem((4,), 8, 130, BF16, BF16))
    assert squares.dtype == FP32 and torch.allclose(squares.double(), oracle.square_sums(out.double()), rtol=1e-6)
    assert torch.equal(squares, square_sums(out))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(16, 9)}, "does not fit"),
        ({"weight": torch.zeros(15, 8)}, "does not fit"),
        ({"x": torch.zeros(5, 16)}, "does not fit"),
        ({"weight": torch.zeros(16, 8, dtype=BF16)}, "weight in h's dtype"),
        ({"x": torch.zeros(4, 16, dtype=torch.int64)}, "floating point"),
        ({"bias": torch.zeros(8)}, r"bias is \[8\]; it must be \[16\]"),
        ({"copy_gain": torch.zeros(3, 16)}, r"copy_gain is \[3, 16\]; it must be \[16\], or \[P, 16\] .* the 4 rows"),
        ({"gate": torch.zeros(2, 16)}, "gate and copy_gain must have one shape"),
        ({"less": torch.zeros(16)}, r"less is \[16\]; it must be \[4\]"),
        ({"impl": "cpp"}, "no impl 'cpp'"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        linear_residual(**{**problem((4,), 8, 16, FP32, FP32), **change})  # type: ignore[arg-type]


def test_tile_numbers_round_trip() -> None:
    config = {"block_m": 128, "warps": 8}
    assert tile_config(tile_list(config)) == config and tile_config(tile_list({})) == {}


def test_auto_is_torch_on_a_cpu_and_compiles_whole() -> None:
    inputs = problem((4,), 8, 16, FP32, FP32)
    torch._dynamo.reset()
    compiled = torch.compile(linear_residual, fullgraph=True, backend="eager")
    for a, b in zip(compiled(**inputs), linear_residual(**inputs, impl="torch"), strict=True):
        assert torch.equal(a, b)
    assert OP.choose("auto", torch.device("cpu"), FP32, rows=4, dim=16, depth=8).impl == "torch"
