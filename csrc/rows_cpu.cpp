// Residual norm, activations and rotation on the CPU, and their gradients. See layer.h.
//
// A row's results are the same bits whatever thread or batch computes it.
#include "layer.h"
#include "parallel.h"
#include "rows.h"

namespace loopmdm {
namespace {

constexpr int64_t kParts = 64;    // at most so many sums of a weight's gradient, each of the same rows whatever thread adds
constexpr int64_t kPartRows = 8;  // rows of such a sum, at least

// The functions of one instruction set. Rotation alone is not FUSED: its bits are torch's.
#define OF_LEVEL(level, target)                                                                                       \
    target void rotate##level(const char* x, int64_t stride, int64_t rows, int64_t dim, const Rotation& with,         \
                              char* to, bool bf16) {                                                                  \
        if (bf16) rotate<true>(x, stride, rows, dim, with, to);                                                       \
        else rotate<false>(x, stride, rows, dim, with, to);                                                           \
    }                                                                                                                 \
    FUSED target void norm_row##level(const NormRows& n, const char* x, int64_t row, float* wide_row) {               \
        if (n.x_bf16 && n.out_bf16) norm_row<true, true>(n, x, row, wide_row);                                        \
        else if (n.x_bf16) norm_row<true, false>(n, x, row, wide_row);                                                \
        else if (n.out_bf16) norm_row<false, true>(n, x, row, wide_row);                                              \
        else norm_row<false, false>(n, x, row, wide_row);                                                             \
    }                                                                                                                 \
    FUSED target void act_row##level(const char* x, const char* other, char* out, int64_t n, int which, bool bf16) {  \
        if (bf16) act_row<true>(x, other, out, n, which);                                                             \
        else act_row<false>(x, other, out, n, which);                                                                 \
    }                                                                                                                 \
    FUSED target void norm_grad_row##level(const NormGradient& n, const char* x, int64_t row, float* wide_row,        \
                                           float* dweight, float* dbias) {                                            \
        if (n.x_bf16 || n.weight_bf16 || n.out_bf16) norm_grad_row<false>(n, x, row, wide_row, dweight, dbias);       \
        else norm_grad_row<true>(n, x, row, wide_row, dweight, dbias);                                                \
    }                                                                                                                 \
    FUSED target void act_grad_row##level(const char* g, const char* x, const char* o, char* dx, char* d, int64_t n,  \
                                          int which, bool bf16) {                                                     \
        if (bf16) act_grad_row<true>(g, x, o, dx, d, n, which);                                                       \
        else act_grad_row<false>(g, x, o, dx, d, n, which);                                                           \
    }

OF_LEVEL(_v1, )
#ifdef LOOPMDM_X86
OF_LEVEL(_v3, V3)
OF_LEVEL(_v4, V4)
#endif

struct Kernels {
    decltype(&rotate_v1) rotate;
    decltype(&norm_row_v1) norm_row;
    decltype(&act_row_v1) act_row;
    decltype(&norm_grad_row_v1) norm_grad_row;
    decltype(&act_grad_row_v1) act_grad_row;
};
#define KERNELS(level) {rotate##level, norm_row##level, act_row##level, norm_grad_row##level, act_grad_row##level}

Kernels choose() {
#ifdef LOOPMDM_X86
    if (best_level() >= 4) return KERNELS(_v4);
    if (best_level() >= 3) return KERNELS(_v3);
#endif
    return KERNELS(_v1);
}
const Kernels kernels = choose();

// step(row) on all rows, by several threads where there is enough to do.
template <typename Step>
void by_row(int64_t rows, int64_t operations, int threads, const Step& step) {
    const int64_t workers = worth(rows * operations, threads), each = std::max<int64_t>(1, rows / (4 * workers));
    parallel((rows + each - 1) / each, workers, [&](int64_t task) {
        for (int64_t r = task * each; r < std::min(rows, (task + 1) * each); ++r) step(r);
    });
}

