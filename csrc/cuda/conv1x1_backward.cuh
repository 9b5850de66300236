// dgrad and wgrad kernels of a 1x1 convolution: operand loaders, the dgrad epilogue and the kernels.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/operand_prologue.cuh"

namespace fused_res::cuda {

// Operand loader of dgrad, dx = dz * W: A is dz (M = rows, K = output channels), B the weight (N = channels).
template <class T, class Shape, bool aligned>
class DgradLoader {
 public:
  using A = GemmOperand<T, Shape::kRows, true>;
  using B = GemmOperand<T, Shape::kCols, false>;
  using Gradient = ConvOutputGradPrologue<T, typename A::Tile, Shape, ReductionAxis::kChannels, aligned>;
  static constexpr int kStageBytes = Gradient::kBytes + B::Tile::kBytes;

  __device__ DgradLoader(const DgradArgs& args, unsigned char* stages, TileCoord coord)
      : args_(args),
        stages_(stages),
        gradient_(args.gradient, coord.row_tile * Shape::kRows,
                  valid_tile_rows<Shape>(args.gradient.rows, coord), 0),
        col_(static_cast<int>(coord.col) + WeightThreadMap::chunk() * kVector<T>) {}

  __device__ const unsigned char* a(int stage) const { return stages_ + stage * kStageBytes; }
  __device__ const unsigned char* b(int stage) const { return a(stage) + Gradient::kBytes; }

  __device__ void copy_stage_async(int stage) {
    unsigned char* tile = stages_ + stage * kStageBytes;
    gradient_.copy_stage_async(tile);
#pragma unroll
    for (int i = 0; i < WeightThreadMap::kIterations; ++i) {
      const int out_channel = copy_stage_ * kTileK<T> + WeightThreadMap::line(i);
      copy_chunk<aligned>(tile + Gradient::kBytes + WeightThreadMap::byte_offset(i),
                          static_cast<const T*>(args_.weight),
                          static_cast<int64_t>(out_channel) * args_.channels + col_,
                          out_channel < args_.gradient.channels ? args_.channels - col_ : 0);
    }
    ++copy_stage_;
  }

  __device__ void transform_stage(int stage) { gradient_.transform_stage(stages_ + stage * kStageBytes); }

 private:
  using WeightThreadMap = TileThreadMap<typename B::Tile, Shape>;

  const DgradArgs& args_;
  unsigned char* stages_;
  Gradient gradient_;
  int col_, copy_stage_ = 0;
};

// Operand loader of wgrad, dW = dz^T * x: A is dz (M = output channels), B the input activation (N =
// channels), K the rows of both.
template <class T, class Shape, bool aligned>
class WgradLoader {
 public:
  using A = GemmOperand<T, Shape::kRows, false>;
  using B = GemmOperand<T, Shape::kCols, false>;
  using Gradient = ConvOutputGradPrologue<T, typename A::Tile, Shape, ReductionAxis::kRows, aligned>;
  using Input = NormActPrologue<T, typename B::Tile, Shape, aligned>;
  static constexpr int kStageBytes = Gradient::kBytes + Input::kBytes;

  __device__ WgradLoader(const WgradArgs& args, unsigned char* stages, TileCoord coord, int64_t first_row,
                         int rows)
      : stages_(stages),
        gradient_(args.gradient, first_row, rows, static_cast<int>(coord.row_tile) * Shape::kRows),
        input_(args, first_row, rows, static_cast<int>(coord.col)) {}

  __device__ const unsigned char* a(int stage) const { return stages_ + stage * kStageBytes; }
  __device__ const unsigned char* b(int stage) const { return a(stage) + Gradient::kBytes; }

  __device__ void copy_stage_async(int stage) {
    gradient_.copy_stage_async(stages_ + stage * kStageBytes);
    input_.copy_stage_async(stages_ + stage * kStageBytes + Gradient::kBytes);
  }

  __device__ void transform_stage(int stage) {
    gradient_.transform_stage(stages_ + stage * kStageBytes);
    input_.transform_stage(stages_ + stage * kStageBytes + Gradient::kBytes);
  }

 private:
  unsigned char* stages_;
  Gradient gradient_;
  Input input_;
};

template <class OperandLoader, class Shape>
constexpr int kBackwardSharedBytes =
    kStages * OperandLoader::kStageBytes > kEpilogueBytes<Shape> ? kStages * OperandLoader::kStageBytes
                                                                 : kEpilogueBytes<Shape>;

// Contribution of one thread's rows to the backward sums of the norm before the convolution: sums of the
// masked dx and of masked dx * (x - mean) for each of its n channels. invstd multiplies the second one at the
// end.
template <int n>
struct NormBackwardSums {
  float sum_dy[n] = {}, sum_dy_xmu[n] = {};
};

// Reduce the sums of the threads that share a column, in a fixed order, and store them as partial sums of the
// row tile. `shared`: reduction scratch.
template <class Shape, int n>
__device__ void store_partial_sums(const DgradArgs& args, const NormBackwardSums<n>& sums, float* shared,
                                   TileCoord coord) {
  constexpr int kThreadRows = Shape::kThreads * n / Shape::kCols, kThreadRowStride = 2 * Shape::kCols;
  float* dst =
      shared + static_cast<int>(threadIdx.x) / (Shape::kCols / n) * kThreadRowStride + thread_col<Shape, n>();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    dst[i] = sums.sum_dy[i];
    dst[Shape::kCols + i] = sums.sum_dy_xmu[i];
  }
  __syncthreads();
  const int col = static_cast<int>(threadIdx.x);
  if (col >= Shape::kCols || col >= coord.cols) return;
  float sum_dy = 0, sum_dy_xmu = 0;
  for (int i = 0; i < kThreadRows; ++i) {
    sum_dy += shared[i * kThreadRowStride + col];
    sum_dy_xmu += shared[i * kThreadRowStride + Shape::kCols + col];
  }
  const int64_t channel = coord.col + col;
  float* out = args.partials + coord.row_tile * 2 * args.channels + channel;
  out[0] = sum_dy;
  out[args.channels] = sum_dy_xmu * args.x_stats[args.channels + channel];  // row 1: invstd
}

