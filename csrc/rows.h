// What is done to the rows of activations between products: bf16 storage, rotation, norms, activations. For functions of one
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

constexpr int64_t kAhead = 12;         // rows of a projection that are fetched before they are needed
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

// A row's `bytes`, kAhead rows after x: the processor does not see strides beyond a page.
INLINE void fetch(const char* x, int64_t stride, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(x + kAhead * stride + i);
}

struct Rotation {
    const float *cos, *sin;  // of the first row; null: none
    int64_t step;            // from one row's angles to the next one's
    bool interleaved, rounded, back;
};

// to [rows][dim] contiguous = x rotated, or rotated back.
template <bool Bf16>
INLINE void rotate(const char* x, int64_t stride, int64_t rows, int64_t dim, const Rotation& with, char* to) {
    constexpr int64_t S = Bf16 ? 2 : 4;
    const int64_t half = dim / 2;
    for (int64_t r = 0; r < rows; ++r, x += stride, to += dim * S) {
        fetch(x, stride, dim * S);
        if (!with.cos) {
            memcpy(to, x, dim * S);
            continue;
        }
        const bool rounded = Bf16 && with.rounded;
        for (int64_t i = 0; i < half; i += 16) {
            const int64_t n = std::min<int64_t>(16, half - i);
            v16 c = get(reinterpret_cast<const char*>(with.cos + r * with.step + i), false, n);
            v16 s = get(reinterpret_cast<const char*>(with.sin + r * with.step + i), false, n);
            if (with.back) s = -s;
            v16 a, b;
            if (with.interleaved) {
                const v16 e = get(x + 2 * i * S, Bf16, 2 * n), o = n > 8 ? get(x + (2 * i + 16) * S, Bf16, 2 * n - 16) : (v16){};
                a = SHUFFLE(e, o, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                b = SHUFFLE(e, o, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            } else {
                a = get(x + i * S, Bf16, n), b = get(x + (half + i) * S, Bf16, n);
            }
            v16 p, q;
            if (rounded) {
                c = wide(narrow(c)), s = wide(narrow(s));
                p = wide(narrow(a * c)) - wide(narrow(b * s)), q = wide(narrow(b * c)) + wide(narrow(a * s));
            } else {
                p = a * c - b * s, q = b * c + a * s;
            }
            if (with.interleaved) {
                const v16 e = SHUFFLE(p, q, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                const v16 o = SHUFFLE(p, q, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
                put(to + 2 * i * S, Bf16, e, 2 * n);
                if (n > 8) put(to + (2 * i + 16) * S, Bf16, o, 2 * n - 16);
            } else {
                put(to + i * S, Bf16, p, n), put(to + (half + i) * S, Bf16, q, n);
            }
        }
    }
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
    if (n.stats) as<float>(n.stats)[2 * row] = mean, as<float>(n.stats)[2 * row + 1] = by;
    by_vector(n.dim, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        v16 y = load<v16>(wide_row + i) * by;
        if (weight) y *= n.weight_bf16 ? get(weight + 2 * i, true, some) : get(weight + 4 * i, false, some);
        if (bias) y += n.bias_bf16 ? get(bias + 2 * i, true, some) : get(bias + 4 * i, false, some);
        put(out + i * (OutBf16 ? 2 : 4), OutBf16, y, some);
    });
}

// Of one row: dx = dnormed's share through the norm + dsummed; what it adds to the gradients of weight and bias.
// With h = (x - mean) * by and g = dnormed * weight, dx = by * (g - h mean(g h) - mean(g)), the last for layer norm alone.
template <bool Fp32>
INLINE void norm_grad_row(const NormGradient& n, const char* x, int64_t row, float* wide_row, float* dweight, float* dbias) {
    const bool x16 = !Fp32 && n.x_bf16, out16 = !Fp32 && n.out_bf16, w16 = !Fp32 && n.weight_bf16;
    const int64_t X = x16 ? 2 : 4, O = out16 ? 2 : 4, first = row * n.dim;
    const auto *dnormed = as<const char>(n.dnormed) + first * O, *weight = as<const char>(n.weight);
    const char* dsummed = n.dsummed ? as<const char>(n.dsummed) + first * X : nullptr;
    char* dbranch = n.dbranch ? as<char>(n.dbranch) + first * (n.branch_bf16 ? 2 : 4) : nullptr;
    char* dx = as<char>(n.dx) + first * X;
    const float mean = as<const float>(n.stats)[2 * row], by = as<const float>(n.stats)[2 * row + 1];
    float* shares = wide_row + up(n.dim, 16);
    v16 along = {}, all = {};
    by_vector(n.dim, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        const v16 h = (get(x + i * X, x16, some) - mean) * by;
        v16 g = get(dnormed + i * O, out16, some);
        if (dweight) {
            const v16 sum = load<v16>(dweight + i) + g * h;
            memcpy(dweight + i, &sum, sizeof sum);
        }
        if (dbias) {
            const v16 sum = load<v16>(dbias + i) + g;
            memcpy(dbias + i, &sum, sizeof sum);
        }
        if (weight) g *= get(weight + i * (w16 ? 2 : 4), w16, some);
        memcpy(wide_row + i, &h, sizeof h);
        memcpy(shares + i, &g, sizeof g);
        along += g * h;
        all += g;
    });
    const float share = sum(along) / n.dim, level = n.centre ? sum(all) / n.dim : 0.0f;
    by_vector(n.dim, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        v16 d = (load<v16>(shares + i) - load<v16>(wide_row + i) * share - level) * by;
        if (dsummed) d += get(dsummed + i * X, x16, some);
        put(dx + i * X, x16, d, some);
        if (dbranch) put(dbranch + i * (n.branch_bf16 ? 2 : 4), n.branch_bf16, d, some);
    });
}

INLINE v16 within(v16 y, float bound) {
    y = y > bound ? (v16){} + bound : y;
    return y < -bound ? (v16){} - bound : y;
}
INLINE v16 clamp(v16 exponent) { return within(exponent, 125.0f); }

template <int Act>
INLINE v16 act(v16 x, v16 other) {
    if constexpr (Act == kSwiglu) return x / (power(clamp(x * -1.44269504f), kExact) + 1.0f) * other;
    // tanh(u) = 2 sigmoid(2 u) - 1
    if constexpr (Act == kGeluTanh) return x / (power(clamp(x * (x * x * -0.102943240f - 2.30220819f)), kExact) + 1.0f);
    return (x < 0.0f ? (v16){} : x) * (x < 0.0f ? (v16){} : x);
}

// Gradients of act<Act>(x, other) times g, in place: x's becomes x, other's becomes other.
template <int Act>
INLINE void act_grad(v16 g, v16& x, v16& other) {
    if constexpr (Act == kSwiglu) {
        const v16 s = 1.0f / (power(clamp(x * -1.44269504f), kExact) + 1.0f), d = g * s;
        const v16 dx = d * other * (1.0f + within(x, 100.0f) * (1.0f - s));
        other = d * x, x = dx;
    } else if constexpr (Act == kGeluTanh) {
        const v16 s = 1.0f / (power(clamp(x * (x * x * -0.102943240f - 2.30220819f)), kExact) + 1.0f);
        const v16 c = within(x, 20.0f);
        x = g * s * (1.0f + c * (1.0f - s) * (1.59576912f + c * c * 0.214064489f));
    } else {
        x = 2.0f * g * (x < 0.0f ? (v16){} : x);
    }
}

template <int Act, bool Bf16>
INLINE void act_row(const char* x, const char* other, char* out, int64_t n) {
    constexpr int64_t S = Bf16 ? 2 : 4;
    by_vector(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        const v16 a = get(x + i * S, Bf16, some);
        put(out + i * S, Bf16, act<Act>(a, Act == kSwiglu ? get(other + i * S, Bf16, some) : a), some);
    });
}
template <bool Bf16>
INLINE void act_row(const char* x, const char* other, char* out, int64_t n, int act) {
    if (act == kSwiglu) act_row<kSwiglu, Bf16>(x, other, out, n);
    else if (act == kGeluTanh) act_row<kGeluTanh, Bf16>(x, x, out, n);
    else act_row<kRelu2, Bf16>(x, x, out, n);
}

template <int Act, bool Bf16>
INLINE void act_grad_row(const char* g, const char* x, const char* other, char* dx, char* dother, int64_t n) {
    constexpr int64_t S = Bf16 ? 2 : 4;
    by_vector(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        v16 a = get(x + i * S, Bf16, some), b = Act == kSwiglu ? get(other + i * S, Bf16, some) : a;
        act_grad<Act>(get(g + i * S, Bf16, some), a, b);
        put(dx + i * S, Bf16, a, some);
        if (Act == kSwiglu) put(dother + i * S, Bf16, b, some);
    });
}
template <bool Bf16>
INLINE void act_grad_row(const char* g, const char* x, const char* other, char* dx, char* dother, int64_t n, int act) {
    if (act == kSwiglu) act_grad_row<kSwiglu, Bf16>(g, x, other, dx, dother, n);
    else if (act == kGeluTanh) act_grad_row<kGeluTanh, Bf16>(g, x, x, dx, dx, n);
    else act_grad_row<kRelu2, Bf16>(g, x, x, dx, dx, n);
}

}  // namespace
}  // namespace loopmdm
