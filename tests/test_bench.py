"""Results of benchmarks: condensed, kept, compared, summed up; and how an arm is timed against another."""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loopmdm.cli import main
from loopmdm.errors import InputError
from loopmdm.lab import bench
from loopmdm.lab.bench_gpu import PARTS, total_bytes
from loopmdm.lab.tune import interval

from .test_reference import load as benchmark_module

frame = benchmark_module("frame")
ROOT = Path(__file__).parents[1]


def row(group="g: a", arm="ours", rounds=7, ratio=2.0, low=1.8, high=2.2, seconds=0.5, **more):
    made = {"group": group, "arm": arm, "seconds": seconds, "rounds": rounds}
    return made | ({} if ratio is None else {"ratio": ratio, "ratio_low": low, "ratio_high": high}) | more


def results(*rows, device="a CPU", revision="abc"):
    shared = {"device": device, "threads": 2, "versions": {"torch": "2.13.0"}, "revision": revision}
    return {"format": 1, "date": "2026-01-01", **shared, "rows": list(rows)}


def test_condense_keeps_what_the_run_shares_once():
    entry = {
        "group": "g: a",
        "name": "ours",
        "fullname": "x",
        "stats": {"median": 0.25, "rounds": 5},
        "extra_info": {"device": "a CPU", "threads": 2, "revision": "abc", "versions": {}, "ratio": 2.0, "nfe": 3},
    }
    found = bench.condense({"datetime": "2026-01-02T03:04", "benchmarks": [entry]})
    assert found["device"] == "a CPU" and found["date"] == "2026-01-02"
    assert found["rows"] == [{"group": "g: a", "arm": "ours", "seconds": 0.25, "rounds": 5, "ratio": 2.0, "nfe": 3}]
    with pytest.raises(InputError, match="nothing was measured"):
        bench.condense({"datetime": "", "benchmarks": []})


def test_better_evidence_is_never_overwritten(tmp_path):
    path = tmp_path / "bench-a-cpu.json"
    assert bench.save(results(row(rounds=9)), path) == path
    assert bench.save(results(row(rounds=9, ratio=2.1)), path) == path
    assert bench.load(path)["rows"][0]["ratio"] == 2.1
    assert bench.save(results(row(rounds=8)), path) == path  # a slower day: as many as fit in a time
    assert bench.save(results(row(rounds=8, sweeps=5)), path) == path
    fewer = bench.save(results(row(rounds=9, sweeps=4)), path)
    fewer_rounds = bench.save(results(row(rounds=3, sweeps=5)), path)
    other_rows = bench.save(results(row(arm="another", rounds=20)), path)
    other_machine = bench.save(results(row(rounds=9), device="another"), path)
    beside = (fewer, fewer_rounds, other_rows, other_machine)
    assert [p.name for p in beside] == [f"bench-a-cpu-{n}.json" for n in (2, 3, 4, 5)]
    assert bench.load(path)["rows"][0]["sweeps"] == 5
    path.write_text("notes")
    with pytest.raises(InputError, match="no results file"):
        bench.save(results(row()), path)
    assert path.read_text() == "notes"


def test_parts_of_one_run_are_merged(tmp_path):
    path = tmp_path / "bench-gpu.json"
    bench.save(results(row(rounds=9), row(arm="b", rounds=5)), path)
    assert bench.save(results(row(arm="b", rounds=7), row(arm="c"), row(rounds=4)), path, merge=True) == path
    assert [(r["arm"], r["rounds"]) for r in bench.load(path)["rows"]] == [("ours", 9), ("b", 7), ("c", 7)]
    assert bench.save(results(row(), revision="later"), path, merge=True) != path


def test_compare_says_what_disagrees():
    first = results(row(), row(arm="b", ratio=1.0, low=0.9, high=1.1), row(group="h: b", ratio=3.0, low=2.9, high=3.1))
    second = results(row(ratio=2.1), row(arm="b", ratio=1.05), row(group="h: b", ratio=3.5, low=3.4, high=3.6))
    cells, verdict = bench.compare(first, second)
    assert [c[0].strip() for c in cells if c[4] == "outside"] == ["b", "ours"]  # b: 1.0 is not in 1.8 to 2.2
    assert verdict[0].startswith("1 of 3") and verdict[1].endswith("in: h.")
    assert "They differ by 10.2%" in verdict[0]  # of 1.05, 1.05 and 3.5 / 3 in logarithms
    _, same = bench.compare(first, results(*first["rows"], device="another"))
    assert same[0].startswith("3 of 3") and "device" in same[2]
    with pytest.raises(InputError, match="no row in common"):
        bench.compare(first, results(row(group="elsewhere")))


