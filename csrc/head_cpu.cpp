// Groups of 128 logits on the CPU: a product whose tile stays in cache, and their statistics. See head.h.
//
// A logit is the same bits whatever tile, thread or batch computes it: one lane, which sums over the depth in rising order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "head.h"
#include "noise.h"
#include "parallel.h"
#include "tile.h"

namespace loopmdm {
namespace {

constexpr int64_t kBlock = 512;  // vocabulary ids of one task: its weights lie in the second cache
constexpr int64_t kRows = 128;   // rows of one task: their logits too
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// From row to row x has stride bytes and w `bytes`. out has room for a multiple of kPanel columns. The next panel's weights
// are fetched meanwhile, a share with every tile.
#define PRODUCT(name, wide, columns, many, one, R)                                                                    \
    void name(const char* x, int64_t stride, int64_t rows, const char* w, int64_t cols, int64_t bytes, float* out,   \
              int64_t out_stride) {                                                                                   \
        thread_local std::vector<uint32_t> panel;                                                                     \
        panel.resize((bytes + 3) / 4 * kPanel);                                                                       \
        const int64_t share = kPanel * bytes / ((rows + R - 1) / R * (kPanel / columns)) + 64;                        \
        for (int64_t first = 0; first < cols; first += kPanel) {                                                      \
            pack<wide>(w + first * bytes, std::min(kPanel, cols - first), bytes, panel.data());                       \
            int64_t fetched = std::min(first + kPanel, cols) * bytes;                                                 \
            const int64_t end = std::min(first + 2 * kPanel, cols) * bytes;                                           \
            for (int64_t c = 0; c < kPanel; c += columns) {                                                           \
                float* to = out + first + c;                                                                          \
                for (int64_t r = 0; r < rows;) {                                                                      \
                    for (const int64_t stop = std::min(end, fetched + share); fetched < stop; fetched += 64)          \
                        __builtin_prefetch(w + fetched, 0, 2);                                                        \
                    const char* from = x + r * stride;                                                                \
                    if (r + R <= rows) {                                                                              \
                        many(from, stride, panel.data() + c, bytes, to + r * out_stride, out_stride);                 \
                        r += R;                                                                                       \
                    } else {                                                                                          \
                        one(from, stride, panel.data() + c, bytes, to + r * out_stride, 0);                           \
                        ++r;                                                                                          \
                    }                                                                                                 \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
    }

FUSED PRODUCT(product_fp32, false, 16, (tile<v4, u4, false, 2, 4>), (tile<v4, u4, false, 1, 4>), 2)
FUSED PRODUCT(product_bf16, false, 16, (tile<v4, u4, true, 2, 4>), (tile<v4, u4, true, 1, 4>), 2)
#ifdef LOOPMDM_X86
FUSED V3 PRODUCT(product_fp32_v3, false, 16, (tile<v8, u8, false, 6, 2>), (tile<v8, u8, false, 1, 2>), 6)
FUSED V3 PRODUCT(product_bf16_v3, false, 16, (tile<v8, u8, true, 4, 2>), (tile<v8, u8, true, 1, 2>), 4)
FUSED V4 PRODUCT(product_fp32_v4, true, 64, (tile<v16, u16, false, 6, 4>), (tile<v16, u16, false, 1, 4>), 6)
FUSED V4 PRODUCT(product_bf16_v4, true, 64, (tile<v16, u16, true, 4, 4>), (tile<v16, u16, true, 1, 4>), 4)

BF16 PRODUCT(product_bf16_dot, true, 64, (tile_dot<6, 4>), (tile_dot<1, 4>), 6)
#endif

// The statistics of one group: 8 vectors, every lane a logit.
// Over the 16 lanes, halves first.
#define REDUCE(name, T, V, H, Q, combine)                                                                             \
    INLINE T name(V x) {                                                                                              \
        const H a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);                                            \
        const H b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);                                      \
        const H h = combine(a, b);                                                                                    \
        const Q c = __builtin_shufflevector(h, h, 0, 1, 2, 3), d = __builtin_shufflevector(h, h, 4, 5, 6, 7);         \
        const Q q = combine(c, d), r = __builtin_shufflevector(q, q, 2, 3, 0, 1), s = combine(q, r);                  \
        const T y = s[0], z = s[1];                                                                                   \
        return combine(y, z);                                                                                         \
    }
#define PLUS(a, b) ((a) + (b))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
REDUCE(sum, float, v16, v8, v4, PLUS)
REDUCE(sum, uint32_t, u16, u8, u4, PLUS)
REDUCE(largest, float, v16, v8, v4, LARGER)

INLINE void group(const float* logits, int64_t n, const float* bias, float scale, float* best, uint32_t* total,
                  float* dot, uint32_t* tempered) {
    float padded[2][kSpan];
    if (n < kSpan) {
        for (int64_t i = 0; i < kSpan; ++i) padded[0][i] = i < n ? logits[i] : kLowest;
        if (bias) {
            for (int64_t i = 0; i < kSpan; ++i) padded[1][i] = i < n ? bias[i] : 0.0f;
            bias = padded[1];
        }
        logits = padded[0];
    }
    v16 x[8], most = (v16){} + kLowest;
    for (int i = 0; i < 8; ++i) {
        x[i] = load<v16>(logits + 16 * i);
        if (bias) x[i] += load<v16>(bias + 16 * i);
        x[i] = x[i] > kLargest ? (v16){} + kLargest : x[i];
        x[i] = x[i] == x[i] ? x[i] : (v16){} + kLowest;
        most = x[i] > most ? x[i] : most;
    }
    const float top = largest(most);
    *best = top;
    if (top == kLowest) {
        *total = 0, *dot = 0;
        if (tempered) *tempered = 0;
        return;
    }
    u16 counted = {}, warm = {};
    v16 weighted = {};
    for (int i = 0; i < 8; ++i) {
        v16 t = x[i] - top;
        const v16 e = exp24(t);
        counted += (u16)__builtin_convertvector(e + 0.5f, i16);
        weighted += e * (t > -87.0f ? t : (v16){} - 87.0f);
        if (tempered) warm += (u16)__builtin_convertvector(exp24(t * scale) + 0.5f, i16);
    }
    *total = sum(counted);
    *dot = sum(weighted);
    if (tempered) *tempered = sum(warm);
}

#define GROUPS(name)                                                                                                  \
    void name(const float* logits, int64_t n, const float* bias, float scale, float* best, uint32_t* total,          \
              float* dot, uint32_t* tempered) {                                                                       \
        for (; n > 0; n -= kSpan, logits += kSpan, ++best, ++total, ++dot) {                                          \
            group(logits, std::min(n, kSpan), bias, scale, best, total, dot, tempered);                               \
            if (bias) bias += kSpan;                                                                                  \
            if (tempered) ++tempered;                                                                                 \
        }                                                                                                             \
    }
GROUPS(groups)

// 64 numbers of consecutive indices from a multiple of 4; left to the compiler to vectorise.
INLINE void gumbel64(uint32_t k0, uint32_t k1, uint32_t step, uint32_t position, uint32_t block, uint32_t stream,
                     float* out) {
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (int i = 0; i < 16; ++i) c0[i] = block + i, c1[i] = position, c2[i] = step, c3[i] = stream;
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < 16; ++i) {
            const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
            c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = static_cast<uint32_t>(p1);
            c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = static_cast<uint32_t>(p0);
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    uint32_t bits[64];
    for (int i = 0; i < 16; ++i) bits[4 * i] = c0[i], bits[4 * i + 1] = c1[i], bits[4 * i + 2] = c2[i], bits[4 * i + 3] = c3[i];
    for (int i = 0; i < 64; ++i) out[i] = gumbel_of(bits[i]);
}

#define GUMBELS(name)                                                                                                 \
    void name(int64_t seed, uint32_t step, uint32_t position, uint32_t first, int64_t count, uint32_t stream,        \
              float* out) {                                                                                           \
        const auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);   \
        float some[64];                                                                                               \
        for (int64_t skip = first % 4, block = first / 4; count > 0; skip = 0, block += 16) {                         \
            gumbel64(k0, k1, step, position, static_cast<uint32_t>(block), stream, some);                             \
            const int64_t n = std::min<int64_t>(64 - skip, count);                                                    \
            memcpy(out, some + skip, n * sizeof(float));                                                              \
            out += n, count -= n;                                                                                     \
        }                                                                                                             \
    }
GUMBELS(gumbels)

#ifdef LOOPMDM_X86
V3 GROUPS(groups_v3)
V4 GROUPS(groups_v4)
V3 GUMBELS(gumbels_v3)
V4 GUMBELS(gumbels_v4)
#endif

struct Kernels {
    decltype(&product_fp32) fp32 = product_fp32, bf16 = product_bf16;
    decltype(&groups) stats = groups;
    decltype(&gumbels) noise = gumbels;
};

// LOOPMDM_CPU_LEVEL, for tests: the best that may be taken, 1 plain, 3 AVX2, 4 AVX-512, 5 its bf16 products as well.
Kernels choose() {
    Kernels k;
    const char* most = std::getenv("LOOPMDM_CPU_LEVEL");
    const int level = most ? std::atoi(most) : 5;
#ifdef LOOPMDM_X86
    __builtin_cpu_init();
    if (level >= 3 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        k = {product_fp32_v3, product_bf16_v3, groups_v3, gumbels_v3};
    if (level >= 4 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        k = {product_fp32_v4, product_bf16_v4, groups_v4, gumbels_v4};
        if (level >= 5 && __builtin_cpu_supports("avx512bf16")) k.bf16 = product_bf16_dot;
    }
#endif
    (void)level;
    return k;
}
const Kernels kernels = choose();

template <typename T>
T* as(uintptr_t at) {
    return reinterpret_cast<T*>(at);
}

float value(const char* at, bool is_bf16) {
    uint32_t bits = 0;
    memcpy(reinterpret_cast<char*>(&bits) + 2 * is_bf16, at, is_bf16 ? 2 : 4);
    return as_float(static_cast<int32_t>(bits));
}

// Logits [rows][stride_out] of columns [first, first + cols), suppressed ids at -inf, bias still to be added.
void logits_of(const Head& h, int64_t row, int64_t rows, int64_t first, int64_t cols, float* out, int64_t out_stride) {
    const int64_t size = h.is_bf16 ? 2 : 4;
    const char* x = as<const char>(h.x) + row * h.stride * size;
    if (h.weight) {
        (h.is_bf16 ? kernels.bf16 : kernels.fp32)(x, h.stride * size, rows, as<const char>(h.weight) + first * h.dim * size,
                                                  cols, h.dim * size, out, out_stride);
    } else {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c)
                out[r * out_stride + c] = value(x + (r * h.stride + first + c) * size, h.is_bf16);
    }
    const auto *id = as<const int64_t>(h.suppressed), *end = id + h.n_suppressed;
    for (id = std::lower_bound(id, end, first); id < end && *id < first + cols; ++id)
        for (int64_t r = 0; r < rows; ++r) out[r * out_stride + *id - first] = kLowest;
}

// The 128 logits of a row's group, -inf beyond the vocabulary.
void inside(const Head& h, int64_t row, int64_t group, float* to) {
    const int64_t first = group * kSpan, cols = std::min(kSpan, h.vocab - first);
    logits_of(h, row, 1, first, cols, to, kSpan);
    for (int64_t c = 0; c < kSpan; ++c) {
        float x = c < cols ? to[c] : kLowest;
        if (h.bias && c < cols) x += as<const float>(h.bias)[first + c];
        x = x > kLargest ? kLargest : x;
        to[c] = x == x ? x : kLowest;
    }
}

}  // namespace

void head_groups_cpu(const Head& h, float scale, uintptr_t best, uintptr_t total, uintptr_t dot, uintptr_t tempered,
                     int threads) {
    const int64_t groups = (h.vocab + kSpan - 1) / kSpan, blocks = (h.vocab + kBlock - 1) / kBlock;
    const int64_t chunks = (h.rows + kRows - 1) / kRows;
    const int64_t workers = worth(h.rows * h.vocab * (h.weight ? h.dim : 16), threads);
    parallel(blocks * chunks, workers, [&](int64_t task) {
        thread_local std::vector<float> scratch;
        scratch.resize(kRows * kBlock);
        const int64_t first = task % blocks * kBlock, cols = std::min(kBlock, h.vocab - first);
        const int64_t row = task / blocks * kRows, rows = std::min(kRows, h.rows - row);
        logits_of(h, row, rows, first, cols, scratch.data(), kBlock);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (row + r) * groups + first / kSpan;
            kernels.stats(scratch.data() + r * kBlock, cols, h.bias ? as<const float>(h.bias) + first : nullptr, scale,
                          as<float>(best) + at, as<uint32_t>(total) + at, as<float>(dot) + at,
                          tempered ? as<uint32_t>(tempered) + at : nullptr);
        }
    });
}

