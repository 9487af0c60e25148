"""The kernel of csrc/unmask.cu, run on the CPU by cuda_on_cpu.h: its logic without a GPU.

What this cannot show is memory ordering inside a warp and the launch itself; tests/test_select_topk.py
covers those where there is a GPU.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopmdm.ops.select_topk import select_topk

HERE = Path(__file__).parent
CXX = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")

HARNESS = """
}  // namespace
}  // namespace loopmdm
extern "C" void run(const float* keys, const bool* eligible, const int64_t* k, bool* out, int64_t rows, int64_t cols,
                    bool reversed) {
    for (int row = 0; row < rows; ++row)
        run_block(row, loopmdm::kThreads, reversed, [=] { loopmdm::select_topk_kernel(keys, eligible, k, out, cols); });
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    source = (HERE.parents[1] / "csrc" / "unmask.cu").read_text()
    body, marker, _ = source.partition("void check(cudaError_t")
    assert marker, "unmask.cu no longer has its launcher where this test cuts it off"
    body = body.replace("#include <cuda_runtime.h>", '#include "cuda_on_cpu.h"')
    folder = tmp_path_factory.mktemp("unmask")
    (folder / "unmask.cpp").write_text(body + HARNESS)
    includes = [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc'}"]
    command = [CXX, "-std=c++17", "-O1", "-shared", "-fPIC", *includes, "unmask.cpp", "-o", "unmask.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "unmask.so"))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("cols", [1, 31, 512, 513, 1300, 5000])
def test_agrees_with_torch(kernel, cols, backwards):
    rng = torch.Generator().manual_seed(cols)
    keys = torch.randn(9, cols, generator=rng)
    keys[::2] = keys[::2].mul(2).round()  # every other row full of ties
    for value in (float("nan"), float("inf"), float("-inf"), -0.0):
        keys[torch.rand(keys.shape, generator=rng) < 0.05] = value
    eligible = torch.rand(keys.shape, generator=rng) < 0.7
    eligible[4] = True
    k = torch.tensor([-1, 0, 1, cols // 3, cols // 2, cols // 2, cols, 2**40, max(1, cols // 5)])
    out = torch.ones_like(eligible)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (keys, eligible, k, out)]
    kernel.run(*pointers, ctypes.c_int64(9), ctypes.c_int64(cols), ctypes.c_bool(backwards))
    assert torch.equal(out, select_topk(keys, eligible, k, impl="torch"))