def test_summary_and_readme():
    text = f"before\n{bench.START}\nold\n{bench.END}\nafter\n"
    assert bench.rewritten(text, "new") == f"before\n{bench.START}\n\nnew\n\n{bench.END}\nafter\n"
    with pytest.raises(InputError):
        bench.rewritten("no marks", "new")


def test_summary_gives_ratios_for_cpus_and_times_for_gpus(tmp_path):
    bench.save(results(row(tokens_per_second=1234.5), row(arm="reference", ratio=None)), tmp_path / "bench-cpu.json")
    cpu = bench.summary(tmp_path)
    assert "2.00 (1.80 to 2.20)" in cpu and "1,234" in cpu and "| reference |" not in cpu
    assert "500 ms" not in cpu and cpu.endswith("Not measured: anything on a GPU.")
    bench.save(results(row(), device="NVIDIA H100"), tmp_path / "bench-gpu.json")
    both = bench.summary(tmp_path, [r"^g: a \| ours"])
    assert "NVIDIA H100" in both and "500 ms" in both and "Not measured" not in both
    assert "| g: a |" not in bench.summary(tmp_path, ["^elsewhere"])


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2, "rows": [1]}'])
def test_a_file_that_is_no_results_file(tmp_path, content, capsys):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main(["bench", "--show", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_show_and_compare_print(tmp_path, capsys):
    first = row("g: " + 20 * "long ", share_of_matmul=0.5, peak_bytes=3 << 20, reference_seconds=1.25)
    path = bench.save(results(first, row(arm="b", ratio=None)), tmp_path / "a.json")
    assert main(["bench", "--show", str(path), "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "2.00 (1.80 to 2.20)" in out and "50%" in out and "3.0 MiB" in out and "1.25 s" in out
    lines = out.splitlines()
    assert lines[0] == "a CPU, 2 threads, torch 2.13.0, revision abc, 2026-01-01"
    (line,) = (line for line in lines if line.startswith("  ours"))
    assert len(line) < 100 < len(first["group"])  # a heading widens no column
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert main(["bench", "--compare", str(path), str(path)]) == 0
    assert "All means over sizes agree" in capsys.readouterr().out


def test_gpu_without_a_gpu_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_parts_name_files_that_there_are():
    files = [word for part in PARTS for word in part.command if word.endswith(".py")]
    assert len(files) > 10 and [file for file in files if not (ROOT / file).is_file()] == []


def test_ncu_table():
    lines = [
        "==PROF== Connected",
        '"ID","Metric Name","Metric Unit","Metric Value"',
        '"0","dram__bytes_read.sum","Mbyte","1,200.5"',
        '"0","dram__bytes_write.sum","Kbyte","2"',
        "bye",
    ]
    assert total_bytes(lines) == pytest.approx(1200.5e6 + 2e3)
    with pytest.raises(InputError):
        total_bytes(["no kernels were profiled"])


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 9, 20, 50])
def test_interval_holds_the_median_as_often_as_it_says(n):
    """Over many samples of a known law, and by the ranks that binomial tables give."""
    rng = random.Random(n)
    hits = 0
    for _ in range(4000):
        low, high = interval([rng.expovariate(1.0) for _ in range(n)])
        hits += low <= math.log(2) <= high
    least = 0.95 if n >= 6 else 1 - 2 / 2**n
    assert hits / 4000 >= least - 0.025  # three standard errors
    ranks = interval(list(range(n)))
    assert ranks == {9: (1, 7), 20: (5, 14), 50: (17, 32)}.get(n, (0, n - 1))


class FakeBenchmark:
    """What `race` needs of pytest-benchmark's fixture."""

    def __init__(self, name="ours", group="g: a"):
        self.name, self.group, self.extra_info, self.stats, self.has_error = name, group, {}, None, False

    def pedantic(self, run, args):
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[1e9]))  # of the call that only checks
        return run(*args)


