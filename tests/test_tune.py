"""`loopmdm tune`: what earns a row, where rows are kept, and that a row only ever costs speed."""

import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopmdm.kernels import tuned

from loopmdm import info
from loopmdm.errors import InputError
from loopmdm.lab import evidence, tune
from loopmdm.lab.evidence import Store
from loopmdm.ops import contract
from loopmdm.ops.contract import Choice, Op, all_ops
from loopmdm.ops.norm_linear import Heads

from .commands import refused, run

CPU, FP32 = torch.device("cpu"), torch.float32
QUICK = tune.EFFORTS["quick"]
EVIDENCE = "measured: results.json"


class Clock:
    """Time that passes only where an op says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tune, "time", clock)
    return clock


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Tables and a user's file of a test's own; `place(table rows, user rows)` writes them."""
    tables, mine = tmp_path / "kernels" / "tables", tmp_path / "mine.json"
    tables.mkdir(parents=True)
    monkeypatch.setattr(tuned, "TABLES", tables)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setenv(tuned.OVERRIDE, str(mine))
    monkeypatch.setattr(contract, "unavailable", lambda impl, device: None)
    tuned.forget()

    def write(table=(), own=None):
        (tables / "scaled.json").write_text(json.dumps({"rows": list(table)}))
        if own is not None:
            mine.write_text(own if isinstance(own, str) else json.dumps({"rows": list(own)}))
        tuned.forget()
        return mine

    yield write
    monkeypatch.undo()
    tuned.forget()


def scaled(clock, costs, wrong=(), grads=(), problems=1):
    """An op of 3 impls that takes `costs[impl, tile]` seconds a call; a function of the problem's number and direction.

    `wrong`: (impl, tile) whose result is off.
    """

    def call(x, which=0, impl="auto"):
        """Raises: nothing; impl."""
        choice = op.choose(impl, x.device, x.dtype, rows=x.numel())
        key = (choice.impl, choice.config.get("tile", 0))
        cost = costs.get(key, costs.get(choice.impl))
        if cost == "dies":
            raise RuntimeError("out of shared memory\nmore")
        clock.now += cost(which, x.requires_grad) if callable(cost) else cost
        return 2 * x + (0.5 if key in wrong else 0.0)

    def problem(which):
        def make(device, dtype, rng, rows=64):
            return {"x": torch.randn(rows, generator=rng).to(device, dtype), "which": which}

        return make

    made = tuple(problem(i) for i in range(problems))
    examples = (lambda device, dtype, rng: {"x": torch.randn(7, generator=rng)},)
    sizes = {"cpu": ({"rows": 4}, {"rows": 16}, {})}
    impls = ("torch", "cpp", "cuda")
    op = Op("scaled", call, examples, impls, (FP32,), {FP32: 1e-6}, grads, problems=made, sizes=sizes)
    return op


def row(impl, tile=None, **upto):
    config = {} if tile is None else {"tile": tile}
    return {"impl": impl, "arch": "cpu", "dtype": "float32", "upto": upto, "config": config, "evidence": EVIDENCE}


def measured(op, **size):
    return tune.measure(op, CPU, FP32, size, QUICK)


# What earns a row


def test_the_fastest_arm_that_beats_torch_wins(place, clock):
    place([row("cpp", 1), row("cpp", 2), row("cuda", 3)])
    op = scaled(clock, {"torch": 1.0, "cpp": 0.9, ("cpp", 1): 0.7, ("cpp", 2): 0.4, "cuda": 0.5})
    cell = measured(op, rows=16)
    assert (cell.best.impl, cell.best.config) == ("cpp", {"tile": 2})
    assert cell.best.ratio == pytest.approx(2.5) and cell.best.torch == pytest.approx(1e6)
    assert cell.row == tuned.Row("scaled", "cpp", "cpu", "float32", {"rows": 16}, {"tile": 2})
    # the tile that a kernel chooses itself is an arm too, and each configuration is one only once
    assert sorted((a.impl, a.config.get("tile", 0)) for a in cell.arms) == [
        *(("cpp", tile) for tile in range(3)), ("cuda", 0), ("cuda", 3)
    ]  # fmt: skip
    assert op.choose("auto", CPU, FP32).impl == "cpp", "an arm stayed pinned"
    assert op._pins == []


