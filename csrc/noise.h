// The noise of unmasking: Gumbel numbers that are functions of (row seed, step, position, index, stream), the same bits in
// C++, CUDA, Triton (kernels/noise.py) and torch (ops/noise.py).
//
// Philox4x32-10 (Salmon et al., SC 2011), key = the halves of the seed, counter = (index / 4, position, step, stream), word
// index % 4. Each fp32 operation is rounded on its own: no fused multiply-add, no division, no library's log or exp. So
// host code is compiled with -ffp-contract=off, and on the device the intrinsics below never contract.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef LOOPMDM_BOTH
#ifdef __CUDACC__
#define LOOPMDM_BOTH __host__ __device__ __forceinline__
#else
#define LOOPMDM_BOTH inline
#endif
#endif

namespace loopmdm {

constexpr uint32_t kGroupStream = 11, kTokenStream = 12;  // random.GROUP, random.TOKEN

#ifdef __CUDA_ARCH__
LOOPMDM_BOTH float add(float a, float b) { return __fadd_rn(a, b); }
LOOPMDM_BOTH float mul(float a, float b) { return __fmul_rn(a, b); }
#else
LOOPMDM_BOTH float add(float a, float b) { return a + b; }
LOOPMDM_BOTH float mul(float a, float b) { return a * b; }
#endif

LOOPMDM_BOTH int32_t as_int(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

LOOPMDM_BOTH float as_float(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

LOOPMDM_BOTH void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                                  static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
        c[0] = next[0], c[1] = next[1], c[2] = next[2], c[3] = next[3];
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

// log(1 + f) + e log 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1]: f - f²/2 + f³ P(f), P a minimax fit of degree 7.
LOOPMDM_BOTH float log_of(float f, float e) {
    float p = -0.07634497f;
    p = add(mul(p, f), 0.12761576f);
    p = add(mul(p, f), -0.13160183f);
    p = add(mul(p, f), 0.14201757f);
    p = add(mul(p, f), -0.16623357f);
    p = add(mul(p, f), 0.20001227f);
    p = add(mul(p, f), -0.2500082f);
    p = add(mul(p, f), 0.3333333f);
    const float square = mul(f, f);
    float y = mul(mul(p, f), square);
    y = add(y, mul(e, -2.1219444e-4f));  // log 2 = 355/512 - 2.12e-4; e * 355/512 is exact
    y = add(y, mul(square, -0.5f));
    return add(add(f, y), mul(e, 0.693359375f));
}

// x 2^-e for the bits of a normal x.
LOOPMDM_BOTH float scaled(int32_t bits, int32_t e) {
    return as_float(static_cast<int32_t>(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(e) << 23)));
}

// Natural logarithm of a positive normal number, to 1.2 units in the last place.
LOOPMDM_BOTH float log_fp32(float x) {
    const int32_t bits = as_int(x);
    const int32_t e = (bits - 0x3f3504f3) >> 23;  // the mantissa in [sqrt(1/2), sqrt(2))
    return log_of(add(scaled(bits, e), -1.0f), static_cast<float>(e));
}

// log(1 - u) for u in [2^-33, 1 - 2^-24].
LOOPMDM_BOTH float log1p_of_minus(float u) {
    const float rest = add(1.0f, -u);
    const int32_t bits = as_int(rest);
    const bool small = u < 0.29289323f;  // there u itself is the argument, which 1 - u would round away
    const int32_t e = small ? 0 : (bits - 0x3f3504f3) >> 23;
    const float f = small ? -u : add(scaled(bits, e), -1.0f);
    return log_of(f, static_cast<float>(e));
}

// 32 random bits -> a number in [2^-33, 1 - 2^-24]: fp32 rounds (r + 0.5) 2^-32 to 1 for the largest r.
LOOPMDM_BOTH float uniform_of(uint32_t r) {
    const float u = mul(add(static_cast<float>(r), 0.5f), 2.3283064365386963e-10f);
    return u < 0.99999994f ? u : 0.99999994f;
}

LOOPMDM_BOTH float gumbel_of(uint32_t r) { return -log_fp32(-log1p_of_minus(uniform_of(r))); }

LOOPMDM_BOTH float gumbel(int64_t seed, uint32_t step, uint32_t position, uint32_t index, uint32_t stream) {
    uint32_t c[4] = {index / 4, position, step, stream};
    philox(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
    return gumbel_of(c[index % 4]);
}

// 2^24 exp(t) for t <= 0, at least exp(-87): sums of it rounded to integers do not depend on their order.
LOOPMDM_BOTH float exp24(float t) {
    t = t > -87.0f ? t : -87.0f;
    const float y = mul(t, 1.44269504f);
    const float z = add(y, 12582936.0f);  // 1.5 * 2^23 + 24: the low bits hold 24 + round(y)
    const float r = add(y, -add(z, -12582936.0f));
    float p = 1.5476301e-4f;
    p = add(mul(p, r), 1.340027e-3f);
    p = add(mul(p, r), 9.618004e-3f);
    p = add(mul(p, r), 5.550328e-2f);
    p = add(mul(p, r), 0.2402265f);
    p = add(mul(p, r), 0.6931472f);
    p = add(mul(p, r), 1.0f);
    return as_float(static_cast<int32_t>(static_cast<uint32_t>(as_int(p)) + (static_cast<uint32_t>(as_int(z)) << 23)));
}

}  // namespace loopmdm
