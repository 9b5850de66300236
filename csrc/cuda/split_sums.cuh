// Sums that were split over blocks, each with the same tile and another part of the terms.
#pragma once

#include "cuda/epilogue.cuh"

namespace fused_res::cuda {

struct SplitSumsArgs {
  const float* sums;  // (splits, rows, channels)
  int64_t splits, col_tiles;
  Epilogue epilogue;
};

template <int n>
__device__ void add_splits(const SplitSumsArgs& args, float* sums, Place place) {
  using Shape = SmallTile;
  const int col = own_col<Shape, n>();
  for_own_rows<Shape, n>(args.epilogue.rows, place, [&](int row) {
    const int64_t channels = args.epilogue.channels;
    const float* part = args.sums + (place.row_tile * Shape::kRows + row) * channels + place.col + col;
    Vector<float, n> total = load<n>(part);
    for (int64_t split = 1; split < args.splits; ++split) {
      const Vector<float, n> more = load<n>(part + split * args.epilogue.rows * channels);
      for (int i = 0; i < n; ++i) total[i] += more[i];
    }
    store(sums + row * SumTile<Shape>::kStride + col, total);
  });
}

// Adds up what the splits have found, in their order, and goes on as one block would have.
template <class T>
FUSED_RES_KERNEL(SmallTile::kThreads, 3)
split_sums_kernel(const __grid_constant__ SplitSumsArgs args) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int64_t col = blockIdx.x % args.col_tiles * SmallTile::kCols, left = args.epilogue.channels - col;
  const Place place = {static_cast<int64_t>(blockIdx.x / args.col_tiles), col,
                       static_cast<int>(left < SmallTile::kCols ? left : SmallTile::kCols)};
  if (args.epilogue.vectors) {
    add_splits<4>(args, sums, place);
  } else {
    add_splits<1>(args, sums, place);
  }
  __syncthreads();
  finish<T, SmallTile>(args.epilogue, sums, place);
}

}  // namespace fused_res::cuda
