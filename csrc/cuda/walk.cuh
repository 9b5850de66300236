// One thread's way through a unit of work (see cut.h), and what the threads of a block add up.
#pragma once

#include "common/layout.h"
#include "cuda/cut.h"
#include "cuda/elementwise.cuh"

namespace fused_res::cuda {

constexpr int kWarps = kThreads / kWarp;

// Where a thread's access of one step lies.
template <Layout layout, int n>
class Walk;

template <int n>
class Walk<Layout::kNhwc, n> {
 public:
  __device__ Walk(const Cut& cut, int64_t block, int64_t step)
      : cut_(cut),
        row_(step * (kThreads / cut.across) + threadIdx.x / cut.across),
        col_((block * cut.across + threadIdx.x % cut.across) * n) {}

  __device__ bool inside() const { return row_ < cut_.images * cut_.pixels && col_ < cut_.channels; }
  __device__ int64_t offset() const { return row_ * cut_.channels + col_; }
  // The byte of a relu_mask that holds this access's first bit, and which it is.
  __device__ int64_t mask_offset() const { return row_ * ((cut_.channels + 7) / 8) + col_ / 8; }
  __device__ int bit() const { return static_cast<int>(col_ % 8); }
  __device__ void next() { row_ += kThreads / cut_.across; }

 private:
  const Cut& cut_;
  int64_t row_, col_;
};

template <int n>
class Walk<Layout::kNchw, n> {
 public:
  __device__ Walk(const Cut& cut, int64_t block, int64_t step) : cut_(cut), channel_(block) {
    const int64_t index = step * kThreads + threadIdx.x;
    image_ = index / cut.slots;
    slot_ = index - image_ * cut.slots;
  }

  __device__ bool inside() const { return image_ < cut_.images && slot_ * n < cut_.pixels; }
  __device__ int64_t offset() const { return plane() * cut_.pixels + slot_ * n; }
  __device__ int64_t mask_offset() const { return plane() * ((cut_.pixels + 7) / 8) + slot_ * n / 8; }
  __device__ int bit() const { return static_cast<int>(slot_ * n % 8); }
  __device__ void next() {
    image_ += cut_.step_images;
    slot_ += cut_.step_slots;
    if (slot_ >= cut_.slots) slot_ -= cut_.slots, ++image_;
  }

 private:
  __device__ int64_t plane() const { return image_ * cut_.channels + channel_; }

  const Cut& cut_;
  int64_t channel_, image_, slot_;
};

// The channels of one thread, beside each other; all its elements are of one channel in contiguous memory.
template <Layout layout, int n>
constexpr int kColumns = layout == Layout::kNhwc ? n : 1;

template <Layout layout>
__device__ constexpr int column(int element) {
  return layout == Layout::kNhwc ? element : 0;
}

// The first of a thread's channels, counted within its block.
template <Layout layout, int n>
__device__ inline int first_column(const Cut& cut) {
  return layout == Layout::kNhwc ? static_cast<int>(threadIdx.x % cut.across) * n : 0;
}

// Whether this thread is the first of those that have its channels.
__device__ inline bool is_first_of_channels(const Cut& cut) {
  return static_cast<int>(threadIdx.x) < cut.across;
}

struct Unit {
  int64_t block, part;

  __device__ int64_t first_channel(const Cut& cut) const { return block * cut.block_channels; }
  __device__ int64_t first_tile(const Cut& cut) const { return part * cut.tiles_per_part; }
  __device__ int64_t last_tile(const Cut& cut) const {
    const int64_t last = first_tile(cut) + cut.tiles_per_part;
    return last < cut.tiles ? last : cut.tiles;
  }
};

// Values of a channel in the tiles before this one.
__device__ inline int64_t values_before(const Cut& cut, int64_t tile) {
  const int64_t step = tile * kTile;
  if (cut.channels_last) {
    const int64_t rows = step * (kThreads / cut.across), all = cut.images * cut.pixels;
    return rows < all ? rows : all;
  }
  const int64_t index = step * kThreads, image = index / cut.slots;
  if (image >= cut.images) return cut.images * cut.pixels;
  const int64_t begun = (index - image * cut.slots) * cut.vector;
  return image * cut.pixels + (begun < cut.pixels ? begun : cut.pixels);
}

// Adds up each of the block's channels over all threads, in a fixed order; every thread receives its own
// channels' sums. `shared`: kWarps * kMostChannels, free again behind it.
template <Layout layout, int n, class A>
__device__ void block_sum(A (&sums)[kColumns<layout, n>], const Cut& cut, A* shared) {
  constexpr int columns = kColumns<layout, n>;
  for (int distance = cut.across; distance < kWarp; distance *= 2) {
    for (int j = 0; j < columns; ++j) sums[j] += __shfl_xor_sync(~0u, sums[j], distance);
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, first = first_column<layout, n>(cut);
  if (lane < cut.across) {
    for (int j = 0; j < columns; ++j) shared[warp * kMostChannels + first + j] = sums[j];
  }
  __syncthreads();
  for (int j = 0; j < columns; ++j) sums[j] = 0;
#pragma unroll 1  // with all loads at once there are not enough registers
  for (int w = 0; w < kWarps; ++w) {
    for (int j = 0; j < columns; ++j) sums[j] += shared[w * kMostChannels + first + j];
  }
  __syncthreads();
}

}  // namespace fused_res::cuda
