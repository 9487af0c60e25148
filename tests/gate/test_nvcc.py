"""Compile gate for csrc/unmask.cu: it fits the registers of every architecture we ship, without spills."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "unmask.cu"
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="the compile gate of unmask.cu needs nvcc")


def cuobjdump():
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def built(request, tmp_path_factory):
    """(ptxas report, cubin) for one architecture."""
    cubin = tmp_path_factory.mktemp(request.param) / "unmask.cubin"
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        f"-arch={request.param}",
        "-cubin",
        "-Xptxas",
        "-v",
        str(SOURCE),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, cubin


def test_no_spills_and_few_registers(built):
    report, _ = built
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0", "0")}, report
    used = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert used and max(used) <= 64, report  # 64 lets two blocks of 512 threads share an SM
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", report)]
    assert shared and max(shared) < 8192, report


def test_no_local_memory_in_sass(built):
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump comes with triton or the CUDA toolkit, neither is installed")
    sass = subprocess.run([tool, "-sass", str(built[1])], check=True, capture_output=True, text=True).stdout
    for name in ("select_topk_kernel", "select_scatter_kernel", "count_kernel", "compact_kernel"):
        assert name in sass
    assert re.findall(r"\b(?:STL|LDL)\b.*", sass) == []
    assert "VOTE" in sass, "the ranks of ties come from warp votes"
