"""The head_stats and noise kernels in Triton's interpreter: the same tokens as torch, no race, no stray access."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .harness import launch, need_interpreter

need_interpreter()

from loopmdm.errors import InputError  # noqa: E402
from loopmdm.ops import head_stats as module  # noqa: E402
from loopmdm.ops.head_stats import OP, head_stats, logit_stats  # noqa: E402
from loopmdm.ops.noise import GROUP, TOKEN, gumbel_rows  # noqa: E402

from ..test_head_stats import check_layouts  # noqa: E402
from ..test_noise import counters  # noqa: E402

INF, NAN = float("inf"), float("nan")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_noise_over_a_million_counters() -> None:
    arguments = counters(512, seed=3)
    for stream, count in ((GROUP, 2048), (TOKEN, 100)):
        assert torch.equal(gumbel_rows(*arguments, count, stream, "triton"), gumbel_rows(*arguments, count, stream))


def problem(rows: int, dim: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(rows + vocab)
    return {
        "hidden": torch.randn(rows, dim, generator=rng).to(dtype),
        "weight": (torch.randn(vocab, dim, generator=rng) * 3 / dim**0.5).to(dtype),
        "bias": torch.randn(vocab, generator=rng),
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=rng),
        "positions": torch.randint(0, 4096, (rows,), generator=rng),
        "steps": torch.randint(0, 64, (rows,), generator=rng),
    }


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("rows, dim, vocab", [(1, 16, 1), (9, 72, 129), (33, 24, 300)])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_agrees_with_torch(rows: int, dim: int, vocab: int, dtype: torch.dtype, temperature: float) -> None:
    inputs = problem(rows, dim, vocab, dtype)
    options: dict[str, Any] = {"temperature": temperature, "suppressed": (0, vocab - 1) if vocab > 2 else ()}
    got, want = (head_stats(**inputs, **options, impl=i) for i in ("triton", "torch"))
    assert torch.equal(got.token, want.token)
    for name, a, b in zip(got._fields[1:], got[1:], want[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1e-9}])
def test_the_same_tokens_from_given_logits(options: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(12, 515, generator=rng).mul(4).round().div(2)  # ties
    x[2], x[3], x[4, 7], x[5, :400] = NAN, -INF, INF, NAN
    options = {"seeds": torch.arange(12), "positions": torch.arange(12) * 3, "suppressed": (3, 514)} | options
    options["tokens"] = torch.where(torch.arange(12) % 3 == 0, torch.arange(12) * 40 + 3, -1)
    got, want = (logit_stats(x, **options, impl=i) for i in ("triton", "torch"))
    for a, b in zip(got[:4], want[:4], strict=True):
        assert torch.equal(a, b)


def test_layouts() -> None:
    check_layouts("triton")


def test_refuses_other_dtypes() -> None:
    with pytest.raises(InputError, match="float64 is not for the kernel"):
        head_stats(torch.ones(2, 3).double(), torch.ones(4, 3).double(), impl="triton")


@pytest.mark.parametrize("count", [0, 7, 99])
def test_rows_beyond_count_are_ignored(count: int) -> None:
    inputs = problem(12, 16, 200, FP32)
    got, want = (head_stats(**inputs, temperature=1.0, count=torch.tensor(count), impl=i) for i in ("triton", "torch"))
    assert torch.equal(got.token, want.token) and bool((got.token[count:] == -1).all())
    assert not any(t.isnan().any() for t in got)


@pytest.mark.parametrize("from_logits", [False, True])
def test_no_races_and_no_stray_accesses(monkeypatch: pytest.MonkeyPatch, from_logits: bool) -> None:
    rows = 18 if from_logits else 33  # more than one tile
    inputs = problem(rows, 40, 200, FP32)
    module._mask.cache_clear()

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, seeds: Tensor, positions: Tensor, steps: Tensor, t: Tensor):
        options = {"temperature": 0.8, "suppressed": (7, 199), "tokens": t, "impl": "triton"}
        noise = {"seeds": seeds, "positions": positions, "steps": steps}
        if from_logits:
            return tuple(logit_stats(hidden, **noise, **options))
        return tuple(head_stats(hidden, weight, bias, **noise, **options))

    if from_logits:
        inputs["hidden"] = inputs["hidden"] @ inputs["weight"].T
    judged = torch.where(torch.arange(rows) % 4 == 0, torch.arange(rows), -1)
    token, *_ = launch(monkeypatch, call, *inputs.values(), judged)
    module._mask.cache_clear()
    assert bool((token >= 0).all())


def test_groups_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What top-k reads: any groups of a row, the last one partly beyond the vocabulary."""
    inputs = problem(4, 40, 200, FP32)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, group: Tensor) -> tuple[Tensor, ...]:
        draw = module.Draw(0.0, None, None, None, (), None, None, None, None)
        inside = module.Triton(hidden, weight, bias, draw, {}).inside(slice(0, 4), group)
        return (inside.nan_to_num(nan=NAN, neginf=-1e9),)

    group = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]])
    (out,) = launch(monkeypatch, call, inputs["hidden"], inputs["weight"], inputs["bias"], group)
    x = torch.nn.functional.pad(inputs["hidden"] @ inputs["weight"].T + inputs["bias"], (0, 56), value=-1e9)
    assert torch.allclose(out, x.view(4, 2, 128).gather(1, group[..., None].expand(-1, -1, 128)), atol=1e-5)


def test_examples_agree() -> None:
    for dtype in OP.dtypes:
        assert OP.deviation("triton", torch.device("cpu"), dtype) <= OP.tolerance[dtype]