@pytest.mark.parametrize("gain, impl", [(1.06, "cpp"), (1.04, "torch"), (0.9, "torch")])
def test_a_row_takes_a_margin(place, clock, gain, impl):
    place()
    assert measured(scaled(clock, {"torch": gain, "cpp": 1.0, "cuda": 9.0})).row.impl == impl


def test_noise_earns_nothing(place, clock):
    """The median is 1.8x, but the interval reaches below 1."""
    place()
    noisy = itertools.cycle([0.5, 1.0, 0.5, 1.0, 0.5, 1.2, 0.5, 1.2, 0.5])
    op = scaled(clock, {"torch": 0.9, "cpp": lambda *_: next(noisy), "cuda": 9.0})
    cell = measured(op)
    arm = next(a for a in cell.arms if a.impl == "cpp")
    assert cell.best is None and arm.ratio > tune.MARGIN > arm.low
    assert arm.rounds == 3 * QUICK.rounds, "what is open gets a longer look"


def test_a_wrong_or_failing_arm_is_not_timed(place, clock):
    place([row("cpp", 1), row("cpp", 2)])
    op = scaled(clock, {"torch": 1.0, "cpp": 0.9, ("cpp", 1): 0.1, ("cpp", 2): "dies", "cuda": 0.2}, {("cpp", 1)})
    cell = measured(op)
    assert cell.best.impl == "cuda"
    outcomes = {a.config.get("tile", 0): a for a in cell.arms if a.impl == "cpp"}
    assert outcomes[1].outcome.startswith("differs from torch by") and outcomes[1].rounds == 0
    assert outcomes[2].outcome == "failed: RuntimeError: out of shared memory"
    assert outcomes[0].outcome == "timed"
    facts = json.loads(json.dumps(cell.facts(), allow_nan=False))
    assert [set(a) & {"ratio"} for a in facts["arms"]] == [{"ratio"}, set(), set(), {"ratio"}]


@pytest.mark.parametrize("out, copy, outcome", [(0, 2**-8, "timed"), (0, 0.1, "differs"), (2**-8, 0, "differs")])
def test_a_result_is_as_exact_as_its_own_dtype(place, clock, out, copy, outcome):
    """A bf16 copy of an fp32 stream may be off by a bf16 rounding, the stream itself may not."""
    place()

    def call(x, which=0, impl="auto"):
        wrong = op.choose(impl, x.device, x.dtype).impl != "torch"
        clock.now += 1.0
        return x * (1 + wrong * out), (x * (1 + wrong * copy)).bfloat16()

    op = dataclasses.replace(scaled(clock, {}), call=call, tolerance={FP32: 1e-6, torch.bfloat16: 1e-2})
    assert {arm.outcome.split()[0] for arm in measured(op).arms} == {outcome}


def test_torch_may_fail(place, clock):
    """Then there is no evidence for anything at that size, and the other sizes keep theirs."""
    mine = place()
    costs = {"torch": lambda which, _: 1 / (which != 0), "cpp": 0.1, "cuda": 0.1}
    cell = measured(scaled(clock, costs))
    assert cell.best is None and cell.failed == "torch failed: ZeroDivisionError: division by zero"
    good = measured(scaled(clock, {"torch": 1.0, "cpp": 0.1, "cuda": 0.1}), rows=4)
    Store(mine, QUICK, CPU).add([good, cell])
    assert [dict(r.upto) for r in tuned.rows("scaled")] == [{"rows": 4}]
    assert Store(mine, QUICK, CPU).add([cell]) == 0
    assert [dict(r.upto) for r in tuned.rows("scaled")] == [{"rows": 4}], "nothing new replaces nothing"


def test_the_problem_that_gains_least_decides(place, clock):
    place()
    costs = {"torch": 1.0, "cpp": lambda which, _: (2.0, 0.1)[which], "cuda": lambda which, _: (0.8, 0.5)[which]}
    cell = measured(scaled(clock, costs, problems=2))
    assert cell.best.impl == "cuda" and cell.best.ratio == pytest.approx(1.25)


def test_gradients_count(place, clock):
    """An arm that is faster without them and slower with them earns nothing."""
    place()
    costs = {"torch": 1.0, "cpp": lambda _, grad: 1.5 if grad else 0.1, "cuda": 0.8}
    assert measured(scaled(clock, costs, grads=("x",))).best.impl == "cuda"
    assert measured(scaled(clock, costs)).best.impl == "cpp"


