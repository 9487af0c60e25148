// Attention with rotary positions on the CPU. See layer.h.
//
// A result is the same bits whatever thread or batch computes it.
#include <cmath>
#include <limits>

#include "layer.h"
#include "parallel.h"
#include "rows.h"

namespace loopmdm {
namespace {

constexpr int64_t kRows = 24;            // queries of a tile: a multiple of the rows of every product below
constexpr int64_t kKeys = 256;           // keys of a step: their scores stay in the first cache
constexpr int64_t kStride = kKeys + 16;  // rows of scores do not lie a page apart
constexpr int64_t kScratch = 32 << 20;   // bytes of packed keys and values at a time, if one head needs no more
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// panels[column / 64][key][column % 64] = v, for bf16 words of two keys; zeros for keys from n to `all`, and up to a
// multiple of 16 columns. `words` are those of a whole panel.
template <bool Bf16>
INLINE void values(const char* v, int64_t stride, int64_t n, int64_t all, int64_t dim, int64_t words, uint32_t* panels) {
    constexpr int64_t S = Bf16 ? 2 : 4, K = Bf16 ? 2 : 1;
    for (int64_t k = 0; k < all; k += K, v += K * stride, panels += kPanel) {
        fetch(v, stride, dim * S);
        if (Bf16) fetch(v + stride, stride, dim * S);
        for (int64_t c = 0; c < dim; c += 16) {
            u16 x = {};
            if (k < n) x = (u16)get(v + S * c, Bf16, dim - c);
            if constexpr (Bf16) {
                x >>= 16;
                if (k + 1 < n) x |= (u16)get(v + stride + S * c, true, dim - c);
            }
            memcpy(panels + c / kPanel * words * kPanel + c % kPanel, &x, sizeof x);
        }
    }
}

// 2^y with a relative error of 3e-6, which bf16 does not show.
INLINE v16 power4(v16 y) {
    const v16 z = y + kExact, r = y - (z - kExact);
    v16 p = r * 0.00957011f + 0.0559179f;
    p = p * r + 0.24024745f;
    p = p * r + 0.69312181f;
    p = p * r + 1.0f;
    return (v16)((u16)p + ((u16)z << 23));
}

// One row's softmax so far: exponents are powers of two, `most` the largest, `total` the sum.
struct Soft {
    float most, total;
};

// s[0, n) scores become their unnormalised probabilities, zeros from n to `all`, and for bf16 are stored as such from s on.
// Returns what the probabilities of earlier keys are to be multiplied with.
template <bool Bf16>
INLINE float soften(float* s, int64_t n, int64_t all, float scale, const uint8_t* mask, Soft& soft) {
    v16 most = (v16){} + kLowest;
    i16 odd = {};
    for (int64_t i = n; i < all; ++i) s[i] = kLowest;
    if (mask) {
        for (int64_t i = 0; i < all; i += 16) {
            b16 seen = {};
            memcpy(&seen, mask + i, std::max<int64_t>(0, std::min<int64_t>(16, n - i)));
            v16 x = load<v16>(s + i);
            x = __builtin_convertvector(seen, i16) != 0 ? x : (v16){} + kLowest;
            memcpy(s + i, &x, sizeof x);
        }
    }
    for (int64_t i = 0; i < all; i += 16) {
        const v16 x = load<v16>(s + i);
        most = x > most ? x : most;
        odd |= x != x;
    }
    const float before = soft.most;
    float top = std::max(before, largest(most) * scale);
    bool lost = soft.total != soft.total;
    if (sum((u16)odd)) lost = true;
    soft.most = top;
    v16 total = {};
    char* to = reinterpret_cast<char*>(s);
    if (lost || top == kLowest) {
        memset(s, 0, all * (Bf16 ? 2 : 4));
    } else {
        for (int64_t i = 0; i < all; i += 16) {
            const v16 y = load<v16>(s + i) * scale - top;
            const v16 p = y > -125.0f ? (Bf16 ? power4(y) : power(y, kExact)) : (v16){};
            total += p;
            if constexpr (Bf16) {
                const h16 nearest = __builtin_convertvector(((u16)p + 0x8000) >> 16, h16);  // p is in [0, 1.01]
                memcpy(to + 2 * i, &nearest, sizeof nearest);
            } else {
                memcpy(to + 4 * i, &p, sizeof p);
            }
        }
    }
    const float less = before == top ? 1.0f : std::exp2(before - top);
    soft.total = lost ? std::numeric_limits<float>::quiet_NaN() : soft.total * less + sum(total);
    return less;
}

INLINE void finish(const float* x, int64_t dim, const Soft& soft, bool bf16, char* out) {
    const float by = soft.most == kLowest && soft.total == 0 ? 0.0f : 1 / soft.total;
    for (int64_t i = 0; i < dim; i += 16) put(out + i * (bf16 ? 2 : 4), bf16, load<v16>(x + i) * by, dim - i);
}

INLINE void add_scaled(float* x, float by, const float* more, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const v16 y = load<v16>(x + i) * by + load<v16>(more + i);
        memcpy(x + i, &y, sizeof y);
    }
}

// out [rows][out_stride] = x . panel for `cols` columns, a multiple of 16 and at most 64. Whole tiles: rows are rounded up
// to one of R rows.
#define ACROSS(kernel, R, columns)                                                                                    \
    for (int64_t c = 0; c + (columns) <= cols; c += (columns))                                                        \
        for (int64_t r = 0; r < rows; r += (R))                                                                       \
            kernel(x + r * stride, stride, panel + c, bytes, out + r * out_stride + c, out_stride);
#define PRODUCT(name, body)                                                                                           \
    void name(const char* x, int64_t stride, int64_t rows, const uint32_t* panel, int64_t cols, int64_t bytes,        \
              float* out, int64_t out_stride) {                                                                       \
        body                                                                                                          \
    }
#define BY_WIDTH(one, two, three, four)                                                                               \
    if (cols == 64) ACROSS((four), 6, 64)                                                                             \
    else if (cols == 48) ACROSS((three), 8, 48)                                                                       \
    else if (cols == 32) ACROSS((two), 12, 32)                                                                        \
    else ACROSS((one), 12, 16)

// The functions of one instruction set. Rotation alone is not FUSED: its bits are torch's.
#define OTHERS(level, target, wide_pack)                                                                              \
    target void rotate_fp32##level(const char* x, int64_t stride, int64_t rows, int64_t dim, const Rotation& with,    \
                                   char* to) {                                                                        \
        rotate<false>(x, stride, rows, dim, with, to);                                                                \
    }                                                                                                                 \
    target void rotate_bf16##level(const char* x, int64_t stride, int64_t rows, int64_t dim, const Rotation& with,    \
                                   char* to) {                                                                        \
        rotate<true>(x, stride, rows, dim, with, to);                                                                 \
    }                                                                                                                 \
    target void pack##level(const char* w, int64_t cols, int64_t bytes, uint32_t* panel) {                            \
        loopmdm::pack<wide_pack>(w, cols, bytes, panel);                                                              \
    }                                                                                                                 \
    target void values_fp32##level(const char* v, int64_t stride, int64_t n, int64_t all, int64_t dim, int64_t words, \
                                   uint32_t* panels) {                                                                \
        values<false>(v, stride, n, all, dim, words, panels);                                                         \
    }                                                                                                                 \
    target void values_bf16##level(const char* v, int64_t stride, int64_t n, int64_t all, int64_t dim, int64_t words, \
                                   uint32_t* panels) {                                                                \
        values<true>(v, stride, n, all, dim, words, panels);                                                          \
    }                                                                                                                 \
    FUSED target float soften_fp32##level(float* s, int64_t n, int64_t all, float scale, const uint8_t* mask,         \
                                          Soft& soft) {                                                               \
        return soften<false>(s, n, all, scale, mask, soft);                                                           \
    }                                                                                                                 \
    FUSED target float soften_bf16##level(float* s, int64_t n, int64_t all, float scale, const uint8_t* mask,         \
                                          Soft& soft) {                                                               \
        return soften<true>(s, n, all, scale, mask, soft);                                                            \
    }                                                                                                                 \
    FUSED target void finish##level(const float* x, int64_t dim, const Soft& soft, bool bf16, char* out) {            \
        if (bf16) finish(x, dim, soft, true, out);                                                                    \
        else finish(x, dim, soft, false, out);                                                                        \
    }                                                                                                                 \
    FUSED target void add_scaled##level(float* x, float by, const float* more, int64_t n) {                           \
        add_scaled(x, by, more, n);                                                                                   \
    }