// Epilogue of dgrad: mask dx by the ReLU of the activation that the convolution read, accumulate the backward
// sums of that activation's norm, add the residual gradient, and store dx.
template <class T, class Shape, int n>
__device__ void apply_dgrad_epilogue(const DgradArgs& args, float* accumulators, TileCoord coord) {
  const int channel = static_cast<int>(coord.col) + thread_col<Shape, n>();
  const T *x = static_cast<const T*>(args.x), *added = static_cast<const T*>(args.added);
  NormBackwardSums<n> norm_sums;
  for_each_thread_row<Shape, n>(args.gradient.rows, coord, [&](int tile_row) {
    const int64_t row = coord.row_tile * Shape::kRows + tile_row, offset = row * args.channels + channel;
    auto values = load<n>(accumulators + tile_row * AccumulatorTile<Shape>::kStride + thread_col<Shape, n>());
    if (x != nullptr) {
      const Norm<n> norm(args.x_stats, args.channels, channel);
      const auto x_values = load<n>(x + offset);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float value = to_float(x_values[i]);
        if (args.x_relu && !relu_grad_mask(norm(value, i))) values[i] = 0;
        norm_sums.sum_dy[i] += values[i];
        norm_sums.sum_dy_xmu[i] = fmaf(values[i], value - norm.mean[i], norm_sums.sum_dy_xmu[i]);
      }
    }
    if (added != nullptr) {
      const unsigned bits =
          args.added_mask == nullptr ? ~0u : load_mask_bits(args.added_mask, row, args.channels, channel);
      const auto residual_grad = load<n>(added + offset);
#pragma unroll
      for (int i = 0; i < n; ++i) values[i] += bits >> i & 1 ? to_float(residual_grad[i]) : 0.0f;
    }
    Vector<T, n> dx;
#pragma unroll
    for (int i = 0; i < n; ++i) dx[i] = from_float<T>(values[i]);
    store_global(static_cast<T*>(args.dx) + offset, dx);
  });
  if (x == nullptr) return;
  __syncthreads();
  store_partial_sums<Shape>(args, norm_sums, accumulators, coord);
}

// Return the coordinate of a threadblock's tile; consecutive threadblocks share a row tile.
template <class Shape>
__device__ TileCoord tile_coord(unsigned tile, int col_tiles, int cols) {
  const int first = static_cast<int>(tile % col_tiles) * Shape::kCols;
  return {static_cast<int64_t>(tile / col_tiles), first,
          cols - first < Shape::kCols ? cols - first : Shape::kCols};
}

template <class T, bool simt, class Shape, bool aligned>
FUSED_RES_KERNEL(Shape::kThreads, (kMinBlocksPerSM<Shape, simt, true>))
dgrad_kernel(const __grid_constant__ DgradArgs args) {
  using OperandLoader = DgradLoader<T, Shape, aligned>;
  const TileCoord coord = tile_coord<Shape>(blockIdx.x, args.col_tiles, args.channels);
  OperandLoader loader(args, shared_memory(), coord);
  WarpMma<T, simt, Shape, typename OperandLoader::A, typename OperandLoader::B> mma;
  gemm_mainloop(mma, loader, (args.gradient.channels + kTileK<T> - 1) / kTileK<T>);

  float* accumulators = reinterpret_cast<float*>(shared_memory());
  mma.store_accumulators(accumulators);
  __syncthreads();
  if (args.vectorized) {
    apply_dgrad_epilogue<T, Shape, kVector<T>>(args, accumulators, coord);
  } else {
    apply_dgrad_epilogue<T, Shape, 1>(args, accumulators, coord);
  }
}

template <class T, bool simt, class Shape, bool aligned>
FUSED_RES_KERNEL(Shape::kThreads, (kMinBlocksPerSM<Shape, simt, true>))
wgrad_kernel(const __grid_constant__ WgradArgs args) {
  using OperandLoader = WgradLoader<T, Shape, aligned>;
  const TileCoord coord = tile_coord<Shape>(blockIdx.x, args.col_tiles, args.channels);
  const int64_t rows_per_split = static_cast<int64_t>(args.steps_per_split) * kTileK<T>,
                first = blockIdx.z * rows_per_split;
  const int64_t left = args.gradient.rows - first;
  const int rows = static_cast<int>(left < rows_per_split ? left : rows_per_split);
  OperandLoader loader(args, shared_memory(), coord, first, rows);
  WarpMma<T, simt, Shape, typename OperandLoader::A, typename OperandLoader::B> mma;
  gemm_mainloop(mma, loader, (rows + kTileK<T> - 1) / kTileK<T>);

  float* accumulators = reinterpret_cast<float*>(shared_memory());
  mma.store_accumulators(accumulators);
  __syncthreads();
  apply_epilogue_or_store_split<T, Shape>(args.epilogue, args.split_k_workspace, accumulators, coord);
}

}  // namespace fused_res::cuda
