// Launches of the forward convolution and of the split-K reduction.
#include "cuda/convolution.cuh"
#include "cuda/gemm_dispatch.cuh"
#include "cuda/launch.h"
#include "cuda/split_k.cuh"

namespace fused_res::cuda {

void launch_convolution(const ConvolutionArgs& args, const GemmPartition& partition, MathMode math_mode,
                        bool aligned, Stream stream) {
  dispatch_tile<false>(
      math_mode, partition.size, aligned, [&]<class T, bool simt, class Shape, bool is_aligned>() {
        const dim3 grid =
            checked_grid(partition.row_tiles * partition.col_tiles, args.groups, partition.splits);
        launch(convolution_kernel<T, simt, Shape, is_aligned>, grid, Shape::kThreads,
               kConvolutionSharedBytes<T, Shape>, stream, args);
      });
  if (args.split_k_workspace != nullptr)
    launch_split_k_reduce(math_mode, args.split_k_workspace, partition.splits, args.epilogue, stream);
}

void launch_split_k_reduce(MathMode math_mode, const float* workspace, int64_t splits,
                           const Epilogue& epilogue, Stream stream) {
  static_assert(kSplitKReduceRows == Tile64x64::kRows);
  const int64_t row_tiles = ceil_div(epilogue.rows, Tile64x64::kRows);
  const int64_t col_tiles = ceil_div(epilogue.channels, Tile64x64::kCols);
  dispatch_math_mode(math_mode, [&]<class T, bool simt>() {
    launch(split_k_reduce_kernel<T>, checked_grid(row_tiles * col_tiles), Tile64x64::kThreads,
           kEpilogueBytes<Tile64x64>, stream, SplitKReduceArgs{workspace, splits, col_tiles, epilogue});
  });
}

}  // namespace fused_res::cuda
