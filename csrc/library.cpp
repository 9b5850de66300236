// The Python module fused_res._C. Importing it registers the operators' CPU kernels: each file of csrc/cpu
// that defines operators ends with their registration. The attributes of the module are
//
//   build_info, cpu_isa, set_cpu_isa, fma_peak, bf16_peak, set_output_cache, output_cache_bytes
//     the build's record, the active instruction set, its peak throughput of fp32 FMAs and of products of
//     bfloat16, and the output allocator's cache;
//   cpu_caches(), set_cpu_caches(sizes)
//     caches.h: the bytes of L1 data cache, L2 and L3 in force as a tuple, and the source of each; sizes are
//     three positive integers, or None for those of the machine;
//   streams_output(bytes, norm)
//     True if a convolution's or, with `norm`, a norm's output of this size is written with streaming stores
//     (caches.h), apart from its alignment;
//   winograd_supports(kernel, stride, dilation)
//     True if the Winograd kernels support this geometry of a 2D convolution, False also for a sequence that
//     is not a pair: supports_winograd() of convolution.h;
//   winograd_gemm_rows(height, width, tile, stride)
//     the number of rows of all transform-domain GEMMs together, for one image with an output of height x
//     width and the output tile size `tile`: gemm_rows_per_image() of isa/tiles.h. Raises ValueError if there
//     are no kernels for `tile` or `stride`;
//   convolution_backward(grad, input, weight, bias_size, stride, padding, dilation, groups, output_mask)
//     ATen's operator without the call overhead of torch.ops, which is 10 us: `bias_size` is None or the
//     number of output channels, and the gradients that are not requested are None;
//   snapshot_is_current(attributes, tensors, refuse_grad)
//     snapshot.h: True if every dictionary still holds the value under its key and every tensor is unchanged;
//   class_tags(classes), class_tags_are(classes, tags)
//     snapshot.h: numbers that change with every change of a class;
//   WINOGRAD_POINTS
//     the number of transform-domain GEMMs, which is also the number of floats per input and output channel
//     of a transformed filter;
//   PIXEL_CHANNELS
//     channels up to which direct_bf16 copies whole rows of the filter at once, kPixelChannels of
//     isa/operand.h;
//   PANEL_WIDTH, SPLIT_K_MAX_FLOATS
//     the output channels of a panel, and the elements of a weight, with whole panels, up to which its
//     float32 gradient is computed by split-K (conv_wgrad.h);
//   GRAPH_LOCATIONS, GRAPH_STEP_KINDS, GRAPH_STEP_FIELDS
//     the encoding of an inference graph (conv_program.h): the locations (input, output, no operand), the
//     step kinds (convolution, max_pool), and the names of a step's fields in order.
#include <ATen/ops/convolution_backward.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"  // written by CMakeLists.txt
#include "cpu/caches.h"
#include "cpu/conv_program.h"
#include "cpu/conv_wgrad.h"
#include "cpu/convolution.h"
#include "cpu/fma_peak.h"
#include "cpu/isa.h"
#include "cpu/output_allocator.h"
#include "snapshot.h"

namespace py = pybind11;

