"""The noise contract: one definition in four languages, bit for bit, and it is Gumbel noise."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from loopmdm import random
from loopmdm.ops import noise
from loopmdm.ops.contract import extension
from loopmdm.ops.noise import GROUP, TOKEN, gumbel, gumbel_rows

CSRC = Path(__file__).parents[1] / "csrc"
CXX = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc")

# The header without the extension: also what the device code is, since it says each rounding by an intrinsic.
ALONE = """
#include "noise.h"
extern "C" void run(const int64_t* seed, const int64_t* step, const int64_t* position, const int64_t* first, float* out,
                    int64_t rows, int64_t count, int64_t stream) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < count; ++j)
            out[r * count + j] = loopmdm::gumbel(seed[r], step[r], position[r], first[r] + j, stream);
}
extern "C" float of(int64_t bits) { return loopmdm::gumbel_of(static_cast<uint32_t>(bits)); }
"""


def counters(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seeds of 64 bits; steps, positions and first indices of 32, their extremes among them."""
    rng = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng)
    words = [torch.randint(0, 2**32, (rows,), generator=rng) for _ in range(2)]
    first = torch.randint(0, 2**31 - 2**13, (rows,), generator=rng)
    seeds[0], words[0][0], words[1][0], first[0] = -1, 2**32 - 1, 2**32 - 1, 0
    return seeds, words[0], words[1], first


@pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
def test_a_million_counters_in_the_extension() -> None:
    arguments = counters(1024)
    for stream in (GROUP, TOKEN):
        rows = 1024 if stream == GROUP else 64
        some = [t[:rows] for t in arguments]
        want = gumbel_rows(*some, 1024, stream)
        assert torch.equal(gumbel_rows(*some, 1024, stream, "cpp"), want)
    assert want.isfinite().all()


@pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")
def test_a_million_counters_of_the_header(tmp_path: Path) -> None:
    """Optimised for this very processor, with fused multiply-adds at hand."""
    (tmp_path / "alone.cpp").write_text(ALONE)
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([str(CXX), *flags, "alone.cpp", "-o", "alone.so"], cwd=tmp_path, check=True)
    arguments, out = counters(1024), torch.empty(1024, 1024)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*arguments, out)]
    built = ctypes.CDLL(str(tmp_path / "alone.so"))
    built.run(*pointers, *(ctypes.c_int64(n) for n in (1024, 1024, TOKEN)))
    assert torch.equal(out, gumbel_rows(*arguments, 1024, TOKEN))
    built.of.restype = ctypes.c_float
    assert built.of(ctypes.c_int64(2**32 - 1)) == built.of(ctypes.c_int64(2**32 - 129)) > -2.82


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_contracts_nothing(tmp_path: Path, arch: str) -> None:
    source = '#include "noise.h"\n__global__ void k(float* out, int64_t s) '
    source += "{ out[0] = loopmdm::gumbel(s, 1, 2, threadIdx.x, 11); out[1] = loopmdm::exp24(out[2]); }\n"
    (tmp_path / "k.cu").write_text(source)
    flags = ["-std=c++17", "-O3", f"-arch={arch}", "-ptx", f"-I{CSRC}"]
    subprocess.run([str(NVCC), *flags, "k.cu", "-o", "k.ptx"], cwd=tmp_path, check=True)
    ptx = (tmp_path / "k.ptx").read_text()
    # an operation that does not say how it rounds may be contracted by ptxas
    assert "mul.rn.f32" in ptx and "add.rn.f32" in ptx
    assert not [line for line in ptx.splitlines() if any(f"\t{op}.f32" in line for op in ("mul", "add", "sub", "div"))]
    assert "fma.rn.f32" not in ptx and "lg2" not in ptx and ".f64" not in ptx


def test_words_are_those_of_philox() -> None:
    """Known answers of Random123's kat_vectors for Philox4x32-10: all bits 0, and all 1."""
    for word, want in ((0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)), (0xFFFFFFFF, (0x408F276D,))):
        c = torch.full((1,), word)
        got = [int(t) for t in random.philox((c, c, c, c), (c, c))]
        assert got[: len(want)] == list(want)


def test_an_index_is_a_word_of_its_block() -> None:
    n = torch.tensor([5])
    words = random.philox((n // n, n * 2, n * 3, n * 0 + TOKEN), (n * 7, n * 0))
    for index in range(4, 8):
        u = (float(words[index - 4]) + 0.5) * 2.0**-32
        got = gumbel(n * 7, n * 3, n * 2, torch.tensor([index]), TOKEN)
        assert float(got) == pytest.approx(-math.log(-math.log1p(-u)), abs=2e-6)


def test_extremes_stay_finite() -> None:
    """fp32 rounds (r + 0.5) 2^-32 to 1 for the 128 largest r; the noise of a draw must never be -inf."""
    bits = torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    got = -noise.log_fp32(-noise._log1p_of_minus(u))
    assert got.isfinite().all() and float(got[0]) == pytest.approx(33 * math.log(2), abs=1e-5)
    assert float(got[-1]) == pytest.approx(-math.log(24 * math.log(2)), abs=1e-6)


def _ulps(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want).numpy() / np.spacing(np.abs(want.float().numpy()))).__abs__().max())


def test_accuracy_against_float64() -> None:
    rng = torch.Generator().manual_seed(1)
    x = (1 + torch.rand(1 << 18, generator=rng)) * 2.0 ** torch.randint(-34, 6, (1 << 18,), generator=rng)
    assert _ulps(noise.log_fp32(x), x.double().log()) < 1.2
    u = torch.cat([2.0 ** (-33 * torch.rand(1 << 17, generator=rng)), torch.rand(1 << 17, generator=rng)])
    u = u.clamp(2.0**-33, 1 - 2.0**-24)
    assert _ulps(noise._log1p_of_minus(u), torch.log1p(-u.double())) < 3
    t = -20 * torch.rand(1 << 17, generator=rng)
    assert float((noise.exp24(t).double() / 2**24 - t.double().exp()).abs().max()) < 1.5e-7


def test_it_is_gumbel_noise() -> None:
    """Kolmogorov-Smirnov over 2^20 numbers, and the far tail by count: P(g > x) = 1 - exp(-exp(-x))."""
    rows = torch.arange(2048)
    got = gumbel_rows(rows * 12345, rows % 3, rows, rows * 0, 512, GROUP, "cpp" if extension() else "torch").double()
    assert stats.kstest(got.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    for x in (5.0, 8.0):
        expected = got.numel() * -math.expm1(-math.exp(-x))
        assert abs(int((got > x).sum()) - expected) < 4 * expected**0.5


@pytest.mark.parametrize("changed", range(4))
def test_every_coordinate_matters(changed: int) -> None:
    base = [torch.full((1,), n) for n in (3, 5, 7, 0)]
    other = list(base)
    other[changed] = base[changed] + (1 << 33 if changed == 0 else 8)
    one, two = (gumbel_rows(*arguments, 8, GROUP) for arguments in (base, other))
    assert not (one == two).any()
    assert not (one == gumbel_rows(*base, 8, TOKEN)).any()
