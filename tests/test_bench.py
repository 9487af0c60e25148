"""Results of benchmarks: condensed, kept, compared, summed up; and how an arm is timed against another."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loopmdm.cli import main
from loopmdm.errors import InputError
from loopmdm.lab import bench
from loopmdm.lab.bench_gpu import PARTS, total_bytes

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
    fewer = bench.save(results(row(rounds=5)), path)
    other_rows = bench.save(results(row(arm="another", rounds=20)), path)
    other_machine = bench.save(results(row(rounds=9), device="another"), path)
    assert [p.name for p in (fewer, other_rows, other_machine)] == [f"bench-a-cpu-{n}.json" for n in (2, 3, 4)]
    assert bench.load(path)["rows"][0]["rounds"] == 9
    path.write_text("notes")
    with pytest.raises(InputError, match="no results file"):
        bench.save(results(row()), path)
    assert path.read_text() == "notes"


def test_parts_of_one_run_are_merged(tmp_path):
    path = tmp_path / "bench-gpu.json"
    bench.save(results(row(rounds=9), row(arm="b", rounds=5)), path)
    assert bench.save(results(row(arm="b", rounds=7), row(arm="c"), row(rounds=3)), path, merge=True) == path
    assert [(r["arm"], r["rounds"]) for r in bench.load(path)["rows"]] == [("ours", 9), ("b", 7), ("c", 7)]
    assert bench.save(results(row(), revision="later"), path, merge=True) != path


def test_sweeps_are_pooled():
    once = results(row(ratio=2.0, seconds=0.5), row(arm="a reference", ratio=None, seconds=4.0), row(arm="once"))
    again = results(row(ratio=4.5, seconds=2.0, rounds=5), row(arm="a reference", ratio=None, seconds=1.0))
    assert bench.pooled([once]) == once
    pooled = bench.pooled([once, again])
    ours, reference = pooled["rows"]
    assert pooled["sweeps"] == 2 and (ours["rounds"], reference["seconds"]) == (12, 2.0)
    assert math.isclose(ours["ratio"], 3.0) and math.isclose(ours["seconds"], 1.0)
    assert ours["ratio_low"] * ours["ratio_high"] == pytest.approx(9) and ours["ratio_low"] < 2.0


@pytest.mark.parametrize("sweeps", [2, 3, 8])
def test_pooled_interval_holds_another_runs_ratio(sweeps):
    rng = random.Random(sweeps)

    def run(deviation):
        return bench.pooled([results(row(ratio=math.exp(rng.gauss(1, deviation)))) for _ in range(sweeps)])["rows"][0]

    for deviation, least in ((bench.PRIOR / 2, 0.95), (bench.PRIOR, 0.94), (3 * bench.PRIOR, 0.75)):
        pairs = [(run(deviation), run(deviation)) for _ in range(2000)]
        hits = sum(a["ratio_low"] <= b["ratio"] <= a["ratio_high"] for a, b in pairs) / len(pairs)
        assert hits >= least and (deviation < bench.PRIOR or hits < 0.99)


def test_a_sweep_that_fails_loses_nothing(tmp_path, monkeypatch, capsys):
    from loopmdm.cli import bench as command

    answers = iter([(results(row()), 0), InputError("nothing was measured")])

    def sweep(root, options):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(command, "_sweep", sweep)
    assert main(["bench", "--sweeps", "3", "--out", str(tmp_path / "r.json")]) != 0
    assert bench.load(tmp_path / "r.json")["rows"][0]["ratio"] == 2.0
    assert "sweep 2 is left out" in capsys.readouterr().err
    assert main(["bench", "--sweeps", "0"]) != 0
    assert "--sweeps is 0" in capsys.readouterr().err


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
        low, high = frame.interval([rng.expovariate(1.0) for _ in range(n)])
        hits += low <= math.log(2) <= high
    least = 0.95 if n >= 6 else 1 - 2 / 2**n
    assert hits / 4000 >= least - 0.025  # three standard errors
    ranks = frame.interval(list(range(n)))
    assert ranks == {9: (1, 7), 20: (5, 14), 50: (17, 32)}.get(n, (0, n - 1))


class FakeBenchmark:
    """What `race` needs of pytest-benchmark's fixture."""

    def __init__(self, clock):
        self.extra_info, self.stats, self.clock = {}, None, clock

    def pedantic(self, run, setup, rounds):
        data = []
        for _ in range(rounds):
            args, kwargs = setup()
            began = self.clock.now
            run(*args, **kwargs)
            data.append(self.clock.now - began)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def test_race_pairs_each_round_with_one_of_the_reference(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    order = []

    def taking(name, seconds):
        def run(x):
            order.append((name, x))
            clock.now += seconds * (1 + x)  # an input makes both slower alike
            return x

        return run

    monkeypatch.setattr(frame.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(frame, "peak", lambda dtype: 10.0)
    fake = FakeBenchmark(clock)
    checked = []
    frame.race(fake, taking("ours", 1.0), taking("theirs", 3.0), [0, 1, 2], lambda a, b: checked.append((a, b)),
               rounds=4, warmup=1, tokens=8, flops=6.0, memory=False, nfe=2)  # fmt: skip
    assert checked == [(0, 0)]
    assert order[2:6] == [("theirs", 0), ("ours", 0), ("theirs", 1), ("ours", 1)] and len(order) == 10
    info = fake.extra_info
    assert info["ratio"] == pytest.approx(3.0) and info["reference_seconds"] == pytest.approx(4.5)
    assert (info["ratio_low"], info["ratio_high"]) == pytest.approx(frame.repeated([3.0] * 4))
    assert info["nfe"] == 2 and info["rounds"] == 4
    assert info["tokens_per_second"] == pytest.approx(8 / 1.5)  # rounds take 1, 2, 3 and 1 seconds
    assert info["share_of_matmul"] == pytest.approx(0.4)


@pytest.mark.parametrize("seconds, rounds", [(1.0, frame.ROUNDS), (0.004, 50), (1e-6, frame.MOST)])
def test_short_rows_get_more_rounds(monkeypatch, seconds, rounds):
    clock = SimpleNamespace(now=0.0)

    def run(x):
        clock.now += seconds

    monkeypatch.delenv("LOOPMDM_ROUNDS", raising=False)
    monkeypatch.setattr(frame.time, "perf_counter", lambda: clock.now)
    fake = FakeBenchmark(clock)
    frame.race(fake, run, run, [0], None, memory=False)
    assert fake.extra_info["rounds"] == rounds
    monkeypatch.setenv("LOOPMDM_ROUNDS", "3")
    frame.race(fake, run, run, [0], None, memory=False, rounds=9)
    assert fake.extra_info["rounds"] == frame.ROUNDS


def test_what_writes_in_place_is_given_copies():
    given = [torch.zeros(3), torch.ones(3)]
    seen, clock = [], SimpleNamespace(now=0.0)

    def run(x):
        clock.now += 1.0
        seen.append(x.sum().item())
        return x.add_(5)

    frame.race(FakeBenchmark(clock), run, run, given, frame.same, rounds=3, fresh=torch.clone)
    assert set(seen) == {0.0, 3.0} and given[0].sum() == 0 and given[1].sum() == 3


def test_same_is_bit_for_bit():
    frame.same((torch.ones(2), torch.zeros(1)), (torch.ones(2), torch.zeros(1)))
    for other in (torch.tensor([1.0, 1.0 + 1e-6]), torch.ones(2).double(), torch.ones(1)):
        with pytest.raises(AssertionError, match="not equal"):
            frame.same(torch.ones(2), other)


@pytest.mark.parametrize("n", [5, 20, 100])
def test_interval_holds_another_runs_ratio(n):
    """Runs whose level differs by BETWEEN and whose rounds differ as much, more and less."""
    rng = random.Random(n)
    for spread in (0.2, 1.0, 4.0):
        hits = 0
        for _ in range(2000):
            levels = [rng.gauss(math.log(2), frame.BETWEEN) for _ in range(2)]
            runs = [[math.exp(rng.gauss(level, spread * frame.BETWEEN)) for _ in range(n)] for level in levels]
            low, high = frame.repeated(runs[0])
            hits += low <= statistics.median(runs[1]) <= high
        assert hits / 2000 >= 0.94 - 0.015 and (hits < 1990 or spread > 1)


def test_peak_memory_is_what_is_held_at_once():
    def run(x):
        a = torch.ones(1 << 18)  # 1 MiB
        b = a.double()  # 2 MiB
        del a
        return b + b  # 2 MiB

    assert frame.peak_bytes(run, None) == 4 << 20


def test_an_arm_that_is_not_equal_is_not_timed():
    def differ(a, b):
        raise AssertionError("they differ")

    fake = FakeBenchmark(SimpleNamespace(now=0.0))
    with pytest.raises(AssertionError, match="they differ"):
        frame.race(fake, lambda x: x, lambda x: -x, [1.0], differ)
    assert fake.stats is None


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
