// Every launcher of layer_cpu.cpp and rows_cpu.cpp on buffers of exactly their size, for the sanitizers. Prints a number that depends on all
// that was written.
#include <cstdio>

#include "buffers.h"
#include "layer.h"

using namespace loopmdm;

namespace {

void attention(int64_t B, int64_t T, int64_t R, int64_t G, int64_t each, int64_t D, bool bf16, int threads) {
    const int64_t H = G * each, width = H + 2 * G;
    const Bytes qkv = numbers(B * T * width * D, bf16), q = numbers(B * R * H * D, bf16), out = numbers(B * R * H * D, bf16);
    const Bytes cos = numbers(B * T * (D / 2), false), q_cos = numbers(R * (D / 2), false);
    const Bytes mask = bytes(B * R * T);
    for (int64_t i = 0; i < B * R * T; ++i) mask.data[i] = rng() % 3 != 0;
    const int64_t size = bf16 ? 2 : 4, T_at = width * D;
    const bool rope = rng() % 4, masked = rng() % 2;
    RotaryAttention a{q.at(), qkv.at() + H * D * size, qkv.at() + (H + G) * D * size, out.at(),
                      rope ? cos.at() : 0, rope ? cos.at() : 0, rope ? q_cos.at() : 0, rope ? q_cos.at() : 0,
                      masked ? mask.at() : 0, B, R, T, H, G, D,
                      {R * H * D, H * D, D}, {T * T_at, T_at, D}, {T * T_at, T_at, D},
                      T * (D / 2), 0, R * T, T, bf16, rng() % 2 == 0, rng() % 2 == 0, R == T && !masked && rng() % 2};
    rotary_attention_cpu(a, threads);
    out.read();
}

void norm(int64_t outer, int64_t inner, int64_t D, bool x16, bool branch16, bool out16, bool centre, bool branch, int threads) {
    const int64_t n = outer * inner * D;
    const Bytes x = numbers(n, x16), other = numbers(n, branch16), w = numbers(D, branch16), summed = numbers(n, x16),
                out = numbers(n, out16), stats = numbers(2 * outer * inner, false);
    residual_norm_cpu({x.at(), branch ? other.at() : 0, w.at(), rng() % 2 ? w.at() : 0, branch ? summed.at() : 0, out.at(),
                       stats.at(), outer, inner, D, inner * D, D, 1e-5f, centre, x16, branch16, branch16, branch16, out16},
                      threads);
    summed.read(), out.read(), stats.read();
    const Bytes dx = numbers(n, x16), dbranch = numbers(n, branch16), dw = numbers(D, false), dbias = numbers(D, false);
    residual_norm_backward_cpu({summed.at(), w.at(), stats.at(), branch ? x.at() : 0, out.at(), dx.at(),
                                branch && x16 != branch16 ? dbranch.at() : 0, rng() % 3 ? dw.at() : 0,
                                rng() % 2 ? dbias.at() : 0, outer, inner, D, inner * D, D, centre, x16, branch16, branch16,
                                out16},
                               threads);
    dx.read(), dbranch.read(), dw.read(), dbias.read();
}

void rotation(int64_t B, int64_t T, int64_t H, int64_t D, bool bf16, int threads) {
    const Bytes x = numbers(B * T * 2 * H * D, bf16), cos = numbers(B * T * (D / 2), false), out = numbers(B * T * H * D, bf16);
    const bool each = rng() % 2;
    rotate_cpu({x.at() + H * D * (bf16 ? 2 : 4), cos.at(), cos.at(), out.at(), B, T, H, D, {T * 2 * H * D, 2 * H * D, D},
                each ? T * (D / 2) : 0, bf16, rng() % 2 == 0, rng() % 2 == 0, rng() % 2 == 0},
               threads);
    out.read();
}

void activation(int64_t rows, int64_t cols, int act, bool bf16, int threads) {
    const Bytes x = numbers(rows * cols * 2, bf16), out = numbers(rows * cols, bf16);
    activation_cpu(x.at(), x.at() + cols * (bf16 ? 2 : 4), out.at(), rows, cols, 2 * cols, 2 * cols, act, bf16, threads);
    out.read();
    const Bytes dx = numbers(rows * cols * 2, bf16);
    const int64_t second = cols * (bf16 ? 2 : 4);
    activation_backward_cpu({out.at(), x.at(), x.at() + second, dx.at(), dx.at() + second, rows, cols, 2 * cols, 2 * cols, act,
                             bf16},
                            threads);
    dx.read();
}

}  // namespace

int main() {
    for (const bool bf16 : {false, true}) {
        for (const int64_t T : {1, 3, 63, 65, 257})
            for (const int64_t D : {2, 18, 32, 48, 64, 66}) {
                attention(2, T, T, 1, 2, D, bf16, 1);
                attention(1, T, 5, 2, 1, D, bf16, 1);
            }
        attention(2, 300, 300, 2, 2, 64, bf16, 3);
        for (const int64_t D : {1, 15, 16, 33})
            for (int k = 0; k < 16; ++k) norm(3, 2, D, bf16, k & 1, k & 2, k & 4, k & 8, 1);
        norm(500, 4, 64, bf16, bf16, bf16, true, true, 3);
        for (int act = 0; act < 3; ++act)
            for (const int64_t cols : {1, 15, 16, 33}) activation(5, cols, act, bf16, 1);
        activation(2000, 96, 0, bf16, 3);
        for (const int64_t D : {2, 18, 32, 66}) rotation(2, 5, 3, D, bf16, 1);
        rotation(2, 800, 4, 64, bf16, 3);
    }
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
