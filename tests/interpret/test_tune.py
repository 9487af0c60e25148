"""The arms that `loopmdm tune` times on a GPU: each of a kernel's candidates reaches it, and agrees with torch."""

import pytest
import torch

from loopmdm.lab import tune
from loopmdm.ops.contract import all_ops

from .harness import need_interpreter

need_interpreter()

CPU = torch.device("cpu")
SIZES = {
    "residual_norm": {"rows": 5, "dim": 128},
    "loop_boundary": {"rows": 5, "dim": 128},
    "attention": {"head_dim": 32, "tokens": 9, "spans": 1, "batch": 1},
    "norm_linear": {"rows": 20, "dim": 64},
    "linear_residual": {"rows": 20, "dim": 64},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_arms_agree_with_torch(name, dtype):
    op, size = all_ops()[name], SIZES[name]
    arms = [arm for arm in tune.arms(op, CPU, dtype, size) if arm.impl == "triton"]
    assert len(arms) >= 3 and len({tuple(sorted(arm.config.items())) for arm in arms}) == len(arms)
    variants = list(tune._variants(op, CPU, dtype, size))
    assert len(variants) == len(op.problems) * (1 + bool(op.grads))
    for arm in (arms[0], arms[-1]):
        assert all(variant.refused(arm) is None for variant in variants)
