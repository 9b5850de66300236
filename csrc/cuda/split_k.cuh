// Split-K reduction kernel: adds the partial accumulators that the threadblocks of one output tile computed
// for different ranges of K, then applies the epilogue.
#pragma once

#include "cuda/epilogue.cuh"

namespace fused_res::cuda {

struct SplitKReduceArgs {
  const float* workspace;  // (splits, rows, channels)
  int64_t splits, col_tiles;
  Epilogue epilogue;
};

// Add the splits of a tile in order and store the totals to the accumulator tile in shared memory.
template <int n>
__device__ void reduce_splits(const SplitKReduceArgs& args, float* accumulators, TileCoord coord) {
  using Shape = Tile64x64;
  const int col = thread_col<Shape, n>();
  for_each_thread_row<Shape, n>(args.epilogue.rows, coord, [&](int row) {
    const int64_t channels = args.epilogue.channels;
    const float* partial =
        args.workspace + (coord.row_tile * Shape::kRows + row) * channels + coord.col + col;
    Vector<float, n> total = load<n>(partial);
    for (int64_t split = 1; split < args.splits; ++split) {
      const Vector<float, n> more = load<n>(partial + split * args.epilogue.rows * channels);
      for (int i = 0; i < n; ++i) total[i] += more[i];
    }
    store(accumulators + row * AccumulatorTile<Shape>::kStride + col, total);
  });
}

template <class T>
FUSED_RES_KERNEL(Tile64x64::kThreads, 3)
split_k_reduce_kernel(const __grid_constant__ SplitKReduceArgs args) {
  float* accumulators = reinterpret_cast<float*>(shared_memory());
  const int64_t col = blockIdx.x % args.col_tiles * Tile64x64::kCols, left = args.epilogue.channels - col;
  const TileCoord coord = {static_cast<int64_t>(blockIdx.x / args.col_tiles), col,
                           static_cast<int>(left < Tile64x64::kCols ? left : Tile64x64::kCols)};
  if (args.epilogue.vectorized) {
    reduce_splits<4>(args, accumulators, coord);
  } else {
    reduce_splits<1>(args, accumulators, coord);
  }
  __syncthreads();
  apply_epilogue<T, Tile64x64>(args.epilogue, accumulators, coord);
}

}  // namespace fused_res::cuda
