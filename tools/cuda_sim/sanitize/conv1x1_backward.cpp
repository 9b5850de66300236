// Sanitizer cases of the 1x1 convolution's backward: data gradient and weight gradient.
#include "cuda/conv1x1_backward.h"

#include "gemm_cases.h"

namespace fused_res::cuda::sanitize {
namespace {

constexpr int kImages = 2, kHeight = 7, kWidth = 9;

struct ConvOutputGradCase {
  Arrays arrays;
  Dtype dtype;
  ConvOutputGradArgs args;

  // `full`: with a relu_mask and, for batch statistics, the backward sums.
  ConvOutputGradCase(Dtype dtype, int64_t rows, int channels, bool full) : dtype(dtype), args() {
    args.dy = arrays.random(dtype, rows * channels);
    args.z = arrays.random(dtype, rows * channels);
    args.stats = arrays.random_floats(5 * channels);
    args.sums = full ? arrays.random_floats(2 * channels) : nullptr;
    args.mask = full ? arrays.random_bits(rows * ceil_div(channels, 8)) : nullptr;
    args.relu = true;
    args.inv_count = 1.0f / static_cast<float>(rows);
    args.rows = rows;
    args.channels = channels;
  }
};

bool can_vectorize(MathMode math_mode, int channels) {
  return channels % (16 / element_size(math_mode)) == 0;
}

// `output_norm`: without it, there is no prologue.
void dgrad(MathMode math_mode, TileSize size, bool aligned, int out_channels, int channels, bool full,
           bool output_norm = true) {
  constexpr int64_t kRows = kImages * kHeight * kWidth;
  ConvOutputGradCase gradient(dtype_of(math_mode), kRows, out_channels, full);
  Arrays& arrays = gradient.arrays;
  const GemmPartition partition =
      make_gemm_partition(gemm_problem(kRows, channels, out_channels, 1, math_mode, aligned, true), size, 1);
  DgradArgs args = {};
  args.gradient = gradient.args;
  if (!output_norm) {
    args.gradient.z = nullptr, args.gradient.stats = nullptr, args.gradient.sums = nullptr;
    args.gradient.mask = nullptr, args.gradient.relu = false;
  }
  args.weight = arrays.random(gradient.dtype, static_cast<int64_t>(out_channels) * channels);
  args.dx = arrays.empty(gradient.dtype, kRows * channels);
  args.channels = channels;
  args.col_tiles = static_cast<int>(partition.col_tiles);
  args.vectorized = can_vectorize(math_mode, channels);
  if (full) {
    args.x = arrays.random(gradient.dtype, kRows * channels);
    args.x_stats = arrays.random_floats(5 * channels);
    args.x_relu = true;
    args.partials = arrays.floats(partition.row_tiles * 2 * channels);
    args.added = arrays.random(gradient.dtype, kRows * channels);
    args.added_mask = arrays.random_bits(kRows * ceil_div(channels, 8));
  }
  launch_dgrad(args, partition, math_mode, aligned, nullptr);
}

// With several splits, the case also has a relu_mask, batch statistics and a norm of the input.
void wgrad(MathMode math_mode, TileSize size, bool aligned, int out_channels, int channels, int stride,
           int64_t splits) {
  const int out_height = (kHeight - 1) / stride + 1, out_width = (kWidth - 1) / stride + 1;
  const int64_t rows = static_cast<int64_t>(kImages) * out_height * out_width;
  ConvOutputGradCase gradient(dtype_of(math_mode), rows, out_channels, splits > 1);
  Arrays& arrays = gradient.arrays;
  const GemmPartition partition = make_gemm_partition(
      gemm_problem(out_channels, channels, rows, 1, math_mode, aligned, true), size, splits);
  WgradArgs args = {};
  args.gradient = gradient.args;
  args.input = arrays.random(gradient.dtype, static_cast<int64_t>(kImages) * kHeight * kWidth * channels);
  args.input_stats = splits > 1 ? arrays.random_floats(5 * channels) : nullptr;
  args.input_relu = true;
  if (partition.splits > 1)
    args.split_k_workspace = arrays.floats((partition.splits + 1) * out_channels * channels);
  args.epilogue.output = arrays.empty(gradient.dtype, static_cast<int64_t>(out_channels) * channels);
  args.epilogue.rows = out_channels;
  args.epilogue.channels = channels;
  args.epilogue.vectorized = can_vectorize(math_mode, channels);
  args.channels = channels, args.height = kHeight, args.width = kWidth;
  args.out_height = out_height, args.out_width = out_width;
  args.stride_height = args.stride_width = stride;
  args.col_tiles = static_cast<int>(partition.col_tiles);
  args.steps_per_split = static_cast<int>(partition.steps_per_split);
  launch_wgrad(args, partition, math_mode, aligned, nullptr);
}

}  // namespace

void add_conv1x1_backward(Cases& cases) {
  for (const MathMode math_mode : kMathModes) {
    for_each_tile(math_mode, true, [&](TileSize size, bool aligned) {
      const int out_channels = aligned ? 72 : 19, channels = aligned ? 136 : 67;
      const std::string name = name_of(math_mode, size, aligned);
      cases.push_back({"dgrad " + name, [=] {
                         dgrad(math_mode, size, aligned, out_channels, channels, false);
                         dgrad(math_mode, size, aligned, channels, out_channels, true);
                         dgrad(math_mode, size, aligned, channels, out_channels, true, false);
                       }});
      cases.push_back({"wgrad " + name, [=] {
                         wgrad(math_mode, size, aligned, out_channels, channels, 1, 1);
                         wgrad(math_mode, size, aligned, channels, out_channels, 2, 2);
                         wgrad(math_mode, size, aligned, out_channels, out_channels, 1,
                               kMaxEpilogueSplits + 1);
                       }});
    });
  }
}

}  // namespace fused_res::cuda::sanitize
