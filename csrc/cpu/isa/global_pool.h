// Global average pooling of NHWC images: the mean over the pixels of each channel, accumulated in fp32.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Adds N pixels to the channels' sums by Kahan's compensated summation: `error` is what rounding has added to
// `sum`. Plain summation of 49 pixels has a larger error than PyTorch's cascade.
template <int N, class T>
inline void add_pixels(const T* x, int64_t pitch, int64_t channels, float* sum, float* error) {
  using V = Vec<float>;
  for_each_vector<V>(channels, [&](auto part, int64_t c) {
    V value = part.load(x + c);
    if constexpr (N == 4) {
      value =
          (value + part.load(x + pitch + c)) + (part.load(x + 2 * pitch + c) + part.load(x + 3 * pitch + c));
    }
    const V before = part.load(sum + c);
    value = value - part.load(error + c);
    const V after = before + value;
    part.store(error + c, (after - before) - value);
    part.store(sum + c, after);
  });
}

// A task is one image and one block of kPooledChannels channels. Pixels are read in memory order, four at a
// time, with the sums of the block's channels in L1. The order of summation depends on the shape only.
template <class T>
void global_average_pool(const PoolArgs& a, int64_t begin, int64_t end) {
  using V = Vec<float>;
  const int64_t blocks = (a.channels + kPooledChannels - 1) / kPooledChannels, pixels = a.height * a.width;
  const V count = V::broadcast(static_cast<float>(pixels));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / blocks, first = task % blocks * kPooledChannels;
    const int64_t channels = min(kPooledChannels, a.channels - first);
    const T* x = static_cast<const T*>(a.x) + image * pixels * a.channels + first;
    alignas(64) float sum[kPooledChannels] = {}, error[kPooledChannels] = {};
    int64_t pixel = 0;
    for (; pixel + 4 <= pixels; pixel += 4)
      add_pixels<4>(x + pixel * a.channels, a.channels, channels, sum, error);
    for (; pixel < pixels; ++pixel) add_pixels<1>(x + pixel * a.channels, 0, channels, sum, error);
    T* y = static_cast<T*>(a.y) + image * a.channels + first;
    for_each_vector<V>(channels,
                       [&](auto part, int64_t c) { part.store(y + c, part.load(sum + c) / count); });
  }
}

}  // namespace
}  // namespace fused_res::cpu
