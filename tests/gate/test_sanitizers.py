"""csrc/unmask_cpu.cpp under AddressSanitizer and UndefinedBehaviorSanitizer, and its threads under ThreadSanitizer."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs g++ or clang++ on Linux")


def run(folder, name, *flags):
    """What the driver prints: a digest of everything that the launchers wrote."""
    built = folder / name
    sources = [str(HERE / "driver.cpp"), str(CSRC / "unmask_cpu.cpp")]
    options = ["-std=c++17", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *flags, f"-I{CSRC}"]
    done = subprocess.run([CXX, *options, *sources, "-o", str(built)], capture_output=True, text=True)
    if "cannot find -l" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {name}")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(built)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    return done.stdout.strip()


def test_nothing_is_read_or_written_outside_and_nothing_undefined(tmp_path):
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS")
    checked = run(tmp_path, "asan", "-O1", *flags)
    assert len(checked) == 16 and checked == run(tmp_path, "plain", "-O3")


def test_threads_do_not_race(tmp_path):
    run(tmp_path, "tsan", "-O1", "-fsanitize=thread")
