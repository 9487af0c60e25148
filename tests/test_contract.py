"""What holds for every op: its files come together, its table is evidence, and dispatch never trusts a wrong kernel."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loopmdm.kernels import tuned
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopmdm.errors import InputError
from loopmdm.ops import contract
from loopmdm.ops.contract import IMPLS, Op, all_ops, unavailable

ROOT = Path(__file__).parents[1]
CPU, FP32 = torch.device("cpu"), torch.float32
OPS = sorted(all_ops())
ROWS = [(name, row) for name in OPS for row in tuned.rows(name)]


@pytest.mark.parametrize("name", OPS)
def test_files_of_an_op_come_together(name: str) -> None:
    op = all_ops()[name]
    needed = [f"src/loopmdm/ops/{name}.py", f"tests/test_{name}.py", f"benchmarks/bench_{name}.py"]
    if "triton" in op.impls:
        needed += [f"kernels/{name}.py", f"tests/interpret/test_{name}.py"]
    for path in needed:
        assert (ROOT / path).is_file(), f"{path} is missing"
    if {"cpp", "cuda"} & set(op.impls):
        assert name in (ROOT / "csrc" / "bindings.cpp").read_text()
    assert op.call.__name__ == name
    assert "Raises:" in (op.call.__doc__ or "") and "impl" in (op.call.__doc__ or "")
    assert op.impls[0] == "torch" and (op.library is not None or set(op.impls) <= set(IMPLS))
    assert set(op.dtypes) <= set(op.tolerance)


def test_no_kernel_or_table_without_an_op() -> None:
    helpers = {"__init__", "tuned", "gemm", "noise"}
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py")} - helpers
    assert kernels | {path.stem for path in (ROOT / "kernels" / "tables").glob("*.json")} <= set(OPS)


@pytest.mark.parametrize("name, row", ROWS, ids=lambda value: getattr(value, "arch", value))
def test_table_rows_are_evidence(name: str, row: tuned.Row) -> None:
    assert row.impl in all_ops()[name].impls
    assert row.arch == "cpu" or re.fullmatch(r"sm_\d{2,3}", row.arch)
    assert row.dtype == "*" or isinstance(getattr(torch, row.dtype, None), torch.dtype)
    assert all(isinstance(number, int) for number in (*row.upto.values(), *row.config.values()))
    kind, _, file = row.evidence.partition(": ")
    assert kind in ("compiled", "measured")
    if kind == "measured":
        assert file.startswith("benchmarks/results/") and (ROOT / file).is_file(), f"no {file}"
    else:
        assert not file and row.arch != "cpu", "only a GPU kernel can be known by compiling alone"


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "mutations").glob("*.json")), ids=lambda path: path.stem)
def test_mutations_apply(path: Path) -> None:
    """The code they break is still there, once; tests/mutations.py runs them."""
    for entry in json.loads(path.read_text()):
        assert set(entry) <= {"file", "old", "new", "tests", "interpret", "rebuild", "timeout"} and entry["tests"]
        assert (ROOT / entry["file"]).read_text().count(entry["old"]) == 1, entry["old"]
        assert entry["old"] != entry["new"]
        for node in entry["tests"]:
            file, _, test = node.partition("::")
            assert not test or re.search(rf"def {re.escape(test.partition('[')[0])}\(", (ROOT / file).read_text()), node


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write a table of op "doubled" that holds for this test alone."""
    monkeypatch.setattr(tuned, "TABLES", tmp_path)

    def write(*rows: dict[str, Any]) -> None:
        (tmp_path / "doubled.json").write_text(json.dumps({"rows": rows}))
        tuned.forget()

    yield write
    monkeypatch.undo()
    tuned.forget()


MEASURED = {"impl": "cpp", "arch": "cpu", "evidence": "measured: results.json"}


