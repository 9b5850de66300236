// The Python module fused_res._C. Importing it registers the operators' CPU kernels: each file of csrc/cpu
// that has operators ends with their registration. What the module itself offers says how the library was
// built and which instruction set it runs.
#include <pybind11/pybind11.h>

#include "build_info.h"  // written by CMakeLists.txt
#include "cpu/fma_peak.h"
#include "cpu/isa.h"
#include "cpu/output_memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); });
  m.def("cpu_isa", &fused_res::cpu_isa);
  m.def("set_cpu_isa", &fused_res::set_cpu_isa, py::arg("name"));
  m.def("fma_peak", &fused_res::fma_peak, py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("set_output_cache", &fused_res::set_output_cache, py::arg("bytes"));
  m.def("output_cache_bytes", &fused_res::output_cache_bytes);
}
