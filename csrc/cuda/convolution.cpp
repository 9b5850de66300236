#include "cuda/convolution.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include "common/output_size.h"
#include "cuda/activation.h"
#include "cuda/convolution_host.h"

namespace fused_res::cuda {
namespace {

int64_t checked_output_size(int64_t size, int64_t window, int64_t stride, int64_t padding, int64_t dilation) {
  TORCH_CHECK_VALUE(stride > 0 && dilation > 0 && padding >= 0,
                    "conv: stride and dilation must be positive, padding not negative; got ", stride, ", ",
                    dilation, ", ", padding);
  const int64_t output = output_size(size, window, stride, padding, dilation);
  TORCH_CHECK_VALUE(output > 0, "conv: the window, with dilation ", dilation * (window - 1) + 1,
                    ", is larger than the padded input, ", size + 2 * padding);
  return output;
}

void check(const Convolution& c) {
  check_images(c.input, "input");
  check_images(c.weight, "weight");
  TORCH_CHECK_VALUE(c.weight.numel() > 0, "weight: expected at least one element, got ", c.weight.sizes());
  check_device(c.weight, c.input, "weight");
  TORCH_CHECK_TYPE(c.weight.scalar_type() == c.input.scalar_type(), "weight: expected the dtype of input, ",
                   c.input.scalar_type(), ", got ", c.weight.scalar_type());
  TORCH_CHECK_VALUE(c.stride.size() == 2 && c.padding.size() == 2 && c.dilation.size() == 2,
                    "conv: expected two numbers each for stride, padding and dilation");
  constexpr int64_t kMostGroups = 65535;
  TORCH_CHECK_VALUE(c.groups > 0 && c.groups <= kMostGroups, "groups: expected 1 to ", kMostGroups, ", got ",
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
  args.group_outputs = narrow(w.size(0) / c.groups, "output channels of a group");
  args.groups = static_cast<int>(c.groups);
  args.depth = narrow(w.size(1) * w.size(2) * w.size(3), "weight of an output channel");
  args.height = narrow(x.size(2), "height");
  args.width = narrow(x.size(3), "width");
  args.window_height = narrow(w.size(2), "window's height");
  args.window_width = narrow(w.size(3), "window's width");
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
  // The window's last tap, and one more, from the last pixel.
  narrow(x.size(2) + 2 * c.padding[0] + c.dilation[0], "padded height");
  narrow(x.size(3) + 2 * c.padding[1] + c.dilation[1], "padded width");
  return args;
}

}  // namespace

int narrow(int64_t number, const char* what) {
  constexpr int64_t kMost = (1 << 30) - 1;
  TORCH_CHECK_VALUE(number >= 0 && number <= kMost, what, ": expected a number up to ", kMost, ", got ",
                    number);
  return static_cast<int>(number);
}

void check_images(const Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   ": there are kernels for float32, bfloat16 and float16, not for ", dtype);
  TORCH_CHECK_VALUE(tensor.dim() == 4, name, ": expected four dimensions, got ", tensor.sizes());
}

Arithmetic arithmetic_of(const Tensor& tensor) {
  if (tensor.scalar_type() == at::kBFloat16) return Arithmetic::kBFloat16;
  if (tensor.scalar_type() == at::kHalf) return Arithmetic::kFloat16;
  // Asked for convolutions alone: of the switch as a whole, that raises where the newer ones were set.
  return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV) ? Arithmetic::kTf32 : Arithmetic::kExact;
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

Tensor channel_rows(const Tensor& tensor, const Tensor& input, int64_t rows, int64_t channels,
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
  const OnDeviceOf device(c.input);
  ConvolutionArgs args = geometry(c);
  const Tensor input = laid_out(c.input, true), weight = laid_out(c.weight, true);
  const int64_t images = input.size(0), channels = weight.size(0);
  const int64_t rows = images * args.out_height * args.out_width;
  const Tensor output = at::empty({images, channels, args.out_height, args.out_width}, input.options(),
                                  at::MemoryFormat::ChannelsLast);
  const ChannelVector bias(c.bias, input, channels, "bias");
  Tensor residual, stats;
  if (c.residual.has_value()) {
    check_like(*c.residual, output, "residual");
    residual = laid_out(*c.residual, true);
  }
  if (c.input_stats.has_value()) stats = channel_rows(*c.input_stats, input, 5, args.channels, "input_stats");

  if (rows == 0) return {output, nothing(input, at::kFloat)};
  const Arithmetic arithmetic = arithmetic_of(input);
  const int64_t vector = 16 / element_size(arithmetic);
  const bool aligned = args.group_channels % vector == 0 && is_aligned(input) && is_aligned(weight);
  const ProductCut cut =
      cut_activation({rows, args.group_outputs, args.depth, c.groups, arithmetic, aligned, false}, true);
  const auto floats = input.options().dtype(at::kFloat);
  const int64_t row_tiles = cut.splits > 1 ? ceil_div(rows, kSplitRows) : cut.row_tiles;
  const Tensor partials =
      c.partials ? at::empty({row_tiles, 4, channels}, floats) : nothing(input, at::kFloat);
  const Tensor split_sums = cut.splits > 1 ? at::empty({cut.splits, rows, channels}, floats) : Tensor();

  args.input = input.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.input_stats = stats.defined() ? stats.const_data_ptr<float>() : nullptr;
  args.input_relu = c.input_relu;
  args.split_sums = split_sums.defined() ? split_sums.mutable_data_ptr<float>() : nullptr;
  args.col_tiles = static_cast<int>(cut.col_tiles);
  args.steps_per_split = static_cast<int>(cut.steps_per_split);
  args.epilogue.output = output.mutable_data_ptr();
  args.epilogue.bias = bias.get();
  args.epilogue.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  args.epilogue.partials = c.partials ? partials.mutable_data_ptr<float>() : nullptr;
  args.epilogue.rows = rows;
  args.epilogue.channels = channels;
  args.epilogue.relu = c.relu;
  args.epilogue.vectors = args.group_outputs % vector == 0 && (!residual.defined() || is_aligned(residual));
  launch_convolution(args, cut, arithmetic, aligned, device.stream());
  return {output, partials};
}

}  // namespace fused_res::cuda
