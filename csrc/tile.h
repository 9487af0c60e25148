// Vectors, and tiles of a product whose right side lies in panels of 64 columns; for functions of one instruction set each.
//
// A product is the same bits whatever tile, thread or batch computes it: one lane, which sums over the depth in rising order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// Not clang: it refuses vectors that pass from a function of one instruction set to an inlined helper of none.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LOOPMDM_X86 1
#include <immintrin.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: everything here is inlined
#define INLINE inline __attribute__((always_inline))

namespace loopmdm {
namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint32_t u4 __attribute__((vector_size(16)));

constexpr int64_t kPanel = 64;  // columns that a product takes at a time, side by side in memory

template <typename V>
INLINE V load(const void* at) {
    V x;
    memcpy(&x, at, sizeof x);
    return x;
}

// SHUFFLE(a, b, ...): the lanes of a and b, side by side, that have these numbers.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) shuffle<__VA_ARGS__>(a, b)
template <int... Lane, typename V>
INLINE auto shuffle(V a, V b) {
    typedef int32_t Lanes __attribute__((vector_size(sizeof(V))));
    typedef std::remove_reference_t<decltype(a[0])> Some __attribute__((vector_size(sizeof...(Lane) * sizeof(a[0]))));
    if constexpr (sizeof(Some) == sizeof(V)) return __builtin_shuffle(a, b, Lanes{Lane...});
    else return Some{a[Lane]...};
}
#endif

// A word: one fp32 number, or two bf16, of which a row's last one has only the first (`size` 2).
INLINE uint32_t word(const char* at, int64_t size) {
    uint32_t x = 0;
    memcpy(&x, at, size == 4 ? 4 : 2);
    return x;
}

// S = 8, 4, 2, 1 transpose 16 vectors: blocks of S lanes and S vectors change places.
template <int S>
INLINE void swap_blocks(u16 x[16]) {
#define LOW(j) ((j) & S ? 16 + (j)-S : (j))
#define HIGH(j) ((j) & S ? 16 + (j) : (j) + S)
#define LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
    for (int i = 0; i < 16; ++i) {
        if (i & S) continue;
        const u16 a = x[i], b = x[i + S];
        x[i] = SHUFFLE(a, b, LANES(LOW));
        x[i + S] = SHUFFLE(a, b, LANES(HIGH));
    }
#undef LOW
#undef HIGH
#undef LANES
}

// panel[k][c] = word k of row c of w, `bytes` long and `stride` after the one before; 0 for the columns from cols to kPanel.
template <bool Wide>
INLINE void pack(const char* w, int64_t stride, int64_t cols, int64_t bytes, uint32_t* panel) {
    const int64_t words = (bytes + 3) / 4;
    for (int64_t c = 0; c < kPanel; c += 16) {
        int64_t k = 0;
        if constexpr (Wide) {
            for (; c + 16 <= cols && 4 * (k + 16) <= bytes; k += 16) {
                u16 x[16];
                for (int i = 0; i < 16; ++i) x[i] = load<u16>(w + (c + i) * stride + 4 * k);
                swap_blocks<8>(x), swap_blocks<4>(x), swap_blocks<2>(x), swap_blocks<1>(x);
                for (int i = 0; i < 16; ++i) memcpy(panel + (k + i) * kPanel + c, &x[i], sizeof x[i]);
            }
        }
        for (; k < words; ++k)
            for (int64_t i = c; i < c + 16; ++i) panel[k * kPanel + i] = i < cols ? word(w + i * stride + 4 * k, bytes - 4 * k >= 4 ? 4 : 2) : 0;
    }
}
template <bool Wide>
INLINE void pack(const char* w, int64_t cols, int64_t bytes, uint32_t* panel) {
    pack<Wide>(w, bytes, cols, bytes, panel);
}

// Here, and only here, a * b + c may be one operation.
#if defined(__clang__)
#define FUSED
#else
#define FUSED __attribute__((optimize("fp-contract=fast")))
#endif
#ifdef LOOPMDM_X86
#define V3 __attribute__((target("avx2,fma")))
#define V4 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

// The best instructions that are here and that LOOPMDM_CPU_LEVEL, which is for tests, allows: 1 plain, 3 AVX2, 4 AVX-512,
// 5 its bf16 products as well.
inline int best_level() {
#ifdef LOOPMDM_X86
    const char* most = std::getenv("LOOPMDM_CPU_LEVEL");
    const int level = most ? std::atoi(most) : 5;
    __builtin_cpu_init();
    if (level < 3 || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    if (level < 4 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 3;
    return level >= 5 && __builtin_cpu_supports("avx512bf16") ? 5 : 4;
#else
    return 1;
#endif
}

// out[r][c] = x[r] . panel[.][c] for R rows and C vectors of columns: one lane a logit, the depth in rising order. From 16
// columns to the next 16 out has `apart` numbers. With Ahead, R rows' bytes from `next` are fetched meanwhile.
template <typename V, typename U, bool Bf16, int R, int C, bool Ahead = false>
INLINE void tile(const char* x, int64_t stride, const uint32_t* panel, int64_t bytes, float* out, int64_t out_stride,
                 int64_t apart = 16, const char* next = nullptr) {
    constexpr int L = sizeof(V) / 4;
    V acc[R][C] = {};
    const auto step = [&](int64_t k, int64_t size) __attribute__((always_inline)) {
        if constexpr (Ahead) __builtin_prefetch(next + 4 * R * k, 0, 2);
        U right[C];
        for (int c = 0; c < C; ++c) right[c] = load<U>(panel + k * kPanel + c * L);
        for (int r = 0; r < R; ++r) {
            const U left = (U){} + word(x + r * stride + 4 * k, size);
            for (int c = 0; c < C; ++c) {
                if constexpr (Bf16) {
                    acc[r][c] += (V)(left << 16) * (V)(right[c] << 16);
                    acc[r][c] += (V)(left & 0xffff0000u) * (V)(right[c] & 0xffff0000u);
                } else {
                    acc[r][c] += (V)left * (V)right[c];
                }
            }
        }
    };
    int64_t k = 0;
    for (; 4 * k + 4 <= bytes; ++k) step(k, 4);
    if (4 * k < bytes) step(k, 2);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) memcpy(out + r * out_stride + c * L / 16 * apart + c * L % 16, &acc[r][c], sizeof(V));
}

#ifdef LOOPMDM_X86
// As `tile` of bf16, both products of a word in one instruction.
template <int R, int C, bool Ahead = false>
BF16 INLINE void tile_dot(const char* x, int64_t stride, const uint32_t* panel, int64_t bytes, float* out,
                          int64_t out_stride, int64_t apart = 16, const char* next = nullptr) {
    __m512 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
    const auto step = [&](int64_t k, int64_t size) BF16 __attribute__((always_inline)) {
        if constexpr (Ahead) __builtin_prefetch(next + 4 * R * k, 0, 2);
        __m512bh right[C];
        for (int c = 0; c < C; ++c) right[c] = (__m512bh)_mm512_loadu_si512(panel + k * kPanel + 16 * c);
        for (int r = 0; r < R; ++r) {
            const auto left = (__m512bh)_mm512_set1_epi32(static_cast<int>(word(x + r * stride + 4 * k, size)));
            for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], left, right[c]);
        }
    };
    int64_t k = 0;
    for (; 4 * k + 4 <= bytes; ++k) step(k, 4);
    if (4 * k < bytes) step(k, 2);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + r * out_stride + c * apart, acc[r][c]);
}
// As `tile_dot`, of 8 columns: twice as many of these instructions are done at a time.
template <int R, bool Ahead = false>
BF16 INLINE void tile_dot8(const char* x, int64_t stride, const uint32_t* panel, int64_t bytes, float* out,
                           int64_t out_stride, int64_t, const char* next) {
    __m256 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_ps();
    const auto step = [&](int64_t k, int64_t size) BF16 __attribute__((always_inline)) {
        if constexpr (Ahead) __builtin_prefetch(next + 4 * R * k, 0, 2);
        const auto right = (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + k * kPanel));
        for (int r = 0; r < R; ++r) {
            const auto left = (__m256bh)_mm256_set1_epi32(static_cast<int>(word(x + r * stride + 4 * k, size)));
            acc[r] = _mm256_dpbf16_ps(acc[r], left, right);
        }
    };
    int64_t k = 0;
    for (; 4 * k + 4 <= bytes; ++k) step(k, 4);
    if (4 * k < bytes) step(k, 2);
    for (int r = 0; r < R; ++r) _mm256_storeu_ps(out + r * out_stride, acc[r]);
}
#endif