FUSED PRODUCT(product_fp32, ACROSS((tile<v4, u4, false, 2, 4>), 2, 16))
FUSED PRODUCT(product_bf16, ACROSS((tile<v4, u4, true, 2, 4>), 2, 16))
OTHERS(_v1, , false)
#ifdef LOOPMDM_X86
FUSED V3 PRODUCT(product_fp32_v3, ACROSS((tile<v8, u8, false, 6, 2>), 6, 16))
FUSED V3 PRODUCT(product_bf16_v3, ACROSS((tile<v8, u8, true, 4, 2>), 4, 16))
OTHERS(_v3, V3, false)
FUSED V4 PRODUCT(product_fp32_v4, BY_WIDTH((tile<v16, u16, false, 12, 1>), (tile<v16, u16, false, 12, 2>),
                                           (tile<v16, u16, false, 8, 3>), (tile<v16, u16, false, 6, 4>)))
FUSED V4 PRODUCT(product_bf16_v4, BY_WIDTH((tile<v16, u16, true, 12, 1>), (tile<v16, u16, true, 12, 2>),
                                           (tile<v16, u16, true, 8, 3>), (tile<v16, u16, true, 6, 4>)))
OTHERS(_v4, V4, true)
BF16 PRODUCT(product_bf16_dot, BY_WIDTH((tile_dot<12, 1>), (tile_dot<12, 2>), (tile_dot<8, 3>), (tile_dot<6, 4>)))
#endif

