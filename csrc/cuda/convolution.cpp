// Host side of the forward convolution: argument checks, geometry, work partition and launch.
#include "cuda/convolution.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include "common/output_size.h"
#include "cuda/activation_tensor.h"
#include "cuda/convolution_host.h"

namespace fused_res::cuda {
namespace {

int64_t checked_output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  TORCH_CHECK_VALUE(stride > 0 && dilation > 0 && padding >= 0,
                    "conv: stride and dilation must be positive, padding not negative; got ", stride, ", ",
                    dilation, ", ", padding);
  const int64_t output = output_size(size, kernel, stride, padding, dilation);
  TORCH_CHECK_VALUE(output > 0, "conv: the kernel, with dilation ", dilation * (kernel - 1) + 1,
                    ", is larger than the padded input, ", size + 2 * padding);
  return output;
}

void check(const Convolution& c) {
  check_4d_tensor(c.input, "input");
  check_4d_tensor(c.weight, "weight");
  TORCH_CHECK_VALUE(c.weight.numel() > 0, "weight: expected at least one element, got ", c.weight.sizes());
  check_device(c.weight, c.input, "weight");
  TORCH_CHECK_TYPE(c.weight.scalar_type() == c.input.scalar_type(), "weight: expected the dtype of input, ",
                   c.input.scalar_type(), ", got ", c.weight.scalar_type());
  TORCH_CHECK_VALUE(c.stride.size() == 2 && c.padding.size() == 2 && c.dilation.size() == 2,
                    "conv: expected two numbers each for stride, padding and dilation");
  constexpr int64_t kMaxGroups = 65535;
  TORCH_CHECK_VALUE(c.groups > 0 && c.groups <= kMaxGroups, "groups: expected 1 to ", kMaxGroups, ", got ",
                    c.groups);
  TORCH_CHECK_VALUE(c.weight.size(1) * c.groups == c.input.size(1) && c.weight.size(0) % c.groups == 0,
                    "weight: ", c.weight.sizes(), " in ", c.groups, " groups does not fit input, ",
                    c.input.sizes());
}

ConvolutionArgs geometry(const Convolution& c) {
  const Tensor &x = c.input, &w = c.weight;
  ConvolutionArgs args = {};
  args.channels = narrow(x.size(1), "channels");
  args.group_channels = narrow(w.size(1), "channels of a group");
  args.group_out_channels = narrow(w.size(0) / c.groups, "output channels of a group");
  args.groups = static_cast<int>(c.groups);
  args.gemm_k = narrow(w.size(1) * w.size(2) * w.size(3), "filter elements per output channel");
  args.height = narrow(x.size(2), "height");
  args.width = narrow(x.size(3), "width");
  args.kernel_height = narrow(w.size(2), "kernel height");
  args.kernel_width = narrow(w.size(3), "kernel width");
  args.out_height =
      narrow(checked_output_size(x.size(2), w.size(2), c.stride[0], c.padding[0], c.dilation[0]), "height");
  args.out_width =
      narrow(checked_output_size(x.size(3), w.size(3), c.stride[1], c.padding[1], c.dilation[1]), "width");
  args.stride_height = narrow(c.stride[0], "stride");
  args.stride_width = narrow(c.stride[1], "stride");
  args.pad_height = narrow(c.padding[0], "padding");
  args.pad_width = narrow(c.padding[1], "padding");
  args.dilation_height = narrow(c.dilation[0], "dilation");
  args.dilation_width = narrow(c.dilation[1], "dilation");
  // Bounds of the coordinates that the kernel computes: the last tap of the last output pixel, and one tap
  // beyond.
  narrow(x.size(2) + 2 * c.padding[0] + c.dilation[0], "padded height");
  narrow(x.size(3) + 2 * c.padding[1] + c.dilation[1], "padded width");
  return args;
}

}  // namespace

int narrow(int64_t number, const char* name) {
  constexpr int64_t kMax = (1 << 30) - 1;
  TORCH_CHECK_VALUE(number >= 0 && number <= kMax, name, ": expected a number up to ", kMax, ", got ",
                    number);
  return static_cast<int>(number);
}