// 2^(y + bias - 1.5 * 2^23), where that is a normal number.
INLINE v16 power(v16 y, float bias) {
    const v16 z = y + bias;
    const v16 r = y - (z - bias);
    v16 p = (v16){} + 1.5476301e-4f;
    p = p * r + 1.340027e-3f;
    p = p * r + 9.618004e-3f;
    p = p * r + 5.550328e-2f;
    p = p * r + 0.2402265f;
    p = p * r + 0.6931472f;
    p = p * r + 1.0f;
    return (v16)((u16)p + ((u16)z << 23));
}

// 2^24 exp(t) of t <= 0; below -87 that of -87.
INLINE v16 exp24(v16 t) {
    t = t > -87.0f ? t : (v16){} - 87.0f;
    return power(t * 1.44269504f, 12582936.0f);
}

// Over the 16 lanes, halves first.
#define REDUCE(name, T, V, H, Q, combine)                                                                             \
    INLINE T name(V x) {                                                                                              \
        const H a = SHUFFLE(x, x, 0, 1, 2, 3, 4, 5, 6, 7), b = SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15);           \
        const H h = combine(a, b);                                                                                    \
        const Q c = SHUFFLE(h, h, 0, 1, 2, 3), d = SHUFFLE(h, h, 4, 5, 6, 7);                                         \
        const Q q = combine(c, d), r = SHUFFLE(q, q, 2, 3, 0, 1), s = combine(q, r);                                  \
        const T y = s[0], z = s[1];                                                                                   \
        return combine(y, z);                                                                                         \
    }
#define PLUS(a, b) ((a) + (b))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
REDUCE(sum, float, v16, v8, v4, PLUS)
REDUCE(sum, uint32_t, u16, u8, u4, PLUS)
REDUCE(largest, float, v16, v8, v4, LARGER)

}  // namespace
}  // namespace loopmdm
