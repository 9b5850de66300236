// GEMM epilogue on a tile of float32 accumulators in shared memory: bias, residual, ReLU and the store of the
// output; and the partial statistics of the output as it is stored.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/gemm_mainloop.cuh"

namespace fused_res::cuda {

// Coordinate of a threadblock tile in the output: row tile, first column, and number of valid columns. The
// last column tile of a group may be narrower than the others.
struct TileCoord {
  int64_t row_tile;
  int64_t col;
  int cols;
};

// Return the number of rows of the tile that are inside the problem.
template <class Shape>
__device__ int valid_tile_rows(int64_t rows, TileCoord coord) {
  const int64_t left = rows - coord.row_tile * Shape::kRows;
  return left < Shape::kRows ? static_cast<int>(left) : Shape::kRows;
}

// Shared memory of the epilogue: the accumulator tile, then the scratch of store_partial_stats.
template <class Shape>
constexpr int kEpilogueBytes =
    AccumulatorTile<Shape>::kBytes + 2 * Shape::kThreads * static_cast<int>(sizeof(float));

// Store the partial statistics of each column of the output, rounded to its dtype T: count, mean, M2 (sum of
// squared deviations) and the compensation term of the mean. Two passes over the tile: the mean, then the
// deviations from it. Several threads share a column, each with a range of consecutive rows; their results
// are added in a fixed order.
template <class T, class Shape>
__device__ void store_partial_stats(const Epilogue& epilogue, const float* accumulators, TileCoord coord) {
  constexpr int kParts = Shape::kThreads / Shape::kCols, kPartRows = Shape::kRows / kParts;
  const int col = static_cast<int>(threadIdx.x) % Shape::kCols,
            part = static_cast<int>(threadIdx.x) / Shape::kCols;
  const int rows = valid_tile_rows<Shape>(epilogue.rows, coord);
  const bool valid = col < coord.cols;
  const float bias = valid ? load_parameter(epilogue.bias, coord.col + col, 0.0f) : 0.0f;
  float* totals = const_cast<float*>(accumulators) + AccumulatorTile<Shape>::kBytes / sizeof(float);
  float* squares = totals + Shape::kThreads;
  const auto sum_over_parts = [&](const float* part_sums) {
    float total = part_sums[col];
    for (int i = 1; i < kParts; ++i) total += part_sums[i * Shape::kCols + col];
    return total;
  };
  const auto for_each_value = [&](auto&& f) {
    const int last = rows < (part + 1) * kPartRows ? rows : (part + 1) * kPartRows;
    for (int row = part * kPartRows; row < last; ++row)
      f(to_float(from_float<T>(accumulators[row * AccumulatorTile<Shape>::kStride + col] + bias)));
  };

  float total = 0;
  for_each_value([&](float value) { total += value; });
  totals[threadIdx.x] = total;
  __syncthreads();
  const float count = static_cast<float>(rows), mean = sum_over_parts(totals) / count;
  __syncthreads();

  float deviation = 0, square = 0;
  for_each_value([&](float value) {
    const float d = value - mean;
    deviation += d;
    square = fmaf(d, d, square);
  });
  totals[threadIdx.x] = deviation;
  squares[threadIdx.x] = square;
  __syncthreads();
  if (part != 0 || !valid) return;
  // The rounding error of the mean: exact mean - mean.
  const float compensation = sum_over_parts(totals) / count;
  float* out = epilogue.partials + coord.row_tile * 4 * epilogue.channels + coord.col + col;
  out[0] = count;
  out[epilogue.channels] = mean;
  out[2 * epilogue.channels] = sum_over_parts(squares) - compensation * compensation * count;
  out[3 * epilogue.channels] = compensation;
}

// Return the first of the thread's n columns within the tile. A thread processes the same n columns of
// several rows; neighboring threads have neighboring columns, so that accesses coalesce.
template <class Shape, int n>
__device__ int thread_col() {
  return static_cast<int>(threadIdx.x) % (Shape::kCols / n) * n;
}

// Call f(row within the tile) for each of the thread's rows that is inside the output.
template <class Shape, int n, class F>
__device__ void for_each_thread_row(int64_t rows, TileCoord coord, F&& f) {
  constexpr int kThreadsPerRow = Shape::kCols / n;
  const int valid_rows = valid_tile_rows<Shape>(rows, coord);
  if (thread_col<Shape, n>() >= coord.cols) return;
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x) / kThreadsPerRow; row < Shape::kRows;
       row += Shape::kThreads / kThreadsPerRow) {
    if (row < valid_rows) f(row);
  }
}

// Store act(accumulator + bias [+ residual]), n columns per access.
template <class T, class Shape, int n>
__device__ void store_output(const Epilogue& epilogue, const float* accumulators, TileCoord coord) {
  const int col = thread_col<Shape, n>();
  const T* residual = static_cast<const T*>(epilogue.residual);
  float bias[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    bias[i] = col < coord.cols ? load_parameter(epilogue.bias, coord.col + col + i, 0.0f) : 0.0f;
  }
  for_each_thread_row<Shape, n>(epilogue.rows, coord, [&](int row) {
    const int64_t offset = (coord.row_tile * Shape::kRows + row) * epilogue.channels + coord.col + col;
    const Vector<float, n> values = load<n>(accumulators + row * AccumulatorTile<Shape>::kStride + col);
    const Vector<T, n> added = load<n>(residual + offset, residual != nullptr);
    Vector<T, n> y;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float value = values[i] + bias[i] + to_float(added[i]);
      y[i] = from_float<T>(epilogue.relu ? relu(value) : value);
    }
    store_global(static_cast<T*>(epilogue.output) + offset, y);
  });
}

// Apply the epilogue. `accumulators`: the tile in shared memory, visible to all threads. The partial
// statistics are those of accumulator + bias: with them there is neither a residual nor a ReLU.
template <class T, class Shape>
__device__ void apply_epilogue(const Epilogue& epilogue, const float* accumulators, TileCoord coord) {
  if (epilogue.partials != nullptr) store_partial_stats<T, Shape>(epilogue, accumulators, coord);
  if (epilogue.vectorized) {
    store_output<T, Shape, kVector<T>>(epilogue, accumulators, coord);
  } else {
    store_output<T, Shape, 1>(epilogue, accumulators, coord);
  }
}

// Apply the epilogue or, with split-K (`split_k_workspace` not null), store the raw accumulators of this
// threadblock's split to the workspace (splits, rows, channels).
template <class T, class Shape>
__device__ void apply_epilogue_or_store_split(const Epilogue& epilogue, float* split_k_workspace,
                                              const float* accumulators, TileCoord coord) {
  if (split_k_workspace == nullptr) return apply_epilogue<T, Shape>(epilogue, accumulators, coord);
  float* split = split_k_workspace + blockIdx.z * epilogue.rows * epilogue.channels;
  const Epilogue store_only = {
      split, {}, nullptr, nullptr, epilogue.rows, epilogue.channels, false, epilogue.vectorized};
  apply_epilogue<float, Shape>(store_only, accumulators, coord);
}

}  // namespace fused_res::cuda