def test_a_size_may_be_of_training_or_inference_alone(place, clock):
    place()
    costs = {"torch": 1.0, "cpp": lambda _, grad: 1.5 if grad else 0.1, "cuda": 0.8}
    op = scaled(clock, costs, grads=("x",))
    assert measured(op, training=0).best.impl == "cpp"
    trained = measured(op, rows=16, training=1)
    assert trained.best.impl == "cuda" and trained.row.upto == {"rows": 16, "training": 1}


def test_a_problem_is_drawn_once_and_keeps_its_strides():
    drawn = []

    def make(device, dtype, rng):
        drawn.append(torch.randn(3, 4, 5, generator=rng))
        return {"x": drawn[0][:, 1:3], "tables": (drawn[0], None), "eps": 0.5, "heads": Heads(1, 2, 8)}

    example = tune._drawn_once(make)
    one, two = (example(CPU, FP32, torch.Generator().manual_seed(0)) for _ in range(2))
    assert len(drawn) == 1 and one["eps"] == 0.5 and one["tables"][1] is None and one["heads"] == Heads(1, 2, 8)
    assert type(one["heads"]) is Heads
    for a, b in ((one["x"], two["x"]), (one["tables"][0], two["tables"][0])):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert one["x"].stride() == (20, 5, 1)


def test_a_refused_problem_is_no_failure(place, clock):
    place()
    op = scaled(clock, {"torch": 1.0, "cpp": 0.1, "cuda": 0.5})
    op = dataclasses.replace(op, refuses=lambda impl, **_: "it is odd" if impl == "cpp" else None)
    arms = {a.impl: a.outcome for a in tune.measure(op, CPU, FP32, {}, QUICK).arms}
    assert arms["cpp"] == "it is odd"


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_interval_is_of_the_median(values):
    low, high = tune.interval(values)
    ordered = sorted(values)
    assert low <= statistics.median(values) <= high
    dropped = sum(v < low for v in ordered)
    n = len(values)
    assert 2 * sum(math.comb(n, j) for j in range(dropped)) / 2**n <= 1 - tune.CONFIDENCE


@pytest.mark.parametrize("n, ends", [(5, (0, 4)), (6, (0, 5)), (9, (1, 7)), (31, (9, 21))])
def test_interval_in_tables(n, ends):
    """Ranks as in tables of the sign test at 95%."""
    assert tune.interval(list(range(n))[::-1]) == ends


BOUND = st.one_of(st.none(), st.integers(1, 4))
ROWS = st.lists(st.tuples(st.sampled_from(["torch", "cpp"]), st.integers(0, 1), BOUND, BOUND), max_size=6)


@settings(max_examples=200)
@given(ROWS)
def test_collapsed_rows_answer_alike(drawn):
    def upto(a, b):
        return {name: bound for name, bound in (("a", a), ("b", b)) if bound is not None}

    rows = [tuned.Row("x", impl, "cpu", "float32", upto(a, b), {"tile": tile}) for impl, tile, a, b in drawn]

    def answer(rows, problem):
        fits = (r for r in rows if all(problem[name] <= bound for name, bound in r.upto.items()))
        return next(((r.impl, r.config) for r in fits), None)

    fewer = tune.collapsed(rows)
    for a, b in itertools.product(range(1, 6), repeat=2):
        assert answer(rows, {"a": a, "b": b}) == answer(fewer, {"a": a, "b": b})


def test_equal_rows_are_one():
    rows = [tuned.Row("x", "cpp", "cpu", "float32", {"rows": n}) for n in (1, 8, 64)]
    assert tune.collapsed(rows) == rows[2:]


# The shipped ops


