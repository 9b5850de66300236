// The backward kernels, what brings their operands and what follows their sums.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/formed_tile.cuh"

namespace fused_res::cuda {

// The gradient, rows by output channels, times the weight.
template <class T, class Shape, bool aligned>
class DgradSource {
 public:
  using A = ProductOperand<T, Shape::kRows, true>;
  using B = ProductOperand<T, Shape::kCols, false>;
  using Gradient = GradientTile<T, typename A::Tile, Shape, Summed::kChannels, aligned>;
  static constexpr int kStageBytes = Gradient::kBytes + B::Tile::kBytes;

  __device__ DgradSource(const DgradArgs& args, unsigned char* stages, Place place)
      : args_(args),
        stages_(stages),
        gradient_(args.gradient, place.row_tile * Shape::kRows,
                  rows_of_tile<Shape>(args.gradient.rows, place), 0),
        col_(static_cast<int>(place.col) + WeightShare::chunk() * kVector<T>) {}

  __device__ const unsigned char* a(int stage) const { return stages_ + stage * kStageBytes; }
  __device__ const unsigned char* b(int stage) const { return a(stage) + Gradient::kBytes; }

  __device__ void copy(int stage) {
    unsigned char* tile = stages_ + stage * kStageBytes;
    gradient_.copy(tile);
#pragma unroll
    for (int i = 0; i < WeightShare::kEach; ++i) {
      const int output = copied_ * kDepth<T> + WeightShare::line(i);
      copy_chunk<aligned>(tile + Gradient::kBytes + WeightShare::at(i), static_cast<const T*>(args_.weight),
                          static_cast<int64_t>(output) * args_.channels + col_,
                          output < args_.gradient.channels ? args_.channels - col_ : 0);
    }
    ++copied_;
  }

  __device__ void form(int stage) { gradient_.form(stages_ + stage * kStageBytes); }

 private:
  using WeightShare = Share<typename B::Tile, Shape>;

  const DgradArgs& args_;
  unsigned char* stages_;
  Gradient gradient_;
  int col_, copied_ = 0;
};

// The gradient, transposed, times the activation: summed over rows of both.
template <class T, class Shape, bool aligned>
class WgradSource {
 public:
  using A = ProductOperand<T, Shape::kRows, false>;
  using B = ProductOperand<T, Shape::kCols, false>;
  using Gradient = GradientTile<T, typename A::Tile, Shape, Summed::kRows, aligned>;
  using Input = InputTile<T, typename B::Tile, Shape, aligned>;
  static constexpr int kStageBytes = Gradient::kBytes + Input::kBytes;

  __device__ WgradSource(const WgradArgs& args, unsigned char* stages, Place place, int64_t first_row,
                         int rows)
      : stages_(stages),
        gradient_(args.gradient, first_row, rows, static_cast<int>(place.row_tile) * Shape::kRows),
        input_(args, first_row, rows, static_cast<int>(place.col)) {}

  __device__ const unsigned char* a(int stage) const { return stages_ + stage * kStageBytes; }
  __device__ const unsigned char* b(int stage) const { return a(stage) + Gradient::kBytes; }

  __device__ void copy(int stage) {
    gradient_.copy(stages_ + stage * kStageBytes);
    input_.copy(stages_ + stage * kStageBytes + Gradient::kBytes);
  }

  __device__ void form(int stage) {
    gradient_.form(stages_ + stage * kStageBytes);
    input_.form(stages_ + stage * kStageBytes + Gradient::kBytes);
  }

 private:
  unsigned char* stages_;
  Gradient gradient_;
  Input input_;
};

template <class Source, class Shape>
constexpr int kBackwardShared =
    kStages * Source::kStageBytes > kEpilogueBytes<Shape> ? kStages * Source::kStageBytes
                                                          : kEpilogueBytes<Shape>;

// What a thread's rows add to the sums of the norm that the convolution read through.
template <int n>
struct NormSums {
  float dy[n] = {}, xhat[n] = {};  // xhat but for invstd
};

// Adds up what the threads of a column have found, in their order. `shared` is free.
template <class Shape, int n>
__device__ void store_sums(const DgradArgs& args, const NormSums<n>& own, float* shared, Place place) {
  constexpr int kParts = Shape::kThreads * n / Shape::kCols, kPart = 2 * Shape::kCols;
  float* part = shared + static_cast<int>(threadIdx.x) / (Shape::kCols / n) * kPart + own_col<Shape, n>();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    part[i] = own.dy[i];
    part[Shape::kCols + i] = own.xhat[i];
  }
  __syncthreads();
  const int col = static_cast<int>(threadIdx.x);
  if (col >= Shape::kCols || col >= place.cols) return;
  float dy = 0, xhat = 0;
  for (int i = 0; i < kParts; ++i) {
    dy += shared[i * kPart + col];
    xhat += shared[i * kPart + Shape::kCols + col];
  }
  const int64_t channel = place.col + col;
  float* out = args.partials + place.row_tile * 2 * args.channels + channel;
  out[0] = dy;
  out[args.channels] = xhat * args.x_stats[args.channels + channel];
}

