"""csrc/ by other compilers than this machine's: g++ 11 has no __builtin_shufflevector, clang refuses AVX in helpers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("head", "layer", "product", "rows", "unmask")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as built on Linux")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compiler", ["g++-11", "clang++"])
def test_takes_every_source(tmp_path, compiler, source):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    options = ["-std=c++17", "-O1", "-Wall", "-Werror", "-ffp-contract=off", "-c", "-o", str(tmp_path / "object")]
    done = subprocess.run([compiler, *options, str(CSRC / f"{source}_cpu.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SHUFFLES = """
#include "tile.h"
#include <cstdio>
using namespace loopmdm;
int main() {
    uint32_t rows[16][16], panel[16 * kPanel];
    for (uint32_t i = 0; i < 256; ++i) rows[i / 16][i % 16] = i * i;
    pack<true>(reinterpret_cast<char*>(rows), 16, 64, panel);
    for (int k = 0; k < 16; ++k)
        for (int c = 0; c < 16; ++c)
            if (panel[k * kPanel + c] != rows[c][k]) return 1;
    v16 x = {1, -2, 3, 4, 5, 6, 7, 8, 90, 10, 11, 12, 13, 14, 15, 16};
    u16 n = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    if (sum(x) != 213 || largest(x) != 90 || sum(n) != 136) return 2;
    const v16 y = SHUFFLE(x, -x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 31);
    return y[1] == -1 && y[4] == 3 && y[15] == -16 ? 0 : 3;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("version", [11, 12])
def test_shuffles_of_old_and_new_compilers(tmp_path, version):
    """Whatever g++ this is, it can take the way of g++ 11."""
    (tmp_path / "shuffles.cpp").write_text(SHUFFLES)
    options = ["-std=c++17", "-O2", "-Wno-builtin-macro-redefined", "-U__GNUC__", f"-D__GNUC__={version}", f"-I{CSRC}"]
    command = ["g++", *options, str(tmp_path / "shuffles.cpp"), "-o", str(tmp_path / "shuffles")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([str(tmp_path / "shuffles")]).returncode == 0
