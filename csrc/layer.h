// What lies between a layer's products on the CPU. Pointers and sizes as Python checked them; 0 is null.
#pragma once

#include <cstdint>

namespace loopmdm {

// The best instructions that are here and allowed: 1 plain, 3 AVX2, 4 AVX-512, 5 its bf16 products as well.
int cpu_level();

// out [batch][rows][heads * dim] = softmax(scale * q k^T) v with q and k rotated first. Strides are in elements, those of
// batch, token and head; the last dimension is contiguous. heads is a multiple of groups.
struct RotaryAttention {
    uintptr_t q, k, v, out;                // all bf16 or all fp32
    uintptr_t cos, sin, q_cos, q_sin;      // fp32 [1 or batch][tokens or rows][dim / 2], contiguous; all 0: no rotation
    uintptr_t mask;                        // bool: whether a query may look at a key; 0 for all
    int64_t batch, rows, tokens, heads, groups, dim;
    int64_t q_at[3], k_at[3], v_at[3];
    int64_t rope_batch, q_rope_batch;      // elements from one sequence's table to the next one's, 0 where shared
    int64_t mask_batch, mask_row;          // and of the mask; its last dimension is contiguous
    bool is_bf16, interleaved, rounded, causal;  // rounded: each operation of the rotation is rounded to bf16
};
void rotary_attention_cpu(const RotaryAttention& a, int threads);

// summed = x + branch, out = norm(summed) * weight + bias, over rows of dim numbers. Row (i, j) of outer * inner rows of x
// starts at element i * outer_stride + j * inner_stride; all else is contiguous.
struct NormRows {
    uintptr_t x, branch, weight, bias, summed, out;  // summed is 0 where branch is
    uintptr_t stats;                                 // fp32 [outer * inner][2]: mean and 1 / deviation; 0: not wanted
    int64_t outer, inner, dim, outer_stride, inner_stride;
    float eps;
    bool centre, x_bf16, branch_bf16, weight_bf16, bias_bf16, out_bf16;
};
void residual_norm_cpu(const NormRows& n, int threads);

// Its gradients. x is the sum as stored, laid out as above; dsummed (0: none) and dx are of its dtype, dnormed of out's.
struct NormGradient {
    uintptr_t x, weight, stats, dsummed, dnormed;
    uintptr_t dx, dbranch, dweight, dbias;  // dbranch: 0 where dx serves for it; the last two fp32 [dim], 0: not wanted
    int64_t outer, inner, dim, outer_stride, inner_stride;
    bool centre, x_bf16, branch_bf16, weight_bf16, out_bf16;
};
void residual_norm_backward_cpu(const NormGradient& n, int threads);

enum Activation { kSwiglu, kGeluTanh, kRelu2 };
// out [rows][cols] = act(x), or silu(x) * up; x and up are `stride` and `up_stride` elements from row to row.
void activation_cpu(uintptr_t x, uintptr_t up, uintptr_t out, int64_t rows, int64_t cols, int64_t stride,
                    int64_t up_stride, int act, bool is_bf16, int threads);

// dx and dup, laid out as x and up are, of grad [rows][cols].
struct ActivationGradient {
    uintptr_t grad, x, up, dx, dup;
    int64_t rows, cols, stride, up_stride;
    int act;
    bool is_bf16;
};
void activation_backward_cpu(const ActivationGradient& a, int threads);

// out [batch][tokens][heads][dim] = x rotated, or with `back` rotated back. As in RotaryAttention.
struct RotateHeads {
    uintptr_t x, cos, sin, out;
    int64_t batch, tokens, heads, dim;
    int64_t x_at[3], rope_batch;
    bool is_bf16, interleaved, rounded, back;
};
void rotate_cpu(const RotateHeads& r, int threads);

}  // namespace loopmdm
