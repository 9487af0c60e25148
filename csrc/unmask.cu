// Selection on CUDA: one block per row, exact and deterministic, any row length, no scratch memory.
// Radix select finds the threshold key in four passes of eight bits (integer counts and sums: the order in
// which threads add cannot matter), then one pass in index order hands out the ties. A row of 16k
// tokens is 80 KB and is re-read from L2.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "unmask.h"

namespace loopmdm {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Adds `flag` over the block. `before` becomes the number of set flags in lower threads.
__device__ int block_rank(bool flag, int* warp_counts, int* before) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned votes = __ballot_sync(0xffffffffu, flag);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int total = 0;
    *before = __popc(votes & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) *before += warp_counts[w];
        total += warp_counts[w];
    }
    __syncthreads();
    return total;
}

struct Bins {
    int counts[256];
    uint32_t least[256];                // smallest key of each bin
    unsigned long long costs[256];
    int warp_counts[kWarps];
    uint32_t digit;
    int64_t above, before;              // keys taken above the current digits, and what they cost
    bool all;
};

struct Cut {
    uint32_t threshold;
    int64_t ties;
};

// The last bin whose keys are not all taken becomes `digit`.
__device__ void walk(Bins& bins, const Limit& limit) {
    int digit = 255;
    for (; digit >= 0; --digit) {
        const int n = bins.counts[digit];
        if (n == 0) continue;
        const float last = key_value(bins.least[digit]);
        const int64_t whole = static_cast<int64_t>(bins.costs[digit]);
        if (!taken(limit, bins.above + n, last, bins.before + whole - cost(limit, last))) break;
        bins.above += n;
        bins.before += whole;
    }
    bins.all = digit < 0;
    bins.digit = static_cast<uint32_t>(digit) & 255u;
}

// How many of the equal keys of the last bin are taken: the first fails at `failing` or before.
__device__ int64_t ties_of(const Bins& bins, const Limit& limit, uint32_t key) {
    const float value = key_value(key);
    const int64_t each = cost(limit, value);
    int64_t taking = 0, failing = bins.counts[bins.digit];
    while (failing - taking > 1) {
        const int64_t n = (taking + failing) / 2;
        if (taken(limit, bins.above + n, value, bins.before + (n - 1) * each))
            taking = n;
        else
            failing = n;
    }
    return taking;
}

template <class KeyOf>
__device__ Cut find_cut(KeyOf key_of, const Limit& limit, int64_t cols, Bins& bins) {
    uint32_t threshold = 0;  // its digits above `shift` are known
    if (threadIdx.x == 0) bins.above = bins.before = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int d = threadIdx.x; d < 256; d += kThreads) {
            bins.counts[d] = 0;
            bins.least[d] = 0xffffffffu;
            bins.costs[d] = 0;
        }
        __syncthreads();
        for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
            const uint32_t key = key_of(i);
            if (key == 0u || static_cast<uint64_t>(key ^ threshold) >> (shift + 8) != 0) continue;
            const uint32_t digit = (key >> shift) & 255u;
            atomicAdd(&bins.counts[digit], 1);
            atomicMin(&bins.least[digit], key);
            if (limit.rule == kSum)
                atomicAdd(&bins.costs[digit], static_cast<unsigned long long>(cost(limit, key_value(key))));
        }
        __syncthreads();
        if (threadIdx.x == 0) walk(bins, limit);
        __syncthreads();
        if (bins.all) return {0u, 0};
        threshold |= bins.digit << shift;
    }
    return {threshold, ties_of(bins, limit, threshold)};
}

// visit(column, whether it is picked) for every column.
template <class KeyOf, class Visit>
__device__ void for_picks(KeyOf key_of, const Limit& limit, int64_t cols, Visit visit) {
    __shared__ Bins bins;
    const Cut cut = find_cut(key_of, limit, cols, bins);
    int64_t seen = 0;  // keys equal to the threshold in earlier tiles
    for (int64_t base = 0; base < cols; base += kThreads) {
        const int64_t i = base + threadIdx.x;
        const uint32_t key = i < cols ? key_of(i) : 0u;
        int before;
        const int total = block_rank(key == cut.threshold, bins.warp_counts, &before);
        if (i < cols) visit(i, key > cut.threshold || (key == cut.threshold && seen + before < cut.ties));
        seen += total;
    }
}

__global__ void __launch_bounds__(kThreads) select_topk_kernel(const float* __restrict__ keys,
                                                               const bool* __restrict__ eligible,
                                                               const int64_t* __restrict__ k, bool* __restrict__ out,
                                                               int64_t cols) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * cols;
    const Limit limit{kTopK, 0.0, k[blockIdx.x]};
    for_picks([=](int64_t i) { return order_key(keys[at + i], eligible[at + i]); }, limit, cols,
              [=](int64_t i, bool picked) { out[at + i] = picked; });
}

