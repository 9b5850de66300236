// Split-K of the weight gradients, whose K is the output pixels: the chunk that is read next, and the sum of
// the parts.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Reads the operands of the next chunk into L2 while this one is multiplied, a few cache lines in each of
// `steps` steps.
class ChunkPrefetch {
 public:
  ChunkPrefetch(const MemoryRange* next, int64_t steps) {
    for (int i = 0; i < kMaxNextRanges; ++i) {
      const int64_t lines = next[i].bytes / 64;
      ranges_[i] = {static_cast<const char*>(next[i].data), lines, (lines + steps - 1) / steps};
    }
  }

  bool done() const { return ranges_[0].left == 0 && ranges_[1].left == 0 && ranges_[2].left == 0; }
  void advance() {
    for (Lines& range : ranges_) {
      const int64_t lines = min(range.lines, range.left);
      for (int64_t i = 0; i < lines; ++i) prefetch(range.next + 64 * i);
      range.next += 64 * lines, range.left -= lines;
    }
  }

 private:
  struct Lines {
    const char* next;
    int64_t left, lines;  // lines of a step
  };
  Lines ranges_[kMaxNextRanges];
};

// Adds the partial accumulators of all parts, in order.
inline Vec<float> reduce_split_k(const float* acc, int64_t parts, int64_t stride) {
  Vec<float> sum = load(acc);
  for (int64_t i = 1; i < parts; ++i) sum = sum + load(acc + i * stride);
  return sum;
}

}  // namespace
}  // namespace fused_res::cpu
