// loopmdm._C. Pointers arrive as integers that Python has checked: dtype, shape, device, contiguity.
#include <pybind11/pybind11.h>

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

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled part of loopmdm; loopmdm.ops is the public face.";
    m.attr("version") = LOOPMDM_VERSION;
    m.attr("compiler") = LOOPMDM_COMPILER;
    m.attr("cuda_version") = LOOPMDM_CUDA_VERSION;
    m.attr("cuda_archs") = LOOPMDM_CUDA_ARCHS;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("select_topk_cpu", &loopmdm::select_topk_cpu, unlocked, py::arg("keys"), py::arg("eligible"), py::arg("k"),
          py::arg("out"), py::arg("rows"), py::arg("cols"), py::arg("threads"));
#ifdef LOOPMDM_CUDA
    m.attr("has_cuda") = true;
    m.def("select_topk_cuda", &loopmdm::select_topk_cuda, unlocked, py::arg("keys"), py::arg("eligible"), py::arg("k"),
          py::arg("out"), py::arg("rows"), py::arg("cols"), py::arg("device"), py::arg("stream"));
    m.def("cuda_driver_version", &loopmdm::cuda_driver_version, "For example 13000; 0 without a driver.");
#else
    m.attr("has_cuda") = false;
#endif
}
