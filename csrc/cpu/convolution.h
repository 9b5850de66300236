// How a convolution is cut into tasks. Free of torch, like partition.h. What a task computes depends on the
// shape alone, so the same input gives the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa/kernels.h"
#include "cpu/isa/tiles.h"

namespace fused_res::cpu {
namespace {  // as tiles.h, whose types are members here

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
// Part `index` of [0, n), cut into `parts` as equal as can be.
inline Range part_of(int64_t n, int64_t index, int64_t parts) {
  return {n * index / parts, n * (index + 1) / parts};
}

inline int64_t panels_of(int64_t outputs) { return divide_up(outputs, kPanelOutputs); }
inline int64_t depth_of(const ConvolutionArgs& args) { return args.taps_h * args.taps_w * args.channels; }
// Floats of a packed weight.
inline int64_t packed_size(int64_t outputs, int64_t channels, int64_t taps, bool winograd) {
  return panels_of(outputs) * kPanelOutputs * channels * (winograd ? kTransformPoints : taps);
}

// True if the Winograd kernels support this geometry.
inline bool is_winograd(const ConvolutionArgs& args) {
  return args.taps_h == kTaps && args.taps_w == kTaps && args.stride_h == args.stride_w &&
         args.stride_h >= 1 && args.stride_h <= 2 && args.dilation_h == 1 && args.dilation_w == 1;
}
// True if the Winograd kernels support tiles of this many outputs a side.
constexpr bool is_winograd_tile(int64_t tile) { return tile >= 2 && tile <= 4; }

// Where the partial statistics of a convolution's outputs go: doubles (mean, M2)[outputs] for each chunk, and
// null if nobody asks.
struct ChunkMoments {
  double* data = nullptr;
  double* of(int64_t chunk, int64_t outputs) const { return data ? data + chunk * 2 * outputs : nullptr; }
};

// One product: tasks are a block of pixels and a group of panels.
class DirectTasks {
 public:
  explicit DirectTasks(const ConvolutionArgs& args)
      : args_(args), rows_(args.images * args.out_height * args.out_width), depth_(depth_of(args)) {
    // A block's windows stay in the L2 while all panels pass by.
    const int64_t block = std::clamp<int64_t>(kBlockFloats / depth_, kRowsLeast, kRowsMost);
    chunks_ = divide_up(rows_, block);
  }

  int64_t chunks() const { return chunks_; }
  int64_t outputs_in(int64_t chunk) const {
    const Range rows = part_of(rows_, chunk, chunks_);
    return rows.end - rows.begin;
  }
  int64_t scratch(int64_t threads) const { return args_.gather ? threads * windows() : 0; }

  template <class Parallel>
  void run(const ConvolutionKernels& k, float* scratch, const Parallel& parallel,
           ChunkMoments moments) const {
    // Groups of panels only where there are too few pixels for the threads: each group gathers again. Its
    // blocks come one after the other, so that a thread reads its own part of the weight and no other.
    const int64_t panels = panels_of(args_.outputs), wanted = kTasksPerThread * parallel.threads();
    const int64_t groups = chunks_ >= wanted ? 1 : std::min(panels, divide_up(wanted, chunks_));
    parallel(groups * chunks_, [&](int64_t begin, int64_t end) {
      float* own = scratch + parallel.thread() * (args_.gather ? windows() : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task % chunks_;
        k.direct.run(args_, part_of(rows_, chunk, chunks_), part_of(panels, task / chunks_, groups), own,
                     moments.of(chunk, args_.outputs));
      }
    });
  }

 private:
  static constexpr int64_t kBlockFloats = 65536, kRowsLeast = 14, kRowsMost = 56, kTasksPerThread = 4;

  int64_t windows() const { return divide_up(rows_, chunks_) * row_stride(depth_); }

