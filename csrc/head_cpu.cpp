// Groups of 128 logits on the CPU: a product whose tile stays in cache, and their statistics. See head.h.
//
// A logit is the same bits whatever tile, thread or batch computes it: one lane, which sums over the depth in rising order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // changes no number, and lets loops with conditions be vectors
#endif
#include "head.h"
#include "noise.h"
#include "parallel.h"
#include "tile.h"

namespace loopmdm {
namespace {

constexpr int64_t kBlock = 512;  // vocabulary ids of one task
constexpr int64_t kRows = 128;   // rows of one task: they lie in the second cache
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// A panel holds 64 rows side by side, and the weights are read as they lie. out[slice][id][16 rows]. The last 8 rows and
// fewer leave the other 8 lanes as they are. From `next` on as many bytes are fetched as are read.
#define SWEEP(TILE, R, C)                                                                                             \
    for (int64_t id = 0; id < ids; id += ids < R ? 1 : R) {                                                           \
        const int64_t from = ids < R ? id : std::min<int64_t>(id, ids - R);                                           \
        float* to = out + c * kSpan + from * 16;                                                                      \
        if (ids < R) TILE(1, C)(w + from * bytes, bytes, panel + c, bytes, to, 16, 16 * kSpan, next + from * bytes);  \
        else TILE(R, C)(w + from * bytes, bytes, panel + c, bytes, to, 16, 16 * kSpan, next + from * bytes);          \
    }
#define ACROSS(name, wider, TILE, R, C, FEW, E, F)                                                                    \
    void name(const char* w, int64_t ids, int64_t bytes, const uint32_t* panel, int64_t rows, float* out,            \
              const char* next) {                                                                                     \
        for (int64_t c = 0; c < rows;) {                                                                              \
            const int64_t left = rows - c;                                                                            \
            wider                                                                                                     \
            if (left > 8) SWEEP(TILE, R, C)                                                                           \
            else SWEEP(FEW, E, F)                                                                                     \
            c += 16;                                                                                                  \
        }                                                                                                             \
    }
#define IF_OVER(rows_, columns, TILE, R, C) if (left > rows_) { SWEEP(TILE, R, C) c += columns; continue; }
#define WIDER(TILE) IF_OVER(48, 64, TILE, 4, 4) IF_OVER(32, 48, TILE, 4, 3) IF_OVER(16, 32, TILE, 8, 2)
#define FP32_V1(R, C) tile<v4, u4, false, R, C, true>
#define BF16_V1(R, C) tile<v4, u4, true, R, C, true>
#define FP32_V3(R, C) tile<v8, u8, false, R, C, true>
#define BF16_V3(R, C) tile<v8, u8, true, R, C, true>
#define FP32_V4(R, C) tile<v16, u16, false, R, C, true>
#define BF16_V4(R, C) tile<v16, u16, true, R, C, true>
#define BF16_DOT(R, C) tile_dot<R, C, true>
#define BF16_DOT8(R, C) tile_dot8<R, true>
#define PACK(name, wide)                                                                                              \
    void name(const char* x, int64_t stride, int64_t rows, int64_t bytes, uint32_t* panel) {                          \
        pack<wide>(x, stride, rows, bytes, panel);                                                                    \
    }

FUSED ACROSS(across_fp32, , FP32_V1, 2, 4, FP32_V1, 4, 2)
FUSED ACROSS(across_bf16, , BF16_V1, 2, 4, BF16_V1, 4, 2)
PACK(side_by_side, false)
#ifdef LOOPMDM_X86
FUSED V3 ACROSS(across_fp32_v3, , FP32_V3, 6, 2, FP32_V3, 8, 1)
FUSED V3 ACROSS(across_bf16_v3, , BF16_V3, 4, 2, BF16_V3, 8, 1)
FUSED V4 ACROSS(across_fp32_v4, WIDER(FP32_V4), FP32_V4, 8, 1, FP32_V3, 8, 1)
FUSED V4 ACROSS(across_bf16_v4, WIDER(BF16_V4), BF16_V4, 8, 1, BF16_V3, 8, 1)
BF16 ACROSS(across_bf16_dot, WIDER(BF16_DOT), BF16_DOT, 8, 1, BF16_DOT8, 8, 1)
V4 PACK(side_by_side_v4, true)
#endif

// What is kept of a group, one number a row.
struct Kept {
    float *best, *dot, *second;
    uint32_t *total, *tempered, *at;  // tempered may be null
};

INLINE v16 cleaned(v16 x) {
    x = x > kLargest ? (v16){} + kLargest : x;
    return x == x ? x : (v16){} + kLowest;
}

// The statistics of one group of one row: 8 vectors, every lane a logit.
INLINE void group(const float* logits, int64_t n, const float* bias, float scale, const Kept& to) {
    float padded[2][kSpan];
    if (n < kSpan) {
        for (int64_t i = 0; i < kSpan; ++i) padded[0][i] = i < n ? logits[i] : kLowest;
        if (bias) {
            for (int64_t i = 0; i < kSpan; ++i) padded[1][i] = i < n ? bias[i] : 0.0f;
            bias = padded[1];
        }
        logits = padded[0];
    }
    v16 x[8], most = (v16){} + kLowest, next = most;
    i16 where = {};
    for (int i = 0; i < 8; ++i) {
        x[i] = load<v16>(logits + 16 * i);
        if (bias) x[i] += load<v16>(bias + 16 * i);
        x[i] = cleaned(x[i]);
        const i16 better = x[i] > most;
        const v16 less = better ? most : x[i];
        next = less > next ? less : next;
        where = better ? (i16){} + i : where;
        most = better ? x[i] : most;
    }
    const float top = largest(most);
    int64_t at = kSpan;
    for (int lane = 0; lane < 16; ++lane)
        if (most[lane] == top) at = std::min<int64_t>(at, 16 * where[lane] + lane);
    float rest[16];
    for (int lane = 0; lane < 16; ++lane) rest[lane] = lane == at % 16 ? next[lane] : most[lane];
    *to.best = top, *to.second = largest(load<v16>(rest)), *to.at = static_cast<uint32_t>(at);
    if (top == kLowest) {
        *to.total = 0, *to.dot = 0;
        if (to.tempered) *to.tempered = 0;
        return;
    }
    u16 counted = {}, warm = {};
    v16 weighted = {};
    for (int i = 0; i < 8; ++i) {
        v16 t = x[i] - top;
        const v16 e = exp24(t);
        counted += (u16)__builtin_convertvector(e + 0.5f, i16);
        weighted += e * (t > -87.0f ? t : (v16){} - 87.0f);
        if (to.tempered) warm += (u16)__builtin_convertvector(exp24(t * scale) + 0.5f, i16);
    }
    *to.total = sum(counted);
    *to.dot = sum(weighted);
    if (to.tempered) *to.tempered = sum(warm);
}

// The same of 16 rows, x [128 ids][16 rows]: every lane a row, the sums in the same order.
INLINE void columns(float* x, int64_t n, const float* bias, float scale, const Kept& to) {
    v16 top = (v16){} + kLowest, second = top;
    i16 where = {};
    for (int64_t v = 0; v < n; ++v) {
        v16 y = load<v16>(x + 16 * v);
        if (bias) y += bias[v];
        y = cleaned(y);
        memcpy(x + 16 * v, &y, sizeof y);
        const i16 better = y > top;
        const v16 less = better ? top : y;
        second = less > second ? less : second;
        where = better ? (i16){} + static_cast<int>(v) : where;
        top = better ? y : top;
    }
    for (int64_t v = 16 * n; v < 16 * kSpan; ++v) x[v] = kLowest;
    u16 counted = {}, warm = {};
    v16 part[16];
    for (int c = 0; c < 16; ++c) {
        v16 weighted = {};
        for (int v = c; v < kSpan; v += 16) {
            v16 t = load<v16>(x + 16 * v) - top;
            const v16 e = exp24(t);
            counted += (u16)__builtin_convertvector(e + 0.5f, i16);
            weighted += e * (t > -87.0f ? t : (v16){} - 87.0f);
            if (to.tempered) warm += (u16)__builtin_convertvector(exp24(t * scale) + 0.5f, i16);
        }
        part[c] = weighted;
    }
    for (int c = 0; c < 8; ++c) part[c] += part[c + 8];
    for (int c = 0; c < 4; ++c) part[c] += part[c + 4];
    const v16 dot = (part[0] + part[2]) + (part[1] + part[3]);
    const auto put = [](void* at, auto value) __attribute__((always_inline)) { memcpy(at, &value, sizeof value); };
    put(to.best, top), put(to.second, second), put(to.at, where);
    put(to.total, counted), put(to.dot, (u16)dot & (u16)(top > kLowest));  // without a logit all counts are 0
    if (to.tempered) put(to.tempered, warm);
}

#define GROUPS(name)                                                                                                  \
    void name(const float* logits, int64_t n, const float* bias, float scale, Kept to) {                              \
        for (; n > 0; n -= kSpan, logits += kSpan) {                                                                  \
            group(logits, std::min(n, kSpan), bias, scale, to);                                                       \
            ++to.best, ++to.dot, ++to.second, ++to.total, ++to.at;                                                    \
            if (bias) bias += kSpan;                                                                                  \
            if (to.tempered) ++to.tempered;                                                                           \
        }                                                                                                             \
    }
#define COLUMNS(name)                                                                                                 \
    void name(float* x, int64_t n, const float* bias, float scale, const Kept& to) { columns(x, n, bias, scale, to); }
GROUPS(groups)
COLUMNS(sixteen)

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

// key[g] += a group's log-sum-exp over T.
#define LEVELS(name)                                                                                                  \
    void name(const float* best, const uint32_t* total, int64_t n, float top, float scale, float* key) {              \
        for (int64_t g = 0; g < n; ++g) {                                                                             \
            const float level = (best[g] - top) * scale + log_fp32(static_cast<float>(total[g]) * 0x1p-24f);          \
            key[g] = best[g] > kLowest ? level + key[g] : kLowest;                                                    \
        }                                                                                                             \
    }
LEVELS(levels)

// Of a row's groups the sums of 2^48 exp(logit - top), and of that times (logit - top).
typedef double d8 __attribute__((vector_size(64)));
struct Sums {
    double mass, weighted;
};
#define HALF(x, h) __builtin_convertvector(h ? SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15)                            \
                                             : SHUFFLE(x, x, 0, 1, 2, 3, 4, 5, 6, 7), d8)
#define TOTALS(name)                                                                                                  \
    Sums name(const float* best, const uint32_t* total, const float* dot, int64_t n, float top) {                     \
        d8 mass = {}, weighted = {};                                                                                  \
        for (int64_t g = 0; g < n; g += 16) {                                                                         \
            float b[16], d[16];                                                                                       \
            uint32_t c[16];                                                                                           \
            if (n - g < 16) {                                                                                         \
                for (int64_t i = 0; i < 16; ++i) {                                                                    \
                    const bool in = g + i < n;                                                                        \
                    b[i] = in ? best[g + i] : kLowest, c[i] = in ? total[g + i] : 0, d[i] = in ? dot[g + i] : 0.0f;   \
                }                                                                                                     \
            }                                                                                                         \
            const bool whole = n - g >= 16;                                                                           \
            v16 t = load<v16>(whole ? best + g : b) - top;                                                            \
            t = t > -87.0f ? t : (v16){} - 87.0f;                                                                     \
            const v16 e = exp24(t), more = load<v16>(whole ? dot + g : d);                                            \
            const u16 count = load<u16>(whole ? total + g : c);                                                       \
            for (int h = 0; h < 2; ++h) {                                                                             \
                const d8 m = HALF(e, h), k = HALF(count, h);                                                          \
                mass += m * k;                                                                                        \
                weighted += m * (HALF(t, h) * k + HALF(more, h));                                                     \
            }                                                                                                         \
        }                                                                                                             \
        Sums s = {0, 0};                                                                                              \
        for (int i = 0; i < 8; ++i) s.mass += mass[i], s.weighted += weighted[i];                                     \
        return s;                                                                                                     \
    }
TOTALS(totals)

#ifdef LOOPMDM_X86
V3 GROUPS(groups_v3)
V4 GROUPS(groups_v4)
V3 COLUMNS(sixteen_v3)
V4 COLUMNS(sixteen_v4)
V3 LEVELS(levels_v3)
V4 LEVELS(levels_v4)
V3 TOTALS(totals_v3)
V4 TOTALS(totals_v4)
V3 GUMBELS(gumbels_v3)
V4 GUMBELS(gumbels_v4)
#endif

struct Kernels {
    decltype(&across_fp32) fp32 = across_fp32, bf16 = across_bf16;
    decltype(&side_by_side) pack = side_by_side;
    decltype(&groups) stats = groups;
    decltype(&sixteen) stats16 = sixteen;
    decltype(&gumbels) noise = gumbels;
    decltype(&levels) level = levels;
    decltype(&totals) add = totals;
};

Kernels choose() {
    Kernels k;
#ifdef LOOPMDM_X86
    const int level = best_level();
    if (level >= 3)
        k = {across_fp32_v3, across_bf16_v3, side_by_side, groups_v3, sixteen_v3, gumbels_v3, levels_v3, totals_v3};
    if (level >= 4)
        k = {across_fp32_v4, across_bf16_v4, side_by_side_v4, groups_v4, sixteen_v4, gumbels_v4, levels_v4, totals_v4};
    if (level >= 5) k.bf16 = across_bf16_dot;
#endif
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

// Calls that(i) where id first + i of the next cols is suppressed.
template <typename That>
void suppressed(const Head& h, int64_t first, int64_t cols, const That& that) {
    const auto *id = as<const int64_t>(h.suppressed), *end = id + h.n_suppressed;
    for (id = std::lower_bound(id, end, first); id < end && *id < first + cols; ++id) that(*id - first);
}

// Given logits [rows][out_stride] of columns [first, first + cols), suppressed ids at -inf, bias still to be added.
void given(const Head& h, int64_t row, int64_t rows, int64_t first, int64_t cols, float* out, int64_t out_stride) {
    const int64_t size = h.is_bf16 ? 2 : 4;
    const char* x = as<const char>(h.x) + row * h.stride * size;
    for (int64_t r = 0; r < rows; ++r, out += out_stride) {
        for (int64_t c = 0; c < cols; ++c) out[c] = value(x + (r * h.stride + first + c) * size, h.is_bf16);
        suppressed(h, first, cols, [&](int64_t c) { out[c] = kLowest; });
    }
}

// The same of one row of a product, at most kSpan columns; meanwhile the weights from column `next` on are fetched.
void computed(const Head& h, int64_t row, int64_t first, int64_t cols, int64_t next, float* out) {
    thread_local std::vector<uint32_t> panel;
    const int64_t size = h.is_bf16 ? 2 : 4, bytes = h.dim * size, words = (bytes + 3) / 4;
    const char *x = as<const char>(h.x) + row * h.stride * size, *w = as<const char>(h.weight) + first * bytes;
    panel.resize(words * kPanel);
    for (int64_t k = 0; k < words; ++k) std::fill_n(panel.data() + k * kPanel, 8, word(x + 4 * k, std::min<int64_t>(4, bytes - 4 * k)));
    float lanes[16 * kSpan];
    (h.is_bf16 ? kernels.bf16 : kernels.fp32)(w, cols, bytes, panel.data(), 1, lanes, w + (next - first) * bytes);
    for (int64_t c = 0; c < cols; ++c) out[c] = lanes[16 * c];
    suppressed(h, first, cols, [&](int64_t c) { out[c] = kLowest; });
}

// The 128 logits of a row's group, -inf beyond the vocabulary. `next`: the group that will be looked at then.
void inside(const Head& h, int64_t row, int64_t group, int64_t next, float* to) {
    const int64_t first = group * kSpan, cols = std::min(kSpan, h.vocab - first);
    if (h.weight) computed(h, row, first, cols, next * kSpan, to);
    else given(h, row, 1, first, cols, to, kSpan);
    for (int64_t c = 0; c < kSpan; ++c) {
        float x = c < cols ? to[c] : kLowest;
        if (h.bias && c < cols) x += as<const float>(h.bias)[first + c];
        x = x > kLargest ? kLargest : x;
        to[c] = x == x ? x : kLowest;
    }
}

}  // namespace

void head_groups_cpu(const Head& h, float scale, uintptr_t best, uintptr_t total, uintptr_t dot, uintptr_t tempered,
                     uintptr_t second, uintptr_t at, int threads) {
    const int64_t groups = (h.vocab + kSpan - 1) / kSpan, blocks = (h.vocab + kBlock - 1) / kBlock;
    const int64_t chunks = (h.rows + kRows - 1) / kRows;
    const int64_t size = h.is_bf16 ? 2 : 4, bytes = h.dim * size, words = (bytes + 3) / 4;
    const auto* bias = as<const float>(h.bias);
    const int64_t workers = worth(h.rows * h.vocab * (h.weight ? h.dim : 16), threads);
    const auto kept = [&](int64_t i) {
        return Kept{as<float>(best) + i,     as<float>(dot) + i, as<float>(second) + i,
                    as<uint32_t>(total) + i, tempered ? as<uint32_t>(tempered) + i : nullptr, as<uint32_t>(at) + i};
    };
    std::unique_ptr<uint32_t[]> packed;  // the rows, 64 of them side by side
    if (h.weight) {
        const int64_t panels = (h.rows + kPanel - 1) / kPanel;
        packed.reset(new uint32_t[panels * words * kPanel]);
        parallel(panels, worth(h.rows * words, threads), [&](int64_t p) {
            kernels.pack(as<const char>(h.x) + p * kPanel * h.stride * size, h.stride * size,
                         std::min(kPanel, h.rows - p * kPanel), bytes, packed.get() + p * words * kPanel);
        });
    }
    parallel(blocks * chunks, workers, [&](int64_t task) {
        const int64_t first = task / chunks * kBlock, cols = std::min(kBlock, h.vocab - first);
        const int64_t row = task % chunks * kRows, rows = std::min(kRows, h.rows - row);
        thread_local std::vector<float> scratch;
        scratch.resize(kRows * kBlock);
        if (!packed) {
            given(h, row, rows, first, cols, scratch.data(), kBlock);
            for (int64_t r = 0; r < rows; ++r)
                kernels.stats(scratch.data() + r * kBlock, cols, bias ? bias + first : nullptr, scale,
                              kept((row + r) * groups + first / kSpan));
            return;
        }
        constexpr int64_t kGroups = kBlock / kSpan;
        thread_local float numbers[3][kRows][kGroups];  // written in one go: other threads write beside them
        thread_local uint32_t counts[3][kRows][kGroups];
        alignas(64) float f[3][16];
        alignas(64) uint32_t u[3][16];
        const Kept some{f[0], f[1], f[2], u[0], tempered ? u[1] : nullptr, u[2]};
        const auto* w = as<const char>(h.weight);
        for (int64_t g = 0; g < cols; g += kSpan) {
            const int64_t ids = std::min(kSpan, cols - g);
            for (int64_t r = 0; r < rows; r += kPanel) {
                const int64_t wide = std::min(kPanel, rows - r);
                const bool last = r + kPanel >= rows;
                const int64_t ahead = !last ? first + g : g + kSpan < cols ? first + g + kSpan : first + workers * kBlock;
                (h.is_bf16 ? kernels.bf16 : kernels.fp32)(
                    w + (first + g) * bytes, ids, bytes, packed.get() + (row + r) * words, wide, scratch.data(),
                    w + ahead * bytes);
                suppressed(h, first + g, ids, [&](int64_t c) {
                    for (int64_t s = 0; s < wide; s += 16) std::fill_n(scratch.data() + s * kSpan + c * 16, 16, kLowest);
                });
                for (int64_t s = 0; s < wide; s += 16) {
                    kernels.stats16(scratch.data() + s * kSpan, ids, bias ? bias + first + g : nullptr, scale, some);
                    for (int64_t i = 0; i < std::min<int64_t>(16, wide - s); ++i)
                        for (int k = 0; k < 3; ++k)
                            numbers[k][r + s + i][g / kSpan] = f[k][i], counts[k][r + s + i][g / kSpan] = u[k][i];
                }
            }
        }
        const int64_t many = (cols + kSpan - 1) / kSpan;
        for (int64_t r = 0; r < rows; ++r) {
            const Kept to = kept((row + r) * groups + first / kSpan);
            float* floats[3] = {to.best, to.dot, to.second};
            uint32_t* counted[3] = {to.total, to.tempered, to.at};
            for (int k = 0; k < 3; ++k) {
                memcpy(floats[k], numbers[k][r], many * sizeof(float));
                if (counted[k]) memcpy(counted[k], counts[k][r], many * sizeof(uint32_t));
            }
        }
    });
}

void head_inside_cpu(const Head& h, uintptr_t group, uintptr_t out, int64_t per, int threads) {
    const int64_t workers = worth(h.rows * per * kSpan * (h.weight ? h.dim : 16), threads);
    parallel(h.rows * per, workers, [&](int64_t i) {
        const auto* groups = as<const int64_t>(group);
        inside(h, i / per, groups[i], groups[std::min(i + 1, h.rows * per - 1)], as<float>(out) + i * kSpan);
    });
}

void head_rows_cpu(const Head& h, float scale, uintptr_t best_, uintptr_t total_, uintptr_t dot_, uintptr_t tempered_,
                   uintptr_t second_, uintptr_t at_, const Noise& noise, uintptr_t judged, uintptr_t token_,
                   uintptr_t values_, int threads) {
    const int64_t groups = (h.vocab + kSpan - 1) / kSpan;
    const int64_t workers = worth(h.rows * (groups * 64 + (noise.seeds || judged ? kSpan * (h.weight ? h.dim : 16) : 0)), threads);
    struct Picked {
        int64_t group, likeliest;
        float top, second;
        Sums sums;
    };
    constexpr int64_t kTogether = 8;  // rows of a task: while one's group is looked at, the next one's is fetched
    const auto pick = [&](int64_t row) {
        const auto *best = as<const float>(best_) + row * groups, *dot = as<const float>(dot_) + row * groups;
        const auto *total = as<const uint32_t>(total_) + row * groups,
                   *tempered = as<const uint32_t>(tempered_) + row * groups;
        const int64_t likeliest = std::max_element(best, best + groups) - best;
        const float top = best[likeliest];
        float second = as<const float>(second_)[row * groups + likeliest];
        for (int64_t g = 0; g < groups; ++g) second = g != likeliest && best[g] > second ? best[g] : second;
        Picked p{likeliest, likeliest, top, second, kernels.add(best, total, dot, groups, top)};
        if (noise.seeds && top > kLowest) {
            thread_local std::vector<float> key;
            key.resize(groups);
            kernels.noise(as<const int64_t>(noise.seeds)[row], static_cast<uint32_t>(as<const int64_t>(noise.steps)[row]),
                          static_cast<uint32_t>(as<const int64_t>(noise.positions)[row]), 0, groups, kGroupStream, key.data());
            kernels.level(best, tempered, groups, top, scale, key.data());
            p.group = std::max_element(key.begin(), key.end()) - key.begin();
        }
        return p;
    };
    const auto finish = [&](int64_t row, const Picked& p, int64_t next) {
        const bool alive = p.top > kLowest, drawn = noise.seeds && alive;
        int64_t chosen = as<const uint32_t>(at_)[row * groups + p.likeliest];
        float x[kSpan], key[kSpan], logit = p.top;
        if (drawn) {
            inside(h, row, p.group, next, x);
            kernels.noise(as<const int64_t>(noise.seeds)[row], static_cast<uint32_t>(as<const int64_t>(noise.steps)[row]),
                          static_cast<uint32_t>(as<const int64_t>(noise.positions)[row]),
                          static_cast<uint32_t>(p.group * kSpan), kSpan, kTokenStream, key);
            for (int64_t c = 0; c < kSpan; ++c) key[c] = x[c] > kLowest ? (x[c] - p.top) * scale + key[c] : kLowest;
            chosen = std::max_element(key, key + kSpan) - key;
            logit = x[chosen];
        }
        int64_t token = alive ? p.group * kSpan + chosen : -1;
        if (const int64_t given = judged ? as<const int64_t>(judged)[row] : -1; given >= 0) {
            token = given;
            if (!drawn || given / kSpan != p.group) inside(h, row, given / kSpan, next, x);
            logit = x[given % kSpan];
        }
        as<int64_t>(token_)[row] = token;
        const float values[5] = {token >= 0 ? logit : kLowest, p.top, p.second,
                                 alive ? static_cast<float>(p.top + std::log(p.sums.mass * 0x1p-48)) : kLowest,
                                 alive ? static_cast<float>(p.top + p.sums.weighted / p.sums.mass) : 0.0f};
        for (int64_t i = 0; i < 5; ++i) as<float>(values_)[i * h.rows + row] = values[i];
    };
    const int64_t each = std::max<int64_t>(1, std::min(kTogether, (h.rows + workers - 1) / workers));
    parallel((h.rows + each - 1) / each, workers, [&](int64_t task) {
        Picked picked[kTogether];
        const int64_t first = task * each, rows = std::min(each, h.rows - first);
        for (int64_t i = 0; i < rows; ++i) picked[i] = pick(first + i);
        for (int64_t i = 0; i < rows; ++i) finish(first + i, picked[i], picked[std::min(i + 1, rows - 1)].group);
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
