"""What the attention kernel's binaries must hold beyond the gate: tensor cores of Hopper, one binary for any length."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="the compile gate needs triton")

from loopmdm.kernels import attention as kernel  # noqa: E402

from loopmdm.ops.contract import interpreting  # noqa: E402

from .gate import compile_for  # noqa: E402

if interpreting():
    pytest.skip("the compile gate is a run of its own, without TRITON_INTERPRET", allow_module_level=True)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_multiplies_a_warpgroup_at_a_time(head_dim: int) -> None:
    for item in kernel.gate("bfloat16", {"tokens": 65536, "head_dim": head_dim}, {}):
        # one for the scores and one for the values, in the loop over whole blocks and in the one over edges
        assert compile_for("sm_90", item).sass.count("HGMMA") >= 4


@pytest.mark.parametrize("arch, head_dim", [("sm_86", 128), ("sm_100", 32)])
def test_the_kernel_s_own_tiles_fit_elsewhere(arch: str, head_dim: int) -> None:
    """The gate tries a kernel's own tiles on sm_80 and sm_90 alone; these two spilled in fp32."""
    for item in kernel.gate("float32", {"tokens": 65536, "head_dim": head_dim}, {}):
        assert compile_for(arch, item).stack == 0


def test_nothing_compiles_anew_for_another_length() -> None:
    """Every argument that varies with the batch or the length is left unspecialised. (The others: tests/interpret.)"""
    numbers = [p for p in kernel.attention_kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert [(p.name, p.do_not_specialize) for p in numbers] == [("n_tokens", True), ("log2_scale", False)]
