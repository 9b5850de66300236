// From a tile of float32 sums in shared memory to the output: bias, statistics of what is then written, but
// before it is rounded, residual, ReLU.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/product.cuh"

namespace fused_res::cuda {

// Which part of the output a block's tile is. A group's last tile of columns may be narrower than others.
struct Place {
  int64_t row_tile;
  int64_t col;
  int cols;
};

template <class Shape>
__device__ int rows_of_tile(int64_t rows, Place place) {
  const int64_t left = rows - place.row_tile * Shape::kRows;
  return left < Shape::kRows ? static_cast<int>(left) : Shape::kRows;
}

// Statistics pass their halves of a column on here, behind the tile.
template <class Shape>
constexpr int kEpilogueBytes = SumTile<Shape>::kBytes + 2 * Shape::kThreads * static_cast<int>(sizeof(float));

// Count, mean, M2 and the mean's rest of each column: a first pass for the mean, a second one around it.
// Several threads share a column, each has some rows next to each other; their results are added in order.
template <class Shape>
__device__ void store_partials(const Epilogue& epilogue, const float* sums, Place place) {
  constexpr int kParts = Shape::kThreads / Shape::kCols, kPartRows = Shape::kRows / kParts;
  const int col = static_cast<int>(threadIdx.x) % Shape::kCols,
            part = static_cast<int>(threadIdx.x) / Shape::kCols;
  const int rows = rows_of_tile<Shape>(epilogue.rows, place);
  const bool inside = col < place.cols;
  const float bias = inside ? load_parameter(epilogue.bias, place.col + col, 0.0f) : 0.0f;
  float* totals = const_cast<float*>(sums) + SumTile<Shape>::kBytes / sizeof(float);
  float* squares = totals + Shape::kThreads;
  const auto over_parts = [&](const float* of_parts) {
    float total = of_parts[col];
    for (int i = 1; i < kParts; ++i) total += of_parts[i * Shape::kCols + col];
    return total;
  };
  const auto over_rows = [&](auto&& take) {
    const int last = rows < (part + 1) * kPartRows ? rows : (part + 1) * kPartRows;
    for (int row = part * kPartRows; row < last; ++row)
      take(sums[row * SumTile<Shape>::kStride + col] + bias);
  };

  float total = 0;
  over_rows([&](float value) { total += value; });
  totals[threadIdx.x] = total;
  __syncthreads();
  const float count = static_cast<float>(rows), mean = over_parts(totals) / count;
  __syncthreads();

  float off = 0, square = 0;
  over_rows([&](float value) {
    const float d = value - mean;
    off += d;
    square = fmaf(d, d, square);
  });
  totals[threadIdx.x] = off;
  squares[threadIdx.x] = square;
  __syncthreads();
  if (part != 0 || !inside) return;
  const float rest = over_parts(totals) / count;  // what rounding left in the mean
  float* out = epilogue.partials + place.row_tile * 4 * epilogue.channels + place.col + col;
  out[0] = count;
  out[epilogue.channels] = mean;
  out[2 * epilogue.channels] = over_parts(squares) - rest * rest * count;
  out[3 * epilogue.channels] = rest;
}

// A thread has the same n columns of several rows, neighbouring threads neighbouring columns.
template <class Shape, int n>
__device__ int own_col() {
  return static_cast<int>(threadIdx.x) % (Shape::kCols / n) * n;
}

// Calls take(row of the tile) for those of them that are inside the output.
template <class Shape, int n, class F>
__device__ void for_own_rows(int64_t rows, Place place, F&& take) {
  constexpr int kAcross = Shape::kCols / n;
  const int exist = rows_of_tile<Shape>(rows, place);
  if (own_col<Shape, n>() >= place.cols) return;
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x) / kAcross; row < Shape::kRows;
       row += Shape::kThreads / kAcross) {
    if (row < exist) take(row);
  }
}

template <class T, class Shape, int n>
__device__ void store_output(const Epilogue& epilogue, const float* sums, Place place) {
  const int col = own_col<Shape, n>();
  const T* residual = static_cast<const T*>(epilogue.residual);
  float bias[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    bias[i] = col < place.cols ? load_parameter(epilogue.bias, place.col + col + i, 0.0f) : 0.0f;
  }
  for_own_rows<Shape, n>(epilogue.rows, place, [&](int row) {
    const int64_t at = (place.row_tile * Shape::kRows + row) * epilogue.channels + place.col + col;
    const Vector<float, n> values = load<n>(sums + row * SumTile<Shape>::kStride + col);
    const Vector<T, n> added = load<n>(residual + at, residual != nullptr);
    Vector<T, n> y;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float value = values[i] + bias[i] + to_float(added[i]);
      y[i] = from_float<T>(epilogue.relu ? relu(value) : value);
    }
    store_global(static_cast<T*>(epilogue.output) + at, y);
  });
}

// `sums` are in shared memory, and all threads see them.
template <class T, class Shape>
__device__ void finish(const Epilogue& epilogue, const float* sums, Place place) {
  if (epilogue.partials != nullptr) store_partials<Shape>(epilogue, sums, place);
  if (epilogue.vectors) {
    store_output<T, Shape, kVector<T>>(epilogue, sums, place);
  } else {
    store_output<T, Shape, 1>(epilogue, sums, place);
  }
}

// The same, or where sums are split, with `split_sums` (splits, rows, channels) as the output of this block's
// part.
template <class T, class Shape>
__device__ void finish_split(const Epilogue& epilogue, float* split_sums, const float* sums, Place place) {
  if (split_sums == nullptr) return finish<T, Shape>(epilogue, sums, place);
  float* part = split_sums + blockIdx.z * epilogue.rows * epilogue.channels;
  const Epilogue plain = {
      part, {}, nullptr, nullptr, epilogue.rows, epilogue.channels, false, epilogue.vectors};
  finish<float, Shape>(plain, sums, place);
}

}  // namespace fused_res::cuda