@pytest.mark.parametrize("name", [name for name, op in all_ops().items() if op.problems])
def test_problems_have_the_size_that_they_are_asked_for(name):
    """What dispatch is asked with is the row's key: the dtype, and every bound of the size."""
    op = all_ops()[name]
    assert op.sizes and set(op.sizes) <= {"cpu", "cuda"}
    for sizes in op.sizes.values():
        assert len({tuple(sorted(size.items())) for size in sizes}) == len(sizes)
    all_sizes = [size for sizes in op.sizes.values() for size in sizes]
    smallest = min(all_sizes, key=lambda size: (-len(size), math.prod(size.values())))
    for make, dtype in itertools.product(op.problems, op.dtypes):
        numbers = {bound: value for bound, value in smallest.items() if bound != "training"}
        kwargs = make(CPU, dtype, torch.Generator().manual_seed(0), **numbers)
        with op.pinned(Choice("torch")) as pin, torch.no_grad():
            op.call(**kwargs, impl="auto")
        asked, size = pin.asked[0]
        assert asked == dtype
        assert {bound: size.get(bound) for bound in smallest} == dict(smallest)


def test_candidates_are_what_the_kernels_read():
    pytest.importorskip("triton")
    for name, op in all_ops().items():
        if "triton" in op.impls and op.problems:
            for dtype in op.dtypes:
                for size in op.sizes["cuda"]:
                    found = [a.config for a in tune.arms(dataclasses.replace(op, library=_here), CPU, dtype, size)]
                    keys = {key for config in found for key in config}
                    known = {key for r in tuned.table(name) if r.impl == "triton" for key in r.config}
                    assert keys <= known, name


def _here(impl, device):
    return None


# Rows of the user's own


def test_own_rows_come_first(place, clock):
    op = scaled(clock, {"torch": 1.0, "cpp": 1.0, "cuda": 1.0})
    mine = [{"op": "scaled", **row("cuda", 5, rows=8)}, {"op": "other", **row("cpp")}]
    place([row("cpp", 1)], mine)
    assert op.choose("auto", CPU, FP32, rows=8) == Choice("cuda", {"tile": 5}, EVIDENCE)
    assert op.choose("auto", CPU, FP32, rows=9) == Choice("cpp", {"tile": 1}, EVIDENCE)
    place([row("cpp", 1)], [{"op": "scaled", **row("torch")}])
    assert op.choose("auto", CPU, FP32, rows=8).impl == "torch"


