// Work partition of a weight gradient into tasks. Free of torch, like convolution.h; here too the order of
// summation depends on the shape only.
#pragma once

#include "cpu/convolution.h"

namespace fused_res::cpu {
namespace {  // anonymous, as in tiles.h, because classes have members of its types

// K, the output pixels or tiles, is partitioned into chunks, whose contributions are added in order. Split-K:
// where the accumulators are small, the chunks are distributed over parts with private accumulators, and a
// task packs and multiplies the chunks of its part; the split-K reduction adds the parts. Staged: otherwise
// the operands of a few chunks are packed first, and then each task adds to its own range of the shared
// accumulators.
class WeightGradientTasks {
 public:
  explicit WeightGradientTasks(const WeightGradientArgs& args)
      : args_(args),
        shape_(args.convolution),
        winograd_(shape_.tile != 0),
        tiles_(winograd_ ? TileGrid(shape_) : TileGrid(1, 1, shape_.out_height, shape_.out_width)),
        total_(shape_.images * tiles_.per_image()),
        points_(winograd_ ? kTransformPoints : 1),
        channels_(winograd_ ? shape_.channels : gemm_k(shape_)) {
    split_k_ = accumulator_floats() <= kSplitKMaxFloats;
    const int64_t max_chunk =
        winograd_ ? (split_k_ ? kSplitKTiles : kStagedTiles) / shape_.stride_h : kPixels;
    chunks_ = ceil_div(total_, max_chunk);
    parts_ = split_k_ ? std::min(chunks_, kSplitKParts) : 1;
  }

  int64_t scratch(int64_t threads) const {
    const int64_t operands = input_floats() + grad_output_floats();
    return parts_ * accumulator_floats() + (split_k_ ? threads : kChunksPerStage) * operands;
  }

  template <class Parallel>
  void run(const ConvolutionKernels& kernels, float* scratch, const Parallel& parallel) const {
    const WeightGradientKernels& k = winograd_ ? kernels.winograd_wgrad : kernels.direct_wgrad;
    const int64_t panels = num_panels(shape_.out_channels), groups = ceil_div(channels_, kGroup);
    float* const operands = scratch + parts_ * accumulator_floats();
    if (split_k_) {
      parallel(parts_, [&](int64_t begin, int64_t end) {
        float* v = operands + parallel.thread() * (input_floats() + grad_output_floats());
        for (int64_t part = begin; part < end; ++part) {
          const Range chunks = balanced_range(chunks_, part, parts_);
          for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
            const Range block = balanced_range(total_, chunk, chunks_);
            k.pack_input(args_, block, block, v);
            k.pack_grad_output(args_, block, block, v + input_floats());
            k.gemm(args_, block, {0, panels}, {0, channels_}, v, v + input_floats(), chunk == chunks.begin,
                   scratch + part * accumulator_floats());
          }
        }
      });
    }
    for (int64_t first = 0; !split_k_ && first < chunks_; first += kChunksPerStage) {
      const int64_t chunks = std::min(kChunksPerStage, chunks_ - first);
      const auto chunk_operands = [&](int64_t chunk) {
        return operands + chunk * (input_floats() + grad_output_floats());
      };
      parallel(chunks * kPackTasks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const Range block = balanced_range(total_, first + task / kPackTasks, chunks_);
          const Range slice = balanced_range(block.end - block.begin, task % kPackTasks, kPackTasks);
          const Range rows = {block.begin + slice.begin, block.begin + slice.end};
          float* v = chunk_operands(task / kPackTasks);
          k.pack_input(args_, block, rows, v);
          k.pack_grad_output(args_, block, rows, v + input_floats());
        }
      });
      parallel(panels * groups, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t panel = task / groups;
          const Range group = balanced_range(channels_, task % groups, groups);
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float* v = chunk_operands(chunk);
            k.gemm(args_, balanced_range(total_, first + chunk, chunks_), {panel, panel + 1}, group, v,
                   v + input_floats(), first + chunk == 0, scratch);
          }
        }
      });
    }
    const int64_t lines = ceil_div(shape_.channels, kLine);
    parallel(panels * lines, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / lines, c = task % lines * kLine;
        k.reduce_and_store(args_, {panel, panel + 1}, {c, std::min(c + kLine, shape_.channels)}, scratch,
                           parts_, accumulator_floats());
      }
    });
  }

 private:
  // Floats: 1 MB, which a core's L2 of 1 or 2 MB keeps. These constants are the order of summation, so they
  // do not depend on the caches.
  static constexpr int64_t kSplitKMaxFloats = 1 << 18;
  static constexpr int64_t kSplitKParts = 16;
  static constexpr int64_t kPixels = 128, kSplitKTiles = 28, kStagedTiles = 84;
  static constexpr int64_t kChunksPerStage = 4, kPackTasks = 28;
  static constexpr int64_t kGroup = 56, kLine = 16;  // channels

  int64_t accumulator_floats() const {
    return num_panels(shape_.out_channels) * kPanelWidth * points_ * channels_;
  }
  // The rows of a chunk's packed operands, and the size of each operand, in floats.
  int64_t rows() const { return ceil_div(total_, chunks_) * (winograd_ ? tiles_.transform_elements() : 1); }
  int64_t input_floats() const {
    return winograd_ || shape_.needs_im2col ? rows() * padded_row_stride(channels_) : 0;
  }
  int64_t grad_output_floats() const {
    return winograd_ || args_.pack_dz ? rows() * num_panels(shape_.out_channels) * kPanelWidth : 0;
  }

  const WeightGradientArgs& args_;
  const ConvolutionArgs& shape_;
  bool winograd_;
  TileGrid tiles_;
  int64_t total_, points_, channels_;
  bool split_k_;
  int64_t chunks_, parts_;
};

}  // namespace
}  // namespace fused_res::cpu