void head_inside_cpu(const Head& h, uintptr_t group, uintptr_t out, int64_t per, int threads) {
    const int64_t workers = worth(h.rows * per * kSpan * (h.weight ? h.dim : 16), threads);
    parallel(h.rows * per, workers, [&](int64_t i) {
        inside(h, i / per, as<const int64_t>(group)[i], as<float>(out) + i * kSpan);
    });
}

void head_rows_cpu(const Head& h, float scale, uintptr_t best_, uintptr_t total_, uintptr_t dot_, uintptr_t tempered_,
                   const Noise& noise, uintptr_t judged, uintptr_t token_, uintptr_t values_, int threads) {
    const int64_t groups = (h.vocab + kSpan - 1) / kSpan;
    const int64_t workers = worth(h.rows * (groups * 64 + 2 * kSpan * (h.weight ? h.dim : 16)), threads);
    parallel(h.rows, workers, [&](int64_t row) {
        const auto *best = as<const float>(best_) + row * groups, *dot = as<const float>(dot_) + row * groups;
        const auto *total = as<const uint32_t>(total_) + row * groups,
                   *tempered = as<const uint32_t>(tempered_) + row * groups;
        const int64_t likeliest = std::max_element(best, best + groups) - best;
        const float top = best[likeliest];
        const bool alive = top > kLowest;
        double z = 0, weighted = 0;
        float second = kLowest;
        for (int64_t g = 0; g < groups; ++g) {
            if (best[g] == kLowest) continue;
            if (g != likeliest) second = std::max(second, best[g]);
            const double share = std::max(best[g] - top, -87.0f), mass = exp24(best[g] - top);
            z += mass * total[g], weighted += mass * (share * total[g] + dot[g]);
        }
        float x[kSpan];
        inside(h, row, likeliest, x);
        int64_t chosen = std::max_element(x, x + kSpan) - x, group = likeliest;
        for (int64_t c = 0; c < kSpan; ++c)
            if (c != chosen) second = std::max(second, x[c]);
        if (noise.seeds) {
            thread_local std::vector<float> key;
            key.resize(std::max(groups, kSpan));
            const int64_t seed = as<const int64_t>(noise.seeds)[row];
            const auto step = static_cast<uint32_t>(as<const int64_t>(noise.steps)[row]),
                       position = static_cast<uint32_t>(as<const int64_t>(noise.positions)[row]);
            kernels.noise(seed, step, position, 0, groups, kGroupStream, key.data());
            for (int64_t g = 0; g < groups; ++g) {
                const float level = (best[g] - top) * scale + log_fp32(static_cast<float>(tempered[g]) * 0x1p-24f);
                key[g] = best[g] > kLowest ? level + key[g] : kLowest;
            }
            group = std::max_element(key.begin(), key.begin() + groups) - key.begin();
            if (group != likeliest) inside(h, row, group, x);
            kernels.noise(seed, step, position, static_cast<uint32_t>(group * kSpan), kSpan, kTokenStream, key.data());
            for (int64_t c = 0; c < kSpan; ++c) key[c] = x[c] > kLowest ? (x[c] - top) * scale + key[c] : kLowest;
            chosen = std::max_element(key.begin(), key.begin() + kSpan) - key.begin();
        }
        int64_t token = alive ? group * kSpan + chosen : -1;
        if (const int64_t given = judged ? as<const int64_t>(judged)[row] : -1; given >= 0) {
            token = given;
            if (given / kSpan != group) inside(h, row, given / kSpan, x);
        }
        as<int64_t>(token_)[row] = token;
        const float values[5] = {token >= 0 ? x[token % kSpan] : kLowest, top, second,
                                 alive ? static_cast<float>(top + std::log(z * 0x1p-48)) : kLowest,
                                 alive ? static_cast<float>(top + weighted / z) : 0.0f};
        for (int64_t i = 0; i < 5; ++i) as<float>(values_)[i * h.rows + row] = values[i];
    });
}

void gumbel_cpu(uintptr_t seeds, uintptr_t steps, uintptr_t positions, uintptr_t first, uintptr_t out, int64_t rows,
                int64_t count, int64_t stream, int threads) {
    parallel(rows, worth(rows * count * 64, threads), [&](int64_t row) {
        kernels.noise(as<const int64_t>(seeds)[row], static_cast<uint32_t>(as<const int64_t>(steps)[row]),
                      static_cast<uint32_t>(as<const int64_t>(positions)[row]),
                      static_cast<uint32_t>(as<const int64_t>(first)[row]), count, static_cast<uint32_t>(stream),
                      as<float>(out) + row * count);
    });
}

}  // namespace loopmdm