class Clock:
    """Time that passes only in what is run; `order` has who ran on what."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(frame.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(frame, "peak", lambda dtype, threads: 10.0)
        monkeypatch.setattr(frame, "environment", dict)
        monkeypatch.setattr(frame, "CUDA", False)
        monkeypatch.setattr(frame, "WARMUP", 1)
        monkeypatch.setattr(frame, "GROUPS", {})

    def taking(self, name, seconds):
        def run(x):
            self.order.append((name, x))
            self.now += seconds(self.now) if callable(seconds) else seconds
            return x

        return run


def test_arms_take_turns_in_each_round(monkeypatch):
    clock, checked = Clock(monkeypatch), []
    monkeypatch.setattr(frame, "SWEEPS", 2)
    monkeypatch.setattr(frame, "ROUNDS", 3)
    theirs, slow, fast = clock.taking("theirs", 3.0), clock.taking("slow", 2.0), clock.taking("fast", 1.0)
    rows = [FakeBenchmark(name) for name in ("reference", "slow", "fast")]
    given = {"memory": False, "tokens": 8, "flops": 6.0}
    frame.race(rows[0], theirs, None, [0, 1], None, **given)
    frame.race(rows[1], slow, theirs, [0, 1], lambda a, b: checked.append((a, b)), **given)
    frame.race(rows[2], fast, theirs, [0, 1], None, **given, nfe=2)
    assert checked == [(0, 0)] and len(clock.order) == 5 and frame.GROUPS.keys() == {"g: a"}
    assert [(row.has_error, row.stats.stats.data) for row in rows] == [(True, [])] * 3
    del clock.order[:]
    said = []
    assert frame.measure(said.append) == 0 and not any(row.has_error for row in rows)
    first, second, third = clock.order[3:6], clock.order[6:9], clock.order[9:12]  # after one that is not timed
    assert len(clock.order) == 21 and not frame.GROUPS
    assert [{name for name, _ in r} for r in (first, second, third)] == [{"theirs", "slow", "fast"}] * 3
    assert [{x for _, x in r} for r in (first, second, third)] == [{0}, {1}, {0}]
    assert len({r[0][0] for r in (first, second, third)}) == 3  # each is first once
    assert [row.stats.stats.data for row in rows] == [[3.0] * 6, [2.0] * 6, [1.0] * 6]
    assert "ratios" not in rows[0].extra_info
    info = rows[2].extra_info
    assert info["ratios"] == [3.0, 3.0] and info["sweeps"] == 2
    assert info["reference_seconds"] == 3.0 and info["nfe"] == 2
    assert info["tokens_per_second"] == 8.0 and info["share_of_matmul"] == pytest.approx(0.6)
    assert said == ["sweep 1 of 2 through 1 groups", "sweep 2 of 2 through 1 groups"]


def test_turns_and_inputs_go_on_from_sweep_to_sweep(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(frame, "SWEEPS", 4)
    monkeypatch.setattr(frame, "ROUNDS", 1)
    frame.race(FakeBenchmark(), clock.taking("ours", 1.0), clock.taking("theirs", 1.0), [0, 1], None, memory=False)
    del clock.order[:]
    frame.measure()
    assert len(clock.order) == 2 + 4 * 2  # the first sweep begins with a round that is not timed
    assert [clock.order[n] for n in range(2, 10, 2)] == [("theirs", 0), ("ours", 1), ("theirs", 0), ("ours", 1)]


def test_a_slow_spell_of_the_machine_meets_one_sweep_of_all_rows(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(frame, "SWEEPS", 4)
    monkeypatch.setattr(frame, "ROUNDS", 1)
    rows = [FakeBenchmark(group=f"g: {n}") for n in range(3)]
    ours = clock.taking("ours", lambda now: 2.0 if 20.0 < now < 30.0 else 1.0)
    for row in rows:
        frame.race(row, ours, clock.taking("theirs", 1.0), [0], None, memory=False)
    frame.measure()
    for row in rows:
        assert sorted(row.extra_info["ratios"])[1:] == [1.0, 1.0, 1.0]


def test_a_group_may_have_two_references(monkeypatch):
    clock = Clock(monkeypatch)
    wide, narrow = FakeBenchmark("bf16"), FakeBenchmark("bf16, against bf16")
    ours = clock.taking("ours", 1.0)
    frame.race(wide, ours, clock.taking("fp32", 6.0), [0], None, memory=False)
    frame.race(narrow, ours, clock.taking("also bf16", 4.0), [0], None, memory=False, against="bf16")
    frame.measure()
    assert (wide.extra_info["ratios"][0], narrow.extra_info["ratios"][0]) == (6.0, 4.0)


@pytest.mark.parametrize("seconds, rounds", [(1.0, frame.LEAST), (0.0079, 15), (1e-6, frame.MOST)])
def test_short_rows_get_more_rounds(monkeypatch, seconds, rounds):
    clock, fake = Clock(monkeypatch), FakeBenchmark()
    monkeypatch.setattr(frame, "ROUNDS", 0)
    run = clock.taking("either", seconds)
    frame.race(fake, run, run, [0], None, memory=False)
    del clock.order[:]
    frame.measure()
    assert len(fake.stats.stats.data) == rounds * frame.SWEEPS
    untimed = 2 * frame.SWEEPS if 2 * seconds < frame.COLD else 2
    assert len(clock.order) == 2 * rounds * frame.SWEEPS + untimed


def test_what_fails_while_it_is_timed_is_left_out_with_one_line(monkeypatch):
    clock, said = Clock(monkeypatch), []
    rows = [FakeBenchmark("good"), FakeBenchmark("bad"), FakeBenchmark("against it"), FakeBenchmark(group="h: b")]
    calls = iter(range(100))

    def fails_later(x):
        clock.now += 1.0
        if next(calls) > 1:
            raise RuntimeError("no memory left")

    good = clock.taking("good", 1.0)
    frame.race(rows[0], good, good, [0], None, memory=False)
    frame.race(rows[1], fails_later, good, [0], None, memory=False)
    frame.race(rows[2], good, fails_later, [0], None, memory=False, against="bad")
    frame.race(rows[3], good, good, [0], None, memory=False)
    assert frame.measure(said.append) == 2
    assert [row.has_error for row in rows] == [False, True, True, False]
    assert rows[0].extra_info["ratios"] == rows[3].extra_info["ratios"] == [1.0] * frame.SWEEPS
    assert [line for line in said if line.startswith("not timed")] == [
        "not timed: g: a, bad: no memory left",
        "not timed: g: a, against it: no memory left",
    ]


def test_a_failure_on_a_gpu_is_its_test_s(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(frame, "CUDA", True)
    monkeypatch.setattr(frame.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(frame, "peak_bytes", lambda run, x: 0)
    calls = iter(range(100))

    def fails_later(x):
        clock.now += 1.0
        if next(calls) > 0:
            raise RuntimeError("no memory left")

    row = FakeBenchmark()
    frame.race(row, clock.taking("ours", 1.0), clock.taking("theirs", 2.0), [0], None)
    assert row.extra_info["ratios"][0] == 2.0 and not frame.GROUPS
    with pytest.raises(AssertionError, match="no memory left"):
        frame.race(FakeBenchmark(), fails_later, None, [0], None)


def test_ctrl_c_keeps_what_was_timed(monkeypatch):
    clock, row, late = Clock(monkeypatch), FakeBenchmark(), FakeBenchmark(group="h: b")
    calls = iter(range(100))

    def stopped(x):
        clock.now += 1.0
        if next(calls) > 2:
            raise KeyboardInterrupt

    good = clock.taking("good", 1.0)
    frame.race(row, good, good, [0], None, memory=False)
    frame.race(late, stopped, good, [0], None, memory=False)
    with pytest.raises(KeyboardInterrupt):
        frame.measure()
    assert row.extra_info["sweeps"] >= 1 and row.extra_info["ratios"][0] == 1.0 and not row.has_error
    assert late.extra_info["sweeps"] == 1


def test_threads_and_gradients_are_those_of_the_set_up(monkeypatch):
    clock, seen = Clock(monkeypatch), []

    def run(x):
        clock.now += 1.0
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        frame.race(FakeBenchmark(), run, None, [0], None, memory=False)
    torch.set_num_threads(2)
    try:
        frame.measure()
        assert set(seen) == {(1, False)} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_writes_in_place_is_given_copies(monkeypatch):
    given = [torch.zeros(3), torch.ones(3)]
    seen, clock = [], Clock(monkeypatch)

    def run(x):
        clock.now += 1.0
        seen.append(x.sum().item())
        return x.add_(5)

    monkeypatch.setattr(frame, "ROUNDS", 3)
    frame.race(FakeBenchmark(), run, run, given, frame.same, fresh=torch.clone)
    frame.measure()
    assert set(seen) == {0.0, 3.0} and given[0].sum() == 0 and given[1].sum() == 3


def test_same_is_bit_for_bit():
    frame.same((torch.ones(2), torch.zeros(1)), (torch.ones(2), torch.zeros(1)))
    for other in (torch.tensor([1.0, 1.0 + 1e-6]), torch.ones(2).double(), torch.ones(1)):
        with pytest.raises(AssertionError, match="not equal"):
            frame.same(torch.ones(2), other)


@pytest.mark.parametrize("sweeps, allowed", [(3, 20), (5, 10)])
def test_the_interval_holds_all_rows_of_another_run(sweeps, allowed):
    """Runs that differ by BETWEEN / 2 and sweeps by SPREAD: of 100 pairs few have a row outside, and not by far."""
    rng = random.Random(sweeps)

    def run():
        level = rng.gauss(1, bench.BETWEEN / 2)
        return [math.exp(rng.gauss(level, bench.SPREAD)) for _ in range(sweeps)]

    def outside(factor):
        missed = 0
        for _ in range(100):
            for one, two in ((run(), run()) for _ in range(144)):
                low, high = bench.repeated(one)
                middle, reach = math.sqrt(low * high), math.log(high / low) / 2 * factor
                if abs(math.log(statistics.geometric_mean(two) / middle)) > reach:
                    missed += 1
                    break
        return missed

    assert outside(1.0) <= allowed and outside(0.5) > 50
    low, high = bench.repeated([2.0, 2.0 * 1.5, 2.0 / 1.5])
    assert low < bench.repeated([2.0] * 3)[0] and low * high == pytest.approx(4.0)


def test_ratio_and_interval_come_from_the_sweeps(tmp_path):
    path = bench.save(results(row(ratios=[2.0, 8.0], sweeps=2)), tmp_path / "a.json")
    assert '"ratios": [2.0, 8.0]' in path.read_text() and "ratio_low" not in path.read_text()
    (found,) = bench.load(path)["rows"]
    assert found["ratio"] == pytest.approx(4.0)
    assert (found["ratio_low"], found["ratio_high"]) == bench.repeated([2.0, 8.0])


FAULTS = """
import os, resource, sys, torch
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "kept":
    import frame
    assert frame.keep_memory() == "memory kept"
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(100 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(20)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("what", ["kept", "default"])
def test_memory_that_is_freed_is_kept(what):
    command = [sys.executable, "-c", FAULTS, str(ROOT / "benchmarks"), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 20) == (what == "kept")  # 25600 pages, or 50 of 2 MiB


def test_peak_memory_is_what_is_held_at_once():
    def run(x):
        a = torch.ones(1 << 18)  # 1 MiB
        b = a.double()  # 2 MiB
        del a
        return b + b  # 2 MiB

    assert frame.peak_bytes(run, None) == 4 << 20


def test_an_arm_that_is_not_equal_is_not_timed(monkeypatch):
    Clock(monkeypatch)

    def differ(a, b):
        raise AssertionError("they differ")

    with pytest.raises(AssertionError, match="they differ"):
        frame.race(FakeBenchmark(), lambda x: x, lambda x: -x, [1.0], differ)
    assert not frame.GROUPS


@pytest.mark.parametrize(
    "value, text",
    [(1.5e-5, "15.0 µs"), (9.996e-4, "1.00 ms"), (0.5412, "541 ms"), (0.9999, "1.00 s"), (12.34, "12.3 s")],
)
def test_seconds_have_three_digits(value, text):
    assert bench.seconds(value) == text


def test_results_are_plain_json(tmp_path):
    path = bench.save(results(row(ratio=1 / 3), row(arm="b")), tmp_path / "a.json")
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert len(path.read_text().splitlines()) == 5  # a row a line, so that a change reads as one
