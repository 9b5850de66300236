// Implicit-GEMM forward convolution kernel, NHWC, with the multistage cp.async main loop of
// gemm_mainloop.cuh: the operand loader (im2col of the input, with an optional batch norm + ReLU prologue)
// and the kernel.
#pragma once

#include "cuda/convolution.h"
#include "cuda/epilogue.cuh"
#include "cuda/norm.cuh"

namespace fused_res::cuda {

// The input coordinate of an output pixel's first filter tap: offset of the element in the input, y and x.
// GEMM rows beyond M have a coordinate outside of every image, so that all their taps are padding.
struct alignas(16) WindowOrigin {
  int64_t offset;
  int y, x;
};

template <class Shape>
__device__ void compute_window_origins(const ConvolutionArgs& args, int64_t row_tile, WindowOrigin* origins) {
  constexpr int kOutside = -(1 << 30);
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows; i += Shape::kThreads) {
    const int64_t row = row_tile * Shape::kRows + i;
    if (row >= args.epilogue.rows) {
      origins[i] = {0, kOutside, kOutside};
      continue;
    }
    const int64_t out_row = row / args.out_width, image = out_row / args.out_height;
    const int top = static_cast<int>(out_row % args.out_height) * args.stride_height - args.pad_height;
    const int left = static_cast<int>(row % args.out_width) * args.stride_width - args.pad_width;
    origins[i] = {((image * args.height + top) * args.width + left) * args.channels, top, left};
  }
}

// A K index decomposed into filter row r, filter column s and channel within the group. For K indices >=
// gemm_k, r >= kernel_height.
struct Tap {
  int r, s, channel;

  __device__ Tap(const ConvolutionArgs& args, int index)
      : r(index / args.group_channels / args.kernel_width),
        s(index / args.group_channels % args.kernel_width),
        channel(index % args.group_channels) {}

  __device__ void advance(const ConvolutionArgs& args, int by) {
    channel += by;
    while (channel >= args.group_channels) {
      channel -= args.group_channels;
      if (++s < args.kernel_width) continue;
      s = 0;
      ++r;
    }
  }

  __device__ bool inside(const ConvolutionArgs& args, const WindowOrigin& origin) const {
    const int y = origin.y + r * args.dilation_height, x = origin.x + s * args.dilation_width;
    return r < args.kernel_height && static_cast<unsigned>(y) < static_cast<unsigned>(args.height) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(args.width);
  }

  __device__ int64_t offset(const ConvolutionArgs& args) const {
    const int64_t pixels =
        static_cast<int64_t>(r * args.dilation_height) * args.width + s * args.dilation_width;
    return pixels * args.channels + channel;
  }
};

// Operand loader of the forward GEMM: copies the input (im2col) and weight tiles of each stage to shared
// memory, with 16-byte cp.async, or with scalar loads where the operands are not aligned. Unaligned operands
// get the prologue as they are loaded, aligned ones in shared memory (transform_stage).
template <class T, class Shape, bool aligned>
class ImplicitGemmLoader {
 public:
  using A = GemmOperand<T, Shape::kRows, true>;
  using B = GemmOperand<T, Shape::kCols, true>;
  static constexpr int kStageBytes = A::Tile::kBytes + B::Tile::kBytes;

  __device__ ImplicitGemmLoader(const ConvolutionArgs& args, unsigned char* stages,
                                const WindowOrigin* origins, int group, TileCoord coord, int first_step)
      : args_(args),
        stages_(stages),
        origins_(origins),
        input_(static_cast<const T*>(args.input) + static_cast<int64_t>(group) * args.group_channels),
        first_channel_(group * args.group_channels),
        weight_(static_cast<const T*>(args.weight) + coord.col * args.gemm_k),
        cols_(coord.cols),
        k_index_(first_step * kTileK<T> + InputThreadMap::chunk() * kVector<T>),
        copy_tap_(args, k_index_),
        transform_tap_(copy_tap_) {}

  __device__ const unsigned char* a(int stage) const { return stages_ + stage * kStageBytes; }
  __device__ const unsigned char* b(int stage) const { return a(stage) + A::Tile::kBytes; }

  __device__ void copy_stage_async(int stage) {
    copy_input(stages_ + stage * kStageBytes);
    copy_weight(stages_ + stage * kStageBytes + A::Tile::kBytes);
    copy_tap_.advance(args_, kTileK<T>);
    k_index_ += kTileK<T>;
  }

  // Apply the batch norm + ReLU prologue to the input chunks. Padding is skipped: the convolution pads
  // the normalized activation with zeros, but bn(0) = shift - mean * scale is not zero.
  __device__ void transform_stage(int stage) {
    if (!aligned || args_.input_stats == nullptr) return;
    unsigned char* tile = stages_ + stage * kStageBytes;
    if (transform_tap_.r < args_.kernel_height) {
      // Elements transformed at once: less than a chunk, since the accumulators occupy most of the registers.
      constexpr int kTransformWidth = 4;
#pragma unroll 1
      for (int element = 0; element < kVector<T>; element += kTransformWidth) {
        const Norm<kTransformWidth> norm(args_.input_stats, args_.channels,
                                         first_channel_ + transform_tap_.channel + element);
#pragma unroll 1
        for (int i = 0; i < InputThreadMap::kIterations; ++i) {
          if (!transform_tap_.inside(args_, origins_[InputThreadMap::line(i)])) continue;
          T* dst = reinterpret_cast<T*>(tile + InputThreadMap::byte_offset(i)) + element;
          store(dst, norm.activate(load<kTransformWidth>(dst), args_.input_relu));
        }
      }
    }
    transform_tap_.advance(args_, kTileK<T>);
  }

