// Operators for convolutions of float32 images in channels_last memory: packing of a weight, and one layer
// with its epilogue. The kernels are in isa/direct.h and isa/winograd.h, the tasks in convolution.h.
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
#include "cpu/weight_memory.h"

namespace fused_res::cpu {
namespace {

Tensor empty_packed(int64_t size, at::ScalarType dtype, bool resident) {
  return resident ? empty_weight(size, dtype) : empty_output({size}, dtype, at::MemoryFormat::Contiguous);
}

// Packs a weight for products of bfloat16; the arguments are those of pack_conv_weight.
Tensor pack_bf16_weight(const Tensor& original, bool transposed, bool resident) {
  const Bf16ConvolutionKernels& kernel = *kernels().bf16_convolution;
  // Blocks of filter rows are packed from the weight as it is.
  const bool swap = transposed && packs_filter_rows(original.size(0), original.size(3), kernel.tiles);
  const Tensor rotated = swap ? original.flip({2, 3}).transpose(0, 1) : original;
  const Tensor weight = (rotated.scalar_type() == at::kHalf ? rotated.to(at::kBFloat16) : rotated)
                            .contiguous(at::MemoryFormat::ChannelsLast);
  const Bf16WeightView view = {weight.const_data_ptr(), dtype_of(weight, "weight"),
                               weight.size(0),          weight.size(1),
                               weight.size(2),          weight.size(3),
                               transposed && !swap,     {0, 1, weight.size(2)},
                               {0, 1, weight.size(3)}};
  const int64_t out_channels = view.transposed ? view.channels : view.out_channels,
                channels = view.transposed ? view.out_channels : view.channels;
  const int64_t size = packed_bf16_size(out_channels, channels, view.kernel_h, view.kernel_w, kernel.tiles);
  Tensor packed = empty_packed(size, at::kBFloat16, resident);
  void* to = packed.mutable_data_ptr();
  Parallel{size}(num_panels(out_channels),
                 [&](int64_t begin, int64_t end) { kernel.pack(view, {begin, end}, to); });
  return packed;
}

// The view of a weight (K, C, kh, kw) of float32 to pack; the arguments are those of pack_conv_weight.
WeightView weight_view(const Tensor& weight, int64_t winograd, bool transposed) {
  WeightView view = {float_data(weight, "weight"),
                     weight.size(0),
                     weight.size(1),
                     weight.size(2),
                     weight.size(3),
                     weight.stride(0),
                     weight.stride(1),
                     weight.stride(2),
                     weight.stride(3),
                     winograd,
                     /*stream=*/false};
  if (transposed) {
    view.data += (view.kernel_h - 1) * view.row_stride + (view.kernel_w - 1) * view.column_stride;
    view.row_stride = -view.row_stride, view.column_stride = -view.column_stride;
    std::swap(view.out_channels, view.channels);
    std::swap(view.output_stride, view.channel_stride);
  }
  return view;
}

// Packs a weight (K, C, kh, kw) of float32, bfloat16 or float16. winograd: the stride, 1 or 2, of a Winograd
// convolution, or 0 for a direct one. transposed: pack the weight of the gradient with respect to the input
// (dgrad), whose taps are reversed and whose input and output channels are swapped. bf16_products: pack
// bfloat16 for products of bfloat16, otherwise float32. resident: many calls will read the packed weight.
Tensor pack_conv_weight(const Tensor& original, int64_t winograd, bool transposed, bool bf16_products,
                        bool resident) {
  image_dtype(original, "weight");
  TORCH_CHECK_VALUE(original.dim() == 4, "weight: expected (K, C, kh, kw), got ", original.sizes());
  const int64_t kernel_h = original.size(2), kernel_w = original.size(3);
  TORCH_CHECK_VALUE(winograd >= 0 && winograd <= 2,
                    "winograd: expected a stride of 1 or 2, or 0 for direct, got ", winograd);
  TORCH_CHECK_VALUE(winograd == 0 || (kernel_h == 3 && kernel_w == 3),
                    "weight: Winograd supports 3x3 kernels, got ", original.sizes());
  TORCH_CHECK_VALUE(
      !bf16_products || (kernels().bf16_convolution && winograd == 0),
      "bf16_products: expected a direct convolution, and an instruction set with products of bfloat16, "
      "got ",
      kernels().name);
  if (bf16_products) return pack_bf16_weight(original, transposed, resident);
  const Tensor weight = original.to(at::kFloat);
  WeightView w = weight_view(weight, winograd, transposed);
  const int64_t size = packed_size(w.out_channels, w.channels, kernel_h * kernel_w, winograd != 0);
  Tensor packed = empty_packed(size, at::kFloat, resident);
  void* to = packed.mutable_data_ptr();
  const auto pack =
      winograd != 0 ? convolution_kernels().winograd[0].pack : convolution_kernels().direct[0].pack;
  // Half of the L3, not keeps_in_l3()'s quarter: nothing is read between the packing of U and its use.
  w.stream = static_cast<int64_t>(packed.nbytes()) > caches().l3 / 2;
  Parallel{size}(num_panels(w.out_channels), [&](int64_t begin, int64_t end) { pack(w, {begin, end}, to); });
  return packed;
}

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
                                    const OptionalTensor& input_stats, bool input_relu, bool transposed) {
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
  Tensor packed = weight;
  WeightView view;
  if (weight.dim() == 4) {
    image_dtype(weight, "weight");
    TORCH_CHECK_VALUE(weight.size(transposed ? 1 : 0) == out_channels &&
                          weight.size(transposed ? 0 : 1) == args.channels &&
                          weight.sizes().slice(2).equals(kernel_size),
                      "weight: expected the weight of this convolution, got ", weight.sizes());
    const int64_t winograd = tile != 0 ? args.stride_h : 0;
    if (tile != 0 && WinogradTasks(args).staged()) {
      packed = weight.to(at::kFloat);
      view = weight_view(packed, winograd, transposed);
      args.weight = &view;
    } else {
      packed = pack_conv_weight(weight, winograd, transposed, bf16_products, /*resident=*/false);
    }
  }
  if (!args.weight) args.packed = packed_data(args, packed);
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
    TORCH_CHECK_VALUE(bf16_products, "input_stats: expected products of bfloat16");
    normalized = std::make_unique<NormalizedInput>(x, *input_stats, input_relu);
  }
  const DynamicParallel parallel(args);
  dispatch_tasks(kernels(), args, [&](const auto& tasks) {
    std::unique_ptr<double[]> partial(partials ? new double[tasks.chunks() * 2 * out_channels] : nullptr);
    if constexpr (std::is_same_v<std::decay_t<decltype(tasks)>, DirectBf16Tasks>) {
      Scratch scratch(tasks.scratch(parallel.threads(), normalized.get()));
      tasks.run(kernels(), scratch.data(), parallel, ChunkMoments{partial.get()}, normalized.get());
    } else {
      Scratch scratch(tasks.scratch(parallel.threads()));
      tasks.run(kernels(), scratch.data(), parallel, ChunkMoments{partial.get()});
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
  m.impl("pack_conv_weight", TORCH_FN(pack_conv_weight));
  m.impl("convolve", TORCH_FN(convolve));
}