BROKEN = {
    "no JSON": "{rows",
    "empty": "",
    "a list": "[]",
    "no rows": "{}",
    "rows of numbers": '{"rows": [1]}',
    "a strange key": json.dumps({"rows": [{"op": "scaled", **row("cuda"), "speed": 3}]}),
    "no impl": json.dumps({"rows": [{"op": "scaled", "arch": "cpu"}]}),
    "a bound that is text": json.dumps({"rows": [{"op": "scaled", **row("cuda", rows="8")}]}),
    "a tile that is true": json.dumps({"rows": [{"op": "scaled", **row("cuda", True)}]}),
    "evidence that is none": json.dumps({"rows": [{"op": "scaled", **row("cuda"), "evidence": None}]}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_with_one_warning(place, clock, text):
    op = scaled(clock, {"torch": 1.0, "cpp": 1.0, "cuda": 1.0})
    mine = place([row("cpp", 1)], text)
    with pytest.warns(RuntimeWarning, match="is ignored, it does not hold the rows of `loopmdm tune`") as caught:
        for _ in range(3):
            assert op.choose("auto", CPU, FP32, rows=8).impl == "cpp"
            assert all_ops()["select_topk"].choose("auto", CPU, FP32, rows=8).impl == "torch"
    assert len(caught) == 1 and str(mine) in str(caught[0].message)
    assert "which is ignored" in info._tuned([CPU])
    with pytest.raises(InputError, match="does not hold rows"):
        Store(mine, QUICK, CPU)


def test_bytes_that_are_no_text(place):
    place(own="").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert tuned.override() == ()


def test_a_row_of_no_impl_of_the_op_is_passed_over(place, clock):
    place([row("cpp", 1)], [{"op": "scaled", **row("tirton")}])
    op = scaled(clock, {"torch": 1.0, "cpp": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not even tried
        assert op.choose("auto", CPU, FP32).impl == "cpp"


def test_the_self_check_runs_the_configuration_of_the_row(place, clock):
    """A kernel may be right but for one tile."""
    place(own=[{"op": "scaled", **row("cpp", 3, rows=8)}, {"op": "scaled", **row("cpp", 4)}])
    op = scaled(clock, {"torch": 1.0, "cpp": 1.0}, wrong={("cpp", 3)})
    with pytest.warns(RuntimeWarning, match="cpp differs from torch by"):
        assert op.choose("auto", CPU, FP32, rows=8).impl == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.choose("auto", CPU, FP32, rows=9) == Choice("cpp", {"tile": 4}, EVIDENCE)


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(tuned.OVERRIDE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuned.override_file() == tmp_path / "loopmdm" / "tuned.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/invalid")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tuned.override_file()) == "/home/someone/.config/loopmdm/tuned.json"
    monkeypatch.setenv(tuned.OVERRIDE, "~/rows.json")
    assert str(tuned.override_file()) == "/home/someone/rows.json"
    monkeypatch.setenv(tuned.OVERRIDE, "")
    assert tuned.override_file() is None


# Keeping them


def cell(op="scaled", impl="cpp", dtype="float32", **size):
    arm = tune.Arm(impl, {"tile": 2}, ratio=2.0, low=1.9, high=2.1, rounds=9)
    return tune.Cell(op, "cpu", dtype, size, [arm], None if impl == "torch" else arm)


def test_rows_and_timings_are_written(place):
    mine = place([row("cpp", 1)])
    store = Store(mine, QUICK, CPU)
    assert store.add([cell(rows=4), cell(rows=16), cell(impl="torch")]) == 0
    first, last = tuned.rows("scaled")[:2]
    assert (first.impl, dict(first.upto), dict(first.config)) == ("cpp", {"rows": 16}, {"tile": 2})
    assert (last.impl, dict(last.upto)) == ("torch", {})
    assert len(tuned.rows("scaled")) == 3, "the op's own table still comes behind"
    file = first.evidence.removeprefix("measured: ")
    found = json.loads(Path(file).read_text())
    assert {"machine", "versions", "revision", "timings", "effort", "rule", "unit", "date"} <= set(found)
    assert found["effort"]["name"] == "quick" and found["versions"]["torch"] == torch.__version__
    assert [t["size"] for t in found["timings"]] == [{"rows": 4}, {"rows": 16}, {}]
    assert found["timings"][0]["arms"][0]["ratio"] == 2.0


def test_a_run_replaces_what_it_measured_and_nothing_else(place):
    mine = place(own=[{"op": "other", **row("cpp")}, {"op": "scaled", **row("cuda")}])
    gpu = {"op": "scaled", **row("cuda"), "arch": "sm_90"}
    mine.write_text(json.dumps({"rows": [*json.loads(mine.read_text())["rows"], gpu]}))
    assert Store(mine, tune.EFFORTS["full"], CPU).add([cell()]) == 1
    left = [(r.op, r.impl, r.arch) for r in tuned.read_override(mine)]
    assert left == [("scaled", "cpp", "cpu"), ("other", "cpp", "cpu"), ("scaled", "cuda", "sm_90")]


def test_a_quick_run_does_not_replace_a_full_one(place):
    mine = place()
    full, quick = (Store(mine, tune.EFFORTS[name], CPU) for name in ("full", "quick"))
    quick.stamp = "quick"
    assert quick.better("scaled", "float32") is None
    full.add([cell()])
    assert quick.better("scaled", "float32") == str(full.results)
    assert quick.better("scaled", "bfloat16") is None and full.better("scaled", "float32") is None
    full.results.unlink()
    assert quick.better("scaled", "float32") == str(full.results), "what does not say how it was made counts as full"


def test_a_quick_run_replaces_a_quick_one(place):
    mine = place()
    Store(mine, QUICK, CPU).add([cell()])
    assert Store(mine, QUICK, CPU).better("scaled", "float32") is None


def test_tables_of_a_checkout(place, tmp_path):
    mine = place([row("cpp", 1), {**row("cpp", 7), "arch": "sm_90", "evidence": "compiled"}])
    with pytest.raises(InputError, match="--table writes the tables of a checkout"):
        Store(None, QUICK, CPU)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    store = Store(None, tune.EFFORTS["full"], CPU)
    assert store.add([cell()]) == 1
    measured, compiled = tuned.table("scaled")
    assert measured.evidence == f"measured: benchmarks/results/{store.results.name}" and store.results.is_file()
    assert compiled.arch == "sm_90" and compiled.evidence == "compiled"
    assert not mine.exists()


# The command


@pytest.fixture
def small(place, monkeypatch, tmp_path):
    """One real op at one size."""
    op = all_ops()["select_topk"]
    op = dataclasses.replace(op, sizes={"cpu": ({"rows": 2, "cols": 64},)})
    monkeypatch.setattr(contract, "unavailable", lambda impl, device: None if impl == "cpp" else f"no {impl} here")
    few = {name: effort._replace(rounds=3, screening=1, seconds=1e-5) for name, effort in tune.EFFORTS.items()}
    monkeypatch.setattr(tune, "EFFORTS", few)
    attention = dataclasses.replace(all_ops()["attention"], library=None, impls=("torch", "triton"))
    ops = {"select_topk": op, "attention": attention}
    monkeypatch.setattr(contract, "all_ops", lambda: ops)
    return tmp_path


def _built():
    return contract.extension() is not None


@pytest.mark.skipif(not _built(), reason="loopmdm._C is not built")
def test_command(capsys, small):
    status, out, err = run(capsys, "tune")
    assert status == 0 and "1 of 1: select_topk float32" in err
    line = next(line for line in out.splitlines() if line.startswith("select_topk"))
    assert "rows<=2 cols<=64" in line
    assert "not timed on cpu: attention (no triton here)" in out
    mine = small / "mine.json"
    assert {r.op for r in tuned.read_override(mine)} == {"select_topk"}
    assert f"rows: {mine}" in out and "in force where" not in out
    said = info.render(info.collect())
    assert f"tuned rows of your own come first: {mine} (select_topk float32)" in said
    status, out, _ = run(capsys, "tune", "--quick")
    assert "select_topk float32 (a full run measured it, " in out and "--force replaces that" in out
    status, out, _ = run(capsys, "tune", "--quick", "--force")
    assert "replaced rows measured before: 1 of select_topk float32" in out
    elsewhere = small / "deep" / "rows.json"
    status, out, _ = run(capsys, "tune", "--quick", "--out", elsewhere)
    assert elsewhere.is_file() and f"in force where LOOPMDM_TUNED={elsewhere} is set" in out


def test_a_capture_that_fails_leaves_no_stream_behind(monkeypatch):
    """torch.cuda.graph then leaves its own as the current one."""
    current: list = []

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *_):
            current[0] = self.before

    class Capture(On):
        def __exit__(self, *_):
            raise RuntimeError("operation not permitted when stream is capturing")

    class Side:
        def __init__(self, _):
            pass

        def wait_stream(self, _):
            pass

    main = Side(None)
    current.append(main)
    fakes = {"stream": On, "graph": lambda _: Capture("capture"), "Stream": Side, "CUDAGraph": object}
    fakes |= {"current_stream": lambda _: current[0], "synchronize": lambda _: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = tune._Clock(torch.device("cuda"), lambda impl: lambda: None, 1e-6)
    assert clock.prepare("torch")() >= 0
    assert current == [main] and not clock.graphs


def test_nothing_to_time_writes_nothing(capsys, small):
    status, out, _ = run(capsys, "tune", "--op", "attention")
    assert status == 0 and out == "not timed on cpu: attention (no triton here)\n"
    assert not (small / "mine.json").exists()


def test_bad_input(capsys, small, monkeypatch):
    assert refused(capsys, "tune", "--op", "atention") == "there is no op 'atention'; did you mean 'attention'?"
    assert refused(capsys, "tune", "--dtype", "float31").startswith("no op has dtype 'float31'; did you mean 'float3")
    assert "not allowed with" in refused(capsys, "tune", "--out", "x", "--table")
    monkeypatch.setenv(tuned.OVERRIDE, "")
    assert "give --out or --table" in refused(capsys, "tune")


def test_the_revision_is_the_checkout_s_own(tmp_path):
    """An installed package may lie in a folder of somebody's repository, whose commit says nothing about it."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert evidence.revision(tmp_path) == commit + "+"
    assert evidence.revision(tmp_path / "inside") is None


def test_machine_has_no_name():
    import platform

    facts = SimpleNamespace(**evidence.machine(CPU))
    assert facts.cpu and facts.cores >= 1 and facts.threads == torch.get_num_threads()
    assert platform.node() not in json.dumps(vars(facts))
