"""No pass dispatches more operations, touches more bytes or makes more FLOPs than benchmarks/counters.json says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .test_reference import load

counters = load("counters")
KEPT = json.loads(counters.PATH.read_text())
ROOT = Path(__file__).parents[1]

# Instructions of the selection launchers in the driver's run (tests/gate/driver.cpp), by compiler at -O2.
INSTRUCTIONS = {"12.2.0": 399_890_659}


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != KEPT["torch"], reason=f"counted with torch {KEPT['torch']}, not this one"
)
def test_nothing_costs_more_or_less_than_was_written_down():
    """Less is an error too: then the new numbers are to be kept (`python benchmarks/counters.py --write`)."""
    measured = counters.measure()
    assert measured.keys() == KEPT["cases"].keys()
    for name, numbers in measured.items():
        assert numbers == KEPT["cases"][name], f"{name}: write the new numbers if this is meant"


def test_a_further_operation_is_counted():
    x = torch.ones(4, 8)
    with counters.Counter() as counter:
        y = x + 1  # reads 128 bytes, makes 128
        y.view(2, 16).t()  # views move nothing
        y.add_(1)  # reads and writes in place: no allocation
    assert (counter.operations, counter.allocated, counter.bytes) == (2, 128, 512)


def compiler() -> str:
    found = shutil.which("g++")
    return "none" if found is None else subprocess.check_output([found, "-dumpfullversion"], text=True).strip()


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(compiler() not in INSTRUCTIONS, reason=f"counted with g++ {', '.join(INSTRUCTIONS)} only")
def test_selection_takes_no_more_instructions(tmp_path):
    """On one thread, since what several do varies; 1% for other versions of libstdc++ and valgrind."""
    sources = [str(ROOT / "tests/gate/driver.cpp"), str(ROOT / "csrc/unmask_cpu.cpp")]
    flags = ["-std=c++17", "-O2", "-pthread", f"-I{ROOT / 'csrc'}", "-o", str(tmp_path / "driver")]
    subprocess.run(["g++", *flags, *sources], check=True)
    counted = [f"--toggle-collect=loopmdm::{name}_cpu*" for name in ("select_topk", "select_scatter", "compact")]
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *counted]
    done = subprocess.run([*command, str(tmp_path / "driver"), "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None
    assert int(found[1]) == pytest.approx(INSTRUCTIONS[compiler()], rel=0.01)
