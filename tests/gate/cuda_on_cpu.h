// Enough of CUDA to run the kernels of unmask.cu on a CPU, one block at a time. Each CUDA thread is a fiber that runs
// until it meets a barrier; a round over all fibers is the barrier. Starting the rounds at the other
// end runs the threads in the reverse order: a result that changes means a missing __syncthreads().
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(n)

struct Index {
    int x;
};
inline Index threadIdx, blockIdx;

struct Block {
    ucontext_t home;
    std::vector<ucontext_t> fibers;
    std::vector<char> done;
    std::vector<unsigned> votes[2];
    std::vector<int> ballots;
    std::function<void()> kernel;
};
inline Block block;

inline void __syncthreads() {
    const int me = threadIdx.x;
    swapcontext(&block.fibers[me], &block.home);
}

inline unsigned __ballot_sync(unsigned, bool flag) {
    const int me = threadIdx.x, warp = me / 32;
    auto& votes = block.votes[block.ballots[me]++ % 2];
    votes[warp] = (votes[warp] & ~(1u << me % 32)) | (unsigned(flag) << me % 32);
    __syncthreads();
    return votes[warp];
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
inline void atomicAdd(T* where, T n) {
    *where += n;
}
template <class T>
inline void atomicMin(T* where, T n) {
    if (n < *where) *where = n;
}

inline void run_fiber() {
    block.kernel();
    block.done[threadIdx.x] = 1;
    swapcontext(&block.fibers[threadIdx.x], &block.home);
}

inline void run_block(int index, int threads, bool reversed, std::function<void()> kernel) {
    constexpr size_t kStack = 64 * 1024;
    std::vector<char> stacks(threads * kStack);
    block = Block{};
    block.fibers.resize(threads);
    block.done.resize(threads);
    block.ballots.resize(threads);
    for (auto& votes : block.votes) votes.resize((threads + 31) / 32);
    block.kernel = std::move(kernel);
    blockIdx.x = index;
    for (int t = 0; t < threads; ++t) {
        getcontext(&block.fibers[t]);
        block.fibers[t].uc_stack.ss_sp = stacks.data() + t * kStack;
        block.fibers[t].uc_stack.ss_size = kStack;
        makecontext(&block.fibers[t], run_fiber, 0);
    }
    for (int left = threads; left > 0;) {
        left = 0;
        for (int turn = 0; turn < threads; ++turn) {
            threadIdx.x = reversed ? threads - 1 - turn : turn;
            if (block.done[threadIdx.x]) continue;
            swapcontext(&block.home, &block.fibers[threadIdx.x]);
            left += !block.done[threadIdx.x];
        }
    }
}
