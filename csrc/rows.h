// What is done to the rows of activations between products: bf16 storage, norms, activations. For functions of one
// instruction set each, as tile.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "layer.h"
#include "tile.h"

namespace loopmdm {
namespace {

constexpr float kExact = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint8_t b16 __attribute__((vector_size(16)));

template <typename T>
T* as(uintptr_t at) {
    return reinterpret_cast<T*>(at);
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr size_t kKept = (32 << 20) + 64;  // bytes that a thread keeps: from here on malloc gives them back at once

// Memory at a multiple of 64, kept for the next call.
struct Buffer {
    std::vector<char> bytes;
    template <typename T>
    T* get(int64_t n) {
        bytes.resize(std::max<size_t>(bytes.size(), n * sizeof(T) + 64));
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) & ~uintptr_t{63});
    }
    void trim() {
        if (bytes.size() > kKept) std::vector<char>().swap(bytes);
    }
};

// 16 numbers, or n of them and zeros; stored bf16 is the nearest, ties to even.
INLINE v16 wide(const h16& x) { return (v16)(__builtin_convertvector(x, u16) << 16); }
INLINE h16 narrow(v16 x) {
    const u16 b = (u16)x;
    const u16 y = x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : b >> 16 | 0x40;
    return __builtin_convertvector(y, h16);
}
INLINE v16 get(const char* at, bool bf16) { return bf16 ? wide(load<h16>(at)) : load<v16>(at); }
INLINE void put(char* at, bool bf16, v16 x) {
    if (bf16) {
        const h16 y = narrow(x);
        memcpy(at, &y, sizeof y);
    } else {
        memcpy(at, &x, sizeof x);
    }
}
INLINE v16 get(const char* at, bool bf16, int64_t n) {
    if (n >= 16) return get(at, bf16);
    char some[64] = {};
    memcpy(some, at, n * (bf16 ? 2 : 4));
    return get(some, bf16);
}
INLINE void put(char* at, bool bf16, v16 x, int64_t n) {
    if (n >= 16) return put(at, bf16, x);
    char some[64];
    put(some, bf16, x);
    memcpy(at, some, n * (bf16 ? 2 : 4));
}

// step(i, n) on n = 16 numbers at a time and then on the rest.
template <typename Step>
INLINE void by_vector(int64_t size, const Step& step) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) step(i, 16);
    if (i < size) step(i, size - i);
}

template <bool XBf16, bool OutBf16>
INLINE void norm_row(const NormRows& n, const char* x, int64_t row, float* wide_row) {
    constexpr int64_t S = XBf16 ? 2 : 4;
    const char* branch = n.branch ? as<const char>(n.branch) + row * n.dim * (n.branch_bf16 ? 2 : 4) : nullptr;
    char* summed = n.summed ? as<char>(n.summed) + row * n.dim * S : nullptr;
    char* out = as<char>(n.out) + row * n.dim * (OutBf16 ? 2 : 4);
    const auto* weight = as<const char>(n.weight);
    const auto* bias = as<const char>(n.bias);
    v16 first = {}, second = {};
    by_vector(n.dim, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        v16 s = get(x + i * S, XBf16, some);
        if (branch) {
            s += n.branch_bf16 ? get(branch + 2 * i, true, some) : get(branch + 4 * i, false, some);
            if (XBf16) {
                const h16 stored = narrow(s);
                memcpy(summed + 2 * i, &stored, 2 * some);
                s = wide(stored);
            } else {
                memcpy(summed + 4 * i, &s, 4 * some);
            }
        }
        memcpy(wide_row + i, &s, sizeof s);
        first += s;
        second += s * s;
    });
    float mean = 0;
    if (n.centre) {
        mean = sum(first) / n.dim, second = (v16){};
        for (int64_t i = n.dim; i % 16; ++i) wide_row[i] = mean;
        for (int64_t i = 0; i < n.dim; i += 16) {
            const v16 d = load<v16>(wide_row + i) - mean;
            memcpy(wide_row + i, &d, sizeof d);
            second += d * d;
        }
    }
    const float by = 1 / std::sqrt(sum(second) / n.dim + n.eps);
    by_vector(n.dim, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        v16 y = load<v16>(wide_row + i) * by;
        if (weight) y *= n.weight_bf16 ? get(weight + 2 * i, true, some) : get(weight + 4 * i, false, some);
        if (bias) y += n.bias_bf16 ? get(bias + 2 * i, true, some) : get(bias + 4 * i, false, some);
        put(out + i * (OutBf16 ? 2 : 4), OutBf16, y, some);
    });
}

INLINE v16 clamp(v16 y) {
    y = y > 125.0f ? (v16){} + 125.0f : y;
    return y < -125.0f ? (v16){} - 125.0f : y;
}

template <int Act>
INLINE v16 act(v16 x, v16 other) {
    if constexpr (Act == kSwiglu) return x / (power(clamp(x * -1.44269504f), kExact) + 1.0f) * other;
    // tanh(u) = 2 sigmoid(2 u) - 1
    if constexpr (Act == kGeluTanh) return x / (power(clamp(x * (x * x * -0.102943240f - 2.30220819f)), kExact) + 1.0f);
    return (x < 0.0f ? (v16){} : x) * (x < 0.0f ? (v16){} : x);
}

template <int Act, bool Bf16>
INLINE void act_row(const char* x, const char* other, char* out, int64_t n) {
    constexpr int64_t S = Bf16 ? 2 : 4;
    by_vector(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        const v16 a = get(x + i * S, Bf16, some);
        put(out + i * S, Bf16, act<Act>(a, Act == kSwiglu ? get(other + i * S, Bf16, some) : a), some);
    });
}

}  // namespace
}  // namespace loopmdm