namespace {

using Integers = std::vector<int64_t>;

std::tuple<Integers, std::array<std::string, 3>> cpu_caches() {
  const fused_res::cpu::Caches& sizes = fused_res::cpu::caches();
  const fused_res::cpu::CacheSources sources = fused_res::cpu::cache_sources();
  return {{sizes.l1, sizes.l2, sizes.l3}, {sources.l1, sources.l2, sources.l3}};
}

void set_cpu_caches(const std::optional<std::array<int64_t, 3>>& sizes) {
  if (!sizes) return fused_res::cpu::set_caches(nullptr);
  for (const int64_t size : *sizes) {
    if (size <= 0) throw py::value_error("sizes: expected positive integers, got " + std::to_string(size));
  }
  const fused_res::cpu::Caches caches = {(*sizes)[0], (*sizes)[1], (*sizes)[2]};
  fused_res::cpu::set_caches(&caches);
}

bool winograd_supports(const Integers& kernel, const Integers& stride, const Integers& dilation) {
  if (kernel.size() != 2 || stride.size() != 2 || dilation.size() != 2) return false;
  fused_res::cpu::ConvolutionArgs args = {};
  args.kernel_h = kernel[0], args.kernel_w = kernel[1];
  args.stride_h = stride[0], args.stride_w = stride[1];
  args.dilation_h = dilation[0], args.dilation_w = dilation[1];
  return fused_res::cpu::supports_winograd(args);
}

int64_t winograd_gemm_rows(int64_t height, int64_t width, int64_t tile, int64_t stride) {
  if (height < 0 || width < 0) throw py::value_error("height, width: expected non-negative integers");
  if (!fused_res::cpu::supports_winograd_tile(tile)) throw py::value_error("tile: expected 2 to 4");
  if (stride != 1 && stride != 2) throw py::value_error("stride: expected 1 or 2");
  return fused_res::cpu::gemm_rows_per_image({stride, tile, height, width});
}

using Tensor = at::Tensor;

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input,
                                                        const Tensor& weight,
                                                        std::optional<int64_t> bias_size,
                                                        const Integers& stride, const Integers& padding,
                                                        const Integers& dilation, int64_t groups,
                                                        std::array<bool, 3> output_mask) {
  const Integers bias_sizes(bias_size ? 1 : 0, bias_size.value_or(0)), output_padding(stride.size(), 0);
  return at::convolution_backward(
      grad, input, weight, bias_size ? at::OptionalIntArrayRef(bias_sizes) : std::nullopt, stride, padding,
      dilation, /*transposed=*/false, output_padding, groups, output_mask);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); });
  m.def("cpu_isa", &fused_res::cpu_isa);
  m.def("set_cpu_isa", &fused_res::set_cpu_isa, py::arg("name"));
  m.def("fma_peak", &fused_res::fma_peak, py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("bf16_peak", &fused_res::bf16_peak, py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_caches", &cpu_caches);
  m.def("set_cpu_caches", &set_cpu_caches, py::arg("sizes"));
  m.def(
      "streams_output",
      [](int64_t bytes, bool norm) {
        const fused_res::cpu::Caches& c = fused_res::cpu::caches();
        return norm ? c.streams_norm_output(bytes) : !c.keeps_in_l3(bytes);
      },
      py::arg("bytes"), py::arg("norm"));
  m.def("set_output_cache", &fused_res::set_output_cache, py::arg("bytes"));
  m.def("output_cache_bytes", &fused_res::output_cache_bytes);
  m.def("winograd_supports", &winograd_supports, py::arg("kernel"), py::arg("stride"), py::arg("dilation"));
  m.def("winograd_gemm_rows", &winograd_gemm_rows, py::arg("height"), py::arg("width"), py::arg("tile"),
        py::arg("stride"));
  m.def("convolution_backward", &convolution_backward, py::call_guard<py::gil_scoped_release>());
  m.def("snapshot_is_current", &fused_res::snapshot_is_current, py::arg("attributes"), py::arg("tensors"),
        py::arg("refuse_grad"));
  m.def("class_tags", &fused_res::class_tags, py::arg("classes"));
  m.def("class_tags_are", &fused_res::class_tags_are, py::arg("classes"), py::arg("tags"));
  using namespace fused_res::cpu;
  m.attr("WINOGRAD_POINTS") = kTransformPoints;
  m.attr("PIXEL_CHANNELS") = kPixelChannels;
  m.attr("PANEL_WIDTH") = kPanelWidth;
  m.attr("SPLIT_K_MAX_FLOATS") = kSplitKMaxFloats;
  m.attr("GRAPH_LOCATIONS") = py::make_tuple(int64_t{kInput}, int64_t{kOutput}, int64_t{kNoOperand});
  m.attr("GRAPH_STEP_KINDS") =
      py::make_tuple(int64_t{kConvolution}, int64_t{kMaxPool}, int64_t{kGlobalAveragePool});
  m.attr("GRAPH_STEP_FIELDS") =
      py::tuple(py::cast(std::vector<std::string>(std::begin(kStepFields), std::end(kStepFields))));
}
