// Sanitizer cases of the implicit-GEMM forward convolution.
#include "cuda/convolution.h"
#include "gemm_cases.h"

namespace fused_res::cuda::sanitize {
namespace {

struct Geometry {
  int channels, out_channels, groups, height, width, kernel, stride, padding, dilation;
};

int output_size(const Geometry& g, int size) {
  return (size + 2 * g.padding - g.dilation * (g.kernel - 1) - 1) / g.stride + 1;
}

void convolution(const Geometry& g, MathMode math_mode, TileSize size, bool aligned, int64_t splits,
                 bool training) {
  constexpr int64_t kImages = 3;
  Arrays arrays;
  const Dtype dtype = dtype_of(math_mode);
  ConvolutionArgs args = {};
  args.channels = g.channels, args.group_channels = g.channels / g.groups;
  args.group_out_channels = g.out_channels / g.groups, args.groups = g.groups;
  args.gemm_k = args.group_channels * g.kernel * g.kernel;
  args.height = g.height, args.width = g.width;
  args.out_height = output_size(g, g.height), args.out_width = output_size(g, g.width);
  args.kernel_height = args.kernel_width = g.kernel;
  args.stride_height = args.stride_width = g.stride;
  args.pad_height = args.pad_width = g.padding;
  args.dilation_height = args.dilation_width = g.dilation;

  const int64_t rows = kImages * args.out_height * args.out_width;
  const GemmPartition partition = make_gemm_partition(
      gemm_problem(rows, args.group_out_channels, args.gemm_k, g.groups, math_mode, aligned, false), size,
      splits);
  const int64_t row_tiles = partition.splits > 1 ? ceil_div(rows, kSplitKReduceRows) : partition.row_tiles;
  args.col_tiles = static_cast<int>(partition.col_tiles);
  args.steps_per_split = static_cast<int>(partition.steps_per_split);
  args.input = arrays.random(dtype, kImages * g.height * g.width * g.channels);
  args.weight = arrays.random(dtype, static_cast<int64_t>(g.out_channels) * args.gemm_k);
  if (partition.splits > 1) args.split_k_workspace = arrays.floats(partition.splits * rows * g.out_channels);
  args.epilogue.output = arrays.empty(dtype, rows * g.out_channels);
  args.epilogue.rows = rows;
  args.epilogue.channels = g.out_channels;
  args.epilogue.vectorized = args.group_out_channels % (16 / element_size(math_mode)) == 0;
  if (training) {
    args.input_stats = arrays.random_floats(5 * g.channels);
    args.input_relu = true;
    args.epilogue.partials = arrays.floats(row_tiles * 4 * g.out_channels);
  } else {
    args.epilogue.bias = {arrays.random(dtype, g.out_channels), dtype};
    args.epilogue.residual = arrays.random(dtype, rows * g.out_channels);
    args.epilogue.relu = true;
  }
  launch_convolution(args, partition, math_mode, aligned, nullptr);
}

}  // namespace

void add_convolutions(Cases& cases) {
  constexpr Geometry kAligned[] = {{24, 136, 1, 6, 7, 3, 1, 1, 1}, {48, 80, 2, 7, 5, 2, 2, 1, 2}};
  constexpr Geometry kUnaligned[] = {{3, 5, 1, 9, 8, 3, 2, 1, 1}, {22, 67, 1, 5, 5, 1, 1, 0, 1}};
  for (const MathMode math_mode : kMathModes) {
    for_each_tile(math_mode, false, [&](TileSize size, bool aligned) {
      for (const int64_t splits : {1, 2}) {
        for (const bool training : {false, true}) {
          const auto run = [=](const auto& geometries) {
            for (const Geometry& geometry : geometries)
              convolution(geometry, math_mode, size, aligned, splits, training);
          };
          cases.push_back({"convolution " + name_of(math_mode, size, aligned) + (splits > 1 ? " split" : "") +
                               (training ? " training" : " inference"),
                           [=] { aligned ? run(kAligned) : run(kUnaligned); }});
        }
      }
    });
  }
}

}  // namespace fused_res::cuda::sanitize
