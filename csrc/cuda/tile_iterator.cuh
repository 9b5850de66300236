// Tile iterator: the sequence of accesses of one thread within a work unit (work_partition.h), and the
// reduction of per-channel values over a threadblock.
#pragma once

#include "common/layout.h"
#include "cuda/elementwise.cuh"
#include "cuda/work_partition.h"

namespace fused_res::cuda {

constexpr int kWarpsPerBlock = kThreads / kWarpSize;

// Iterates over the accesses of a thread, one per step: offset in the tensor, offset in the relu_mask, and
// whether the access is inside the tensor. `step`: first step, counted from the beginning of the channel
// block.
template <Layout layout, int n>
class TileIterator;

template <int n>
class TileIterator<Layout::kNhwc, n> {
 public:
  __device__ TileIterator(const WorkPartition& partition, int64_t channel_block, int64_t step)
      : partition_(partition),
        row_(step * (kThreads / partition.threads_per_row) + threadIdx.x / partition.threads_per_row),
        col_((channel_block * partition.threads_per_row + threadIdx.x % partition.threads_per_row) * n) {}

  __device__ bool valid() const {
    return row_ < partition_.images * partition_.pixels && col_ < partition_.channels;
  }
  __device__ int64_t offset() const { return row_ * partition_.channels + col_; }
  // The byte of the relu_mask that contains the first bit of this access, and that bit's position in the
  // byte.
  __device__ int64_t mask_offset() const { return row_ * ((partition_.channels + 7) / 8) + col_ / 8; }
  __device__ int bit() const { return static_cast<int>(col_ % 8); }
  __device__ void next() { row_ += kThreads / partition_.threads_per_row; }

 private:
  const WorkPartition& partition_;
  int64_t row_, col_;
};

template <int n>
class TileIterator<Layout::kNchw, n> {
 public:
  __device__ TileIterator(const WorkPartition& partition, int64_t channel_block, int64_t step)
      : partition_(partition), channel_(channel_block) {
    const int64_t index = step * kThreads + threadIdx.x;
    image_ = index / partition.accesses_per_plane;
    access_ = index - image_ * partition.accesses_per_plane;
  }

  __device__ bool valid() const { return image_ < partition_.images && access_ * n < partition_.pixels; }
  __device__ int64_t offset() const { return plane() * partition_.pixels + access_ * n; }
  __device__ int64_t mask_offset() const { return plane() * ((partition_.pixels + 7) / 8) + access_ * n / 8; }
  __device__ int bit() const { return static_cast<int>(access_ * n % 8); }
  __device__ void next() {
    image_ += partition_.step_images;
    access_ += partition_.step_accesses;
    if (access_ >= partition_.accesses_per_plane) access_ -= partition_.accesses_per_plane, ++image_;
  }

 private:
  __device__ int64_t plane() const { return image_ * partition_.channels + channel_; }

  const WorkPartition& partition_;
  int64_t channel_, image_, access_;
};

// Number of channels of one thread's access: n adjacent ones, or one in contiguous memory.
template <Layout layout, int n>
constexpr int kChannelsPerThread = layout == Layout::kNhwc ? n : 1;

// Return the channel of an element of an access, counted from the thread's first channel.
template <Layout layout>
__device__ constexpr int channel_index(int element) {
  return layout == Layout::kNhwc ? element : 0;
}

// Return the first of the thread's channels, counted within its channel block.
template <Layout layout, int n>
__device__ inline int first_thread_channel(const WorkPartition& partition) {
  return layout == Layout::kNhwc ? static_cast<int>(threadIdx.x % partition.threads_per_row) * n : 0;
}

// Whether this thread is the first one of the threadblock that has its channels.
__device__ inline bool is_channel_leader(const WorkPartition& partition) {
  return static_cast<int>(threadIdx.x) < partition.threads_per_row;
}

// One part of one channel block, see work_partition.h.
struct WorkUnit {
  int64_t channel_block, part;

  __device__ int64_t first_channel(const WorkPartition& partition) const {
    return channel_block * partition.block_channels;
  }
  __device__ int64_t first_tile(const WorkPartition& partition) const {
    return part * partition.tiles_per_part;
  }
  __device__ int64_t last_tile(const WorkPartition& partition) const {
    const int64_t last = first_tile(partition) + partition.tiles_per_part;
    return last < partition.tiles ? last : partition.tiles;
  }
};

// Return the number of values of a channel in the tiles before `tile`.
__device__ inline int64_t values_before_tile(const WorkPartition& partition, int64_t tile) {
  const int64_t step = tile * kStepsPerTile;
  if (partition.channels_last) {
    const int64_t rows = step * (kThreads / partition.threads_per_row),
                  total = partition.images * partition.pixels;
    return rows < total ? rows : total;
  }
  const int64_t index = step * kThreads, image = index / partition.accesses_per_plane;
  if (image >= partition.images) return partition.images * partition.pixels;
  const int64_t in_plane = (index - image * partition.accesses_per_plane) * partition.vector_size;
  return image * partition.pixels + (in_plane < partition.pixels ? in_plane : partition.pixels);
}

// Reduce each channel of the channel block over all threads, in a fixed order: lanes by shuffles, then one
// thread per channel adds the warps. Every thread receives the sums of its own channels. `shared`:
// kWarpsPerBlock * kMaxBlockChannels values of scratch, reusable on return. The j-th channels of adjacent
// threads are adjacent there, so that no access has a bank conflict: with 64 channels, 146 wavefronts of
// shared memory per call (64 stores, 18 for the sums, 64 to broadcast them).
template <Layout layout, int n, class A>
__device__ void block_sum(A (&sums)[kChannelsPerThread<layout, n>], const WorkPartition& partition,
                          A* shared) {
  constexpr int channels = kChannelsPerThread<layout, n>;
  for (int distance = partition.threads_per_row; distance < kWarpSize; distance *= 2) {
    for (int j = 0; j < channels; ++j) sums[j] += __shfl_xor_sync(~0u, sums[j], distance);
  }
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int own = thread % partition.threads_per_row;
  if (lane < partition.threads_per_row) {
    for (int j = 0; j < channels; ++j)
      shared[warp * kMaxBlockChannels + j * partition.threads_per_row + own] = sums[j];
  }
  __syncthreads();
  if (thread < channels * partition.threads_per_row) {
    A total = 0;
    for (int w = 0; w < kWarpsPerBlock; ++w) total += shared[w * kMaxBlockChannels + thread];
    shared[thread] = total;  // no other thread accesses this column
  }
  __syncthreads();
  for (int j = 0; j < channels; ++j) sums[j] = shared[j * partition.threads_per_row + own];
  __syncthreads();
}

}  // namespace fused_res::cuda
