// Operands that are formed in shared memory from what was copied there. Lines of their tiles are rows of an
// activation, chunks run along its channels; rows and channels that do not exist are zeros.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/pointwise_backward.h"
#include "cuda/shared_tile.cuh"

namespace fused_res::cuda {

// Bits of a relu_mask that lie next to each other, for channels from a multiple of their number, at most 8.
__device__ inline uint8_t load_bits(const uint8_t* mask, int64_t row, int channels, int channel) {
  return mask[row * ((channels + 7) / 8) + channel / 8] >> channel % 8;
}

// The gradient before a norm, for n channels that follow each other.
template <int n>
class GradientTerms {
 public:
  __device__ GradientTerms(const GradientArgs& args, int channel)
      : norm_(args.stats, args.channels, channel) {
    if (args.sums == nullptr) return;
    const auto invstd = load<n>(args.stats + args.channels + channel);
    const auto sum_dy = load<n>(args.sums + channel), sum_xhat = load<n>(args.sums + args.channels + channel);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const MeanTerms<float> terms = {sum_dy[i] * args.share, sum_xhat[i] * args.share * invstd[i]};
      a_[i] = terms.a;
      b_[i] = terms.b;
    }
  }

  __device__ float operator()(const GradientArgs& args, float dy, float z, unsigned bits, int i) const {
    const bool passed = args.mask != nullptr ? bits >> i & 1 : !args.relu || passes(norm_(z, i));
    const float masked = passed ? dy : 0.0f;
    if (args.sums == nullptr) return norm_.scale[i] * masked;
    return before_norm(masked, z, norm_.mean[i], norm_.scale[i], a_[i], b_[i]);
  }

 private:
  Norm<n> norm_;
  Vector<float, n> a_, b_;  // see mean_terms
};

// Pieces of a chunk that are formed at once: few, for the sums' sake, which have most of the registers.
template <bool aligned>
constexpr int kPiece = aligned ? 4 : 1;

// From one stage to the next either the rows go on or the channels.
enum class Summed { kRows, kChannels };

// The gradient before a norm. Behind the tile lies another one, of the norm's input.
template <class T, class Tile, class Shape, Summed summed, bool aligned>
class GradientTile {
 public:
  static constexpr int kBytes = 2 * Tile::kBytes;

  // The first stage's tile begins at this row, and so many rows are to be had.
  __device__ GradientTile(const GradientArgs& args, int64_t row, int rows, int channel)
      : args_(args), row_(row), rows_(rows), channel_(channel + Own::chunk() * kVector<T>) {
    prefetch_bits();
  }

  __device__ void copy(unsigned char* tile) {
    const int channel = channel_at(copied_);
#pragma unroll
    for (int i = 0; i < Own::kEach; ++i) {
      const int row = row_at(copied_, i);
      const int64_t at = (row_ + row) * args_.channels + channel;
      const int exist = row < rows_ ? args_.channels - channel : 0;
      copy_chunk<aligned>(tile + Own::at(i), static_cast<const T*>(args_.dy), at, exist);
      copy_chunk<aligned>(tile + Tile::kBytes + Own::at(i), static_cast<const T*>(args_.z), at, exist);
    }
    ++copied_;
  }

  __device__ void form(unsigned char* tile) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < Own::kEach; ++i) bits |= bits_[i] << 8 * i;
#pragma unroll 1
    for (int piece = 0; piece < kVector<T>; piece += kPiece<aligned>) {
      const int channel = channel_at(formed_) + piece;
      if (channel >= args_.channels) break;
      const GradientTerms<kPiece<aligned>> terms(args_, channel);
#pragma unroll 1
      for (int i = 0; i < Own::kEach; ++i) {
        if (row_at(formed_, i) >= rows_) continue;
        T* place = reinterpret_cast<T*>(tile + Own::at(i)) + piece;
        auto dy = load<kPiece<aligned>>(place);
        const auto z = load<kPiece<aligned>>(place + Tile::kBytes / sizeof(T));
#pragma unroll
        for (int k = 0; k < kPiece<aligned>; ++k) {
          dy[k] = from_float<T>(terms(args_, to_float(dy[k]), to_float(z[k]), bits >> (8 * i + piece), k));
        }
        store(place, dy);
      }
    }
    ++formed_;
    prefetch_bits();
  }

 private:
  using Own = Share<Tile, Shape>;

  __device__ int row_at(int stage, int i) const {
    return Own::line(i) + (summed == Summed::kRows ? stage * kDepth<T> : 0);
  }
  __device__ int channel_at(int stage) const {
    return channel_ + (summed == Summed::kChannels ? stage * kDepth<T> : 0);
  }

  // Of the mask, for the stage that is formed next: under way while the one before is multiplied.
  __device__ void prefetch_bits() {
    if (args_.mask == nullptr) return;
#pragma unroll
    for (int i = 0; i < Own::kEach; ++i) {
      const int row = row_at(formed_, i), channel = channel_at(formed_);
      bits_[i] = row < rows_ && channel < args_.channels
                     ? load_bits(args_.mask, row_ + row, args_.channels, channel)
                     : 0;
    }
  }

  const GradientArgs& args_;
  int64_t row_;
  int rows_, channel_, copied_ = 0, formed_ = 0;
  uint8_t bits_[Own::kEach] = {};
  static_assert(Own::kEach <= 4);
};

// What the convolution read: pixels of its input, and where there is a norm, the activation of them.
template <class T, class Tile, class Shape, bool aligned>
class InputTile {
 public:
  static constexpr int kBytes = Tile::kBytes;

  __device__ InputTile(const WgradArgs& args, int64_t row, int rows, int channel)
      : args_(args), row_(row), rows_(rows), channel_(channel + Own::chunk() * kVector<T>) {}

  __device__ void copy(unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < Own::kEach; ++i) {
      const int row = copied_ * kDepth<T> + Own::line(i);
      copy_chunk<aligned>(tile + Own::at(i), static_cast<const T*>(args_.input),
                          pixel(row_ + row) * args_.channels + channel_,
                          row < rows_ ? args_.channels - channel_ : 0);
    }
    ++copied_;
  }

  __device__ void form(unsigned char* tile) {
    if (args_.input_stats == nullptr) return;
#pragma unroll 1
    for (int piece = 0; piece < kVector<T>; piece += kPiece<aligned>) {
      if (channel_ + piece >= args_.channels) break;
      const Norm<kPiece<aligned>> norm(args_.input_stats, args_.channels, channel_ + piece);
#pragma unroll 1
      for (int i = 0; i < Own::kEach; ++i) {
        if (formed_ * kDepth<T> + Own::line(i) >= rows_) continue;
        T* place = reinterpret_cast<T*>(tile + Own::at(i)) + piece;
        store(place, norm.activate(load<kPiece<aligned>>(place), args_.input_relu));
      }
    }
    ++formed_;
  }

 private:
  using Own = Share<Tile, Shape>;

  // Of the input, where the output has this one.
  __device__ int64_t pixel(int64_t row) const {
    if (args_.stride_height == 1 && args_.stride_width == 1) return row;
    const int64_t line = row / args_.out_width, image = line / args_.out_height;
    const int64_t y = line % args_.out_height * args_.stride_height,
                  x = row % args_.out_width * args_.stride_width;
    return (image * args_.height + y) * args_.width + x;
  }

  const WgradArgs& args_;
  int64_t row_;
  int rows_, channel_, copied_ = 0, formed_ = 0;
};

}  // namespace fused_res::cuda
