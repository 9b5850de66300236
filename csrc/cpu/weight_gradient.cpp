// The gradient of a convolution's weight, for float32 images in channels_last memory. The kernels are in
// isa/weight_gradient.h, the tasks in weight_gradient.h.
#include "cpu/weight_gradient.h"

#include <torch/library.h>

#include <atomic>

#include "cpu/isa.h"
#include "cpu/tensor.h"

namespace fused_res::cpu {
namespace {

// parallel(n, body) for weight_gradient.h: each thread takes the next task when it is done with its last.
class Threads {
 public:
  explicit Threads(int64_t products) : threads_(Parallel(products / kProducts).threads()) {}

  int64_t threads() const { return threads_; }
  int64_t thread() const { return threads_ == 1 ? 0 : at::get_thread_num(); }

  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    if (threads_ == 1 || n == 1) return body(int64_t{0}, n);
    std::atomic<int64_t> next = 0;
    at::parallel_for(0, threads_, 1, [&](int64_t, int64_t) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(task, task + 1);
    });
  }

 private:
  static constexpr int64_t kProducts = 64;  // take about as long as an element of an elementwise pass

  int64_t threads_;
};

const float* floats(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat && tensor.is_cpu(), name,
                   ": expected float32 on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
  return tensor.const_data_ptr<float>();
}

// Rows a multiple of 2 KB apart would fall into two sets of the L1.
bool far_apart(int64_t channels) { return channels % 512 == 0; }

Tensor conv_weight_gradient(const Tensor& grad, const Tensor& input, const Tensor& weight,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                            bool winograd) {
  const ConvolutionKernels* found = kernels().convolution;
  TORCH_CHECK(found, "this instruction set, ", kernels().name, ", has no convolution kernels");
  TORCH_CHECK_VALUE(input.dim() == 4 && grad.dim() == 4 && weight.dim() == 4,
                    "input: expected (N, C, H, W), got ", input.sizes(), " for a gradient of ", grad.sizes(),
                    " and a weight of ", weight.sizes());
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor dz = grad.contiguous(at::MemoryFormat::ChannelsLast);
  WeightGradientArgs args = {};
  ConvolutionArgs& shape = args.convolution;
  shape.images = x.size(0), shape.channels = x.size(1), shape.height = x.size(2), shape.width = x.size(3);
  shape.outputs = dz.size(1), shape.out_height = dz.size(2), shape.out_width = dz.size(3);
  shape.taps_h = weight.size(2), shape.taps_w = weight.size(3);
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_h = padding[0], shape.pad_w = padding[1];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  const auto made = [](int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
    return stride > 0 && dilation > 0 ? (in + 2 * pad - dilation * (taps - 1) - 1) / stride + 1 : 0;
  };
  TORCH_CHECK_VALUE(
      shape.images == dz.size(0) && weight.size(0) == shape.outputs && weight.size(1) == shape.channels &&
          shape.out_height == made(shape.height, shape.taps_h, stride[0], padding[0], dilation[0]) &&
          shape.out_width == made(shape.width, shape.taps_w, stride[1], padding[1], dilation[1]) &&
          dz.numel() > 0 && x.numel() > 0,
      "grad_output: expected the gradient of this convolution, got ", grad.sizes(), " for an input of ",
      input.sizes(), " and a weight of ", weight.sizes());
  TORCH_CHECK_VALUE(!winograd || (shape.taps_h == 3 && shape.taps_w == 3 && stride[0] * stride[1] == 1 &&
                                  dilation[0] * dilation[1] == 1),
                    "weight: Winograd is for 3x3 kernels with stride 1, got ", weight.sizes());
  shape.tile = winograd ? 4 : 0;
  const bool pointwise =
      shape.taps_h * shape.taps_w * shape.stride_h * shape.stride_w == 1 && shape.pad_h + shape.pad_w == 0;
  shape.gather = !pointwise || far_apart(shape.channels);
  args.pack_dz = shape.outputs % kPanelOutputs != 0 || far_apart(shape.outputs);
  shape.x = floats(x, "input"), args.dz = floats(dz, "grad_output");
  Tensor dweight = empty_output(weight);
  floats(dweight, "weight");
  args.dweight = dweight.data_ptr<float>();
  args.output_stride = dweight.stride(0), args.channel_stride = dweight.stride(1);
  args.row_stride = dweight.stride(2), args.column_stride = dweight.stride(3);
  const Threads parallel(dz.numel() * depth_of(shape));
  const WeightGradientTasks tasks(args);
  // In whole megabytes, so that many calls can have the same.
  constexpr int64_t kUnit = 1 << 18;
  const int64_t size = divide_up(tasks.scratch(parallel.threads()), kUnit) * kUnit;
  Tensor scratch = empty_output({size}, at::kFloat, at::MemoryFormat::Contiguous);
  tasks.run(*found, scratch.data_ptr<float>(), parallel);
  return dweight;
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  m.impl("conv_weight_gradient", TORCH_FN(fused_res::cpu::conv_weight_gradient));
}
