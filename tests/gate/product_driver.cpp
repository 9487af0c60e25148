// Every launcher of product_cpu.cpp on buffers of exactly their size, for the sanitizers; each on a thread of its own, so
// that scratch memory is what this call asks for. Prints a number that depends on all that was written, or nothing where
// the processor has no bf16 products.
#include <cstdio>
#include <thread>
#include <vector>

#include "buffers.h"
#include "layer.h"
#include "product.h"

using namespace loopmdm;

namespace {

struct Product {
    Bytes packed, bias;
    LayerWeights::Product at() const { return {packed.at(), bias.size ? bias.at() : 0}; }
};

Product product(int64_t cols, int64_t depth, int64_t parts, bool biased, int threads) {
    const Bytes weight = numbers(cols * depth, true);
    Product made{bytes(packed_words(cols, depth, parts) * 4), numbers(biased ? cols : 0, true)};
    pack_weight_cpu(weight.at(), cols, depth, parts, made.packed.at(), threads);
    made.packed.read();
    return made;
}

void linear(int64_t rows, int64_t cols, int64_t depth, int64_t parts, int64_t gap, bool biased, int threads) {
    const int64_t stride = depth + gap;
    const Bytes x = numbers(rows * stride - gap, true), out = bytes(rows * cols * 2);
    const Product w = product(cols, depth, parts, biased, threads);
    packed_linear_cpu(x.at(), stride, rows, w.packed.at(), cols, depth, parts, w.at().bias, out.at(), threads);
    out.read();
}

struct Layer {
    std::vector<Product> products;
    LayerWeights weights;
};

// `apart`: q, k, v and gate, up are weights of their own.
Layer layer(int64_t D, int64_t H, int64_t G, int64_t hd, int64_t hidden, int act, bool apart, bool biased, int threads) {
    Layer made;
    auto& p = made.products;
    const int64_t q = H * hd, k = G * hd;
    const auto add = [&](int64_t cols, int64_t depth, int64_t parts) {
        p.push_back(product(cols, depth, parts, biased, threads));
        return p.back().at();
    };
    LayerWeights& w = made.weights;
    w = {};
    if (apart) w.q = add(q, D, 1), w.k = add(k, D, 1), w.v = add(k, D, 1);
    else w.q = add(q + 2 * k, D, 1);
    w.out = add(D, q, 1);
    if (act == kSwiglu && !apart) {
        w.gate = add(2 * hidden, D, 2);
        w.up = {w.gate.weight + p.back().packed.size / 2, w.gate.bias ? w.gate.bias + 2 * hidden : 0};
    } else {
        w.gate = add(hidden, D, 1);
        if (act == kSwiglu) w.up = add(hidden, D, 1);
    }
    w.down = add(D, hidden, 1);
    w.dim = D, w.heads = H, w.groups = G, w.head_dim = hd, w.hidden = hidden;
    w.activation = act, w.centre = act != kSwiglu, w.eps = 1e-5f;
    return made;
}

// `few`: rows of the last layer that come out, 0 for all.
void layers(int64_t visits, int64_t B, int64_t T, int64_t few, int64_t D, int64_t H, int64_t G, int64_t hd, int64_t hidden,
            int act, bool bf16, bool biased, int threads) {
    const int64_t R = few ? few : T, half = hd / 2;
    const Layer whole = layer(D, H, G, hd, hidden, act, false, biased, threads), parts = layer(D, H, G, hd, hidden, act, true, biased, threads);
    const Bytes x = numbers(B * T * D, bf16), out = bytes(B * R * D * (bf16 ? 2 : 4)), rows = bytes(B * R * 8);
    for (int64_t i = 0; i < B * R; ++i) reinterpret_cast<int64_t*>(rows.at())[i] = i % 2 ? T - 1 - i % T : i % T;
    const bool rope = rng() % 4, masked = rng() % 2, each = rng() % 2;
    const Bytes table = numbers((each ? B : 1) * T * half, false), q_table = numbers(B * R * half, false);
    const Bytes mask = bytes(B * T * T), q_mask = bytes(B * R * T);
    for (const Bytes* m : {&mask, &q_mask})
        for (int64_t i = 0; i < m->size; ++i) m->data[i] = rng() % 3 != 0;
    std::vector<Bytes> vectors;
    std::vector<LayerVisit> given;
    for (int64_t i = 0; i < visits; ++i) {
        const bool norm16 = rng() % 2;
        const auto vector = [&](bool is16) -> uintptr_t {
            if (rng() % 3 == 0) return 0;
            vectors.push_back(numbers(D, is16));
            return vectors.back().at();
        };
        given.push_back({i % 2 ? &parts.weights : &whole.weights, vector(norm16), vector(norm16), vector(norm16), vector(norm16),
                         vector(false), vector(false), norm16, norm16, norm16, norm16});
    }
    RotaryAttention between{};
    between.batch = B, between.rows = between.tokens = T;
    between.interleaved = rng() % 2, between.rounded = rng() % 2, between.causal = !few && !masked && rng() % 2;
    if (rope) between.cos = between.sin = between.q_cos = between.q_sin = table.at();
    if (rope && each) between.rope_batch = between.q_rope_batch = T * half;
    if (masked) between.mask = mask.at(), between.mask_batch = T * T, between.mask_row = T;
    RotaryAttention last = between;
    if (few) {
        last.rows = R;
        if (rope) last.q_cos = last.q_sin = q_table.at(), last.q_rope_batch = R * half;
        if (masked) last.mask = q_mask.at(), last.mask_batch = R * T, last.mask_row = T;
    }
    layers_cpu(given, {x.at(), out.at(), few ? rows.at() : 0, bf16, between, last}, threads);
    out.read();
}

template <typename Case>
void alone(const Case& run) {
    std::thread(run).join();
}

}  // namespace

int main() {
    if (cpu_level() < 5) return 0;
    for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 9, 13, 129})
        for (const int64_t depth : {1, 16, 67, 130}) alone([=] { linear(rows, 64, depth, 1, rows % 2 * 3, depth % 2, 1); });
    for (const int64_t cols : {1, 15, 64, 65, 131}) {
        alone([=] { linear(5, cols, 34, 1, 0, true, 1); });
        alone([=] { linear(5, 2 * cols, 34, 2, 1, true, 1); });
    }
    alone([] { linear(500, 390, 96, 3, 0, true, 3); });
    for (int act = 0; act < 3; ++act)
        for (const int64_t T : {1, 5, 6, 7, 22})
            for (const int64_t hidden : {1, 16, 67, 513})
                alone([=] { layers(1 + T % 3, 2, T, T > 5 ? T / 3 : 0, 48, 2, 1, 24, hidden, act, T % 2, hidden % 2, 1); });
    alone([] { layers(2, 1, 129, 0, 16, 3, 1, 32, 67, 0, false, true, 1); });
    alone([] { layers(3, 1, 140, 131, 80, 4, 2, 16, 1091, 0, true, true, 1); });
    alone([] { layers(3, 2, 200, 0, 64, 4, 4, 16, 200, 0, false, true, 3); });
    alone([] { layers(2, 2, 200, 70, 64, 4, 2, 16, 200, 1, true, true, 3); });
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
