"""The whole plan through the interpreted kernels, against the same plan in torch and the model in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from .harness import need_interpreter

need_interpreter()

from loopmdm.errors import InputError  # noqa: E402
from loopmdm.model.depth import Depth, RelativeChange  # noqa: E402

from .. import oracle  # noqa: E402
from ..helpers import ids, live, tiny  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
SIZE = {"num_attention_heads": 2, "head_dim": 32, "num_hidden_layers": 3, "intermediate_size": 48, "length": 1}
VARIANTS = {
    "llama": ("llama", {"num_key_value_heads": 1, "qk_norm": "before_rope", "boundary": "anchored"}),
    "dit": ("dit", {}),
}


@pytest.mark.parametrize(
    "impl, S, dtype", [("triton", S, dtype) for S in (1, 4) for dtype in (FP32, BF16)] + [("cublas", 1, BF16)], ids=str
)
@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_torch(name: str, impl: str, S: int, dtype: torch.dtype) -> None:
    """With padding, so that spans and a table a token are used; both no further from the truth than 1.2x."""
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **SIZE, **changes))
    tokens, real = ids(2, 9), torch.arange(9) >= torch.tensor([0, 4])[:, None]
    ours, torchs = (model.fused(dtype, impl).hidden(tokens, real, S) for impl in (impl, "torch"))
    assert (ours - torchs).abs().max() < (5e-2 if dtype == BF16 else 1e-5) * torchs.abs().max()
    with torch.no_grad():
        truth = copy.deepcopy(model).double().hidden(tokens, real, S)
    assert oracle.error(ours, truth) <= 1.2 * oracle.error(torchs, truth) + 1e-6


@pytest.mark.parametrize("impl", ["triton", "cublas"])
def test_time_conditioning(impl: str) -> None:
    """Vectors of each sequence's own: gains, biases, gates, and the mean that a centred stream is kept without."""
    model = live(tiny("dit", **SIZE, time_conditioning=True))
    tokens, sigma = ids(3, 9), torch.tensor([0.1, 0.7, 4.0])
    with torch.no_grad():
        truth = copy.deepcopy(model).double().hidden(tokens, num_loops=2, sigma=sigma)
    got, torchs = (model.fused(BF16, which).hidden(tokens, num_loops=2, sigma=sigma) for which in (impl, "torch"))
    assert oracle.error(got, truth) <= 1.2 * oracle.error(torchs, truth) + 1e-6


def test_exits() -> None:
    """The sums of an exit, and sequences that leave."""
    model = live(tiny("llama", **SIZE, boundary="anchored"))
    tokens = ids(4, 9)
    depths = [Depth(5, RelativeChange(0.25, 1)) for _ in range(3)]
    plans = [model.fused(impl=impl) for impl in ("triton", "torch")]
    ours, torchs = (plan.hidden(tokens, num_loops=depth) for plan, depth in zip(plans, depths, strict=False))
    with torch.no_grad():
        want = model.hidden(tokens, num_loops=depths[2])
    visits = [depth.visits.tolist() for depth in depths]  # type: ignore[union-attr]
    assert visits[0] == visits[1] == visits[2] and len(set(visits[0])) > 1
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


def test_heads_that_no_kernel_has() -> None:
    model = live(tiny())  # head_dim 8
    with pytest.raises(InputError, match="head_dim is 8"):
        model.fused(impl="triton").hidden(ids(1, 5), num_loops=1)
    plan = model.fused(impl="triton", attention_impl="torch")
    with torch.no_grad():
        want = model.hidden(ids(1, 5), num_loops=1)
    torch.testing.assert_close(plan.hidden(ids(1, 5), num_loops=1), want, rtol=0, atol=1e-5)
