// How the gradient of a weight is cut into tasks. Free of torch, like convolution.h, and like there what is
// summed in which order depends on the shape alone.
#pragma once

#include "cpu/convolution.h"

namespace fused_res::cpu {
namespace {  // as tiles.h, whose types are members here

// Rows, which are output pixels or tiles, are cut into chunks, whose sums are added in their order. Where the
// sums are small, parts of all the chunks have sums of their own, and a task takes its part through every
// step. Where not, a few chunks at a time become factors, and then each task adds to its own part of the
// sums.
class WeightGradientTasks {
 public:
  explicit WeightGradientTasks(const WeightGradientArgs& args)
      : args_(args),
        shape_(args.convolution),
        winograd_(shape_.tile != 0),
        tiles_(winograd_ ? Tiles(shape_) : Tiles(1, 1, shape_.out_height, shape_.out_width)),
        total_(shape_.images * tiles_.in_image()),
        points_(winograd_ ? kTransformPoints : 1),
        channels_(winograd_ ? shape_.channels : depth_of(shape_)) {
    own_ = sums() <= kOwnSums;
    const int64_t most = winograd_ ? (own_ ? kOwnTiles : kSharedTiles) / shape_.stride_h : kPixels;
    chunks_ = divide_up(total_, most);
    parts_ = own_ ? std::min(chunks_, kOwnParts) : 1;
  }

  int64_t scratch(int64_t threads) const {
    const int64_t factors = input_factors() + output_factors();
    return parts_ * sums() + (own_ ? threads : kChunksAtOnce) * factors;
  }

  template <class Parallel>
  void run(const ConvolutionKernels& kernels, float* scratch, const Parallel& parallel) const {
    const WeightGradientKernels& k = winograd_ ? kernels.winograd_gradient : kernels.direct_gradient;
    const int64_t panels = panels_of(shape_.outputs), groups = divide_up(channels_, kGroup);
    float* const factors = scratch + parts_ * sums();
    if (own_) {
      parallel(parts_, [&](int64_t begin, int64_t end) {
        float* v = factors + parallel.thread() * (input_factors() + output_factors());
        for (int64_t part = begin; part < end; ++part) {
          const Range chunks = part_of(chunks_, part, parts_);
          for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
            const Range block = part_of(total_, chunk, chunks_);
            k.input(args_, block, block, v);
            k.output(args_, block, block, v + input_factors());
            k.multiply(args_, block, {0, panels}, {0, channels_}, v, v + input_factors(),
                       chunk == chunks.begin, scratch + part * sums());
          }
        }
      });
    }
    for (int64_t first = 0; !own_ && first < chunks_; first += kChunksAtOnce) {
      const int64_t chunks = std::min(kChunksAtOnce, chunks_ - first);
      const auto factors_of = [&](int64_t chunk) {
        return factors + chunk * (input_factors() + output_factors());
      };
      parallel(chunks * kSlices, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const Range block = part_of(total_, first + task / kSlices, chunks_);
          const Range slice = part_of(block.end - block.begin, task % kSlices, kSlices);
          const Range rows = {block.begin + slice.begin, block.begin + slice.end};
          float* v = factors_of(task / kSlices);
          k.input(args_, block, rows, v);
          k.output(args_, block, rows, v + input_factors());
        }
      });
      parallel(panels * groups, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t panel = task / groups;
          const Range group = part_of(channels_, task % groups, groups);
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float* v = factors_of(chunk);
            k.multiply(args_, part_of(total_, first + chunk, chunks_), {panel, panel + 1}, group, v,
                       v + input_factors(), first + chunk == 0, scratch);
          }
        }
      });
    }
    const int64_t lines = divide_up(shape_.channels, kLine);
    parallel(panels * lines, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / lines, c = task % lines * kLine;
        k.finish(args_, {panel, panel + 1}, {c, std::min(c + kLine, shape_.channels)}, scratch, parts_,
                 sums());
      }
    });
  }

 private:
  static constexpr int64_t kOwnSums = 1 << 18;  // floats: a quarter of a thread's own cache
  static constexpr int64_t kOwnParts = 16;
  static constexpr int64_t kPixels = 128, kOwnTiles = 28, kSharedTiles = 84;
  static constexpr int64_t kChunksAtOnce = 4, kSlices = 28;
  static constexpr int64_t kGroup = 56, kLine = 16;  // channels

  int64_t sums() const { return panels_of(shape_.outputs) * kPanelOutputs * points_ * channels_; }
  // Floats of a chunk's factors.
  int64_t rows() const { return divide_up(total_, chunks_) * (winograd_ ? tiles_.factors() : 1); }
  int64_t input_factors() const { return winograd_ || shape_.gather ? rows() * row_stride(channels_) : 0; }
  int64_t output_factors() const {
    return winograd_ || args_.pack_dz ? rows() * panels_of(shape_.outputs) * kPanelOutputs : 0;
  }

  const WeightGradientArgs& args_;
  const ConvolutionArgs& shape_;
  bool winograd_;
  Tiles tiles_;
  int64_t total_, points_, channels_;
  bool own_;
  int64_t chunks_, parts_;
};

}  // namespace
}  // namespace fused_res::cpu
