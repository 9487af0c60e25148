"""The softmax_minus_onehot kernel in Triton's interpreter, against float64 and against torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .harness import launch, need_interpreter

need_interpreter()

from loopmdm.kernels import linear_cross_entropy as kernel  # noqa: E402

from loopmdm.errors import InputError  # noqa: E402
from loopmdm.ops import linear_cross_entropy as module  # noqa: E402
from loopmdm.ops.linear_cross_entropy import OP, linear_cross_entropy  # noqa: E402

from .. import oracle  # noqa: E402

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [FP32, BF16, FP16]
SHAPES = [(1, 1), (3, 17), (2, 64), (2, 131), (1, 4099)]


def problem(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    rows, vocab = shape
    rng = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(rows, vocab, generator=rng)).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=rng)
    if vocab > 2:  # an id that no target is
        logits[:, 1] = float("-inf")
        targets = torch.where(targets == 1, 2, targets)
    weights = torch.rand(rows, generator=rng) + 0.5
    return {"logits": logits, "targets": targets, "weights": weights}


def call(
    logits: Tensor, targets: Tensor, weights: Tensor | None, grads: bool, config: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """The kernel on a copy: (nll, what it left in the logits)."""
    left = torch.empty_like(logits)
    left.copy_(logits)
    nll = torch.empty(logits.shape[0], dtype=torch.float32)
    kernel.softmax_minus_onehot_(left, targets, weights, nll, grads, config)
    return nll, left


def truth(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    x = logits.double()
    nll = x.logsumexp(-1) - x.gather(1, targets[:, None])[:, 0]
    grad = torch.softmax(x, -1).scatter_add(1, targets[:, None], -torch.ones_like(nll)[:, None])
    return nll, grad if weights is None else grad * weights.double()[:, None]


@pytest.mark.parametrize("config", [{}, {"block": 64, "warps": 1}], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(
    shape: tuple[int, int], dtype: torch.dtype, weighted: bool, config: dict[str, int]
) -> None:
    inputs = problem(shape, dtype)
    if not weighted:
        inputs["weights"] = None
    want = truth(**inputs)
    ours = call(**inputs, grads=True, config=config)
    left, nll = inputs["logits"].clone(), torch.empty(shape[0])
    module._softmax_minus_onehot_(left, inputs["targets"], inputs["weights"], nll, True, None)
    for got, torchs, exact in zip(ours, (nll, left), want, strict=True):
        assert oracle.error(got, exact) <= 1.2 * oracle.error(torchs, exact) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_no_races_and_no_stray_accesses(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = problem(shape, dtype)
    for grads in (True, False):
        nll, left = launch(monkeypatch, call, *inputs.values(), grads, {"block": 64})
        assert nll.isfinite().all()
        assert torch.equal(left, inputs["logits"]) != grads


def test_suppressed_target() -> None:
    """An infinite loss, and no gradient at the suppressed id."""
    inputs = problem((3, 17), FP32)
    inputs["targets"] = torch.ones(3, dtype=torch.int64)
    nll, left = call(**inputs, grads=True, config={"block": 8})
    assert nll.isposinf().all() and left[:, 1].count_nonzero() == 0


def test_a_row_that_begins_with_suppressed_blocks() -> None:
    inputs = problem((3, 64), FP32)
    inputs["logits"][:, :20] = float("-inf")
    inputs["targets"] = torch.tensor([20, 63, 40])
    for got, want in zip(call(**inputs, grads=True, config={"block": 8}), truth(**inputs), strict=True):
        assert oracle.error(got, want) < 1e-6


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="the kernel takes bfloat16, float16 and float32"):
        linear_cross_entropy(
            torch.ones(1, 2, dtype=torch.float64),
            torch.ones(3, 2, dtype=torch.float64),
            torch.tensor([1]),
            impl="triton",
        )


def test_examples_agree() -> None:
    for dtype in OP.dtypes:
        assert OP.deviation("triton", CPU, dtype) <= OP.tolerance[dtype]
