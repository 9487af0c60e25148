"""Compile gate: every Triton row of every table, and every kernel's default, on GPUs that are not here.

A run of its own, without TRITON_INTERPRET: `pytest tests/gate -n 2`.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="the compile gate needs triton")

from loopmdm.kernels import residual_norm  # noqa: E402

from loopmdm.ops.contract import all_ops, interpreting  # noqa: E402

from .gate import Case, cases, compile_for, kernel_files, shared_limit  # noqa: E402

if interpreting():
    pytest.skip("the compile gate is a run of its own, without TRITON_INTERPRET", allow_module_level=True)


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.arch} {case.label}")
def test_fits_without_spills(case: Case) -> None:
    binary = compile_for(case.arch, case.compile)
    threads = 32 * case.compile.num_warps
    assert binary.stack == 0, f"{binary.spills} spill instructions, {binary.stack} bytes of stack"
    assert 0 < binary.registers <= min(case.compile.registers, 65536 // threads)
    assert binary.shared <= shared_limit(case.arch)
    for wanted in case.compile.contains:
        assert wanted in binary.sass, f"no {wanted} in the SASS"
    assert ".f64" not in binary.ptx, "double precision crept in"


def test_gate_sees_spills() -> None:
    """A tile that cannot fit in registers must be caught."""
    *_, backward = residual_norm.gate("float32", {"dim": 16384}, {"rows": 1, "warps": 16})
    binary = compile_for("sm_90", backward)
    assert binary.stack > 0 and binary.spills > 0


def test_gate_sees_double_precision() -> None:
    forward, *_ = residual_norm.gate("float32", {"dim": 64}, {})
    signature = {**forward.signature, "weight_ptr": "*fp64", "x_ptr": "*fp64"}
    assert ".f64" in compile_for("sm_90", forward._replace(signature=signature)).ptx


def test_every_triton_table_has_a_gate() -> None:
    gated = {module.__name__.rpartition(".")[2] for module in kernel_files()}
    assert {name for name, op in all_ops().items() if "triton" in op.impls} <= gated
