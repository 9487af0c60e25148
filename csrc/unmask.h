// Ranking for unmasking, shared by CPU and CUDA: which positions of a row are revealed, and what that writes.
//
// One 32-bit key orders everything: larger key first, and among equal keys the lower index first.
//   0            not eligible
//   1            eligible, NaN                 (below -inf, but still picked when k asks for it)
//   0x007fffff   eligible, -inf
//   ...          eligible finite values in order, -0.0 equal to +0.0
//   0xff800000   eligible, +inf
// Of the ranked positions a prefix is taken. A rule says how long it is: it holds for the first n or fails, and once
// it fails it fails for all that follow. So a row is decided by a threshold: every key above it is taken, and of the
// keys equal to it the first `ties` in index order.
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

// The value of an eligible position's key.
LOOPMDM_BOTH float key_value(uint32_t key) {
    const uint32_t bits = key == 1u ? 0x7fc00000u : (key >> 31) ? key & 0x7fffffffu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

enum Rule { kTopK = 0, kThreshold = 1, kFactor = 2, kSum = 3 };

// How long the prefix is: n positions while n <= k or while the rule holds for the n-th.
struct Limit {
    int rule;
    double bound;  // below 0 or NaN: the rule never holds, except a threshold's, which any number may be
    int64_t k;
};

// What a value v < 0 adds to the sum of kSum: -v in units of 2^-36, rounded up, at most 256. Integers, so that the
// order of summation does not matter; 2^18 of them fit.
LOOPMDM_BOTH int64_t cost(const Limit& limit, float value) {
    if (limit.rule != kSum || !(value < 0.0f)) return 0;
    const double units = -static_cast<double>(value) * 68719476736.0;
    if (units >= 17592186044416.0) return int64_t{1} << 44;
    const int64_t whole = static_cast<int64_t>(units);
    return whole + (static_cast<double>(whole) < units);
}

// Whether the n-th position (from 1) belongs to the prefix; `before` is the cost of the n - 1 before it.
LOOPMDM_BOTH bool taken(const Limit& limit, int64_t n, float value, int64_t before) {
    if (n <= limit.k) return true;
    if (limit.rule == kThreshold) return value >= static_cast<float>(limit.bound);
    if (!(limit.bound >= 0.0)) return false;
    // value >= 1 - bound / (n + 1) without a division
    if (limit.rule == kFactor) return (1.0 - static_cast<double>(value)) * static_cast<double>(n + 1) <= limit.bound;
    if (limit.rule == kSum) return value >= -3.402823466e38f && static_cast<double>(before) <= limit.bound * 68719476736.0;
    return false;
}

// One step of rows x cols positions. `again` and `ends` may be null.
struct Scatter {
    const float* scores;
    const int64_t* proposed;
    const bool *eligible, *again, *ends;
    const int64_t* k;     // [rows]
    const double* bound;  // [rows]
    const int64_t* eos;   // [eos_count]
    int64_t* tokens;
    bool *masked, *revealed, *remasked;
    bool* done;  // [rows]
    int64_t rows, cols, mask_id, eos_count;
    int rule;
    bool remask;
};

LOOPMDM_BOTH Limit limit_of(const Scatter& s, int64_t row) { return {s.rule, s.bound[row], s.k[row]}; }

LOOPMDM_BOTH uint32_t scatter_key(const Scatter& s, int64_t at) {
    return order_key(s.scores[at], s.eligible[at] && (s.masked[at] ? s.proposed[at] >= 0 : s.remask));
}

// Writes one position; `picked` is whether its rank was taken.
LOOPMDM_BOTH void place(const Scatter& s, int64_t at, bool picked) {
    const bool was = s.masked[at];
    const bool show = picked && was;
    const bool hide = !was && ((s.remask && s.eligible[at] && !picked) || (s.again && s.again[at]));
    if (show) s.tokens[at] = s.proposed[at];
    if (hide) s.tokens[at] = s.mask_id;
    s.masked[at] = (was && !show) || hide;
    s.revealed[at] = show;
    s.remasked[at] = hide;
}

LOOPMDM_BOTH bool ends_here(const Scatter& s, int64_t at) {
    if (!s.ends || !s.ends[at] || s.masked[at]) return false;
    for (int64_t e = 0; e < s.eos_count; ++e)
        if (s.tokens[at] == s.eos[e]) return true;
    return false;
}

// first_end, first_masked: lowest columns of an EOS and of a mask, cols where there is none.
LOOPMDM_BOTH bool is_done(const Scatter& s, int64_t first_end, int64_t first_masked) {
    return first_end < first_masked || (first_masked == s.cols && !s.remask && !s.again);
}

// Launchers: contiguous keys float[rows][cols], eligible and out bool[rows][cols], k int64[rows].
void select_topk_cpu(uintptr_t keys, uintptr_t eligible, uintptr_t k, uintptr_t out, int64_t rows, int64_t cols,
                     int threads);
void select_topk_cuda(uintptr_t keys, uintptr_t eligible, uintptr_t k, uintptr_t out, int64_t rows, int64_t cols,
                      int device, uintptr_t stream);
void select_scatter_cpu(const Scatter& s, int threads);
void select_scatter_cuda(const Scatter& s, int device, uintptr_t stream);
// mask bool[rows][cols] -> found int64[capacity], the flat indices in order and -1 behind them; count int64[1].
// `partial` is scratch of the CUDA one, int64[rows].
void compact_cpu(uintptr_t mask, uintptr_t found, uintptr_t count, int64_t rows, int64_t cols, int64_t capacity);
void compact_cuda(uintptr_t mask, uintptr_t partial, uintptr_t found, uintptr_t count, int64_t rows, int64_t cols,
                  int64_t capacity, int device, uintptr_t stream);
int cuda_driver_version();

}  // namespace loopmdm
