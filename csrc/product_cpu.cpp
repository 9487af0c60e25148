// Products with packed bf16 weights, and a layer that keeps its activations in the processor's second cache. See product.h.
//
// A task is a block of rows: it takes them through everything from one attention to the next, so that between two products
// lies neither a thread's barrier nor memory. A result is the same bits whatever thread or batch computes it.
#include <algorithm>
#include <stdexcept>

#include "parallel.h"
#include "product.h"
#include "rows.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace loopmdm {

namespace {
int64_t filled(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
}  // namespace

int64_t packed_words(int64_t cols, int64_t depth, int64_t parts) { return parts * filled(cols / parts) * filled(depth) / 2; }

void huge_pages(uintptr_t at, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t from = (at + page - 1) / page * page, to = (at + bytes) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // or else smaller ones will do
#endif
    (void)at, (void)bytes;
}

#ifdef LOOPMDM_X86
namespace {

#define HOT FUSED BF16

constexpr int64_t kBlock = 128;  // rows of a task: with what becomes of them they fit the second cache
constexpr int64_t kChunk = 512;  // columns of an MLP that exist at a time
constexpr int64_t kSlack = 4;    // rows behind the last one that whole tiles read and write

// tile [rows][64] = x . panel, by tiles of 6 rows and the rest by tiles of 4. Meanwhile as much of what lies behind the panel
// is fetched, mostly the next one: the processor's own foresight ends where a page does.
HOT void product(const char* x, int64_t stride, int64_t rows, const uint32_t* panel, int64_t bytes, float* tile) {
    const int64_t over = rows % 6;
    const int64_t sixes = std::max<int64_t>(0, over == 0 || over > 2 ? rows / 6 + (over == 5) : rows / 6 - 1);
    const char *next = reinterpret_cast<const char*>(panel) + kPanel * bytes, *end = next + kPanel * bytes;
    int64_t r = 0;
    for (; r < 6 * sixes && next < end; r += 6, next += 6 * bytes)
        tile_dot<6, 4, true>(x + r * stride, stride, panel, bytes, tile + r * kPanel, kPanel, 16, next);
    for (; r < 6 * sixes; r += 6) tile_dot<6, 4>(x + r * stride, stride, panel, bytes, tile + r * kPanel, kPanel);
    for (; r < rows; r += 4) tile_dot<4, 4>(x + r * stride, stride, panel, bytes, tile + r * kPanel, kPanel);
}

// The next functions take `rows` rows of such a tile, of which `cols` columns count. bias is bf16; it and gate may be null.
INLINE v16 part(const char* bias, int64_t i, int64_t cols) { return bias ? get(bias + 2 * i, true, cols - i) : (v16){}; }
HOT void store(const float* tile, int64_t rows, int64_t cols, const char* bias, char* out, int64_t stride) {
    for (int64_t i = 0; i < cols; i += 16) {
        const v16 b = part(bias, i, cols);
        for (int64_t r = 0; r < rows; ++r) put(out + r * stride + 2 * i, true, load<v16>(tile + r * kPanel + i) + b, cols - i);
    }
}
HOT void accumulate(const float* tile, int64_t rows, int64_t cols, const char* bias, const float* gate, float* sum,
                    int64_t stride) {
    for (int64_t i = 0; i < cols; i += 16) {
        const v16 b = part(bias, i, cols), g = gate ? load<v16>(gate + i) : (v16){} + 1.0f;
        for (int64_t r = 0; r < rows; ++r) {
            const v16 y = load<v16>(sum + r * stride + i) + (load<v16>(tile + r * kPanel + i) + b) * g;
            memcpy(sum + r * stride + i, &y, sizeof y);
        }
    }
}
template <int Act>
INLINE void activate(const float* tile, const float* other, int64_t rows, int64_t cols, const char* bias,
                     const char* other_bias, char* out, int64_t stride) {
    for (int64_t i = 0; i < kPanel; i += 16) {
        const v16 b = i < cols ? part(bias, i, cols) : (v16){}, c = i < cols ? part(other_bias, i, cols) : (v16){};
        for (int64_t r = 0; r < rows; ++r) {
            const v16 x = load<v16>(tile + r * kPanel + i) + b;
            put(out + r * stride + 2 * i, true, act<Act>(x, Act == kSwiglu ? load<v16>(other + r * kPanel + i) + c : x));
        }
    }
}
HOT void activate(int act, const float* tile, const float* other, int64_t rows, int64_t cols, const char* bias,
                  const char* other_bias, char* out, int64_t stride) {
    if (act == kSwiglu) activate<kSwiglu>(tile, other, rows, cols, bias, other_bias, out, stride);
    else if (act == kGeluTanh) activate<kGeluTanh>(tile, tile, rows, cols, bias, bias, out, stride);
    else activate<kRelu2>(tile, tile, rows, cols, bias, bias, out, stride);
}
HOT void norm(const NormRows& n, const char* x, bool bf16, int64_t row, float* wide_row) {
    if (bf16) norm_row<true, true>(n, x, row, wide_row);
    else norm_row<false, true>(n, x, row, wide_row);
}
HOT void copy(const char* x, bool from_bf16, char* out, bool to_bf16, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) put(out + i * (to_bf16 ? 2 : 4), to_bf16, get(x + i * (from_bf16 ? 2 : 4), from_bf16));
}
V4 void pack_panel(const char* w, int64_t stride, int64_t cols, int64_t bytes, uint32_t* panel) {
    pack<true>(w, stride, cols, bytes, panel);
}

using Product = LayerWeights::Product;
const float* at(uintptr_t vector, int64_t i) { return vector ? as<const float>(vector) + i : nullptr; }
const char* bias_at(const Product& p, int64_t i) { return p.bias ? as<const char>(p.bias) + 2 * i : nullptr; }
const uint32_t* panel_at(const Product& p, int64_t col, int64_t depth) {  // of the panel that begins with column `col`
    return as<const uint32_t>(p.weight) + col * filled(depth) / 2;
}

// One visit of a layer by a call.
struct Pass {
    const LayerVisit& visit;
    const LayerWeights& w;
    const char* x;           // the stream [batch][tokens][dim]
    char* to;                // [batch][rows][dim]
    const int64_t* rows_at;  // null: all
    const RotaryAttention& a;
    bool is_bf16;
    char *q, *kv, *y;  // [rows][q_cols], [tokens][k_cols + k_cols], [rows][q_cols]; all in one q lies before k