void check_4d_tensor(const Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   ": expected float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(tensor.dim() == 4, name, ": expected four dimensions, got ", tensor.sizes());
}

MathMode math_mode_of(const Tensor& tensor) {
  if (tensor.scalar_type() == at::kBFloat16) return MathMode::kBFloat16;
  if (tensor.scalar_type() == at::kHalf) return MathMode::kFloat16;
  // Queries the convolution setting: the query of the global TF32 setting raises if the newer per-operator
  // ones are set.
  return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV) ? MathMode::kTf32 : MathMode::kFloat32;
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

Tensor aligned_channel_rows(const Tensor& tensor, const Tensor& input, int64_t rows, int64_t channels,
                            const char* name) {
  check_device(tensor, input, name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, ": expected float32, got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == channels, name,
                    ": expected (", rows, ", ", channels, "), got ", tensor.sizes());
  const Tensor dense = tensor.contiguous();
  constexpr uintptr_t kEightFloats = 32;
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % kEightFloats == 0 ? dense : dense.clone();
}

std::tuple<Tensor, Tensor> convolve(const Convolution& c) {
  check(c);
  const DeviceGuard device(c.input);
  ConvolutionArgs args = geometry(c);
  const Tensor input = to_memory_format(c.input, true), weight = to_memory_format(c.weight, true);
  const int64_t images = input.size(0), channels = weight.size(0);
  const int64_t rows = images * args.out_height * args.out_width;
  const Tensor output = at::empty({images, channels, args.out_height, args.out_width}, input.options(),
                                  at::MemoryFormat::ChannelsLast);
  const ChannelVector bias(c.bias, input, channels, "bias");
  Tensor residual, stats;
  if (c.residual.has_value()) {
    check_like(*c.residual, output, "residual");
    residual = to_memory_format(*c.residual, true);
  }
  if (c.input_stats.has_value())
    stats = aligned_channel_rows(*c.input_stats, input, 5, args.channels, "input_stats");

  if (rows == 0) return {output, empty_placeholder(input, at::kFloat)};
  const MathMode math_mode = math_mode_of(input);
  const int64_t vector_size = 16 / element_size(math_mode);
  const bool aligned = args.group_channels % vector_size == 0 && is_aligned(input) && is_aligned(weight);
  const GemmPartition partition = partition_activation_gemm(
      {rows, args.group_out_channels, args.gemm_k, c.groups, math_mode, aligned, false}, true);
  const auto floats = input.options().dtype(at::kFloat);
  const int64_t row_tiles = partition.splits > 1 ? ceil_div(rows, kSplitKReduceRows) : partition.row_tiles;
  const Tensor partials =
      c.partials ? at::empty({row_tiles, 4, channels}, floats) : empty_placeholder(input, at::kFloat);
  const Tensor split_k_workspace =
      partition.splits > 1 ? at::empty({partition.splits, rows, channels}, floats) : Tensor();

  args.input = input.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.input_stats = stats.defined() ? stats.const_data_ptr<float>() : nullptr;
  args.input_relu = c.input_relu;
  args.split_k_workspace =
      split_k_workspace.defined() ? split_k_workspace.mutable_data_ptr<float>() : nullptr;
  args.col_tiles = static_cast<int>(partition.col_tiles);
  args.steps_per_split = static_cast<int>(partition.steps_per_split);
  args.epilogue.output = output.mutable_data_ptr();
  args.epilogue.bias = bias.get();
  args.epilogue.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  args.epilogue.partials = c.partials ? partials.mutable_data_ptr<float>() : nullptr;
  args.epilogue.rows = rows;
  args.epilogue.channels = channels;
  args.epilogue.relu = c.relu;
  args.epilogue.vectorized =
      args.group_out_channels % vector_size == 0 && (!residual.defined() || is_aligned(residual));
  launch_convolution(args, partition, math_mode, aligned, device.stream());
  return {output, partials};
}

}  // namespace fused_res::cuda