struct Kernels {
    decltype(&product_fp32) product[2];  // of fp32, of bf16; and so on
    decltype(&rotate_fp32_v1) rotate[2];
    decltype(&pack_v1) pack;
    decltype(&values_fp32_v1) values[2];
    decltype(&soften_fp32_v1) soften[2];
    decltype(&finish_v1) finish;
    decltype(&add_scaled_v1) add_scaled;
};
#define KERNELS(level)                                                                                                \
    {{product_fp32, product_bf16},           {rotate_fp32##level, rotate_bf16##level},                                \
     pack##level,  {values_fp32##level, values_bf16##level}, {soften_fp32##level, soften_bf16##level},                \
     finish##level, add_scaled##level}

Kernels choose() {
    Kernels k = KERNELS(_v1);
#ifdef LOOPMDM_X86
    const int level = best_level();
    if (level >= 3) {
        k = KERNELS(_v3);
        k.product[0] = product_fp32_v3, k.product[1] = product_bf16_v3;
    }
    if (level >= 4) {
        k = KERNELS(_v4);
        k.product[0] = product_fp32_v4, k.product[1] = level >= 5 ? product_bf16_dot : product_bf16_v4;
    }
#endif
    return k;
}
const Kernels kernels = choose();

// Where one key head's rotated keys and its values lie, in words.
struct Packed {
    int64_t size, keys, words;  // keys: a multiple of 64; words: of one panel of values
    explicit Packed(const RotaryAttention& a)
        : size(a.is_bf16 ? 2 : 4), keys(up(a.tokens, kPanel)), words(a.is_bf16 ? keys / 2 : keys) {}
    int64_t key_words(const RotaryAttention& a) const { return a.dim * size / 4 * keys; }
    int64_t all(const RotaryAttention& a) const { return key_words(a) + up(a.dim, kPanel) * words; }
};

// 64 keys of one head.
void pack_keys(const RotaryAttention& a, const Packed& p, int64_t b, int64_t g, int64_t first, uint32_t* to) {
    thread_local Buffer rotated;
    const int64_t n = std::min(kPanel, a.tokens - first), table = b * a.rope_batch + first * (a.dim / 2);
    char* rows = rotated.get<char>(kPanel * a.dim * p.size);
    const char* k = as<const char>(a.k) + (b * a.k_at[0] + first * a.k_at[1] + g * a.k_at[2]) * p.size;
    const Rotation with{a.cos ? as<const float>(a.cos) + table : nullptr, a.cos ? as<const float>(a.sin) + table : nullptr,
                        a.dim / 2, a.interleaved, a.rounded, false};
    kernels.rotate[a.is_bf16](k, a.k_at[1] * p.size, n, a.dim, with, rows);
    kernels.pack(rows, n, a.dim * p.size, to + first * (a.dim * p.size / 4));
    const char* v = as<const char>(a.v) + (b * a.v_at[0] + first * a.v_at[1] + g * a.v_at[2]) * p.size;
    const int64_t before = first * p.words / p.keys;
    kernels.values[a.is_bf16](v, a.v_at[1] * p.size, n, up(n, 16), a.dim, p.words, to + p.key_words(a) + before * kPanel);
}

// Up to kRows queries of one head from `first` on.
void attend(const RotaryAttention& a, const Packed& p, int64_t b, int64_t h, int64_t first, const uint32_t* packed) {
    thread_local Buffer buffer;
    const int64_t rows = std::min(kRows, a.rows - first), dim = up(a.dim, 16), is = a.is_bf16;
    float* scores = buffer.get<float>(kRows * (kStride + 2 * dim + a.dim));
    float *out = scores + kRows * kStride, *more = out + kRows * dim;
    char* q = reinterpret_cast<char*>(more + kRows * dim);
    const int64_t table = b * a.q_rope_batch + first * (a.dim / 2);
    const Rotation with{a.q_cos ? as<const float>(a.q_cos) + table : nullptr,
                        a.q_cos ? as<const float>(a.q_sin) + table : nullptr, a.dim / 2, a.interleaved, a.rounded, false};
    const char* x = as<const char>(a.q) + (b * a.q_at[0] + first * a.q_at[1] + h * a.q_at[2]) * p.size;
    kernels.rotate[is](x, a.q_at[1] * p.size, rows, a.dim, with, q);
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(a.dim));
    Soft soft[kRows];
    for (auto& s : soft) s = {kLowest, 0};
    const int64_t seen = a.causal ? std::min(a.tokens, first + rows) : a.tokens;
    for (int64_t k = 0; k < seen; k += kKeys) {
        const int64_t n = std::min(kKeys, seen - k), all = up(n, 16);
        for (int64_t c = 0; c < all; c += kPanel)
            kernels.product[is](q, a.dim * p.size, rows, packed + (k + c) * (a.dim * p.size / 4), std::min(kPanel, all - c),
                                a.dim * p.size, scores + c, kStride);
        float less[kRows];
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* mask = a.mask ? as<const uint8_t>(a.mask) + b * a.mask_batch + (first + r) * a.mask_row + k : nullptr;
            const int64_t own = a.causal ? std::max<int64_t>(0, std::min(n, first + r + 1 - k)) : n;
            less[r] = kernels.soften[is](scores + r * kStride, own, all, scale, mask, soft[r]);
        }
        float* to = k ? more : out;
        for (int64_t c = 0; c < dim; c += kPanel)
            kernels.product[is](reinterpret_cast<char*>(scores), kStride * 4, rows,
                                packed + p.key_words(a) + (c * p.words + k * p.words / p.keys * kPanel),
                                std::min(kPanel, dim - c), all * p.size, to + c, dim);
        for (int64_t r = 0; k && r < rows; ++r) kernels.add_scaled(out + r * dim, less[r], more + r * dim, dim);
    }
    char* to = as<char>(a.out) + ((b * a.rows + first) * a.heads + h) * a.dim * p.size;
    for (int64_t r = 0; r < rows; ++r)
        kernels.finish(out + r * dim, a.dim, soft[r], a.is_bf16, to + r * a.heads * a.dim * p.size);
}

}  // namespace