 private:
  using InputThreadMap = TileThreadMap<typename A::Tile, Shape>;
  using WeightThreadMap = TileThreadMap<typename B::Tile, Shape>;

  __device__ void copy_input(unsigned char* tile) {
    const int64_t tap = copy_tap_.offset(args_);
#pragma unroll
    for (int i = 0; i < InputThreadMap::kIterations; ++i) {
      const WindowOrigin origin = origins_[InputThreadMap::line(i)];
      unsigned char* dst = tile + InputThreadMap::byte_offset(i);
      if constexpr (aligned) {
        const bool inside = copy_tap_.inside(args_, origin);
        ptx::cp_async(shared_address(dst), input_ + (inside ? origin.offset + tap : 0), inside);
      } else {
        store(reinterpret_cast<T*>(dst), load_im2col_chunk(origin));
      }
    }
  }

  __device__ Vector<T, kVector<T>> load_im2col_chunk(const WindowOrigin& origin) const {
    Vector<T, kVector<T>> chunk;
    Tap tap = copy_tap_;
    for (int i = 0; i < kVector<T>; ++i) {
      Vector<T, 1> x = {from_float<T>(0)};
      if (tap.inside(args_, origin)) {
        x = load<1>(input_ + origin.offset + tap.offset(args_));
        if (args_.input_stats != nullptr) {
          x = Norm<1>(args_.input_stats, args_.channels, first_channel_ + tap.channel)
                  .activate(x, args_.input_relu);
        }
      }
      chunk[i] = x[0];
      tap.advance(args_, 1);
    }
    return chunk;
  }

  __device__ void copy_weight(unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < WeightThreadMap::kIterations; ++i) {
      const int col = WeightThreadMap::line(i);
      copy_chunk<aligned>(tile + WeightThreadMap::byte_offset(i), weight_,
                          static_cast<int64_t>(col) * args_.gemm_k + k_index_,
                          col < cols_ ? args_.gemm_k - k_index_ : 0);
    }
  }

  const ConvolutionArgs& args_;
  unsigned char* stages_;
  const WindowOrigin* origins_;
  const T* input_;  // at the group's first channel
  int first_channel_;
  const T* weight_;  // at the tile's first output channel
  int cols_;
  int k_index_;  // K index of this thread's chunk in the next stage to copy
  Tap copy_tap_, transform_tap_;
};

// Shared memory layout: the pipeline stages, which the accumulator tile reuses after the main loop, then the
// window origins of the tile's rows.
template <class T, class Shape>
constexpr int kWindowOriginsOffset =
    kStages * ImplicitGemmLoader<T, Shape, true>::kStageBytes > kEpilogueBytes<Shape>
        ? kStages * ImplicitGemmLoader<T, Shape, true>::kStageBytes
        : kEpilogueBytes<Shape>;
template <class T, class Shape>
constexpr int kConvolutionSharedBytes =
    kWindowOriginsOffset<T, Shape> + Shape::kRows * static_cast<int>(sizeof(WindowOrigin));

template <class T, bool simt, class Shape, bool aligned>
FUSED_RES_KERNEL(Shape::kThreads, (kMinBlocksPerSM<Shape, simt, false>))
convolution_kernel(const __grid_constant__ ConvolutionArgs args) {
  using OperandLoader = ImplicitGemmLoader<T, Shape, aligned>;
  unsigned char* shared = shared_memory();
  // Consecutive threadblocks share a row tile, so that the input, the larger operand, is reused from the L2.
  const int64_t row_tile = blockIdx.x / args.col_tiles;
  const int first_col = static_cast<int>(blockIdx.x % args.col_tiles) * Shape::kCols;
  const int group = static_cast<int>(blockIdx.y), remaining_cols = args.group_out_channels - first_col;
  const TileCoord coord = {row_tile, static_cast<int64_t>(group) * args.group_out_channels + first_col,
                           remaining_cols < Shape::kCols ? remaining_cols : Shape::kCols};

  WindowOrigin* origins = reinterpret_cast<WindowOrigin*>(shared + kWindowOriginsOffset<T, Shape>);
  compute_window_origins<Shape>(args, row_tile, origins);
  __syncthreads();
  const int steps = (args.gemm_k + kTileK<T> - 1) / kTileK<T>;
  const int first_step = static_cast<int>(blockIdx.z) * args.steps_per_split, steps_left = steps - first_step;
  OperandLoader loader(args, shared, origins, group, coord, first_step);
  WarpMma<T, simt, Shape, typename OperandLoader::A, typename OperandLoader::B> mma;
  gemm_mainloop(mma, loader, steps_left < args.steps_per_split ? steps_left : args.steps_per_split);

  float* accumulators = reinterpret_cast<float*>(shared);
  mma.store_accumulators(accumulators);
  __syncthreads();
  apply_epilogue_or_store_split<T, Shape>(args.epilogue, args.split_k_workspace, accumulators, coord);
}

}  // namespace fused_res::cuda
