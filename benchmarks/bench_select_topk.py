"""select_topk: C++ (CPU) and CUDA against the torch reference on the same device.

    pytest benchmarks/bench_select_topk.py --benchmark-only
    LOOPMDM_RESULTS=benchmarks/results pytest benchmarks/bench_select_topk.py -k interleaved

The second command alternates the two, with one thread and with all, and writes the ratios that the
op's table refers to. On a busy machine torch's thread pool waits for descheduled workers (100 ms and
more), which flatters C++: believe the one-thread rows and the fastest runs.
"""

import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from loopmdm.lab.evidence import processor
from loopmdm.ops.select_topk import OP, select_topk

CUDA = torch.cuda.is_available()
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="impl=cuda needs a CUDA device")
SIZES = [(1, 64), (1, 1024), (8, 256), (8, 1024), (16, 4096), (64, 64), (64, 1024), (64, 4096), (256, 16384)]


def problem(rows, cols, seed=0):
    rng = torch.Generator().manual_seed(seed)
    keys = torch.rand(rows, cols, generator=rng)
    eligible = torch.rand(rows, cols, generator=rng) < 0.7
    k = torch.randint(0, cols // 4, (rows,), generator=rng)
    return keys, eligible, k


@pytest.mark.parametrize(
    ("device", "impl"),
    [
        ("cpu", "torch"),
        ("cpu", "cpp"),
        pytest.param("cuda", "torch", marks=NEEDS_CUDA),
        pytest.param("cuda", "cuda", marks=NEEDS_CUDA),
    ],
)
@pytest.mark.parametrize(("rows", "cols"), SIZES[3:7:3], ids=lambda n: str(n))
def test_select_topk(benchmark, rows, cols, device, impl):
    inputs = [tensor.to(device) for tensor in problem(rows, cols)]
    assert torch.equal(select_topk(*inputs, impl=impl), select_topk(*inputs, impl="torch"))

    def run():
        select_topk(*inputs, impl=impl)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"select_topk {rows}x{cols} on {device}"
    benchmark(run)


def test_interleaved():
    if OP.verify("cpp", torch.device("cpu"), torch.float32) is not None:
        pytest.fail("cpp is wrong, so there is nothing to time")
    before = torch.get_num_threads()
    try:
        results = [ratio(rows, cols, threads) for threads in sorted({1, before}) for rows, cols in SIZES]
    finally:
        torch.set_num_threads(before)
    for line in results:
        print(line)
    folder = os.environ.get("LOOPMDM_RESULTS")
    if folder:
        machine = {"cpu": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        note = "us, medians of interleaved runs; fastest_ratio compares the fastest run of each"
        lines = ",\n".join("  " + json.dumps(line) for line in results)
        head = json.dumps({"op": "select_topk", "machine": machine, "unit": note})[:-1]
        Path(folder, "cpu-select_topk.json").write_text(f'{head},\n "rows": [\n{lines}\n ]}}\n')


def ratio(rows, cols, threads, seconds=1.0):
    torch.set_num_threads(threads)
    inputs = [problem(rows, cols, seed) for seed in range(4)]
    times = {"torch": [], "cpp": []}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 24:
        for impl, taken in times.items():
            start = time.perf_counter()
            select_topk(*inputs[turn % 4], impl=impl)
            taken.append((time.perf_counter() - start) * 1e6)
        turn += 1
    middle = {impl: statistics.median(taken[4:]) for impl, taken in times.items()}
    return {
        "shape": [rows, cols],
        "threads": threads,
        "torch_us": round(middle["torch"], 1),
        "cpp_us": round(middle["cpp"], 1),
        "ratio": round(middle["torch"] / middle["cpp"], 2),
        "fastest_ratio": round(min(times["torch"]) / min(times["cpp"]), 2),
        "runs": turn - 4,
    }