int cpu_level() { return best_level(); }

void rotary_attention_cpu(const RotaryAttention& a, int threads) {
    thread_local Buffer packed;
    const Packed p(a);
    const int64_t each = p.all(a), heads = a.batch * a.groups, blocks = p.keys / kPanel, shared = a.heads / a.groups;
    const int64_t tiles = (a.rows + kRows - 1) / kRows;
    const auto pack = [&](int64_t head, int64_t block, uint32_t* to) {
        pack_keys(a, p, head / a.groups, head % a.groups, block * kPanel, to);
    };
    const auto tile = [&](int64_t head, int64_t i, int64_t at, const uint32_t* from) {
        attend(a, p, head / a.groups, head % a.groups * shared + i, at * kRows, from);
    };
    const int64_t busy = worth(heads * shared * a.rows * a.tokens * a.dim * 4, threads);
    if ((heads % busy == 0 || heads >= 8 * busy) && each * busy * 4 <= kScratch) {
        // a key head is one thread's own: what it packs stays in its cache
        return parallel(heads, busy, [&](int64_t head) {
            uint32_t* to = packed.get<uint32_t>(each);
            for (int64_t block = 0; block < blocks; ++block) pack(head, block, to);
            for (int64_t i = 0; i < shared; ++i)
                for (int64_t at = 0; at < tiles; ++at) tile(head, i, at, to);
        });
    }
    const int64_t some = std::max<int64_t>(1, std::min(heads, kScratch / (4 * each)));
    uint32_t* scratch = packed.get<uint32_t>(some * each);
    for (int64_t first = 0; first < heads; first += some) {
        const int64_t now = std::min(some, heads - first);
        parallel(now * blocks, worth(now * a.tokens * a.dim * 8, threads), [&](int64_t task) {
            pack(first + task / blocks, task % blocks, scratch + task / blocks * each);
        });
        const int64_t workers = worth(now * shared * a.rows * a.tokens * a.dim * 4, threads);
        const int64_t run = std::max<int64_t>(1, std::min(tiles, now * shared * tiles / (8 * workers)));
        const int64_t runs = (tiles + run - 1) / run;
        parallel(now * shared * runs, workers, [&](int64_t task) {
            const int64_t at = task / runs / shared, end = std::min(tiles, (task % runs + 1) * run);
            for (int64_t i = task % runs * run; i < end; ++i) tile(first + at, task / runs % shared, i, scratch + at * each);
        });
    }
    packed.trim();
}

}  // namespace loopmdm
