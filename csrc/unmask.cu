// select_topk on CUDA: one block per row, exact and deterministic, any row length, no scratch memory.
// Radix select finds the threshold key in four passes of eight bits (integer counts: the order in
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

__global__ void __launch_bounds__(kThreads) select_topk_kernel(const float* __restrict__ keys,
                                                               const bool* __restrict__ eligible,
                                                               const int64_t* __restrict__ k, bool* __restrict__ out,
                                                               int64_t cols) {
    __shared__ int histogram[256];
    __shared__ int warp_counts[kWarps];
    __shared__ uint32_t found_digit;
    __shared__ int64_t found_left;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * cols;
    keys += at, eligible += at, out += at;

    int64_t count = 0;
    for (int64_t base = 0; base < cols; base += kThreads) {
        const int64_t i = base + threadIdx.x;
        int before;
        count += block_rank(i < cols && eligible[i], warp_counts, &before);
    }
    int64_t left = picks(k[blockIdx.x], count);
    if (left == 0 || left == count) {
        for (int64_t i = threadIdx.x; i < cols; i += kThreads) out[i] = left != 0 && eligible[i];
        return;
    }

    uint32_t threshold = 0;  // its digits above `shift` are known; `left` keys with these digits are still to be taken
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int d = threadIdx.x; d < 256; d += kThreads) histogram[d] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
            const uint32_t key = order_key(keys[i], eligible[i]);
            if (static_cast<uint64_t>(key ^ threshold) >> (shift + 8) == 0) atomicAdd(&histogram[(key >> shift) & 255u], 1);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int64_t above = 0;
            int digit = 255;
            while (above + histogram[digit] < left) above += histogram[digit--];
            found_digit = static_cast<uint32_t>(digit);
            found_left = left - above;
        }
        __syncthreads();
        threshold |= found_digit << shift;
        left = found_left;
    }

    int64_t seen = 0;  // keys equal to the threshold in earlier tiles
    for (int64_t base = 0; base < cols; base += kThreads) {
        const int64_t i = base + threadIdx.x;
        const uint32_t key = i < cols ? order_key(keys[i], eligible[i]) : 0u;
        int before;
        const int total = block_rank(key == threshold, warp_counts, &before);
        if (i < cols) out[i] = key > threshold || (key == threshold && seen + before < left);
        seen += total;
    }
}

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("select_topk: ") + cudaGetErrorString(status));
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

int cuda_driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace loopmdm
