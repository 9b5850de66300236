// The forward kernel and what brings its operands.
#pragma once

#include "cuda/convolution.h"
#include "cuda/epilogue.cuh"
#include "cuda/norm.cuh"

namespace fused_res::cuda {

// The first tap of an output pixel: where its image and its row and column are; outside of every image for
// rows of a tile that do not exist.
struct alignas(16) Pixel {
  int64_t offset;
  int row, col;
};

template <class Shape>
__device__ void locate_pixels(const ConvolutionArgs& args, int64_t row_tile, Pixel* pixels) {
  constexpr int kOutside = -(1 << 30);
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows; i += Shape::kThreads) {
    const int64_t row = row_tile * Shape::kRows + i;
    if (row >= args.epilogue.rows) {
      pixels[i] = {0, kOutside, kOutside};
      continue;
    }
    const int64_t line = row / args.out_width, image = line / args.out_height;
    const int top = static_cast<int>(line % args.out_height) * args.stride_height - args.pad_height;
    const int left = static_cast<int>(row % args.out_width) * args.stride_width - args.pad_width;
    pixels[i] = {((image * args.height + top) * args.width + left) * args.channels, top, left};
  }
}

// Where in the window, and in the group's channels, an index of the sum lies; behind the window's last row
// for those behind the sum's end.
struct Tap {
  int row, col, channel;

  __device__ Tap(const ConvolutionArgs& args, int index)
      : row(index / args.group_channels / args.window_width),
        col(index / args.group_channels % args.window_width),
        channel(index % args.group_channels) {}

  __device__ void advance(const ConvolutionArgs& args, int by) {
    channel += by;
    while (channel >= args.group_channels) {
      channel -= args.group_channels;
      if (++col < args.window_width) continue;
      col = 0;
      ++row;
    }
  }

  __device__ bool inside(const ConvolutionArgs& args, const Pixel& pixel) const {
    const int y = pixel.row + row * args.dilation_height, x = pixel.col + col * args.dilation_width;
    return row < args.window_height && static_cast<unsigned>(y) < static_cast<unsigned>(args.height) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(args.width);
  }

  __device__ int64_t offset(const ConvolutionArgs& args) const {
    const int64_t pixels =
        static_cast<int64_t>(row * args.dilation_height) * args.width + col * args.dilation_width;
    return pixels * args.channels + channel;
  }
};

// Brings the operands' tiles, stage after stage: 16 bytes at a time and without waiting, or where these are
// not aligned, element by element.
template <class T, class Shape, bool aligned>
class ConvolutionSource {
 public:
  using A = ProductOperand<T, Shape::kRows, true>;
  using B = ProductOperand<T, Shape::kCols, true>;
  static constexpr int kStageBytes = A::Tile::kBytes + B::Tile::kBytes;

  __device__ ConvolutionSource(const ConvolutionArgs& args, unsigned char* stages, const Pixel* pixels,
                               int group, Place place, int first_step)
      : args_(args),
        stages_(stages),
        pixels_(pixels),
        input_(static_cast<const T*>(args.input) + static_cast<int64_t>(group) * args.group_channels),
        first_channel_(group * args.group_channels),
        weight_(static_cast<const T*>(args.weight) + place.col * args.depth),
        cols_(place.cols),
        index_(first_step * kDepth<T> + InputShare::chunk() * kVector<T>),
        copied_(args, index_),
        formed_(copied_) {}

  __device__ const unsigned char* a(int stage) const { return stages_ + stage * kStageBytes; }
  __device__ const unsigned char* b(int stage) const { return a(stage) + A::Tile::kBytes; }

  __device__ void copy(int stage) {
    copy_input(stages_ + stage * kStageBytes);
    copy_weight(stages_ + stage * kStageBytes + A::Tile::kBytes);
    copied_.advance(args_, kDepth<T>);
    index_ += kDepth<T>;
  }

  // Normalises what the input's chunks hold. Padding stays as it is: zero behind the norm, not before it.
  __device__ void form(int stage) {
    if (!aligned || args_.input_stats == nullptr) return;
    unsigned char* tile = stages_ + stage * kStageBytes;
    if (formed_.row < args_.window_height) {
      constexpr int kPiece = 4;  // of a chunk, for the sums' sake, which have most of the registers
#pragma unroll 1
      for (int piece = 0; piece < kVector<T>; piece += kPiece) {
        const Norm<kPiece> norm(args_.input_stats, args_.channels, first_channel_ + formed_.channel + piece);
#pragma unroll 1
        for (int i = 0; i < InputShare::kEach; ++i) {
          if (!formed_.inside(args_, pixels_[InputShare::line(i)])) continue;
          T* place = reinterpret_cast<T*>(tile + InputShare::at(i)) + piece;
          store(place, norm.activate(load<kPiece>(place), args_.input_relu));
        }
      }
    }
    formed_.advance(args_, kDepth<T>);
  }

