// Operator for the gradients of a convolution with respect to its input and its weight, and, where it is
// direct, for the passes of the norms around it. The kernels are those of the forward convolution and of
// isa/conv_wgrad*.h; those of the norms, batch_norm_*.h, run on the pixels of a chunk, which stay in L2.
#include <torch/library.h>

#include <array>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/conv_wgrad.h"
#include "cpu/convolution_host.h"
#include "cpu/packed_weight.h"

namespace fused_res::cpu {
namespace {

// With fewer chunks, both gradients share no chunk: the input gradient has more tasks by itself.
constexpr int64_t kMinJointChunks = 4;
constexpr int64_t kPassPixels = 2048;  // of a task of a pass over the input gradient of several phases

// The gradients of one convolution.
struct Backward {
  ConvolutionArgs shape;  // the forward convolution
  BackwardArgs norm;      // of the norm that follows; without one, dy is the gradient of the output
  bool has_norm;
  ForwardArgs input_norm;  // of the norm that precedes
  bool has_input_norm;
  // Added to the gradient of the input: that of a shortcut, with its ReLU mask or null.
  const void* added;
  const uint8_t* added_mask;
  char* dx;
  double* input_sums;  // [chunk][2][channels], or null: the sums of the norm that precedes, see
                       // BatchNormActKernels

  int64_t element() const { return element_size(shape.dtype); }
  const BatchNormActKernels& norm_kernels() const {
    return kernels().batch_norm_act[static_cast<int>(shape.dtype)][static_cast<int>(Layout::kNhwc)];
  }
  void grad_output(Range pixels, void* to) const {
    BackwardArgs args = norm;
    args.norms[0].dx = static_cast<char*>(to) - pixels.begin * shape.out_channels * element();
    norm_kernels().backward[0](pixel_block(shape.out_channels, pixels), args);
  }
  void input(Range pixels, void* to) const {
    ForwardArgs args = input_norm;
    args.y = static_cast<char*>(to) - pixels.begin * shape.channels * element();
    norm_kernels().forward(pixel_block(shape.channels, pixels), args);
  }
  // The input gradient of these pixels is written.
  void finish_input_grad(int64_t chunk, Range pixels) const {
    if (added)
      kernels().add_masked[static_cast<int>(shape.dtype)](dx, added, added_mask, pixels.begin, pixels.end,
                                                          shape.channels);
    if (!input_sums) return;
    BackwardArgs args = {};
    args.dy = dx;
    args.norms[0] = {
        .x = input_norm.x, .norm = input_norm.norm, .slope = nullptr, .offset = nullptr, .dx = nullptr};
    args.activation = input_norm.activation;
    norm_kernels().reduce[0](pixel_block(shape.channels, pixels), args,
                             input_sums + chunk * 2 * shape.channels);
  }
};

// The input gradient by itself. `whole`: it is computed in one phase.
class InputGradientFusion final : public ChunkFusion {
 public:
  InputGradientFusion(const Backward& backward, bool whole) : backward_(backward), whole_(whole) {}
  bool computes_input() const override { return backward_.has_norm; }
  void input(Range pixels, void* to) const override { backward_.grad_output(pixels, to); }
  void output(int64_t chunk, Range rows) const override {
    if (whole_) backward_.finish_input_grad(chunk, rows);
  }