  const ConvolutionArgs& args_;
  int64_t rows_, depth_, chunks_;
};

// Winograd: where the transformed weight stays in the caches, a task takes a block of tiles through all three
// steps. Where it does not, or where there are few tiles, all tiles are transformed first, and then each task
// reads its own part of the weight, once.
class WinogradTasks {
 public:
  explicit WinogradTasks(const ConvolutionArgs& args)
      : args_(args), tiles_(args), total_(args.images * tiles_.in_image()) {
    const int64_t side = args.tile + 2;
    const int64_t weight = panels_of(args.outputs) * kPanelOutputs * args.channels * side * side;
    shared_ = total_ < (weight > kSmallWeight ? kFewTiles : 3 * kOwnBlock) || weight > kCachedWeight;
    chunks_ = divide_up(total_, shared_ ? kSharedBlock / args.stride_h : kOwnBlock);
  }

  int64_t chunks() const { return chunks_; }
  int64_t outputs_in(int64_t chunk) const {
    const Range block = part_of(total_, chunk, chunks_);
    int64_t count = 0;
    for (int64_t t = block.begin; t < block.end; ++t) {
      const int64_t y = t % tiles_.in_image() / tiles_.across, x = t % tiles_.across;
      count += std::min(tiles_.tile, args_.out_height - y * tiles_.tile) *
               std::min(tiles_.tile, args_.out_width - x * tiles_.tile);
    }
    return count;
  }
  int64_t scratch(int64_t threads) const {
    return shared_ ? kBlocksAtOnce * factors() + threads * products() : threads * (factors() + products());
  }

  template <class Parallel>
  void run(const ConvolutionKernels& k, float* scratch, const Parallel& parallel,
           ChunkMoments moments) const {
    const int64_t panels = panels_of(args_.outputs);
    if (!shared_) {
      parallel(chunks_, [&](int64_t begin, int64_t end) {
        float* v = scratch + parallel.thread() * (factors() + products());
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const Range block = part_of(total_, chunk, chunks_);
          k.winograd.input(args_, block, block, v);
          k.winograd.output(args_, block, {0, panels}, v, v + factors(), moments.of(chunk, args_.outputs));
        }
      });
      return;
    }
    float* const own = scratch + kBlocksAtOnce * factors();
    for (int64_t first = 0; first < chunks_; first += kBlocksAtOnce) {
      const int64_t blocks = std::min(kBlocksAtOnce, chunks_ - first);
      parallel(blocks * kParts, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const Range block = part_of(total_, first + task / kParts, chunks_);
          const Range part = part_of(block.end - block.begin, task % kParts, kParts);
          k.winograd.input(args_, block, {block.begin + part.begin, block.begin + part.end},
                           scratch + task / kParts * factors());
        }
      });
      parallel(panels * blocks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t panel = task / blocks, chunk = first + task % blocks;
          k.winograd.output(args_, part_of(total_, chunk, chunks_), {panel, panel + 1},
                            scratch + task % blocks * factors(), own + parallel.thread() * products(),
                            moments.of(chunk, args_.outputs));
        }
      });
    }
  }

 private:
  static constexpr int64_t kSmallWeight = 1 << 20, kCachedWeight = 3 << 20;                // floats
  static constexpr int64_t kOwnBlock = 14, kSharedBlock = 112, kFewTiles = 8 * kOwnBlock;  // tiles
  static constexpr int64_t kBlocksAtOnce = 4, kParts = 28;

  // Floats of a block's factors and of one panel's products.
  int64_t rows() const { return divide_up(total_, chunks_) * tiles_.factors(); }
  int64_t factors() const { return rows() * row_stride(args_.channels); }
  int64_t products() const { return rows() * kPanelOutputs; }

  const ConvolutionArgs& args_;
  Tiles tiles_;
  int64_t total_, chunks_;
  bool shared_;
};

// f(tasks) for the algorithm that `args` asks for.
template <class F>
auto with_tasks(const ConvolutionArgs& args, F f) {
  return args.tile == 0 ? f(DirectTasks(args)) : f(WinogradTasks(args));
}

}  // namespace
}  // namespace fused_res::cpu
