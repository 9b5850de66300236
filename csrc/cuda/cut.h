// How an activation is cut into work for thread blocks: by its shape and by what its addresses allow, never
// by the GPU, so that the same input gives the same bits everywhere.
#pragma once

#include <algorithm>

#include "cuda/operands.h"

namespace fused_res::cuda {

constexpr int kThreads = 256, kWarpThreads = 32;
// Most channels of a block: one cache line of 16-bit channels.
constexpr int kMostChannels = 64;
// Accesses of a thread that are under way before the first is used.
constexpr int kTile = 4;
// What a reduction is cut into at most, and a pass without one: several blocks for each multiprocessor of a
// large GPU.
constexpr int64_t kReductionUnits = 1024, kPassUnits = 4096;

// Elements of a 16-byte access. Doubles, which nobody is in a hurry with, come one by one.
constexpr int widest_vector(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat64:
      return 1;
    default:
      return 8;
  }
}

struct Activation {
  int64_t images, channels, pixels;
  bool channels_last;

  int64_t numel() const { return images * channels * pixels; }
  // What a relu_mask is made of: rows padded to whole bytes.
  int64_t rows() const { return images * (channels_last ? pixels : channels); }
  int64_t cols() const { return channels_last ? channels : pixels; }
  int64_t mask_cols() const { return ceil_div(cols(), 8); }
};

// A unit of work is one part of one block of channels: a few neighbours in channels_last memory, one channel
// in contiguous memory. A part is tiles, a tile is kTile steps, and in a step each thread of a block makes
// one access.
struct Cut {
  int64_t images, channels, pixels;
  bool channels_last;
  int vector;  // elements of an access
  // Threads beside each other in a row of channels, and channels of a block; 1 in contiguous memory.
  int across, block_channels;
  // Contiguous: accesses that a plane takes, with whole bytes of a mask; and how far a step goes.
  int64_t slots, step_images, step_slots;
  int64_t blocks, tiles, tiles_per_part, parts;

  int64_t units() const { return blocks * parts; }
};

inline Cut cut(const Activation& x, int vector, int64_t most_units) {
  Cut cut = {};
  cut.images = x.images, cut.channels = x.channels, cut.pixels = x.pixels;
  cut.channels_last = x.channels_last, cut.vector = vector;
  const int byte = std::max(1, 8 / vector);  // threads that share a byte of the mask
  int64_t steps;
  if (x.channels_last) {
    const int most = vector == 1 ? kWarpThreads : kMostChannels / 8;
    const int64_t vectors = ceil_div(x.channels, vector);
    cut.across = byte;
    while (cut.across < most && cut.across < vectors) cut.across *= 2;
    cut.blocks = ceil_div(vectors, cut.across);
    steps = ceil_div(x.images * x.pixels, kThreads / cut.across);
  } else {
    cut.across = 1;
    cut.slots = ceil_div(x.pixels, 8) * (8 / vector);
    cut.step_images = kThreads / cut.slots, cut.step_slots = kThreads % cut.slots;
    cut.blocks = x.channels;
    steps = ceil_div(x.images * cut.slots, kThreads);
  }
  cut.block_channels = x.channels_last ? cut.across * vector : 1;
  cut.tiles = ceil_div(steps, kTile);
  cut.tiles_per_part = ceil_div(cut.tiles, std::max<int64_t>(1, most_units / cut.blocks));
  cut.parts = ceil_div(cut.tiles, cut.tiles_per_part);
  return cut;
}

}  // namespace fused_res::cuda
