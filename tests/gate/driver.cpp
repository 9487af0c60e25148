// Every launcher of unmask_cpu.cpp on buffers of exactly their size, for AddressSanitizer and UBSan: odd and zero sizes,
// every rule, special values, several threads. Prints a number that depends on all that was written.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "unmask.h"

using namespace loopmdm;

namespace {

std::mt19937 rng(1);
uint64_t digest = 14695981039346656037u;

int64_t pick(int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); }

// Arrays of their own, so that one element too far is outside.
template <class T>
std::unique_ptr<T[]> make(int64_t n) {
    return std::unique_ptr<T[]>(new T[n]());
}

template <class T>
void read(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) digest = (digest ^ static_cast<uint64_t>(x[i])) * 1099511628211u;
}

template <class T>
uintptr_t at(const T& x) {
    return reinterpret_cast<uintptr_t>(x.get());
}

void run(int64_t rows, int64_t cols, int threads) {
    const int64_t n = rows * cols;
    const float inf = std::numeric_limits<float>::infinity();
    const float specials[] = {NAN, inf, -inf, -0.0f, 0.0f, 3.4e38f, -3.4e38f, 1e-45f, -300.0f};
    const int64_t counts[] = {std::numeric_limits<int64_t>::min(), -1, 0, 1, cols / 2, cols, cols + 1,
                              std::numeric_limits<int64_t>::max()};
    const double bounds[] = {NAN, -1.0, 0.0, 0.5, 3.0, 1e300, std::numeric_limits<double>::infinity(), -1e300};
    auto scores = make<float>(n);
    auto proposed = make<int64_t>(n), tokens = make<int64_t>(n), k = make<int64_t>(rows), eos = make<int64_t>(3);
    auto eligible = make<bool>(n), again = make<bool>(n), ends = make<bool>(n), masked = make<bool>(n);
    auto shown = make<bool>(n), hidden = make<bool>(n), done = make<bool>(rows);
    auto bound = make<double>(rows);
    for (int rule = kTopK; rule <= kSum; ++rule) {
        for (int variant = 0; variant < 8; ++variant) {
            for (int64_t i = 0; i < n; ++i) {
                scores[i] = pick(4) ? (rule == kSum ? -1.0f : 1.0f) * pick(32) / 32.0f : specials[pick(9)];
                proposed[i] = pick(6) - 1, tokens[i] = pick(6);
                eligible[i] = pick(5), again[i] = !pick(8), ends[i] = !pick(4), masked[i] = pick(3);
            }
            for (int64_t b = 0; b < rows; ++b) k[b] = counts[pick(8)], bound[b] = bounds[pick(8)], done[b] = !pick(6);
            eos[0] = 1, eos[1] = 3, eos[2] = std::numeric_limits<int64_t>::max();
            select_topk_cpu(at(scores), at(eligible), at(k), at(shown), rows, cols, threads);
            read(shown.get(), n);
            const Scatter s{scores.get(), proposed.get(), eligible.get(), variant & 1 ? again.get() : nullptr,
                            variant & 2 ? ends.get() : nullptr, k.get(), bound.get(), eos.get(), tokens.get(),
                            masked.get(), shown.get(), hidden.get(), done.get(), rows, cols, 99,
                            variant & 2 ? 3 : 0, rule, (variant & 4) != 0};
            select_scatter_cpu(s, threads);
            read(tokens.get(), n), read(masked.get(), n), read(shown.get(), n), read(hidden.get(), n);
            read(done.get(), rows);
        }
    }
    for (const int64_t capacity : {int64_t{1}, n / 2 + 1, n + 5}) {
        auto found = make<int64_t>(capacity), total = make<int64_t>(1);
        compact_cpu(at(masked), at(found), at(total), rows, cols, capacity);
        read(found.get(), capacity), read(total.get(), 1);
    }
}

}  // namespace

// Any argument keeps it to one thread, for counting instructions.
int main(int count, char**) {
    for (const int64_t cols : {0, 1, 2, 31, 127, 128, 129, 1025})
        for (const int64_t rows : {0, 1, 3, 8}) run(rows, cols, 1);
    run(5, 16411, count > 1 ? 1 : 3);
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