def doubled(error: float = 0.0, crash: bool = False) -> tuple[Op, list[str]]:
    """An op whose "cpp" implementation is off by `error` in its gradient, and the list of what ran."""
    ran: list[str] = []

    def call(x: Tensor, impl: str = "auto") -> Tensor:
        choice = op.choose(impl, x.device, x.dtype, rows=x.numel())
        ran.append(choice.impl)
        if choice.impl == "cpp" and crash:
            raise RuntimeError("launch failed")
        return 2 * x if choice.impl == "torch" else 2 * x + error * (x - x.detach())

    def example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
        return {"x": torch.randn(7, generator=rng).to(device, dtype)}

    op = Op("doubled", call, (example,), ("torch", "cpp"), (FP32,), {FP32: 1e-6}, ("x",))
    return op, ran


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "unavailable", lambda impl, device: None)


@pytest.mark.usefixtures("built")
def test_auto_uses_a_measured_row_that_agrees(table: Callable[..., None]) -> None:
    table(MEASURED | {"config": {"rows": 4}})
    op, ran = doubled()
    assert op.choose("auto", CPU, FP32) == contract.Choice("cpp", {"rows": 4}, "measured: results.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.call(torch.ones(3))
    assert ran[-1] == "cpp"


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("fault", [{"error": 0.25}, {"error": float("nan")}, {"crash": True}], ids=str)
def test_a_wrong_kernel_is_switched_off_with_one_warning(table: Callable[..., None], fault: dict[str, Any]) -> None:
    """The fault may be in the gradient alone."""
    table(MEASURED)
    op, ran = doubled(**fault)
    with pytest.warns(RuntimeWarning, match="using torch instead") as caught:
        for _ in range(3):
            assert torch.equal(op.call(torch.ones(3)), torch.full((3,), 2.0))
            assert ran[-1] == "torch"
    assert len(caught) == 1
    assert ran.count("cpp") == 1, "the self-check was not remembered"
    assert "doubled: cpp" in op.choose("auto", CPU, FP32).why


@pytest.mark.skipif(contract.extension() is None, reason="loopmdm._C is not built")
@pytest.mark.parametrize("around", ["inference mode", "autocast", "checkpoint"])
def test_the_self_check_does_not_mind_where_it_runs(around: str) -> None:
    op, found = contract.all_ops()["residual_norm"], []

    def first_use(x: Tensor) -> Tensor:
        tuned.forget()
        found.append(op.verify("cpp", CPU, FP32))
        return x * x

    x = torch.ones(3, requires_grad=True)
    if around == "inference mode":
        with torch.inference_mode():
            first_use(x)
    elif around == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            first_use(x)
    else:  # it counts the tensors that are saved for backward
        checkpoint(first_use, x, use_reentrant=False).sum().backward()
    assert found and found == [None] * len(found)
    tuned.forget()


@pytest.mark.usefixtures("built")
def test_auto_never_uses_an_unmeasured_row(table: Callable[..., None]) -> None:
    table(MEASURED | {"evidence": "compiled"})
    op, ran = doubled(crash=True)
    op.call(torch.ones(3))
    assert ran == ["torch"]
    assert op.choose("auto", CPU, FP32).why == "no faster implementation was measured here"
    assert op.choose("cpp", CPU, FP32).impl == "cpp"


@pytest.mark.usefixtures("built")
def test_a_row_holds_inside_its_bounds_and_the_first_wins(table: Callable[..., None]) -> None:
    small = {"upto": {"rows": 8}, "config": {"tile": 1}}
    large = {"upto": {"rows": 64}, "config": {"tile": 2}}
    table(MEASURED | small | {"dtype": "float16"}, MEASURED | small, MEASURED | large, MEASURED | {"impl": "torch"})
    op, _ = doubled()
    for rows, impl, config in [
        (1, "cpp", {"tile": 1}),
        (8, "cpp", {"tile": 1}),
        (9, "cpp", {"tile": 2}),
        (65, "torch", {}),
    ]:
        choice = op.choose("auto", CPU, FP32, rows=rows)
        assert (choice.impl, choice.config) == (impl, config)
    elsewhere = tuned.best("doubled", "sm_90", FP32, {"rows": 1})
    assert elsewhere is None


@pytest.mark.usefixtures("built")
def test_a_refused_problem_goes_to_the_next_row(table: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """And an explicit name says why; the first reason is the one that is kept."""
    monkeypatch.setattr(Op, "verify", lambda *problem: None)
    table(MEASURED | {"impl": "theirs"}, MEASURED | {"upto": {"rows": 8}, "config": {"tile": 3}})
    op, _ = doubled()
    op = dataclasses.replace(op, impls=(*op.impls, "theirs"), library=lambda impl, device: None)

    def refuses(impl: str) -> str | None:
        return "it is odd" if impl == "theirs" else None

    assert op.choose("auto", CPU, FP32, rows=8).impl == "theirs"
    assert op.choose("auto", CPU, FP32, refuses, rows=8) == contract.Choice("cpp", {"tile": 3}, MEASURED["evidence"])
    assert op.choose("auto", CPU, FP32, refuses, rows=9) == contract.Choice("torch", {}, "it is odd")
    with pytest.raises(InputError, match="doubled: impl='theirs' cannot run: it is odd"):
        op.choose("theirs", CPU, FP32, refuses, rows=8)


def test_a_library_says_itself_where_it_runs(table: Callable[..., None]) -> None:
    table(MEASURED | {"impl": "theirs"})
    op, _ = doubled()
    op = dataclasses.replace(op, impls=("torch", "theirs"), library=lambda impl, device: f"no {impl} on {device.type}")
    assert op.choose("auto", CPU, FP32) == contract.Choice("torch", {}, "no theirs on cpu")
    with pytest.raises(InputError, match="doubled: impl='theirs' cannot run here: no theirs on cpu"):
        op.choose("theirs", CPU, FP32)


def test_self_check_passes_over_examples_that_are_refused() -> None:
    op, _ = doubled(error=1.0)
    assert op.deviation("cpp", CPU, FP32) > 0.5
    op = dataclasses.replace(op, refuses=lambda impl, x: "never")
    assert op.taken("cpp", CPU, FP32) == () and op.taken("torch", CPU, FP32) == op.examples
    assert "cpp takes no example in torch.float32" in (op.verify("cpp", CPU, FP32) or "")


def test_every_shipped_gpu_row_is_passed_over_until_measured() -> None:
    for name, row in ROWS:
        if not row.measured and row.impl != "torch":
            # what auto sees for the largest problem of this row
            found = tuned.best(name, row.arch, FP32, row.upto, measured_only=True)
            assert found is None or found.measured


@pytest.mark.parametrize("name", OPS)
def test_forced_impl_says_why_it_cannot_run(name: str) -> None:
    op = all_ops()[name]
    with pytest.raises(InputError, match=f"{name} has no impl 'tirton'"):
        op.choose("tirton", CPU, FP32)
    assert op.choose("torch", CPU, FP32).impl == "torch"
    for impl in op.impls:
        reason = op.unavailable(impl, CPU)
        if reason is not None:
            with pytest.raises(InputError, match=re.escape(f"{name}: impl={impl!r} cannot run here: {reason}")):
                op.choose(impl, CPU, FP32)


def test_reasons_name_the_missing_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "interpreting", lambda: False)
    tuned.forget()
    assert unavailable("torch", CPU) is None
    assert "CUDA device or TRITON_INTERPRET=1" in (unavailable("triton", CPU) or "") or not _has_triton()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(contract, "extension", lambda: None)
    tuned.forget()
    assert unavailable("triton", CPU) == "triton is not installed"
    assert unavailable("cpp", CPU) == "loopmdm._C is not built"
    monkeypatch.undo()
    tuned.forget()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("name", OPS)
def test_self_check_runs_on_torch(name: str) -> None:
    """Each example is a valid problem, not a constant one, and reproducible."""
    op = all_ops()[name]
    for dtype in op.dtypes:
        assert op.deviation("torch", CPU, dtype) == 0.0
        for example in op.examples:
            for tensor in example(CPU, dtype, torch.Generator().manual_seed(0)).values():
                assert not isinstance(tensor, Tensor) or tensor.unique().numel() > 1


def test_rows_and_ops_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROWS[0][1].impl = "torch"  # type: ignore[misc]
