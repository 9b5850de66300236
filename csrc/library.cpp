// The Python module fused_res._C. Importing it registers the operators' CPU kernels: each file of csrc/cpu
// that has operators ends with their registration. The module itself has
//
//   build_info, cpu_isa, set_cpu_isa, fma_peak, set_output_cache, output_cache_bytes
//     the record of the build, the instruction set, its peak, and the cache of output memory;
//   winograd_supports(kernel, stride, dilation)
//     True if the Winograd kernels support this geometry of a 2D convolution: is_winograd() of convolution.h.
//     False for any sequence that is not a pair;
//   winograd_gemm_rows(height, width, tile, stride)
//     the number of rows of all transform-domain GEMMs together, for one image with an output of height x
//     width in tiles of `tile` outputs a side: rows_of_image() of isa/tiles.h. Raises ValueError if there are
//     no kernels for `tile` or `stride`;
//   WINOGRAD_POINTS
//     the number of transform-domain GEMMs, which is also the number of floats per input and output channel
//     of a packed Winograd weight;
//   PROGRAM_PLACES, PROGRAM_KINDS, PROGRAM_FIELDS
//     the format of a program, of conv_program.h: (input, output, nowhere), (convolution, max_pool), and the
//     names of a step's fields in order.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "build_info.h"  // written by CMakeLists.txt
#include "cpu/conv_program.h"
#include "cpu/convolution.h"
#include "cpu/fma_peak.h"
#include "cpu/isa.h"
#include "cpu/output_memory.h"

namespace py = pybind11;

namespace {

using Numbers = std::vector<int64_t>;

bool winograd_supports(const Numbers& kernel, const Numbers& stride, const Numbers& dilation) {
  if (kernel.size() != 2 || stride.size() != 2 || dilation.size() != 2) return false;
  fused_res::cpu::ConvolutionArgs args = {};
  args.taps_h = kernel[0], args.taps_w = kernel[1];
  args.stride_h = stride[0], args.stride_w = stride[1];
  args.dilation_h = dilation[0], args.dilation_w = dilation[1];
  return fused_res::cpu::is_winograd(args);
}

int64_t winograd_gemm_rows(int64_t height, int64_t width, int64_t tile, int64_t stride) {
  if (height < 0 || width < 0) throw py::value_error("height, width: expected sizes of at least 0");
  if (!fused_res::cpu::is_winograd_tile(tile)) throw py::value_error("tile: expected 2 to 4");
  if (stride != 1 && stride != 2) throw py::value_error("stride: expected 1 or 2");
  return fused_res::cpu::rows_of_image({stride, tile, height, width});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); });
  m.def("cpu_isa", &fused_res::cpu_isa);
  m.def("set_cpu_isa", &fused_res::set_cpu_isa, py::arg("name"));
  m.def("fma_peak", &fused_res::fma_peak, py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("set_output_cache", &fused_res::set_output_cache, py::arg("bytes"));
  m.def("output_cache_bytes", &fused_res::output_cache_bytes);
  m.def("winograd_supports", &winograd_supports, py::arg("kernel"), py::arg("stride"), py::arg("dilation"));
  m.def("winograd_gemm_rows", &winograd_gemm_rows, py::arg("height"), py::arg("width"), py::arg("tile"),
        py::arg("stride"));
  using namespace fused_res::cpu;
  m.attr("WINOGRAD_POINTS") = kTransformPoints;
  m.attr("PROGRAM_PLACES") = py::make_tuple(int64_t{kInput}, int64_t{kOutput}, int64_t{kNowhere});
  m.attr("PROGRAM_KINDS") = py::make_tuple(int64_t{kConvolution}, int64_t{kMaxPool});
  m.attr("PROGRAM_FIELDS") =
      py::tuple(py::cast(std::vector<std::string>(std::begin(kStepFields), std::end(kStepFields))));
}
