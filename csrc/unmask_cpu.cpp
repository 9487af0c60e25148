// select_topk on the CPU: one row per task, threads of our own (a second OpenMP runtime beside torch's
// would double the thread pools). No thread outlives the call, so forking afterwards is safe.
#include <algorithm>
#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "unmask.h"

namespace loopmdm {
namespace {

// Starting a thread costs about as much as ranking this many tokens.
constexpr int64_t kTokensPerThread = 16384;

void select_row(const float* keys, const uint8_t* eligible, int64_t k, uint8_t* out, int64_t cols, uint32_t* order) {
    int64_t count = 0;
    for (int64_t i = 0; i < cols; ++i) count += eligible[i] != 0;
    const int64_t take = picks(k, count);
    if (take == 0 || take == count) {
        for (int64_t i = 0; i < cols; ++i) out[i] = take != 0 && eligible[i] != 0;
        return;
    }
    for (int64_t i = 0; i < cols; ++i) order[i] = order_key(keys[i], eligible[i] != 0);
    std::nth_element(order, order + take - 1, order + cols, std::greater<uint32_t>());
    const uint32_t threshold = order[take - 1];
    // What nth_element left in front is the picked set, so the quota of ties is counted there.
    int64_t ties = std::count(order, order + take, threshold);
    for (int64_t i = 0; i < cols; ++i) {
        const uint32_t key = order_key(keys[i], eligible[i] != 0);
        out[i] = key > threshold || (key == threshold && ties-- > 0);
    }
}

}  // namespace

void select_topk_cpu(uintptr_t keys, uintptr_t eligible, uintptr_t k, uintptr_t out, int64_t rows, int64_t cols,
                     int threads) {
    const int64_t useful = std::min(rows, rows * cols / kTokensPerThread);
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, useful));
    std::vector<uint32_t> scratch(workers * cols);
    std::atomic<int64_t> next{0};
    auto work = [&](int64_t worker) {
        for (int64_t row; (row = next.fetch_add(1)) < rows;) {
            const int64_t at = row * cols;
            select_row(reinterpret_cast<const float*>(keys) + at, reinterpret_cast<const uint8_t*>(eligible) + at,
                       reinterpret_cast<const int64_t*>(k)[row], reinterpret_cast<uint8_t*>(out) + at, cols,
                       scratch.data() + worker * cols);
        }
    };
    std::vector<std::thread> others;
    others.reserve(workers - 1);
    for (int64_t worker = 1; worker < workers; ++worker) {
        try {
            others.emplace_back(work, worker);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the ones that run take all the rows
        }
    }
    work(0);
    for (auto& other : others) other.join();
}

}  // namespace loopmdm