__global__ void __launch_bounds__(kThreads) select_scatter_kernel(const Scatter s) {
    __shared__ long long first_end, first_masked;
    const int64_t row = blockIdx.x, at = row * s.cols;
    if (s.done[row]) {
        for (int64_t i = threadIdx.x; i < s.cols; i += kThreads) s.revealed[at + i] = s.remasked[at + i] = false;
        return;
    }
    if (threadIdx.x == 0) first_end = first_masked = s.cols;
    for_picks([&s, at](int64_t i) { return scatter_key(s, at + i); }, limit_of(s, row), s.cols,
              [&](int64_t i, bool picked) {
                  place(s, at + i, picked);
                  if (ends_here(s, at + i)) atomicMin(&first_end, static_cast<long long>(i));
                  if (s.masked[at + i]) atomicMin(&first_masked, static_cast<long long>(i));
              });
    __syncthreads();
    if (threadIdx.x == 0) s.done[row] = is_done(s, first_end, first_masked);
}

__global__ void __launch_bounds__(kThreads) count_kernel(const bool* __restrict__ mask, int64_t* __restrict__ partial,
                                                         int64_t cols) {
    __shared__ int total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    int mine = 0;
    for (int64_t i = threadIdx.x; i < cols; i += kThreads) mine += mask[blockIdx.x * cols + i];
    atomicAdd(&total, mine);
    __syncthreads();
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) compact_kernel(const bool* __restrict__ mask,
                                                           const int64_t* __restrict__ partial,
                                                           int64_t* __restrict__ found, int64_t* __restrict__ count,
                                                           int64_t rows, int64_t cols, int64_t capacity) {
    __shared__ int warp_counts[kWarps];
    __shared__ unsigned long long earlier, everything;
    if (threadIdx.x == 0) earlier = everything = 0;
    __syncthreads();
    unsigned long long before_me = 0, all = 0;
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
        all += partial[row];
        if (row < blockIdx.x) before_me += partial[row];
    }
    atomicAdd(&earlier, before_me);
    atomicAdd(&everything, all);
    __syncthreads();
    const int64_t total = static_cast<int64_t>(everything) < capacity ? static_cast<int64_t>(everything) : capacity;
    int64_t next = static_cast<int64_t>(earlier);
    for (int64_t base = 0; base < cols; base += kThreads) {
        const int64_t i = base + threadIdx.x, at = blockIdx.x * cols + i;
        const bool set = i < cols && mask[at];
        int before;
        const int here = block_rank(set, warp_counts, &before);
        if (set && next + before < capacity) found[next + before] = at;
        next += here;
    }
    const int64_t stride = rows * kThreads;
    for (int64_t i = total + blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < capacity; i += stride)
        found[i] = -1;
    if (blockIdx.x == 0 && threadIdx.x == 0) *count = total;
}

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("unmask: ") + cudaGetErrorString(status));
}

struct DeviceGuard {
    int previous = 0;
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous));
        check(cudaSetDevice(device));
    }
    ~DeviceGuard() { cudaSetDevice(previous); }
};

}  // namespace

void select_topk_cuda(uintptr_t keys, uintptr_t eligible, uintptr_t k, uintptr_t out, int64_t rows, int64_t cols,
                      int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    select_topk_kernel<<<static_cast<unsigned>(rows), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const float*>(keys), reinterpret_cast<const bool*>(eligible),
        reinterpret_cast<const int64_t*>(k), reinterpret_cast<bool*>(out), cols);
    check(cudaGetLastError());
}

void select_scatter_cuda(const Scatter& s, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    select_scatter_kernel<<<static_cast<unsigned>(s.rows), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(s);
    check(cudaGetLastError());
}

void compact_cuda(uintptr_t mask, uintptr_t partial, uintptr_t found, uintptr_t count, int64_t rows, int64_t cols,
                  int64_t capacity, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto grid = static_cast<unsigned>(rows);
    const auto where = reinterpret_cast<cudaStream_t>(stream);
    const auto* set = reinterpret_cast<const bool*>(mask);
    count_kernel<<<grid, kThreads, 0, where>>>(set, reinterpret_cast<int64_t*>(partial), cols);
    compact_kernel<<<grid, kThreads, 0, where>>>(set, reinterpret_cast<int64_t*>(partial),
                                                 reinterpret_cast<int64_t*>(found),
                                                 reinterpret_cast<int64_t*>(count), rows, cols, capacity);
    check(cudaGetLastError());
}

int cuda_driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace loopmdm
