// The head on the CPU: statistics of groups of 128 logits while they are in cache. Pointers as Python checked them.
#pragma once

#include <cstdint>

namespace loopmdm {

constexpr int64_t kSpan = 128;  // vocabulary ids in a group, part of the noise contract

// Logits of `rows` rows: x @ weight.T + bias, or x itself where weight is 0. x has `stride` elements from row to row.
// is_bf16: x and weight are bf16, else fp32. bias fp32 or 0. suppressed: sorted int64 ids that become -inf.
struct Head {
    uintptr_t x, weight, bias, suppressed;
    int64_t rows, vocab, dim, stride, n_suppressed;
    bool is_bf16;
};

// Of each row and group, [rows][ceil(vocab / 128)]: best, the largest logit (-inf: none); total, the sum of
// 2^24 exp(logit - best) rounded to integers; dot, the sum of 2^24 exp(logit - best) (logit - best); tempered (may be 0),
// as total with the exponents times scale; second, the second largest logit; at, the largest one's place in the group.
void head_groups_cpu(const Head& head, float scale, uintptr_t best, uintptr_t total, uintptr_t dot, uintptr_t tempered,
                     uintptr_t second, uintptr_t at, int threads);
// out fp32 [rows][per][128]: the logits of the groups group[row][i], int64, -inf beyond the vocabulary; the same bits
// that head_groups_cpu saw.
void head_inside_cpu(const Head& head, uintptr_t group, uintptr_t out, int64_t per, int threads);
// int64 [rows] each: what names a row's noise; seeds 0 for none.
struct Noise {
    uintptr_t seeds, steps, positions;
};
// token int64 [rows] and values fp32 [5][rows], (logit, top, second, lse, dot), from what head_groups_cpu left; tempered is
// `total` where scale is 1. With noise a token is drawn, else it is the likeliest; judged (may be 0) int64 [rows]: where
// >= 0, that token instead. A row without a finite logit gets -1.
void head_rows_cpu(const Head& head, float scale, uintptr_t best, uintptr_t total, uintptr_t dot, uintptr_t tempered,
                   uintptr_t second, uintptr_t at, const Noise& noise, uintptr_t judged, uintptr_t token,
                   uintptr_t values, int threads);
// out fp32 [rows][count]: gumbel(seed, step, position, first + j, stream); all but out int64 [rows].
void gumbel_cpu(uintptr_t seeds, uintptr_t steps, uintptr_t positions, uintptr_t first, uintptr_t out, int64_t rows,
                int64_t count, int64_t stream, int threads);

}  // namespace loopmdm