// From the sums to dx: masked by the activation that the convolution read, with the sums of its norm, and the
// shortcut's gradient added.
template <class T, class Shape, int n>
__device__ void finish_dgrad(const DgradArgs& args, float* sums, Place place) {
  const int channel = static_cast<int>(place.col) + own_col<Shape, n>();
  const T *x = static_cast<const T*>(args.x), *added = static_cast<const T*>(args.added);
  NormSums<n> norm_sums;
  for_own_rows<Shape, n>(args.gradient.rows, place, [&](int tile_row) {
    const int64_t row = place.row_tile * Shape::kRows + tile_row, at = row * args.channels + channel;
    auto values = load<n>(sums + tile_row * SumTile<Shape>::kStride + own_col<Shape, n>());
    if (x != nullptr) {
      const Norm<n> norm(args.x_stats, args.channels, channel);
      const auto raw = load<n>(x + at);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float value = to_float(raw[i]);
        if (args.x_relu && !passes(norm(value, i))) values[i] = 0;
        norm_sums.dy[i] += values[i];
        norm_sums.xhat[i] = fmaf(values[i], value - norm.mean[i], norm_sums.xhat[i]);
      }
    }
    if (added != nullptr) {
      const unsigned bits =
          args.added_mask == nullptr ? ~0u : load_bits(args.added_mask, row, args.channels, channel);
      const auto more = load<n>(added + at);
#pragma unroll
      for (int i = 0; i < n; ++i) values[i] += bits >> i & 1 ? to_float(more[i]) : 0.0f;
    }
    Vector<T, n> dx;
#pragma unroll
    for (int i = 0; i < n; ++i) dx[i] = from_float<T>(values[i]);
    store_global(static_cast<T*>(args.dx) + at, dx);
  });
  if (x == nullptr) return;
  __syncthreads();
  store_sums<Shape>(args, norm_sums, sums, place);
}

template <class Shape>
__device__ Place place_of(unsigned tile, int col_tiles, int cols) {
  const int first = static_cast<int>(tile % col_tiles) * Shape::kCols;
  return {static_cast<int64_t>(tile / col_tiles), first,
          cols - first < Shape::kCols ? cols - first : Shape::kCols};
}

template <class T, bool exact, class Shape, bool aligned>
FUSED_RES_KERNEL(Shape::kThreads, (kResidentBlocks<Shape, exact, true>))
dgrad_kernel(const __grid_constant__ DgradArgs args) {
  using Source = DgradSource<T, Shape, aligned>;
  const Place place = place_of<Shape>(blockIdx.x, args.col_tiles, args.channels);
  Source source(args, shared_memory(), place);
  Product<T, exact, Shape, typename Source::A, typename Source::B> product;
  accumulate(product, source, (args.gradient.channels + kDepth<T> - 1) / kDepth<T>);

  float* sums = reinterpret_cast<float*>(shared_memory());
  product.store(sums);
  __syncthreads();
  if (args.vectors) {
    finish_dgrad<T, Shape, kVector<T>>(args, sums, place);
  } else {
    finish_dgrad<T, Shape, 1>(args, sums, place);
  }
}

template <class T, bool exact, class Shape, bool aligned>
FUSED_RES_KERNEL(Shape::kThreads, (kResidentBlocks<Shape, exact, true>))
wgrad_kernel(const __grid_constant__ WgradArgs args) {
  using Source = WgradSource<T, Shape, aligned>;
  const Place place = place_of<Shape>(blockIdx.x, args.col_tiles, args.channels);
  const int64_t share = static_cast<int64_t>(args.steps_per_split) * kDepth<T>, first = blockIdx.z * share;
  const int64_t left = args.gradient.rows - first;
  const int rows = static_cast<int>(left < share ? left : share);
  Source source(args, shared_memory(), place, first, rows);
  Product<T, exact, Shape, typename Source::A, typename Source::B> product;
  accumulate(product, source, (rows + kDepth<T> - 1) / kDepth<T>);

  float* sums = reinterpret_cast<float*>(shared_memory());
  product.store(sums);
  __syncthreads();
  finish_split<T, Shape>(args.epilogue, args.split_sums, sums, place);
}

}  // namespace fused_res::cuda
