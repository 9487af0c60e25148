"""csrc/*_cpu.cpp but unmask's under AddressSanitizer and UBSan, their threads under ThreadSanitizer."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PARTS = {"head": ("head",), "layer": ("layer", "rows"), "product": ("product", "layer")}
CXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs g++ or clang++ on Linux")


def run(folder, part, name, *flags):
    built = folder / name
    sources = [str(HERE / f"{part}_driver.cpp"), *(str(CSRC / f"{name}_cpu.cpp") for name in PARTS[part])]
    options = ["-std=c++17", "-g", "-pthread", "-Wall", "-Werror", "-ffp-contract=off", *flags, f"-I{CSRC}"]
    done = subprocess.run([CXX, *options, *sources, "-o", str(built)], capture_output=True, text=True)
    if "cannot find -l" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {name}")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(built)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    if not done.stdout and part == "product":
        pytest.skip("this processor has no bf16 products")
    return done.stdout.strip()


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_read_or_written_outside_and_nothing_undefined(tmp_path, part):
    flags = (
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-D_GLIBCXX_ASSERTIONS",
        "-D_GLIBCXX_SANITIZE_VECTOR=1",
    )
    assert len(run(tmp_path, part, "asan", "-O1", *flags)) == 16


@pytest.mark.parametrize("part", PARTS)
def test_threads_do_not_race(tmp_path, part):
    run(tmp_path, part, "tsan", "-O1", "-fsanitize=thread")
