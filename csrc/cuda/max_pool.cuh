// Max pooling kernels (max_pool.h). A thread computes one access (one or more channels of a pixel) of the
// result.
#pragma once

#include "cuda/elementwise.cuh"
#include "cuda/max_pool.h"
#include "cuda/work_partition.h"

namespace fused_res::cuda {

// Divide, in 32 bits where the operands fit. A 64-bit division takes several times as long, and only the
// largest tensors need it.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Coordinates of an access from its index: image, first channel, row and column.
struct PoolPosition {
  int64_t image, channel;
  int row, col;

  __device__ PoolPosition(const MaxPoolArgs& args, int64_t index, int64_t height, int64_t width) {
    const int64_t vectors = args.channels / args.vector_size;
    int64_t pixel = index;
    if (args.channels_last) {
      pixel = quotient(index, vectors);
      channel = (index - pixel * vectors) * args.vector_size;
    }
    const int64_t line = quotient(pixel, width), plane = quotient(line, height);
    col = static_cast<int>(pixel - line * width);
    row = static_cast<int>(line - plane * height);
    image = plane;
    if (!args.channels_last) {
      image = quotient(plane, args.channels);
      channel = plane - image * args.channels;
    }
  }

  // Return the offset of another pixel of the same image and channels, in a tensor of this height and width.
  __device__ int64_t offset(const MaxPoolArgs& args, int64_t height, int64_t width, int row, int col) const {
    if (args.channels_last) return ((image * height + row) * width + col) * args.channels + channel;
    return ((image * args.channels + channel) * height + row) * width + col;
  }
};

// Max pooling forward. The index of the maximum is its position in the window, row-major.
template <class T, int n>
FUSED_RES_KERNEL(kThreads, 2)
max_pool_forward_kernel(const __grid_constant__ MaxPoolArgs args) {
  using A = Accumulator<T>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t count = args.images * args.channels * args.out_height * args.out_width / n;
  if (index >= count) return;
  const PoolPosition at(args, index, args.out_height, args.out_width);
  A mean[n], scale[n], shift[n];
  if (args.stats != nullptr) {
    const A* stats = static_cast<const A*>(args.stats) + at.channel;
    for (int i = 0; i < n; ++i) {
      mean[i] = stats[i], scale[i] = stats[2 * args.channels + i], shift[i] = stats[3 * args.channels + i];
    }
  }
  A best[n];
  uint8_t chosen[n];
  for (int i = 0; i < n; ++i) best[i] = -static_cast<A>(INFINITY), chosen[i] = 0;
  bool is_first = true;  // taken even where it is no larger than -infinity
  for (int r = 0; r < args.kernel_h; ++r) {
    for (int s = 0; s < args.kernel_w; ++s) {
      const int row = at.row * args.stride_h - args.pad_h + r, col = at.col * args.stride_w - args.pad_w + s;
      if (row < 0 || row >= args.height || col < 0 || col >= args.width) continue;
      const auto x =
          load<n>(static_cast<const T*>(args.x) + at.offset(args, args.height, args.width, row, col));
      for (int i = 0; i < n; ++i) {
        A value = to_float(x[i]);
        if (args.stats != nullptr) {
          value = batch_normalize(value, mean[i], scale[i], shift[i]);
          // Rounded first: of values that are equal in the output's type the first one gets the gradient.
          value = to_float(from_float<T>(args.relu ? relu(value) : value));
        }
        const bool better = is_first || value > best[i] || value != value;
        best[i] = better ? value : best[i];
        chosen[i] = better ? static_cast<uint8_t>(r * args.kernel_w + s) : chosen[i];
      }
      is_first = false;
    }
  }
  Vector<T, n> y;
  Vector<uint8_t, n> indices;
  for (int i = 0; i < n; ++i) y[i] = from_float<T>(best[i]), indices[i] = chosen[i];
  store_global(static_cast<T*>(args.y) + index * n, y);
  store_global(args.indices + index * n, indices);
}

// Max pooling backward: each input position gathers the gradients of the windows that contain it, in a fixed
// order.
template <class T, int n>
FUSED_RES_KERNEL(kThreads, 2)
max_pool_backward_kernel(const __grid_constant__ MaxPoolArgs args) {
  using A = Accumulator<T>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t count = args.images * args.channels * args.height * args.width / n;
  if (index >= count) return;
  const PoolPosition at(args, index, args.height, args.width);
  A sum[n] = {};
  for (int r = 0; r < args.kernel_h; ++r) {
    const int top = at.row + args.pad_h - r, p = top / args.stride_h;
    if (top < 0 || top % args.stride_h != 0 || p >= args.out_height) continue;
    for (int s = 0; s < args.kernel_w; ++s) {
      const int left = at.col + args.pad_w - s, q = left / args.stride_w;
      if (left < 0 || left % args.stride_w != 0 || q >= args.out_width) continue;
      const int64_t offset = at.offset(args, args.out_height, args.out_width, p, q);
      const auto indices = load<n>(args.indices + offset);
      const auto dy = load<n>(static_cast<const T*>(args.x) + offset);
      for (int i = 0; i < n; ++i) sum[i] += indices[i] == r * args.kernel_w + s ? to_float(dy[i]) : A(0);
    }
  }
  Vector<T, n> dx;
  for (int i = 0; i < n; ++i) dx[i] = from_float<T>(sum[i]);
  store_global(static_cast<T*>(args.y) + index * n, dx);
}

}  // namespace fused_res::cuda
