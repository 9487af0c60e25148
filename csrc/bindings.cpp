// loopmdm._C. Pointers arrive as integers that Python has checked: dtype, shape, device, contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "head.h"
#include "layer.h"
#include "product.h"
#include "unmask.h"

#ifndef LOOPMDM_CUDA_VERSION
#define LOOPMDM_CUDA_VERSION ""
#define LOOPMDM_CUDA_ARCHS ""
#endif

#if defined(__clang__)
#define LOOPMDM_COMPILER "clang " __VERSION__
#else
#define LOOPMDM_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;

namespace {

// The pointers of a Scatter, in its order; 0 is null.
using Pointers = std::array<uintptr_t, 13>;

loopmdm::Scatter scatter_of(const Pointers& p, int64_t rows, int64_t cols, int64_t mask_id, int64_t eos_count, int rule,
                            bool remask) {
    const auto flags = [](uintptr_t at) { return reinterpret_cast<bool*>(at); };
    const auto ints = [](uintptr_t at) { return reinterpret_cast<int64_t*>(at); };
    return {reinterpret_cast<const float*>(p[0]), ints(p[1]), flags(p[2]), flags(p[3]), flags(p[4]), ints(p[5]),
            reinterpret_cast<const double*>(p[6]), ints(p[7]), ints(p[8]), flags(p[9]), flags(p[10]), flags(p[11]),
            flags(p[12]), rows, cols, mask_id, eos_count, rule, remask};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled part of loopmdm; loopmdm.ops is the public face.";
    m.attr("version") = LOOPMDM_VERSION;
    m.attr("compiler") = LOOPMDM_COMPILER;
    m.attr("cuda_version") = LOOPMDM_CUDA_VERSION;
    m.attr("cuda_archs") = LOOPMDM_CUDA_ARCHS;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("select_topk_cpu", &loopmdm::select_topk_cpu, unlocked, py::arg("keys"), py::arg("eligible"), py::arg("k"),
          py::arg("out"), py::arg("rows"), py::arg("cols"), py::arg("threads"));
    m.def("select_scatter_cpu", [](const Pointers& pointers, int64_t rows, int64_t cols, int64_t mask_id,
                                   int64_t eos_count, int rule, bool remask, int threads) {
        loopmdm::select_scatter_cpu(scatter_of(pointers, rows, cols, mask_id, eos_count, rule, remask), threads);
    }, unlocked);
    m.def("compact_cpu", &loopmdm::compact_cpu, unlocked, py::arg("mask"), py::arg("found"), py::arg("count"),
          py::arg("rows"), py::arg("cols"), py::arg("capacity"));
    py::class_<loopmdm::Head>(m, "Head", "Arguments of head_stats; see csrc/head.h.")
        .def(py::init([](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t suppressed, int64_t rows, int64_t vocab,
                         int64_t dim, int64_t stride, int64_t n_suppressed, bool is_bf16) {
                 return loopmdm::Head{x, weight, bias, suppressed, rows, vocab, dim, stride, n_suppressed, is_bf16};
             }),
             py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("suppressed"), py::arg("rows"),
             py::arg("vocab"), py::arg("dim"), py::arg("stride"), py::arg("n_suppressed"), py::arg("is_bf16"));
    m.def("head_groups_cpu", &loopmdm::head_groups_cpu, unlocked, py::arg("head"), py::arg("scale"), py::arg("best"),
          py::arg("total"), py::arg("dot"), py::arg("tempered"), py::arg("second"), py::arg("at"), py::arg("threads"));
    m.def("head_inside_cpu", &loopmdm::head_inside_cpu, unlocked, py::arg("head"), py::arg("group"), py::arg("out"),
          py::arg("per"), py::arg("threads"));
    m.def("head_rows_cpu", [](const loopmdm::Head& head, float scale, uintptr_t best, uintptr_t total, uintptr_t dot,
                              uintptr_t tempered, uintptr_t second, uintptr_t at, uintptr_t seeds, uintptr_t steps,
                              uintptr_t positions, uintptr_t judged, uintptr_t token, uintptr_t values, int threads) {
        loopmdm::head_rows_cpu(head, scale, best, total, dot, tempered, second, at, {seeds, steps, positions}, judged,
                               token, values, threads);
    }, unlocked);
    m.def("gumbel_cpu", &loopmdm::gumbel_cpu, unlocked, py::arg("seeds"), py::arg("steps"), py::arg("positions"),
          py::arg("first"), py::arg("out"), py::arg("rows"), py::arg("count"), py::arg("stream"), py::arg("threads"));
    m.def("cpu_level", &loopmdm::cpu_level, "1 plain, 3 AVX2, 4 AVX-512, 5 with its bf16 products.");
    // Pointers and sizes in the order of the structs of layer.h.
    m.def("rotary_attention_cpu", [](const std::array<uintptr_t, 9>& p, const std::array<int64_t, 6>& n,
                                     const std::array<int64_t, 9>& at, const std::array<int64_t, 4>& shared,
                                     const std::array<bool, 4>& is, int threads) {
        loopmdm::rotary_attention_cpu({p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], n[0], n[1], n[2], n[3], n[4],
                                       n[5], {at[0], at[1], at[2]}, {at[3], at[4], at[5]}, {at[6], at[7], at[8]},
                                       shared[0], shared[1], shared[2], shared[3], is[0], is[1], is[2], is[3]},
                                      threads);
    }, unlocked);
    m.def("residual_norm_cpu", [](const std::array<uintptr_t, 7>& p, const std::array<int64_t, 5>& n, float eps,
                                  const std::array<bool, 6>& is, int threads) {
        loopmdm::residual_norm_cpu({p[0], p[1], p[2], p[3], p[4], p[5], p[6], n[0], n[1], n[2], n[3], n[4], eps, is[0],
                                    is[1], is[2], is[3], is[4], is[5]},
                                   threads);
    }, unlocked);
    m.def("residual_norm_backward_cpu", [](const std::array<uintptr_t, 9>& p, const std::array<int64_t, 5>& n,
                                           const std::array<bool, 5>& is, int threads) {
        loopmdm::residual_norm_backward_cpu({p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], n[0], n[1], n[2], n[3],
                                             n[4], is[0], is[1], is[2], is[3], is[4]},
                                            threads);
    }, unlocked);
    m.def("activation_cpu", &loopmdm::activation_cpu, unlocked);
    m.def("activation_backward_cpu", [](const std::array<uintptr_t, 5>& p, const std::array<int64_t, 4>& n, int act,
                                        bool is_bf16, int threads) {
        loopmdm::activation_backward_cpu({p[0], p[1], p[2], p[3], p[4], n[0], n[1], n[2], n[3], act, is_bf16}, threads);
    }, unlocked);
    m.def("rotate_cpu", [](const std::array<uintptr_t, 4>& p, const std::array<int64_t, 8>& n,
                           const std::array<bool, 4>& is, int threads) {
        loopmdm::rotate_cpu({p[0], p[1], p[2], p[3], n[0], n[1], n[2], n[3], {n[4], n[5], n[6]}, n[7], is[0], is[1], is[2],
                             is[3]},
                            threads);
    }, unlocked);
    m.def("packed_words", &loopmdm::packed_words, "32-bit words of a packed weight.");
    m.def("huge_pages", &loopmdm::huge_pages, "Ask for pages of 2 MiB for memory that nobody wrote to yet.");
    m.def("pack_weight_cpu", &loopmdm::pack_weight_cpu, unlocked);
    m.def("packed_linear_cpu", &loopmdm::packed_linear_cpu, unlocked);
    // Pointers and sizes in the order of LayerWeights, LayerVisit, LayersCall and RotaryAttention.
    py::class_<loopmdm::LayerWeights>(m, "LayerWeights", "Weights of one layer; see csrc/product.h.")
        .def(py::init([](const std::array<uintptr_t, 14>& p, const std::array<int64_t, 5>& n, int activation, bool centre,
                         float eps) {
            return loopmdm::LayerWeights{{p[0], p[1]}, {p[2], p[3]}, {p[4], p[5]}, {p[6], p[7]}, {p[8], p[9]},
                                         {p[10], p[11]}, {p[12], p[13]}, n[0], n[1], n[2], n[3], n[4], activation, centre, eps};
        }));
    using Visit = std::tuple<const loopmdm::LayerWeights*, std::array<uintptr_t, 6>, std::array<bool, 4>>;
    using Between = std::tuple<std::array<uintptr_t, 5>, std::array<int64_t, 3>, std::array<int64_t, 4>>;
    m.def("layers_cpu", [](const std::vector<Visit>& given, const std::array<uintptr_t, 3>& c, const Between& between,
                           const Between& last, const std::array<bool, 4>& is, int threads) {
        std::vector<loopmdm::LayerVisit> visits;
        for (const auto& [w, p, b] : given)
            visits.push_back({w, p[0], p[1], p[2], p[3], p[4], p[5], b[0], b[1], b[2], b[3]});
        const auto attention = [&](const Between& of) {
            const auto& [p, n, shared] = of;
            loopmdm::RotaryAttention a{};
            a.cos = p[0], a.sin = p[1], a.q_cos = p[2], a.q_sin = p[3], a.mask = p[4];
            a.batch = n[0], a.rows = n[1], a.tokens = n[2];
            a.rope_batch = shared[0], a.q_rope_batch = shared[1], a.mask_batch = shared[2], a.mask_row = shared[3];
            a.interleaved = is[1], a.rounded = is[2], a.causal = is[3];
            return a;
        };
        loopmdm::layers_cpu(visits, {c[0], c[1], c[2], is[0], attention(between), attention(last)}, threads);
    }, unlocked);
#ifdef LOOPMDM_CUDA
    m.attr("has_cuda") = true;
    m.def("select_topk_cuda", &loopmdm::select_topk_cuda, unlocked, py::arg("keys"), py::arg("eligible"), py::arg("k"),
          py::arg("out"), py::arg("rows"), py::arg("cols"), py::arg("device"), py::arg("stream"));
    m.def("select_scatter_cuda", [](const Pointers& pointers, int64_t rows, int64_t cols, int64_t mask_id,
                                    int64_t eos_count, int rule, bool remask, int device, uintptr_t stream) {
        loopmdm::select_scatter_cuda(scatter_of(pointers, rows, cols, mask_id, eos_count, rule, remask), device,
                                     stream);
    }, unlocked);
    m.def("compact_cuda", &loopmdm::compact_cuda, unlocked, py::arg("mask"), py::arg("partial"), py::arg("found"),
          py::arg("count"), py::arg("rows"), py::arg("cols"), py::arg("capacity"), py::arg("device"),
          py::arg("stream"));
    m.def("cuda_driver_version", &loopmdm::cuda_driver_version, "For example 13000; 0 without a driver.");
#else
    m.attr("has_cuda") = false;
#endif
}
