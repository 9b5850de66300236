// Operand prologues of the 1x1 convolution backward: GEMM operands that are computed in shared memory from
// the tensors that cp.async copied there. ConvOutputGradPrologue applies the batch norm (and ReLU) backward,
// NormActPrologue the batch norm + ReLU forward. Lines of their tiles are rows (pixels) of an activation,
// chunks run along the channels. Rows and channels outside of the tensor are zeros.
#pragma once

#include "cuda/conv1x1_backward.h"
#include "cuda/norm.cuh"
#include "cuda/shared_tile.cuh"

namespace fused_res::cuda {

// Return the relu_mask bits of a row from `channel` on, starting at bit 0: those in the same mask byte.
// `channel` must be a multiple of the number of bits that the caller uses (1, 2, 4 or 8), so that they lie in
// one byte.
__device__ inline uint8_t load_mask_bits(const uint8_t* mask, int64_t row, int channels, int channel) {
  return mask[row * ((channels + 7) / 8) + channel / 8] >> channel % 8;
}

// Batch norm backward of n adjacent channels: the gradient dz with respect to the norm's input z (the
// convolution output), from the gradient dy with respect to the norm's output (Ioffe & Szegedy 2015,
// https://arxiv.org/abs/1502.03167).
template <int n>
class ConvOutputGradTransform {
 public:
  __device__ ConvOutputGradTransform(const ConvOutputGradArgs& args, int channel)
      : norm_(args.stats, args.channels, channel) {
    if (args.sums == nullptr) return;  // running statistics are constants: dz = scale * dy
    const auto invstd = load<n>(args.stats + args.channels + channel);
    const auto sum_dy = load<n>(args.sums + channel),
               sum_dy_xhat = load<n>(args.sums + args.channels + channel);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const BackwardMeans<float> means = {sum_dy[i] * args.inv_count,
                                          sum_dy_xhat[i] * args.inv_count * invstd[i]};
      a_[i] = means.a;
      b_[i] = means.b;
    }
  }

  __device__ float operator()(const ConvOutputGradArgs& args, float dy, float z, unsigned bits, int i) const {
    const bool unmasked = args.mask != nullptr ? bits >> i & 1 : !args.relu || relu_grad_mask(norm_(z, i));
    const float masked = unmasked ? dy : 0.0f;
    if (args.sums == nullptr) return norm_.scale[i] * masked;
    return norm_input_grad(masked, z, norm_.mean[i], norm_.scale[i], a_[i], b_[i]);
  }

 private:
  Norm<n> norm_;
  Vector<float, n> a_, b_;  // BackwardMeans of each channel: mean(dy), mean(dy * xhat) * invstd
};

// Elements of a chunk that are transformed at once: few, since the accumulators occupy most of the registers.
template <bool aligned>
constexpr int kTransformWidth = aligned ? 4 : 1;

// The axis of the activation that is the GEMM's K: it advances from stage to stage.
enum class ReductionAxis { kRows, kChannels };

// Operand prologue that computes the gradient with respect to the convolution output. The stage holds two
// tiles, dy and then z, and the transform overwrites dy with dz. Without z, dy is used as is.
template <class T, class Tile, class Shape, ReductionAxis reduction_axis, bool aligned>
class ConvOutputGradPrologue {
 public:
  static constexpr int kBytes = 2 * Tile::kBytes;

  // `row`: first row of the first stage's tile. `rows`: number of valid rows from there on.
  __device__ ConvOutputGradPrologue(const ConvOutputGradArgs& args, int64_t row, int rows, int channel)
      : args_(args), row_(row), rows_(rows), channel_(channel + ThreadMap::chunk() * kVector<T>) {
    prefetch_mask_bits();
  }

  __device__ void copy_stage_async(unsigned char* tile) {
    const int channel = channel_at(copy_stage_);
#pragma unroll
    for (int i = 0; i < ThreadMap::kIterations; ++i) {
      const int row = row_at(copy_stage_, i);
      const int64_t offset = (row_ + row) * args_.channels + channel;
      const int valid_elements = row < rows_ ? args_.channels - channel : 0;
      copy_chunk<aligned>(tile + ThreadMap::byte_offset(i), static_cast<const T*>(args_.dy), offset,
                          valid_elements);
      if (args_.z != nullptr) {
        copy_chunk<aligned>(tile + Tile::kBytes + ThreadMap::byte_offset(i), static_cast<const T*>(args_.z),
                            offset, valid_elements);
      }
    }
    ++copy_stage_;
  }