    int64_t size() const { return is_bf16 ? 2 : 4; }
    int64_t q_cols() const { return w.heads * w.head_dim; }
    int64_t k_cols() const { return w.groups * w.head_dim; }
    int64_t row_cols() const { return (rows_at ? 0 : q_cols()) + 2 * k_cols(); }  // that all tokens have of q, k and v
    const char* source(int64_t row) const {  // of a row that comes out
        if (rows_at) row = row / a.rows * a.tokens + rows_at[row];
        return x + row * w.dim * size();
    }

    NormRows norm_of(bool mlp, int64_t rows, char* out) const {
        const LayerVisit& v = visit;
        return {0, 0, mlp ? v.mlp_gain : v.attn_gain, mlp ? v.mlp_bias : v.attn_bias, 0, reinterpret_cast<uintptr_t>(out), 0, 1,
                rows, w.dim, 0, 0, w.eps, w.centre, false, false, mlp ? v.mlp_gain_bf16 : v.attn_gain_bf16,
                mlp ? v.mlp_bias_bf16 : v.attn_bias_bf16, true};
    }

    // Columns [from, to) of norm(x) . (q, k, v), of some rows, to `out`, which begins with column `from`.
    template <typename Source>
    void project(int64_t rows, const Source& source, int64_t from, int64_t to, char* out, int64_t stride) const {
        thread_local Buffer buffer;
        float* tile = buffer.get<float>((kBlock + kSlack) * (kPanel + w.dim / 2) + w.dim);
        float* wide_row = tile + (kBlock + kSlack) * kPanel;
        char* h = reinterpret_cast<char*>(wide_row + w.dim);
        const NormRows n = norm_of(false, rows, h);
        for (int64_t r = 0; r < rows; ++r) norm(n, source(r), is_bf16, r, wide_row);
        const auto columns = [&](const Product& p, int64_t first, int64_t last, char* at) {
            for (int64_t col = first / kPanel * kPanel; col < last; col += kPanel) {
                const int64_t skip = std::max<int64_t>(0, first - col), begin = col + skip;
                product(h, 2 * w.dim, rows, panel_at(p, col, w.dim), 2 * w.dim, tile);
                store(tile + skip, rows, std::min(kPanel, last - col) - skip, bias_at(p, begin), at + 2 * (begin - first), stride);
            }
        };
        if (!w.k.weight) return columns(w.q, from, to, out);
        const int64_t Q = q_cols(), K = k_cols();
        if (!from) columns(w.q, 0, Q, out);
        if (to == Q) return;
        columns(w.k, 0, K, out + 2 * (Q - from));
        columns(w.v, 0, K, out + 2 * (Q + K - from));
    }

