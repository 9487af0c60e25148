// Every launcher of head_cpu.cpp on buffers of exactly their size, for AddressSanitizer and UBSan. Prints a number that
// depends on all that was written.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>

#include "head.h"

using namespace loopmdm;

namespace {

std::mt19937 rng(1);
uint64_t digest = 14695981039346656037u;

template <class T>
std::unique_ptr<T[]> make(int64_t n) {
    return std::unique_ptr<T[]>(new T[n]());
}

template <class T>
uintptr_t at(const T& x) {
    return reinterpret_cast<uintptr_t>(x.get());
}

template <class T>
void read(const T* x, int64_t n) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(x);
    for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
}

template <class T>
T number(bool special) {
    const float inf = std::numeric_limits<float>::infinity();
    const float specials[] = {NAN, inf, -inf, -0.0f, 3.4e38f, 1e-45f};
    const float value = special && rng() % 9 == 0 ? specials[rng() % 6] : static_cast<float>(rng() % 2001) / 500 - 2;
    uint32_t bits;
    static_assert(sizeof bits == sizeof value);
    __builtin_memcpy(&bits, &value, sizeof bits);
    if constexpr (sizeof(T) == 2) return static_cast<T>(bits >> 16);
    else return value;
}

template <class T>
void run(int64_t rows, int64_t vocab, int64_t dim, bool product, float scale, int threads) {
    const int64_t groups = (vocab + kSpan - 1) / kSpan, width = product ? dim : vocab, per = 3;
    auto x = make<T>(rows * width), weight = make<T>(vocab * dim);
    auto bias = make<float>(vocab);
    auto suppressed = make<int64_t>(2), group = make<int64_t>(rows * per), row = make<int64_t>(rows);
    for (int64_t i = 0; i < rows * width; ++i) x[i] = number<T>(true);
    for (int64_t i = 0; i < vocab * dim; ++i) weight[i] = number<T>(false);
    for (int64_t i = 0; i < vocab; ++i) bias[i] = number<float>(true);
    for (int64_t i = 0; i < rows * per; ++i) group[i] = static_cast<int64_t>(rng() % groups);
    for (int64_t i = 0; i < rows; ++i) row[i] = static_cast<int64_t>(uint64_t{rng()} << 32 | rng());
    suppressed[1] = vocab - 1;
    const Head h{at(x), product ? at(weight) : 0, rng() % 2 ? at(bias) : 0, at(suppressed), rows, vocab, width, width,
                 2, sizeof(T) == 2};
    auto best = make<float>(rows * groups), dot = make<float>(rows * groups), out = make<float>(rows * per * kSpan);
    auto total = make<uint32_t>(rows * groups), tempered = make<uint32_t>(rows * groups);
    auto second = make<float>(rows * groups);
    auto place = make<uint32_t>(rows * groups);
    head_groups_cpu(h, scale, at(best), at(total), at(dot), scale == 1 ? 0 : at(tempered), at(second), at(place), threads);
    auto token = make<int64_t>(rows);
    auto values = make<float>(5 * rows);
    const Noise noise{rng() % 2 ? at(row) : 0, at(row), at(row)};
    const uintptr_t judged = rng() % 2 ? at(group) : 0;
    head_rows_cpu(h, scale, at(best), at(total), at(dot), scale == 1 ? at(total) : at(tempered), at(second), at(place), noise,
                  judged, at(token), at(values), threads);
    read(token.get(), rows), read(values.get(), 5 * rows);
    head_inside_cpu(h, at(group), at(out), per, threads);
    read(best.get(), rows * groups), read(total.get(), rows * groups), read(tempered.get(), rows * groups);
    read(second.get(), rows * groups), read(place.get(), rows * groups), read(out.get(), rows * per * kSpan);
    gumbel_cpu(at(row), at(row), at(row), at(group), at(out), rows, per * kSpan - 1, 11, threads);
    read(out.get(), rows * per * kSpan);
}

}  // namespace

int main() {
    for (const int64_t vocab : {1, 2, 127, 128, 129, 515, 1027})
        for (const int64_t rows : {0, 1, 7, 131})
            for (const bool product : {false, true})
                for (const float scale : {1.0f, 0.3f, 3e38f}) {
                    run<float>(rows, vocab, 1 + static_cast<int64_t>(rng() % 70), product, scale, 1);
                    run<uint16_t>(rows, vocab, 1 + static_cast<int64_t>(rng() % 70), product, scale, 1);
                }
    run<float>(40, 5003, 65, true, 0.7f, 3);
    run<uint16_t>(40, 5003, 65, true, 1.0f, 3);
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