  __device__ void transform_stage(unsigned char* tile) {
    if (args_.z == nullptr) return;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < ThreadMap::kIterations; ++i) bits |= bits_[i] << 8 * i;
#pragma unroll 1
    for (int element = 0; element < kVector<T>; element += kTransformWidth<aligned>) {
      const int channel = channel_at(transform_stage_) + element;
      if (channel >= args_.channels) break;
      const ConvOutputGradTransform<kTransformWidth<aligned>> transform(args_, channel);
#pragma unroll 1
      for (int i = 0; i < ThreadMap::kIterations; ++i) {
        if (row_at(transform_stage_, i) >= rows_) continue;
        T* dst = reinterpret_cast<T*>(tile + ThreadMap::byte_offset(i)) + element;
        auto dy = load<kTransformWidth<aligned>>(dst);
        const auto z = load<kTransformWidth<aligned>>(dst + Tile::kBytes / sizeof(T));
#pragma unroll
        for (int k = 0; k < kTransformWidth<aligned>; ++k) {
          dy[k] =
              from_float<T>(transform(args_, to_float(dy[k]), to_float(z[k]), bits >> (8 * i + element), k));
        }
        store(dst, dy);
      }
    }
    ++transform_stage_;
    prefetch_mask_bits();
  }

 private:
  using ThreadMap = TileThreadMap<Tile, Shape>;

  __device__ int row_at(int stage, int i) const {
    return ThreadMap::line(i) + (reduction_axis == ReductionAxis::kRows ? stage * kTileK<T> : 0);
  }
  __device__ int channel_at(int stage) const {
    return channel_ + (reduction_axis == ReductionAxis::kChannels ? stage * kTileK<T> : 0);
  }

  // Prefetch the mask bits of the next stage to transform, so that their loads overlap the multiplication of
  // the current stage.
  __device__ void prefetch_mask_bits() {
    if (args_.mask == nullptr) return;
#pragma unroll
    for (int i = 0; i < ThreadMap::kIterations; ++i) {
      const int row = row_at(transform_stage_, i), channel = channel_at(transform_stage_);
      bits_[i] = row < rows_ && channel < args_.channels
                     ? load_mask_bits(args_.mask, row_ + row, args_.channels, channel)
                     : 0;
    }
  }

  const ConvOutputGradArgs& args_;
  int64_t row_;
  int rows_, channel_, copy_stage_ = 0, transform_stage_ = 0;
  uint8_t bits_[ThreadMap::kIterations] = {};
  static_assert(ThreadMap::kIterations <= 4);
};

// Operand prologue that recomputes the convolution's input activation: act(bn(x)), or x where there is no
// norm.
template <class T, class Tile, class Shape, bool aligned>
class NormActPrologue {
 public:
  static constexpr int kBytes = Tile::kBytes;

  __device__ NormActPrologue(const WgradArgs& args, int64_t row, int rows, int channel)
      : args_(args), row_(row), rows_(rows), channel_(channel + ThreadMap::chunk() * kVector<T>) {}

  __device__ void copy_stage_async(unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < ThreadMap::kIterations; ++i) {
      const int row = copy_stage_ * kTileK<T> + ThreadMap::line(i);
      copy_chunk<aligned>(tile + ThreadMap::byte_offset(i), static_cast<const T*>(args_.input),
                          input_pixel(row_ + row) * args_.channels + channel_,
                          row < rows_ ? args_.channels - channel_ : 0);
    }
    ++copy_stage_;
  }

  __device__ void transform_stage(unsigned char* tile) {
    if (args_.input_stats == nullptr) return;
#pragma unroll 1
    for (int element = 0; element < kVector<T>; element += kTransformWidth<aligned>) {
      if (channel_ + element >= args_.channels) break;
      const Norm<kTransformWidth<aligned>> norm(args_.input_stats, args_.channels, channel_ + element);
#pragma unroll 1
      for (int i = 0; i < ThreadMap::kIterations; ++i) {
        if (transform_stage_ * kTileK<T> + ThreadMap::line(i) >= rows_) continue;
        T* dst = reinterpret_cast<T*>(tile + ThreadMap::byte_offset(i)) + element;
        store(dst, norm.activate(load<kTransformWidth<aligned>>(dst), args_.input_relu));
      }
    }
    ++transform_stage_;
  }

 private:
  using ThreadMap = TileThreadMap<Tile, Shape>;

  // Return the input pixel that an output pixel of the (strided) 1x1 convolution reads.
  __device__ int64_t input_pixel(int64_t row) const {
    if (args_.stride_height == 1 && args_.stride_width == 1) return row;
    const int64_t out_row = row / args_.out_width, image = out_row / args_.out_height;
    const int64_t y = out_row % args_.out_height * args_.stride_height,
                  x = row % args_.out_width * args_.stride_width;
    return (image * args_.height + y) * args_.width + x;
  }

  const WgradArgs& args_;
  int64_t row_;
  int rows_, channel_, copy_stage_ = 0, transform_stage_ = 0;
};

}  // namespace fused_res::cuda
