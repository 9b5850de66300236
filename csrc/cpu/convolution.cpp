// Operator for one convolution of images in channels_last memory, with its epilogue and, where the kernels
// are direct, the norm that precedes it. The kernels are in isa/direct*.h and isa/winograd.h, the tasks in
// convolution.h.
// fused_res/backends/cpu/convolution.py selects the algorithm for a shape.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/convolution_host.h"
#include "cpu/packed_weight.h"

namespace fused_res::cpu {
namespace {

// Merges the moments of all chunks into partial statistics (1, 3, C): count, mean, M2.
Tensor merge_chunk_moments(const ConvolutionArgs& args, double* partial, const std::vector<double>& counts) {
  const int64_t channels = args.out_channels;
  const Parallel parallel(static_cast<int64_t>(counts.size()) * channels);
  parallel(ceil_div(channels, kPanelWidth), [&](int64_t begin, int64_t end) {
    const int64_t c0 = begin * kPanelWidth, c1 = std::min(end * kPanelWidth, channels);
    double count = counts[0];
    for (size_t i = 1; i < counts.size(); ++i) {
      kernels().merge_partials(partial, partial + i * 2 * channels, count, counts[i], channels, c0, c1);
      count += counts[i];
    }
  });
  Tensor merged = at::empty({1, 3, channels}, at::kDouble);
  double* to = merged.data_ptr<double>();
  double count = 0;
  for (const double more : counts) count += more;
  std::fill(to, to + channels, count);
  std::copy(partial, partial + 2 * channels, to + channels);
  return merged;
}

// The norm and the ReLU that precede a convolution.
class NormalizedInput final : public ChunkFusion {
 public:
  NormalizedInput(const Tensor& input, const Tensor& stats, bool relu)
      : channels_(input.size(1)), element_size_(input.element_size()) {
    const ActivationTensor x(input);
    stats_ = checked_stats(stats, x, "input_stats");
    forward_ = norm_kernels(x).forward;
    args_.x = input.const_data_ptr(), args_.norm = norm_args(stats_);
    args_.activation = relu ? Activation::kRelu : Activation::kIdentity;
  }
  bool computes_input() const override { return true; }
  void input(Range pixels, void* to) const override {
    ForwardArgs args = args_;
    args.y = static_cast<char*>(to) - pixels.begin * channels_ * element_size_;
    forward_(pixel_block(channels_, pixels), args);
  }

 private:
  int64_t channels_, element_size_;
  Tensor stats_;
  void (*forward_)(const Block&, const ForwardArgs&);
  ForwardArgs args_ = {};
};

std::tuple<Tensor, Tensor> convolve(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& residual, int64_t out_channels,
                                    at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t tile,
                                    bool relu, bool partials, bool bf16_products,
                                    const OptionalTensor& input_stats, bool input_relu) {
  TORCH_CHECK_VALUE(input.dim() == 4, "input: expected (N, C, H, W), got ", input.sizes());
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  ConvolutionArgs args = {};
  args.images = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.out_channels = out_channels, args.tile = tile, args.relu = relu, args.bf16_products = bf16_products;
  args.dtype = image_dtype(x, "input");
  TORCH_CHECK_TYPE(
      !partials || args.dtype == Dtype::kFloat32 || bf16_products,
      "partials: expected a float32 input, or products of bfloat16, for partial statistics, got ",
      x.scalar_type());
  set_geometry(args, kernel_size, stride, padding, dilation);
  check_conv_args(args);
  const PackedWeight packed(args, weight);
  const std::array<int64_t, 4> sizes = {args.images, out_channels, args.out_height, args.out_width};
  Tensor added, shift;
  if (residual && residual->defined()) {
    TORCH_CHECK_VALUE(residual->sizes().equals(sizes), "residual: expected the shape of the output, ",
                      at::IntArrayRef(sizes), ", got ", residual->sizes());
    added = residual->contiguous(at::MemoryFormat::ChannelsLast);
    args.residual = data_like_input(added, args.dtype, "residual");
  }
  if (bias && bias->defined()) {
    TORCH_CHECK_VALUE(bias->numel() == out_channels && bias->is_contiguous(), "bias: expected ", out_channels,
                      " elements, got ", bias->sizes());
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat || bias->scalar_type() == x.scalar_type(),
                     "bias: expected float32 or the dtype of the input, ", x.scalar_type(), ", got ",
                     bias->scalar_type());
    shift = bias->to(at::kFloat);
    args.bias = float_data(shift, "bias");
  }
  Tensor output = empty_output(sizes, x.scalar_type(), at::MemoryFormat::ChannelsLast);
  args.x = x.const_data_ptr(), args.y = output.mutable_data_ptr();
  args.stream = use_streaming_stores(args, args.images);
  Tensor statistics = empty_placeholder(at::kDouble);
  if (output.numel() == 0)
    return {output, partials ? at::zeros({1, 3, out_channels}, at::kDouble) : statistics};
  std::unique_ptr<NormalizedInput> normalized;
  if (input_stats && input_stats->defined()) {
    TORCH_CHECK_VALUE(tile == 0, "input_stats: expected a direct convolution");
    normalized = std::make_unique<NormalizedInput>(x, *input_stats, input_relu);
  }
  const DynamicParallel parallel(args);
  dispatch_tasks(kernels(), args, [&](const auto& tasks) {
    std::unique_ptr<double[]> partial(partials ? new double[tasks.chunks() * 2 * out_channels] : nullptr);
    if constexpr (std::is_same_v<std::decay_t<decltype(tasks)>, WinogradTasks>) {
      Scratch scratch(tasks.scratch(parallel.threads()));
      tasks.run(kernels(), scratch.data(), parallel, ChunkMoments{partial.get()});
    } else {
      Scratch scratch(tasks.scratch(parallel.threads(), normalized.get()));
      tasks.run(kernels(), scratch.data(), parallel, ChunkMoments{partial.get()}, normalized.get());
    }
    if (partials) {
      std::vector<double> counts;
      for (int64_t i = 0; i < tasks.chunks(); ++i)
        counts.push_back(static_cast<double>(tasks.pixel_count(i)));
      statistics = merge_chunk_moments(args, partial.get(), counts);
    }
  });
  return {output, statistics};
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("convolve", TORCH_FN(convolve));
}
