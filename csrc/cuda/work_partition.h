// Work partition of the batch norm and elementwise kernels: how an activation is divided over threadblocks.
// It depends on the activation's shape and the alignment of its addresses, never on the GPU, so the same
// input gives bitwise the same result on every device.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/kernel_args.h"

namespace fused_res::cuda {

constexpr int kThreads = 256;      // of a threadblock
constexpr int kHostWarpSize = 32;  // equals kWarpSize of device.cuh, which needs CUDA headers
// Maximum number of channels of a channel block: one 128-byte cache line of 16-bit channels.
constexpr int kMaxBlockChannels = 64;
// Accesses that a thread has in flight before it uses the first one.
constexpr int kStepsPerTile = 4;
// Upper bounds of the number of work units, for a reduction and for an elementwise pass: several threadblocks
// per multiprocessor of a large GPU.
constexpr int64_t kMaxReductionUnits = 1056, kMaxElementwiseUnits = 4096;
// Threadblocks of a norm kernel that run at once on the GPU that work is partitioned for, an H200: 132
// multiprocessors with two each, by registers. All GPUs use the same partition.
constexpr int64_t kResidentBlocks = 132 * 2;

// Return the number of elements of a 16-byte access. float64 is not performance-critical and uses scalar
// accesses.
constexpr int max_vector_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat64:
      return 1;
    default:
      return 8;
  }
}

struct ActivationShape {
  int64_t images, channels, pixels;
  bool channels_last;

  int64_t numel() const { return images * channels * pixels; }
  // Layout of a relu_mask: rows() rows of cols() bits, each row padded to full bytes.
  int64_t rows() const { return images * (channels_last ? pixels : channels); }
  int64_t cols() const { return channels_last ? channels : pixels; }
  int64_t mask_cols() const { return ceil_div(cols(), 8); }
};

// A work unit is one part of one channel block. A channel block is a few adjacent channels in channels_last
// memory and one channel in contiguous memory. A part is a range of tiles, a tile is kStepsPerTile steps, and
// in a step each thread of the threadblock makes one access.
struct WorkPartition {
  int64_t images, channels, pixels;
  bool channels_last;
  int vector_size;      // elements per access
  int threads_per_row;  // threads that cover the channels of one pixel; contiguous: 1
  int block_channels;   // channels of a channel block; contiguous: 1
  // contiguous only. Accesses per plane, rounded up to full mask bytes. One step advances by step_images
  // images plus step_accesses accesses: kThreads = step_images * accesses_per_plane + step_accesses.
  int64_t accesses_per_plane, step_images, step_accesses;
  int64_t channel_blocks, tiles, tiles_per_part, parts;

  int64_t units() const { return channel_blocks * parts; }
};

// Return the number of tiles per part with the shortest run time in whole waves of threadblocks, with at most
// max(max_units, channel blocks) work units: one that leaves little of the last wave idle.
inline int64_t choose_tiles_per_part(int64_t tiles, int64_t channel_blocks, int64_t max_units) {
  const int64_t fewest = ceil_div(tiles, std::max<int64_t>(1, max_units / channel_blocks));
  const int64_t most = fewest + std::min<int64_t>(fewest, 8);
  int64_t best = fewest, best_time = std::numeric_limits<int64_t>::max();
  for (int64_t tiles_per_part = fewest; tiles_per_part <= most; ++tiles_per_part) {
    const int64_t units = channel_blocks * ceil_div(tiles, tiles_per_part);
    const int64_t time = ceil_div(units, kResidentBlocks) * tiles_per_part;
    if (time < best_time) best = tiles_per_part, best_time = time;
  }
  return best;
}

// Partition `x` for accesses of `vector_size` elements into at most max(max_units, channel blocks) work
// units.
inline WorkPartition partition_work(const ActivationShape& x, int vector_size, int64_t max_units) {
  WorkPartition partition = {};
  partition.images = x.images, partition.channels = x.channels, partition.pixels = x.pixels;
  partition.channels_last = x.channels_last, partition.vector_size = vector_size;
  const int threads_per_mask_byte = std::max(1, 8 / vector_size);
  int64_t steps;
  if (x.channels_last) {
    // 8 threads with 16-byte accesses cover a 128-byte cache line.
    const int max_threads = vector_size == 1 ? kHostWarpSize : kMaxBlockChannels / 8;
    const int64_t vectors = ceil_div(x.channels, vector_size);
    partition.threads_per_row = threads_per_mask_byte;
    while (partition.threads_per_row < max_threads && partition.threads_per_row < vectors)
      partition.threads_per_row *= 2;
    partition.channel_blocks = ceil_div(vectors, partition.threads_per_row);
    steps = ceil_div(x.images * x.pixels, kThreads / partition.threads_per_row);
  } else {
    partition.threads_per_row = 1;
    partition.accesses_per_plane = ceil_div(x.pixels, 8) * (8 / vector_size);
    partition.step_images = kThreads / partition.accesses_per_plane,
    partition.step_accesses = kThreads % partition.accesses_per_plane;
    partition.channel_blocks = x.channels;
    steps = ceil_div(x.images * partition.accesses_per_plane, kThreads);
  }
  partition.block_channels = x.channels_last ? partition.threads_per_row * vector_size : 1;
  partition.tiles = ceil_div(steps, kStepsPerTile);
  partition.tiles_per_part = choose_tiles_per_part(partition.tiles, partition.channel_blocks, max_units);
  partition.parts = ceil_div(partition.tiles, partition.tiles_per_part);
  return partition;
}

}  // namespace fused_res::cuda
