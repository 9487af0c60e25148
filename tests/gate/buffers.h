// Buffers of exactly their size and a number that depends on all that was written, for the drivers under sanitizers.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

namespace {

std::mt19937 rng(1);
uint64_t digest = 14695981039346656037u;

struct Bytes {
    std::unique_ptr<char[]> data;
    int64_t size;
    uintptr_t at() const { return reinterpret_cast<uintptr_t>(data.get()); }
    void read() const {
        for (int64_t i = 0; i < size; ++i) digest = (digest ^ static_cast<unsigned char>(data[i])) * 1099511628211u;
    }
};

Bytes bytes(int64_t n) { return {std::unique_ptr<char[]>(new char[n]()), n}; }

Bytes numbers(int64_t n, bool bf16) {
    const int64_t size = bf16 ? 2 : 4;
    Bytes b = bytes(n * size);
    for (int64_t i = 0; i < n; ++i) {
        const float x = static_cast<float>(rng() % 2001) / 500 - 2;
        std::memcpy(b.data.get() + i * size, reinterpret_cast<const char*>(&x) + (bf16 ? 2 : 0), size);
    }
    return b;
}

}  // namespace