    // All that comes behind the attention, of rows [first, first + rows) of those that come out.
    void finish(int64_t first, int64_t rows) const {
        thread_local Buffer buffer;
        const int64_t D = w.dim, Q = q_cols(), all = kBlock + kSlack;
        float* tile = buffer.get<float>(all * 2 * kPanel + D + all * D + all * D / 2 + all * kChunk / 2);
        float *other = tile + all * kPanel, *wide_row = other + all * kPanel, *sum = wide_row + D;
        char *h = reinterpret_cast<char*>(sum + all * D), *u = h + all * D * 2;
        for (int64_t r = 0; r < rows; ++r) copy(source(first + r), is_bf16, reinterpret_cast<char*>(sum + r * D), false, D);
        for (int64_t col = 0; col < D; col += kPanel) {
            product(y + first * Q * 2, 2 * Q, rows, panel_at(w.out, col, Q), 2 * Q, tile);
            accumulate(tile, rows, std::min(kPanel, D - col), bias_at(w.out, col), at(visit.attn_gate, col), sum + col, D);
        }
        const NormRows n = norm_of(true, rows, h);
        for (int64_t r = 0; r < rows; ++r) norm(n, reinterpret_cast<const char*>(sum + r * D), false, r, wide_row);
        for (int64_t from = 0; from < w.hidden; from += kChunk) {
            const int64_t chunk = std::min(kChunk, w.hidden - from);
            for (int64_t col = from; col < from + chunk; col += kPanel) {
                product(h, 2 * D, rows, panel_at(w.gate, col, D), 2 * D, tile);
                if (w.up.weight) product(h, 2 * D, rows, panel_at(w.up, col, D), 2 * D, other);
                activate(w.activation, tile, other, rows, std::min(kPanel, w.hidden - col), bias_at(w.gate, col),
                         bias_at(w.up, col), u + 2 * (col - from), 2 * kChunk);
            }
            for (int64_t col = 0; col < D; col += kPanel) {
                const uint32_t* panel = panel_at(w.down, col, w.hidden) + from / 2 * kPanel;
                product(u, 2 * kChunk, rows, panel, 2 * chunk, tile);
                accumulate(tile, rows, std::min(kPanel, D - col), from ? nullptr : bias_at(w.down, col), at(visit.mlp_gate, col),
                           sum + col, D);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            copy(reinterpret_cast<const char*>(sum + r * D), false, to + (first + r) * D * size(), is_bf16, D);
    }
};

// step(first, n) on blocks of rows, equally long and as many for each thread.
template <typename Step>
void by_block(int64_t rows, int64_t operations, int threads, const Step& step) {
    const int64_t workers = worth(rows * operations, threads);
    const int64_t blocks = up((rows + kBlock - 1) / kBlock, workers), each = (rows + blocks - 1) / blocks;
    parallel((rows + each - 1) / each, workers, [&](int64_t i) { step(i * each, std::min(each, rows - i * each)); });
}

}  // namespace

void pack_weight_cpu(uintptr_t weight, int64_t cols, int64_t depth, int64_t parts, uintptr_t to, int threads) {
    const int64_t words = filled(depth) / 2, part = cols / parts, panels = filled(part) / kPanel;
    parallel(parts * panels, worth(cols * depth, threads), [&](int64_t i) {
        const int64_t col = i % panels * kPanel;
        auto* panel = as<uint32_t>(to) + i * words * kPanel;
        pack_panel(as<const char>(weight) + (i / panels * part + col) * depth * 2, depth * 2, std::min(kPanel, part - col),
                   depth * 2, panel);
        std::fill(panel + (depth + 1) / 2 * kPanel, panel + words * kPanel, 0);
    });
}

void packed_linear_cpu(uintptr_t x, int64_t stride, int64_t rows, uintptr_t weight, int64_t cols, int64_t depth,
                       int64_t parts, uintptr_t bias, uintptr_t out, int threads) {
    const int64_t part = cols / parts, each_part = filled(part) / kPanel, panels = parts * each_part;
    const int64_t blocks = (rows + kBlock - 1) / kBlock, each = (rows + blocks - 1) / blocks;
    const int64_t workers = worth(2 * rows * depth * cols, threads);
    const int64_t runs = std::min(panels, std::max<int64_t>(1, 4 * workers / blocks));
    const Product product_of{weight, bias};
    parallel(blocks * runs, workers, [&](int64_t task) {
        thread_local Buffer buffer;
        const int64_t first = task / runs * each, n = std::min(each, rows - first), bytes = filled(depth) * 2;
        float* tile = buffer.get<float>((kBlock + kSlack) * (kPanel + bytes / 4));
        char* own = reinterpret_cast<char*>(tile + (kBlock + kSlack) * kPanel);
        for (int64_t r = 0; r < n; ++r) memcpy(own + r * bytes, as<const char>(x) + (first + r) * stride * 2, 2 * depth);
        for (int64_t p = task % runs * panels / runs; p < (task % runs + 1) * panels / runs; ++p) {
            const int64_t inside = p % each_part * kPanel, col = p / each_part * part + inside;
            product(own, bytes, n, panel_at(product_of, p * kPanel, depth), 2 * depth, tile);
            store(tile, n, std::min(kPanel, part - inside), bias_at(product_of, col), as<char>(out) + 2 * (first * cols + col),
                  2 * cols);
        }
    });
}

void layers_cpu(const std::vector<LayerVisit>& visits, const LayersCall& c, int threads) {
    thread_local Buffer buffer, streams;
    const LayerWeights& w = *visits[0].weights;
    const int64_t all = c.between.batch * c.between.tokens, kept = c.last.batch * c.last.rows, size = c.is_bf16 ? 2 : 4;
    const int64_t q_cols = w.heads * w.head_dim, cols = q_cols + 2 * w.groups * w.head_dim;
    char* qkv = buffer.get<char>(2 * (all * cols + (all + kSlack + kept) * q_cols));
    char *y = qkv + 2 * all * cols, *few = y + 2 * (all + kSlack) * q_cols;
    // what is between two layers lies in `out` where that is large enough
    char* stream = c.rows ? streams.get<char>(all * w.dim * size) : as<char>(c.out);
    const auto pass = [&](size_t i) {
        const bool last = i + 1 == visits.size(), some = last && c.rows;
        return Pass{visits[i], *visits[i].weights, i ? stream : as<const char>(c.x), last ? as<char>(c.out) : stream,
                    some ? as<const int64_t>(c.rows) : nullptr, last ? c.last : c.between, c.is_bf16,
                    some ? few : qkv, some ? qkv : qkv + 2 * q_cols, y};
    };
    const auto project = [&](const Pass& p, int64_t first, int64_t n) {
        const auto source = [&](int64_t r) { return p.x + (first + r) * w.dim * size; };
        p.project(n, source, cols - p.row_cols(), cols, qkv + 2 * first * p.row_cols(), 2 * p.row_cols());
    };
    by_block(all, 2 * w.dim * cols, threads, [&](int64_t first, int64_t n) { project(pass(0), first, n); });
    for (size_t i = 0; i < visits.size(); ++i) {
        const Pass p = pass(i);
        const bool more = i + 1 < visits.size();
        if (p.rows_at)
            by_block(kept, 2 * w.dim * q_cols, threads, [&](int64_t first, int64_t n) {
                p.project(n, [&](int64_t r) { return p.source(first + r); }, 0, q_cols, few + 2 * first * q_cols, 2 * q_cols);
            });
        RotaryAttention a = p.a;
        const int64_t row = p.row_cols(), rows[3] = {p.rows_at ? q_cols : row, row, row};
        const int64_t positions[3] = {a.rows, a.tokens, a.tokens};
        int64_t* strides[3] = {a.q_at, a.k_at, a.v_at};
        for (int j = 0; j < 3; ++j) strides[j][0] = positions[j] * rows[j], strides[j][1] = rows[j], strides[j][2] = w.head_dim;
        a.q = reinterpret_cast<uintptr_t>(p.q), a.k = reinterpret_cast<uintptr_t>(p.kv), a.v = a.k + 2 * p.k_cols();
        a.out = reinterpret_cast<uintptr_t>(y);
        a.heads = w.heads, a.groups = w.groups, a.dim = w.head_dim, a.is_bf16 = true;
        rotary_attention_cpu(a, threads);
        const int64_t operations = 2 * (cols + q_cols + (w.up.weight ? 3 : 2) * w.hidden) * w.dim;
        by_block(a.batch * a.rows, operations, threads, [&](int64_t first, int64_t n) {
            p.finish(first, n);
            if (more) project(pass(i + 1), first, n);
        });
    }
    buffer.trim(), streams.trim();
}
#else
namespace {
[[noreturn]] void none() { throw std::runtime_error("this build has no products of packed bf16 weights"); }
}  // namespace
void pack_weight_cpu(uintptr_t, int64_t, int64_t, int64_t, uintptr_t, int) { none(); }
void packed_linear_cpu(uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, int) { none(); }
void layers_cpu(const std::vector<LayerVisit>&, const LayersCall&, int) { none(); }
#endif

}  // namespace loopmdm