 private:
  const Backward& backward_;
  bool whole_;
};

// The weight gradient, and the input gradient of the same pixels if `dgrad` is given.
class WeightGradientFusion final : public GradientFusion {
 public:
  WeightGradientFusion(const Backward& backward, const ConvolutionArgs* dgrad)
      : backward_(backward), dgrad_(dgrad) {}
  bool computes_input() const override { return backward_.has_input_norm; }
  void input(Range pixels, void* to) const override { backward_.input(pixels, to); }
  bool computes_grad_output() const override { return backward_.has_norm; }
  void grad_output(Range pixels, void* to) const override { backward_.grad_output(pixels, to); }
  Range grad_output_pixels(Range rows) const override { return dgrad_ ? input_pixels(*dgrad_, rows) : rows; }
  int64_t chunk_bytes(int64_t rows) const override {
    if (!dgrad_) return 0;
    if (dgrad_->bf16_products)
      return copied_elements(*dgrad_, kernels().bf16_convolution->tiles, rows) * backward_.element();
    return dgrad_->needs_im2col
               ? rows * padded_row_stride(gemm_k(*dgrad_)) * static_cast<int64_t>(sizeof(float))
               : 0;
  }
  std::array<MemoryRange, kMaxNextRanges> operands(Range rows) const override {
    const ConvolutionArgs& shape = backward_.shape;
    const int64_t element = backward_.element();
    const auto range = [&](const void* data, Range pixels, int64_t channels) {
      return MemoryRange{static_cast<const char*>(data) + pixels.begin * channels * element,
                         (pixels.end - pixels.begin) * channels * element};
    };
    const Range dz = grad_output_pixels(rows);
    return {range(shape.x, input_pixels(shape, rows), shape.channels),
            range(backward_.norm.dy, dz, shape.out_channels),
            backward_.has_norm ? range(backward_.norm.norms[0].x, dz, shape.out_channels) : MemoryRange{}};
  }
  void chunk(int64_t chunk, Range rows, const void* dz, char* memory) const override {
    if (!dgrad_) return;
    ConvolutionArgs args = *dgrad_;
    args.x = dz;
    const Range panels = {0, num_panels(args.out_channels)};
    if (args.bf16_products) {
      kernels().bf16_convolution->run(args, rows, panels, memory, nullptr, nullptr);
    } else {
      kernels().convolution->direct[dtype_index(args)].run(args, rows, panels, memory, nullptr);
    }
    backward_.finish_input_grad(chunk, rows);
  }

