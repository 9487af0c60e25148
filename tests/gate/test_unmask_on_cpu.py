"""The kernels of csrc/unmask.cu, run on the CPU by cuda_on_cpu.h: their logic without a GPU.

What this cannot show is memory ordering inside a warp and the launch itself; tests/test_select_topk.py,
test_select_scatter.py and test_compact.py cover those where there is a GPU.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopmdm.ops.compact import OP as COMPACT
from loopmdm.ops.compact import compact
from loopmdm.ops.select_scatter import OP as SCATTER
from loopmdm.ops.select_scatter import RULES, select_scatter
from loopmdm.ops.select_topk import select_topk

HERE = Path(__file__).parent
CXX = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")

HARNESS = """
}  // namespace
}  // namespace loopmdm
using namespace loopmdm;
extern "C" void topk(const float* keys, const bool* eligible, const int64_t* k, bool* out, int64_t rows, int64_t cols,
                     bool reversed) {
    for (int row = 0; row < rows; ++row)
        run_block(row, kThreads, reversed, [=] { select_topk_kernel(keys, eligible, k, out, cols); });
}
extern "C" void scatter(const float* scores, const int64_t* proposed, const bool* eligible, const bool* again,
                        const bool* ends, const int64_t* k, const double* bound, const int64_t* eos, int64_t* tokens,
                        bool* masked, bool* revealed, bool* remasked, bool* done, int64_t rows, int64_t cols,
                        int64_t mask_id, int64_t eos_count, int rule, bool remask, bool reversed) {
    const Scatter s{scores, proposed, eligible, again, ends, k, bound, eos, tokens, masked, revealed, remasked, done,
                    rows, cols, mask_id, eos_count, rule, remask};
    for (int row = 0; row < rows; ++row) run_block(row, kThreads, reversed, [=] { select_scatter_kernel(s); });
}
extern "C" void compact(const bool* mask, int64_t* partial, int64_t* found, int64_t* count, int64_t rows, int64_t cols,
                        int64_t capacity, bool reversed) {
    for (int row = 0; row < rows; ++row) run_block(row, kThreads, reversed, [=] { count_kernel(mask, partial, cols); });
    for (int row = 0; row < rows; ++row)
        run_block(row, kThreads, reversed,
                  [=] { compact_kernel(mask, partial, found, count, rows, cols, capacity); });
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    source = (HERE.parents[1] / "csrc" / "unmask.cu").read_text()
    body, marker, _ = source.partition("void check(cudaError_t")
    assert marker, "unmask.cu no longer has its launchers where this test cuts them off"
    body = body.replace("#include <cuda_runtime.h>", '#include "cuda_on_cpu.h"')
    folder = tmp_path_factory.mktemp("unmask")
    (folder / "unmask.cpp").write_text(body + HARNESS)
    includes = [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc'}"]
    command = [CXX, "-std=c++17", "-O1", "-shared", "-fPIC", *includes, "unmask.cpp", "-o", "unmask.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "unmask.so"))


def pointers(*tensors):
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]


def longs(*numbers):
    return [ctypes.c_int64(n) for n in numbers]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("cols", [1, 31, 512, 513, 1300, 5000])
def test_agrees_with_torch(kernels, cols, backwards):
    rng = torch.Generator().manual_seed(cols)
    keys = torch.randn(9, cols, generator=rng)
    keys[::2] = keys[::2].mul(2).round()  # every other row full of ties
    for value in (float("nan"), float("inf"), float("-inf"), -0.0):
        keys[torch.rand(keys.shape, generator=rng) < 0.05] = value
    eligible = torch.rand(keys.shape, generator=rng) < 0.7
    eligible[4] = True
    k = torch.tensor([-1, 0, 1, cols // 3, cols // 2, cols // 2, cols, 2**40, max(1, cols // 5)])
    out = torch.ones_like(eligible)
    kernels.topk(*pointers(keys, eligible, k, out), *longs(9, cols), ctypes.c_bool(backwards))
    assert torch.equal(out, select_topk(keys, eligible, k, impl="torch"))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("build", SCATTER.examples, ids=RULES)
def test_select_scatter_agrees_with_torch(kernels, build, backwards):
    for seed in (0, 5):  # in 5 an id that is not the first of `eos` ends a sequence
        given, want = (build(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(seed)) for _ in range(2))
        want = select_scatter(**want, impl="torch")
        eos = given.get("eos", torch.empty(0, dtype=torch.int64))
        shown, hidden = torch.ones_like(given["masked"]), torch.ones_like(given["masked"])
        names = ("scores", "proposed", "eligible", "again", "ends", "k", "bound")
        read = pointers(*(given.get(name) for name in names), eos)
        written = pointers(given["tokens"], given["masked"], shown, hidden, given["done"])
        kernels.scatter(
            *read, *written, *longs(*shown.shape, given["mask_id"], len(eos)), RULES.index(given["rule"]),
            ctypes.c_bool(given["remask"]), ctypes.c_bool(backwards),
        )  # fmt: skip
        got = (given["tokens"], given["masked"], given["done"], shown, hidden)
        for name, a, b in zip(want._fields, got, want, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("build", COMPACT.examples, ids=["all", "short"])
def test_compact_agrees_with_torch(kernels, build, backwards):
    given = build(torch.device("cpu"), torch.bool, torch.Generator().manual_seed(0))
    mask, capacity = given["mask"], given["capacity"]
    partial, rows, total = (torch.full((n,), 7) for n in (len(mask), capacity, 1))
    kernels.compact(*pointers(mask, partial, rows, total), *longs(*mask.shape, capacity), ctypes.c_bool(backwards))
    want = compact(mask, capacity, impl="torch")
    assert torch.equal(rows, want.rows) and torch.equal(total, want.total)