 private:
  using InputShare = Share<typename A::Tile, Shape>;
  using WeightShare = Share<typename B::Tile, Shape>;

  __device__ void copy_input(unsigned char* tile) {
    const int64_t tap = copied_.offset(args_);
#pragma unroll
    for (int i = 0; i < InputShare::kEach; ++i) {
      const Pixel pixel = pixels_[InputShare::line(i)];
      unsigned char* place = tile + InputShare::at(i);
      if constexpr (aligned) {
        const bool inside = copied_.inside(args_, pixel);
        ptx::copy_async(shared_address(place), input_ + (inside ? pixel.offset + tap : 0), inside);
      } else {
        store(reinterpret_cast<T*>(place), gather(pixel));
      }
    }
  }

  __device__ Vector<T, kVector<T>> gather(const Pixel& pixel) const {
    Vector<T, kVector<T>> chunk;
    Tap tap = copied_;
    for (int i = 0; i < kVector<T>; ++i) {
      Vector<T, 1> x = {from_float<T>(0)};
      if (tap.inside(args_, pixel)) {
        x = load<1>(input_ + pixel.offset + tap.offset(args_));
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
    for (int i = 0; i < WeightShare::kEach; ++i) {
      const int col = WeightShare::line(i);
      copy_chunk<aligned>(tile + WeightShare::at(i), weight_,
                          static_cast<int64_t>(col) * args_.depth + index_,
                          col < cols_ ? args_.depth - index_ : 0);
    }
  }

  const ConvolutionArgs& args_;
  unsigned char* stages_;
  const Pixel* pixels_;
  const T* input_;  // the group's first channel
  int first_channel_;
  const T* weight_;  // of the tile's first column
  int cols_;
  int index_;  // of the sum, in what is copied next
  Tap copied_, formed_;
};

// Stages and later sums, and behind them the tile's pixels.
template <class T, class Shape>
constexpr int kConvolutionPixelsAt =
    kStages * ConvolutionSource<T, Shape, true>::kStageBytes > kEpilogueBytes<Shape>
        ? kStages * ConvolutionSource<T, Shape, true>::kStageBytes
        : kEpilogueBytes<Shape>;
template <class T, class Shape>
constexpr int kConvolutionShared =
    kConvolutionPixelsAt<T, Shape> + Shape::kRows * static_cast<int>(sizeof(Pixel));

template <class T, bool exact, class Shape, bool aligned>
FUSED_RES_KERNEL(Shape::kThreads, (kResidentBlocks<Shape, exact, false>))
convolution_kernel(const __grid_constant__ ConvolutionArgs args) {
  using Source = ConvolutionSource<T, Shape, aligned>;
  unsigned char* shared = shared_memory();
  // Neighbours share their rows of the input, the larger operand.
  const int64_t row_tile = blockIdx.x / args.col_tiles;
  const int first_col = static_cast<int>(blockIdx.x % args.col_tiles) * Shape::kCols;
  const int group = static_cast<int>(blockIdx.y), left = args.group_outputs - first_col;
  const Place place = {row_tile, static_cast<int64_t>(group) * args.group_outputs + first_col,
                       left < Shape::kCols ? left : Shape::kCols};

  Pixel* pixels = reinterpret_cast<Pixel*>(shared + kConvolutionPixelsAt<T, Shape>);
  locate_pixels<Shape>(args, row_tile, pixels);
  __syncthreads();
  const int steps = (args.depth + kDepth<T> - 1) / kDepth<T>;
  const int first = static_cast<int>(blockIdx.z) * args.steps_per_split, left_steps = steps - first;
  Source source(args, shared, pixels, group, place, first);
  Product<T, exact, Shape, typename Source::A, typename Source::B> product;
  accumulate(product, source, left_steps < args.steps_per_split ? left_steps : args.steps_per_split);

  float* sums = reinterpret_cast<float*>(shared);
  product.store(sums);
  __syncthreads();
  finish_split<T, Shape>(args.epilogue, args.split_sums, sums, place);
}

}  // namespace fused_res::cuda
