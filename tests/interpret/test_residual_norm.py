"""The residual_norm kernel in Triton's interpreter, against the float64 oracle and against torch's own error."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from .harness import guarded, launch, need_interpreter

need_interpreter()

from loopmdm.kernels import residual_norm as kernel  # noqa: E402

from loopmdm.errors import InputError  # noqa: E402
from loopmdm.ops import residual_norm as module  # noqa: E402
from loopmdm.ops.residual_norm import FUSED_DTYPES, FUSED_MAX_DIM, KINDS, OP, residual_norm  # noqa: E402

from .. import oracle  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(1, 1), (17, 1), (3, 2), (17, 63), (1, 100), (2, 17, 100), (9, 768), (41, 64)]
# (stream, branch and normed): as trained, and all of one dtype
DTYPES = [(FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16), (FP16, FP16)]


def problem(
    shape: tuple[int, ...], stream: torch.dtype, other: torch.dtype, without: str = ""
) -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(shape[0] + shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    dim = shape[-1]
    made: dict[str, Tensor | None] = {
        "x": (2 * draw(*shape) + 1).to(stream),
        "branch": draw(*shape).to(other),
        "weight": draw(dim).abs() + 0.5,
        "bias": draw(dim),
    }
    return {name: None if name in without.split() else value for name, value in made.items()}


def both_errors(inputs: dict[str, Tensor | None], kind: str, out: torch.dtype) -> list[tuple[str, float, float]]:
    """(name, the kernel's error, torch's error) of every output and gradient."""
    inputs = {name: value if value is None else guarded(value) for name, value in inputs.items()}
    truth = functools.partial(oracle.residual_norm, kind=kind, eps=1e-5, stream=inputs["x"].dtype)  # type: ignore[union-attr]
    ours, torchs = (
        oracle.errors(functools.partial(residual_norm, kind=kind, out_dtype=out, impl=impl), truth, inputs)
        for impl in ("triton", "torch")
    )
    return [(name, ours[name], torchs[name]) for name in ours]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream, other", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape: tuple[int, ...], stream: torch.dtype, other: torch.dtype, kind: str) -> None:
    # layer norm of one column is 0 and of two is about ±1 whatever x is: gradients are rounding noise
    floor = {1: 2.0, 2: 5e-6}.get(shape[-1], 5e-7) if kind == "layernorm" else 5e-7
    for name, ours, torchs in both_errors(problem(shape, stream, other), kind, other):
        assert ours <= 1.2 * torchs + floor, f"{name}: {ours:.2e}, torch {torchs:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", ["branch", "weight", "bias", "weight bias", "branch weight bias"])
def test_optional_inputs(without: str, kind: str) -> None:
    for name, ours, torchs in both_errors(problem((5, 37), FP32, FP32, without), kind, FP32):
        assert ours <= 1.2 * torchs + 5e-7, f"{name}: {ours:.2e}, torch {torchs:.2e}"


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("stream, other", DTYPES[:1] + DTYPES[3:4], ids=str)
@pytest.mark.parametrize("shape", [(17, 63), (1, 100), (33, 5)], ids=str)
def test_no_races_and_no_stray_accesses(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    stream: torch.dtype,
    other: torch.dtype,
    rows: int,
    centre: bool,
) -> None:
    config = {"rows": rows}
    inputs = problem(shape, stream, other)
    summed, normed, mean, rstd = launch(monkeypatch, kernel.forward, *inputs.values(), centre, 1e-5, other, config)
    assert (normed.dtype, mean.numel(), rstd.numel()) == (other, shape[0] * centre, shape[0])
    dsummed, dnormed = torch.randn(shape).to(stream), torch.randn(shape).to(other)
    own = other if other != stream else None
    args = (dsummed, dnormed, summed, inputs["weight"], mean, rstd, centre, True, own, config)
    dx, dbranch, dweight, dbias = launch(monkeypatch, kernel.backward, *args)
    assert (dx.dtype, dbranch.dtype, dweight.shape, dbias.shape) == (stream, other, shape[1:], shape[1:])
    if own is not None:
        assert torch.equal(dbranch, dx.to(own))


@pytest.mark.parametrize("n_rows, most", [(40, 3), (41, 4), (7, 8), (64, 1)])
def test_any_number_of_programs_adds_every_row(monkeypatch: pytest.MonkeyPatch, n_rows: int, most: int) -> None:
    """Row blocks that do not divide by programs: none left out, none counted twice."""
    monkeypatch.setattr(kernel, "partition", functools.partial(kernel.partition, most=most))
    for name, ours, torchs in both_errors(problem((n_rows, 10), FP32, FP32), "layernorm", FP32):
        assert ours <= 1.2 * torchs + 5e-7, f"{name}: {ours:.2e}, torch {torchs:.2e}"


@pytest.mark.parametrize("n_rows", [1, 511, 512, 513, 4097, 1 << 20])
@pytest.mark.parametrize("rows", [1, 8])
def test_partition_covers_the_rows(n_rows: int, rows: int) -> None:
    programs, n_blocks = kernel.partition(n_rows, rows)
    assert programs <= 512
    assert (programs - 1) * n_blocks * rows < n_rows <= programs * n_blocks * rows


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used: int) -> None:
    inputs = problem((6, 20), FP32, BF16, "weight bias" if used == 0 else "")

    def one(fn):  # type: ignore[no-untyped-def]
        return lambda **values: fn(**values)[used : used + 1]

    ours = one(functools.partial(residual_norm, impl="triton"))
    truth = one(functools.partial(oracle.residual_norm, kind="rmsnorm", eps=1e-5, stream=FP32))
    got = oracle.errors(ours, truth, inputs)
    assert got.pop("dbranch") < 5e-3
    assert max(got.values()) < 1e-6


def test_strided_inputs_and_gradients() -> None:
    values = problem((6, 20), FP32, FP32)
    strided = {
        n: v if v is None else v.t().contiguous().t() if v.dim() == 2 else torch.stack([v, v], 1)[:, 0]
        for n, v in values.items()
    }
    results = [
        residual_norm(**{n: v.detach().requires_grad_() for n, v in side.items()}, impl="triton")  # type: ignore[union-attr, arg-type]
        for side in (values, strided)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_no_rows() -> None:
    x = torch.zeros(0, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    summed, normed = residual_norm(x, x.detach(), weight, impl="triton")
    assert summed.shape == normed.shape == (0, 8)
    dx, dweight = torch.autograd.grad(normed.sum() + summed.sum(), [x, weight])
    assert dx.shape == (0, 8) and torch.equal(dweight, torch.zeros(8))


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(
    "without, stream, other, out",
    [
        ("", FP32, FP32, FP32),
        ("branch", FP32, FP32, BF16),
        ("weight bias", FP32, BF16, BF16),
        ("bias", BF16, FP32, FP32),
    ],
)
def test_opcheck(without: str, stream: torch.dtype, other: torch.dtype, out: torch.dtype, centre: bool) -> None:
    """Schema, autograd registration, fake tensors and dynamic shapes as torch itself checks them."""
    values = problem((2, 3, 8), stream, other, without).values()
    leaves = [value if value is None else value.requires_grad_() for value in values]
    torch.library.opcheck(module._forward_op, (*leaves, centre, 1e-5, out, 0, 0))


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
def test_self_check_passes(dtype: torch.dtype) -> None:
    assert OP.deviation("triton", torch.device("cpu"), dtype) <= OP.tolerance[dtype]


def test_same_limits_on_both_sides() -> None:
    assert (kernel.MAX_DIM, kernel.DTYPES) == (FUSED_MAX_DIM, FUSED_DTYPES)


@pytest.mark.parametrize(
    "x, sentence",
    [
        (torch.zeros(2, 4, dtype=torch.float64), "the kernel takes bfloat16"),
        (torch.zeros(1, 4097), "rows of up to 4096"),
    ],
)
def test_what_the_kernel_cannot_do(x: Tensor, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        residual_norm(x, x, impl="triton")
