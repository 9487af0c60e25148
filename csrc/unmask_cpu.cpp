// Selection on the CPU: one row per task.
#include <algorithm>
#include <functional>
#include <vector>

#include "parallel.h"
#include "unmask.h"

namespace loopmdm {
namespace {

// Waking a thread costs about as much as ranking this many tokens.
constexpr int64_t kTokensPerThread = 16384;

struct Cut {
    uint32_t threshold;
    int64_t ties;

    bool picks(uint32_t key) { return key > threshold || (key == threshold && ties-- > 0); }
};

// order: the keys of the eligible positions in any order; it comes back in another one.
Cut cut(uint32_t* order, int64_t count, const Limit& limit) {
    const std::greater<uint32_t> larger;
    int64_t take = std::max<int64_t>(0, std::min(limit.k, count));
    if (limit.rule == kThreshold) {
        const auto holds = [&](uint32_t key) { return taken(limit, count + 1, key_value(key), 0); };
        if (limit.k < count) take = std::max<int64_t>(take, std::count_if(order, order + count, holds));
    } else if (limit.rule != kTopK && limit.k < count) {
        std::sort(order, order + count, larger);
        int64_t before = 0;
        for (take = 0; take < count && taken(limit, take + 1, key_value(order[take]), before); ++take)
            before += cost(limit, key_value(order[take]));
    }
    if (take == 0) return {0xffffffffu, 0};
    if (take == count) return {0u, 0};
    std::nth_element(order, order + take - 1, order + count, larger);
    const uint32_t threshold = order[take - 1];
    // What nth_element left in front is the picked set, so the quota of ties is counted there.
    return {threshold, std::count(order, order + take, threshold)};
}

void select_row(const float* keys, const uint8_t* eligible, int64_t k, uint8_t* out, int64_t cols, uint32_t* order) {
    int64_t count = 0;
    for (int64_t i = 0; i < cols; ++i) {
        order[count] = order_key(keys[i], eligible[i] != 0);
        count += eligible[i] != 0;
    }
    Cut found = cut(order, count, {kTopK, 0.0, k});
    for (int64_t i = 0; i < cols; ++i) out[i] = found.picks(order_key(keys[i], eligible[i] != 0));
}

void scatter_row(const Scatter& s, int64_t row, uint32_t* order) {
    const int64_t start = row * s.cols, stop = start + s.cols;
    if (s.done[row]) {
        std::fill(s.revealed + start, s.revealed + stop, false);
        std::fill(s.remasked + start, s.remasked + stop, false);
        return;
    }
    int64_t count = 0;
    for (int64_t at = start; at < stop; ++at) {
        order[count] = scatter_key(s, at);
        count += order[count] != 0u;
    }
    Cut found = cut(order, count, limit_of(s, row));
    int64_t first_end = s.cols, first_masked = s.cols;
    for (int64_t at = start; at < stop; ++at) {
        place(s, at, found.picks(scatter_key(s, at)));
        if (first_end == s.cols && ends_here(s, at)) first_end = at - start;
        if (first_masked == s.cols && s.masked[at]) first_masked = at - start;
    }
    s.done[row] = is_done(s, first_end, first_masked);
}

// work(row, scratch of cols keys) for every row.
template <class Work>
void for_rows(int64_t rows, int64_t cols, int threads, Work work) {
    parallel(rows, std::min<int64_t>(threads, rows * cols / kTokensPerThread), [&](int64_t row) {
        thread_local std::vector<uint32_t> keys;
        keys.resize(cols);
        work(row, keys.data());
    });
}

}  // namespace

void select_topk_cpu(uintptr_t keys, uintptr_t eligible, uintptr_t k, uintptr_t out, int64_t rows, int64_t cols,
                     int threads) {
    for_rows(rows, cols, threads, [=](int64_t row, uint32_t* order) {
        const int64_t at = row * cols;
        select_row(reinterpret_cast<const float*>(keys) + at, reinterpret_cast<const uint8_t*>(eligible) + at,
                   reinterpret_cast<const int64_t*>(k)[row], reinterpret_cast<uint8_t*>(out) + at, cols, order);
    });
}

void select_scatter_cpu(const Scatter& s, int threads) {
    for_rows(s.rows, s.cols, threads, [&s](int64_t row, uint32_t* order) { scatter_row(s, row, order); });
}

void compact_cpu(uintptr_t mask, uintptr_t found, uintptr_t count, int64_t rows, int64_t cols, int64_t capacity) {
    const auto* set = reinterpret_cast<const uint8_t*>(mask);
    auto* out = reinterpret_cast<int64_t*>(found);
    int64_t n = 0;
    for (int64_t i = 0; i < rows * cols && n < capacity; ++i)
        if (set[i]) out[n++] = i;
    *reinterpret_cast<int64_t*>(count) = n;
    std::fill(out + n, out + capacity, int64_t{-1});
}

}  // namespace loopmdm
