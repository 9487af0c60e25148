// Products with packed bf16 weights on the CPU, and a whole layer of them, for inference. Pointers and sizes as Python
// checked them; 0 is null. Only where cpu_level() is 5.
#pragma once

#include <cstdint>
#include <vector>

#include "layer.h"

namespace loopmdm {

// A packed weight [cols][depth]: its rows in `parts` of equal length (gate and up), each of them filled up with zeros to
// a multiple of 64, as panels of 64 rows in which word k of each lies side by side, [64 rows][depth / 2], the depth too
// filled up to a multiple of 64.
int64_t packed_words(int64_t cols, int64_t depth, int64_t parts);
void pack_weight_cpu(uintptr_t weight, int64_t cols, int64_t depth, int64_t parts, uintptr_t to, int threads);

// Ask for pages of 2 MiB for memory that nobody wrote to yet: weights are read once a pass, and each page must be found.
void huge_pages(uintptr_t at, int64_t bytes);

// bf16 out [rows][cols] = x . weight + bias (bf16 or null); x bf16 with `stride` elements from row to row.
void packed_linear_cpu(uintptr_t x, int64_t stride, int64_t rows, uintptr_t weight, int64_t cols, int64_t depth,
                       int64_t parts, uintptr_t bias, uintptr_t out, int threads);

// A layer: packed weights, bf16 biases or null. q, k and v are one weight (then k and v are null) or three; `up` is null
// but for SwiGLU, silu(gate) * up, and `gate` what is activated.
struct LayerWeights {
    struct Product {
        uintptr_t weight, bias;
    } q, k, v, out, gate, up, down;
    int64_t dim, heads, groups, head_dim, hidden;
    int activation;
    bool centre;
    float eps;
};

// One visit of a layer: gains and biases of its norms, [dim] or null, of bf16 where that is said, else fp32; and what its
// two branches are multiplied with, fp32 [dim] or null.
struct LayerVisit {
    const LayerWeights* weights;
    uintptr_t attn_gain, attn_bias, mlp_gain, mlp_bias, attn_gate, mlp_gate;
    bool attn_gain_bf16, attn_bias_bf16, mlp_gain_bf16, mlp_bias_bf16;
};

// Layers of one form, one after the other: x [batch][tokens][dim] -> out, with `rows` int64 [batch][last.rows] of the last
// layer these positions alone. Of the attentions tables, mask and sizes are given, all else is the call's own.
struct LayersCall {
    uintptr_t x, out, rows;
    bool is_bf16;                  // x and out, else fp32
    RotaryAttention between, last;  // of all layers but the last, and of the last
};
void layers_cpu(const std::vector<LayerVisit>& visits, const LayersCall& c, int threads);

}  // namespace loopmdm