// Where a row of x begins, in elements.
template <typename Rows>
int64_t start(const Rows& n, int64_t row) {
    return row / n.inner * n.outer_stride + row % n.inner * n.inner_stride;
}

}  // namespace

void residual_norm_cpu(const NormRows& n, int threads) {
    by_row(n.outer * n.inner, n.dim * 16, threads, [&](int64_t r) {
        thread_local Buffer buffer;
        kernels.norm_row(n, as<const char>(n.x) + start(n, r) * (n.x_bf16 ? 2 : 4), r, buffer.get<float>(up(n.dim, 16)));
    });
}

void residual_norm_backward_cpu(const NormGradient& n, int threads) {
    const int64_t rows = n.outer * n.inner, each = std::max(kPartRows, (rows + kParts - 1) / kParts), D = up(n.dim, 16);
    const int64_t parts = (rows + each - 1) / each, gradients = !!n.dweight + !!n.dbias;
    thread_local Buffer kept;
    float* sums = kept.get<float>(parts * gradients * D);
    parallel(parts, worth(rows * n.dim * 32, threads), [&](int64_t part) {
        thread_local Buffer buffer;
        float *wide_row = buffer.get<float>(2 * D), *own = sums + part * gradients * D;
        memset(own, 0, gradients * D * sizeof(float));
        for (int64_t r = part * each; r < std::min(rows, (part + 1) * each); ++r)
            kernels.norm_grad_row(n, as<const char>(n.x) + start(n, r) * (n.x_bf16 ? 2 : 4), r, wide_row,
                                  n.dweight ? own : nullptr, n.dbias ? own + !!n.dweight * D : nullptr);
    });
    for (int64_t i = 0; i < gradients; ++i) {
        float* to = as<float>(i || !n.dweight ? n.dbias : n.dweight);
        memcpy(to, sums + i * D, n.dim * sizeof(float));
        for (int64_t part = 1; part < parts; ++part)
            for (int64_t c = 0; c < n.dim; ++c) to[c] += sums[(part * gradients + i) * D + c];
    }
}

void activation_cpu(uintptr_t x, uintptr_t other, uintptr_t out, int64_t rows, int64_t cols, int64_t stride,
                    int64_t up_stride, int act, bool is_bf16, int threads) {
    const int64_t size = is_bf16 ? 2 : 4;
    by_row(rows, cols * 16, threads, [&](int64_t r) {
        kernels.act_row(as<const char>(x) + r * stride * size, as<const char>(other) + r * up_stride * size,
                        as<char>(out) + r * cols * size, cols, act, is_bf16);
    });
}

void activation_backward_cpu(const ActivationGradient& a, int threads) {
    const int64_t size = a.is_bf16 ? 2 : 4;
    by_row(a.rows, a.cols * 32, threads, [&](int64_t r) {
        const int64_t at = r * a.stride * size, up_at = r * a.up_stride * size;
        kernels.act_grad_row(as<const char>(a.grad) + r * a.cols * size, as<const char>(a.x) + at, as<const char>(a.up) + up_at,
                             as<char>(a.dx) + at, as<char>(a.dup) + up_at, a.cols, a.act, a.is_bf16);
    });
}

void rotate_cpu(const RotateHeads& r, int threads) {
    const int64_t size = r.is_bf16 ? 2 : 4;
    by_row(r.batch * r.tokens, r.heads * r.dim * 8, threads, [&](int64_t row) {
        const int64_t b = row / r.tokens, t = row % r.tokens, table = b * r.rope_batch + t * (r.dim / 2);
        const Rotation with{as<const float>(r.cos) + table, as<const float>(r.sin) + table, 0, r.interleaved, r.rounded,
                            r.back};
        kernels.rotate(as<const char>(r.x) + (b * r.x_at[0] + t * r.x_at[1]) * size, r.x_at[2] * size, r.heads, r.dim, with,
                       as<char>(r.out) + row * r.heads * r.dim * size, r.is_bf16);
    });
}

}  // namespace loopmdm