 private:
  const Backward& backward_;
  const ConvolutionArgs* dgrad_;
};

// One dimension of a phase of the input gradient: the input positions `offset`, offset + stride, ... They are
// the convolution of the output gradient with every stride-th tap, in reverse:
//   dx[stride * t + offset] = sum over j of dz[t + q - j] * w[first + stride * j],  q = (offset + padding) /
//   stride
struct Phase {
  TapSubset taps;
  int64_t padding, count;
  Phase(int64_t offset, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t first = (offset + pad) % stride;
    taps = {first, stride, first < kernel ? (kernel - first + stride - 1) / stride : 0};
    padding = (taps.count - 1) * dilation - (offset + pad) / stride;
    count = offset < size ? (size - offset + stride - 1) / stride : 0;
  }
};

// The convolution of the output gradient that computes a phase of the input gradient. `compact`: of the
// strided input positions only, whose gradient is stored without the others.
ConvolutionArgs phase_args(const Backward& backward, const Phase& rows, const Phase& columns,
                           int64_t offset_h, int64_t offset_w, bool compact, int64_t tile) {
  const ConvolutionArgs& forward = backward.shape;
  ConvolutionArgs args = {};
  args.images = forward.images;
  args.channels = forward.out_channels, args.height = forward.out_height, args.width = forward.out_width;
  args.out_channels = forward.channels, args.out_height = rows.count, args.out_width = columns.count;
  args.kernel_h = rows.taps.count, args.kernel_w = columns.taps.count;
  args.stride_h = args.stride_w = 1;
  args.pad_h = rows.padding, args.pad_w = columns.padding;
  args.dilation_h = forward.dilation_h, args.dilation_w = forward.dilation_w;
  args.dtype = forward.dtype, args.bf16_products = forward.bf16_products, args.tile = tile;
  args.needs_im2col = needs_im2col(args);
  args.x = backward.norm.dy, args.y = backward.dx;
  if (!compact && forward.stride_h * forward.stride_w != 1) {
    args.y_stride_h = forward.stride_h, args.y_stride_w = forward.stride_w;
    args.y_height = forward.height, args.y_width = forward.width;
    args.y = backward.dx + (offset_h * forward.width + offset_w) * forward.channels * backward.element();
  } else {
    args.stream = !args.bf16_products && use_streaming_stores(args, args.images);
  }
  return args;
}

// The convolutions that compute the input gradient. `packed`: receives their weights.
std::vector<ConvolutionArgs> make_phases(const Backward& backward, const Tensor& weight, bool compact,
                                         int64_t tile, std::vector<PackedWeight>& packed) {
  const ConvolutionArgs& shape = backward.shape;
  std::vector<ConvolutionArgs> phases;
  for (int64_t i = 0; i < (compact ? 1 : shape.stride_h); ++i) {
    const Phase rows(i, shape.height, shape.kernel_h, shape.stride_h, shape.pad_h, shape.dilation_h);
    for (int64_t j = 0; j < (compact ? 1 : shape.stride_w); ++j) {
      const Phase columns(j, shape.width, shape.kernel_w, shape.stride_w, shape.pad_w, shape.dilation_w);
      if (rows.count * columns.count == 0) continue;
      TORCH_CHECK_VALUE(
          !shape.bf16_products ||
              !packs_filter_rows(shape.out_channels, columns.taps.count, kernels().bf16_convolution->tiles),
          "weight: expected more than ", kPixelChannels, " output channels, got ", weight.sizes());
      TORCH_CHECK_VALUE(rows.padding >= 0 && columns.padding >= 0 && rows.taps.count * columns.taps.count > 0,
                        "weight: expected a filter larger than its stride and its padding, got ",
                        weight.sizes());
      phases.push_back(phase_args(backward, rows, columns, i, j, compact, tile));
      packed.emplace_back(phases.back(), weight, rows.taps, columns.taps);
    }
  }
  return phases;
}

// True if the gradient of a weight is to be written with streaming stores: the optimizer reads it when all
// other gradients have been written. Two cores of a Xeon with AMX, ms of a step with and without: ResNet-50,
// batch 4, 162 and 167; ResNet-18, batch 4, 61.3 and 63.8; batch 16, equal.
bool streams_weight_gradient(const WeightGradientArgs& args, int64_t bytes) {
  constexpr int64_t kLine = 64 / sizeof(float);
  return bytes >= caches().l2 / 2 && reinterpret_cast<uintptr_t>(args.dweight) % 64 == 0 &&
         args.output_stride % kLine == 0 && args.row_stride % kLine == 0 && args.column_stride % kLine == 0;
}

// True for rows that are a multiple of 2 KB apart, which alias in two sets of the L1.
bool aliases_l1_sets(int64_t channels) { return channels % 512 == 0; }

WeightGradientArgs weight_gradient_args(const ConvolutionArgs& shape, const void* dz, int64_t tile) {
  WeightGradientArgs args = {};
  args.convolution = shape, args.dz = dz;
  if (shape.bf16_products) return args;
  args.convolution.tile = tile == 0 ? 0 : 4;
  args.convolution.needs_im2col = !is_pointwise(shape);  // it is packed in any case
  args.pack_dz = shape.out_channels % kPanelWidth != 0 || aliases_l1_sets(shape.out_channels);
  return args;
}

// Returns the gradient sums (2, C), sum dy and sum dy * xhat, of all chunks.
Tensor merge_sums(const std::vector<double>& partial, int64_t channels, const Tensor& stats) {
  std::vector<double> total(static_cast<size_t>(2 * channels));
  for (size_t i = 0; i < partial.size(); ++i) total[i % total.size()] += partial[i];
  Tensor sums = at::detail::empty_cpu({2, channels}, at::kFloat);
  const FinalizeBackwardArgs out = {.stats = stats.const_data_ptr(),
                                    .slope = nullptr,
                                    .offset = nullptr,
                                    .dweight = matrix_row(sums, 1),
                                    .dbias = matrix_row(sums, 0)};
  kernels().finalize_backward[0](out, total.data(), total.data() + channels, 1.0, channels, 0, channels);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(
    const Tensor& grad_output, const OptionalTensor& output, const OptionalTensor& stats,
    const OptionalTensor& relu_mask, bool relu, const OptionalTensor& sums, int64_t count,
    const Tensor& weight, const Tensor& input, const OptionalTensor& input_stats, bool input_relu,
    const OptionalTensor& added, const OptionalTensor& added_mask, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, std::array<bool, 2> output_mask, int64_t tile) {
  TORCH_CHECK_VALUE(input.dim() == 4 && grad_output.dim() == 4 && weight.dim() == 4,
                    "input: expected (N, C, H, W), got ", input.sizes(), " for a gradient of ",
                    grad_output.sizes(), " and a weight of ", weight.sizes());
  const auto [needs_input_grad, needs_weight_grad] = output_mask;
  const ActivationTensor dy(grad_output.contiguous(at::MemoryFormat::ChannelsLast));
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const ActivationTensor x_like(x);
  Backward backward = {};
  ConvolutionArgs& shape = backward.shape;
  shape.images = x.size(0), shape.channels = x.size(1), shape.height = x.size(2), shape.width = x.size(3);
  shape.out_channels = dy.tensor.size(1);
  shape.dtype = image_dtype(x, "input"), shape.bf16_products = shape.dtype == Dtype::kBFloat16;
  set_geometry(shape, weight.sizes().slice(2), stride, padding, dilation);
  TORCH_CHECK_TYPE(shape.dtype != Dtype::kFloat16, "input: expected float32 or bfloat16, got ",
                   x.scalar_type());
  convolution_kernels();  // raises without them
  TORCH_CHECK_VALUE(!shape.bf16_products || kernels().bf16_convolution,
                    "input: products of bfloat16 require avx512_bf16 or amx, got ", kernels().name);
  TORCH_CHECK_VALUE(
      tile == 0 || (!shape.bf16_products && supports_winograd_tile(tile) && supports_winograd(shape)),
      "tile: Winograd supports float32, 3x3 kernels with stride 1 or 2, and tiles of 2 to 4, got ", tile);
  TORCH_CHECK_VALUE(shape.images == dy.tensor.size(0) && weight.size(0) == shape.out_channels &&
                        weight.size(1) == shape.channels && shape.out_height == dy.tensor.size(2) &&
                        shape.out_width == dy.tensor.size(3) && dy.tensor.numel() > 0 && x.numel() > 0,
                    "grad_output: expected the gradient of this convolution, got ", grad_output.sizes(),
                    " for an input of ", input.sizes(), " and a weight of ", weight.sizes());
  shape.x = x.const_data_ptr();
  backward.norm.dy = data_like_input(dy.tensor, shape.dtype, "grad_output");

  // The norm that follows.
  Tensor z, saved, coefficients;
  backward.has_norm = stats && stats->defined();
  if (backward.has_norm) {
    TORCH_CHECK_VALUE(output && output->defined(), "output: expected together with stats");
    z = dy.checked_like(*output, "output"), saved = checked_stats(*stats, dy, "stats");
    coefficients = norm_coefficients(sums, saved, count, shape.out_channels);
    backward.norm.mask = checked_mask(relu_mask, dy);
    backward.norm.activation = relu && !backward.norm.mask ? Activation::kRelu : Activation::kIdentity;
    backward.norm.norms[0] = {.x = z.const_data_ptr(),
                              .norm = norm_args(saved),
                              .slope = coefficients.defined() ? matrix_row(coefficients, 0) : nullptr,
                              .offset = coefficients.defined() ? matrix_row(coefficients, 1) : nullptr,
                              .dx = nullptr};
  }
  // The norm that precedes.
  Tensor input_saved;
  backward.has_input_norm = input_stats && input_stats->defined();
  if (backward.has_input_norm) {
    input_saved = checked_stats(*input_stats, x_like, "input_stats");
    backward.input_norm.x = shape.x, backward.input_norm.norm = norm_args(input_saved);
    backward.input_norm.activation = input_relu ? Activation::kRelu : Activation::kIdentity;
  }

  const bool has_norms = backward.has_norm || backward.has_input_norm;
  TORCH_CHECK_VALUE(tile == 0 || !(has_norms || (added && added->defined())),
                    "tile: expected 0, a direct convolution, with norms or an addition, got ", tile);
  const DynamicParallel parallel(dy.tensor.numel() * gemm_k(shape));
  const bool strided = shape.stride_h * shape.stride_w != 1;
  const bool compact = strided && shape.kernel_h * shape.kernel_w == 1;
  Tensor dx = empty_placeholder(x.scalar_type()), dweight = empty_placeholder(at::kFloat),
         input_sums = empty_placeholder(at::kFloat);
  std::vector<PackedWeight> packed;
  std::vector<ConvolutionArgs> phases;
  Tensor addend;
  if (needs_input_grad) {
    const Tensor like =
        compact ? x.slice(2, 0, c10::nullopt, shape.stride_h).slice(3, 0, c10::nullopt, shape.stride_w) : x;
    dx = empty_output(like.sizes(), x.scalar_type(), at::MemoryFormat::ChannelsLast);
    backward.dx = static_cast<char*>(dx.mutable_data_ptr());
    if (added && added->defined()) {
      const ActivationTensor dx_like(dx);
      addend = dx_like.checked_like(*added, "added");
      backward.added = addend.const_data_ptr(), backward.added_mask = checked_mask(added_mask, dx_like);
    }
    phases = make_phases(backward, weight, compact, tile, packed);
  }
  const bool has_input_sums = needs_input_grad && backward.has_input_norm;
  TORCH_CHECK_VALUE(!has_input_sums || !compact, "input_stats: expected none for a strided 1x1 convolution");
  WeightGradientArgs wgrad = weight_gradient_args(shape, backward.norm.dy, tile);
  const auto dispatch_wgrad = [&](const auto& f) {
    if (shape.bf16_products) {
      f(WeightGradientBf16Tasks(wgrad, kernels().bf16_convolution->tiles), kernels().bf16_convolution);
    } else {
      f(WeightGradientTasks(wgrad), kernels().convolution);
    }
  };
  int64_t wgrad_chunks = 0;
  dispatch_wgrad([&](const auto& tasks, const auto*) {
    wgrad_chunks = tasks.chunks();
    TORCH_CHECK_VALUE(!needs_weight_grad || !has_norms || tasks.fusible(), "weight: expected at most ",
                      kSplitKMaxFloats, " elements in whole panels, in float32 with norms, got ",
                      weight.sizes());
  });
  // Both gradients of a chunk are computed together if they read the same pixels of dz.
  const bool joint = needs_input_grad && needs_weight_grad && !strided && shape.height == shape.out_height &&
                     shape.width == shape.out_width && wgrad_chunks >= kMinJointChunks && backward.has_norm;
  std::vector<double> partial;
  if (has_input_sums && joint) partial.resize(static_cast<size_t>(wgrad_chunks * 2 * shape.channels));
  backward.input_sums = partial.empty() ? nullptr : partial.data();
  if (needs_input_grad && !joint) {
    const InputGradientFusion fusion(backward, phases.size() == 1);
    const bool finishes = backward.added || has_input_sums;
    for (const ConvolutionArgs& args : phases) {
      dispatch_tasks(kernels(), args, [&](const auto& tasks) {
        if constexpr (std::is_same_v<std::decay_t<decltype(tasks)>, WinogradTasks>) {
          Scratch scratch(tasks.scratch(parallel.threads()));
          tasks.run(kernels(), scratch.data(), parallel, {});
        } else {
          if (has_input_sums && phases.size() == 1) {
            partial.resize(static_cast<size_t>(tasks.chunks() * 2 * shape.channels));
            backward.input_sums = partial.data();
          }
          const bool passes = backward.has_norm || (finishes && phases.size() == 1);
          Scratch scratch(tasks.scratch(parallel.threads(), passes ? &fusion : nullptr));
          tasks.run(kernels(), scratch.data(), parallel, {}, passes ? &fusion : nullptr);
        }
      });
    }
    if (finishes && phases.size() > 1) {
      const int64_t pixels = shape.images * shape.height * shape.width,
                    chunks = ceil_div(pixels, kPassPixels);
      if (has_input_sums) partial.resize(static_cast<size_t>(chunks * 2 * shape.channels));
      backward.input_sums = has_input_sums ? partial.data() : nullptr;
      parallel(chunks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          backward.finish_input_grad(i, balanced_range(pixels, i, chunks));
      });
    }
  }
  if (needs_weight_grad) {
    dweight = empty_output(weight.sizes(), at::kFloat, weight.suggest_memory_format());
    wgrad.dweight = dweight.data_ptr<float>();
    wgrad.output_stride = dweight.stride(0), wgrad.channel_stride = dweight.stride(1);
    wgrad.row_stride = dweight.stride(2), wgrad.column_stride = dweight.stride(3);
    wgrad.stream = streams_weight_gradient(wgrad, static_cast<int64_t>(dweight.nbytes()));
    if (joint) phases[0].pixels_outer = true;
    const WeightGradientFusion fusion(backward, joint ? &phases[0] : nullptr);
    dispatch_wgrad([&](const auto& tasks, const auto* convolution) {
      Scratch scratch(tasks.scratch(parallel.threads(), fusion));
      tasks.run(*convolution, scratch.data(), parallel, fusion);
    });
    dweight = dweight.to(weight.scalar_type());
  }
  if (has_input_sums) input_sums = merge_sums(partial, shape.channels, input_saved);
  return {dx, input_sums, dweight};
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  m.impl("conv_backward", TORCH_FN(fused_res::cpu::conv_backward));
}
