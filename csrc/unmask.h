// Ranking for unmasking, shared by CPU and CUDA: which positions of a row are revealed.
//
// One 32-bit key orders everything: larger key first, and among equal keys the lower index first.
//   0            not eligible
//   1            eligible, NaN                 (below -inf, but still picked when k asks for it)
//   0x007fffff   eligible, -inf
//   ...          eligible finite values in order, -0.0 equal to +0.0
//   0xff800000   eligible, +inf
// Rows are decided by a threshold: every key above it is taken, and of the keys equal to it the
// first `ties` in index order.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LOOPMDM_BOTH __host__ __device__ __forceinline__
#else
#define LOOPMDM_BOTH inline
#endif

namespace loopmdm {

LOOPMDM_BOTH uint32_t order_key(float value, bool eligible) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (!eligible) return 0u;
    if (magnitude > 0x7f800000u) return 1u;
    if (magnitude == 0u) return 0x80000000u;
    return (bits >> 31) ? ~bits : bits | 0x80000000u;
}

// k is the caller's int64, any value; the result is how many of `eligible` positions to take.
LOOPMDM_BOTH int64_t picks(int64_t k, int64_t eligible) {
    return k < 0 ? 0 : (k < eligible ? k : eligible);
}

// Launchers: contiguous keys float[rows][cols], eligible and out bool[rows][cols], k int64[rows].
void select_topk_cpu(uintptr_t keys, uintptr_t eligible, uintptr_t k, uintptr_t out, int64_t rows, int64_t cols,
                     int threads);
void select_topk_cuda(uintptr_t keys, uintptr_t eligible, uintptr_t k, uintptr_t out, int64_t rows, int64_t cols,
                      int device, uintptr_t stream);
int cuda_driver_version();

}  // namespace loopmdm
