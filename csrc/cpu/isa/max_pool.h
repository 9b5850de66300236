// Max pooling with an optional prologue, normalize + ReLU, that is applied as the input is loaded and never
// stored. The comparison is PyTorch's: in row-major order over the window, a later value replaces the maximum
// only if it is greater or NaN.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// The window elements of output position `out` that lie within the input.
inline Range window_bounds(int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t size) {
  const int64_t start = out * stride - pad;
  return {start < 0 ? -start : 0, min(kernel, size - start)};
}

// The outputs whose window covers the input position `in`.
inline Range covering_outputs(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t out_size) {
  const int64_t first = in + pad - kernel + 1;
  return {first <= 0 ? 0 : (first + stride - 1) / stride, min(out_size, (in + pad) / stride + 1)};
}

// The prologue. Its result is rounded to T as if it had been stored: rounding makes ties, and ties decide
// which element receives the gradient.
template <class T, class V>
inline V apply_prologue(V x, const PoolArgs& a, V mean, V scale, V shift) {
  if (!a.scale) return x;
  V v = normalize(x - mean, scale, shift);
  if (a.relu) v = maskz(relu_active(v), v);
  return round_to(v, T{});
}

template <class V>
inline void store_indices(uint8_t* p, V a, FullVector) {
  store_bytes(p, a);
}
template <class V>
inline void store_indices(uint8_t* p, V a, TailVector part) {
  uint8_t bytes[V::lanes];
  store_bytes(bytes, a);
  for (int i = 0; i < part.n; ++i) p[i] = bytes[i];
}
template <class V>
inline typename V::Mask indices_equal(const uint8_t* p, uint8_t value, FullVector) {
  return bytes_equal<V>(p, value);
}
template <class V>
inline typename V::Mask indices_equal(const uint8_t* p, uint8_t value, TailVector part) {
  uint8_t bytes[V::lanes] = {};
  for (int i = 0; i < part.n; ++i) bytes[i] = p[i];
  return bytes_equal<V>(bytes, value);
}

// --- NHWC: a vector holds channels of one pixel ---

template <class T, bool Norm, bool Indices>
void max_pool_rows_nhwc(const PoolArgs& a, int64_t begin, int64_t end) {
  using S = Compute<T>;
  using V = Vec<S>;
  const S* mean = static_cast<const S*>(a.mean);
  const S* scale = static_cast<const S*>(a.scale);
  const S* shift = static_cast<const S*>(a.shift);
  for (int64_t row = begin; row < end; ++row) {
    const T* image = static_cast<const T*>(a.x) + row / a.out_height * a.height * a.width * a.channels;
    const int64_t oy = row % a.out_height;
    const Range rows = window_bounds(oy, a.kernel_h, a.stride_h, a.pad_h, a.height);
    for (int64_t ox = 0; ox < a.out_width; ++ox) {
      const Range cols = window_bounds(ox, a.kernel_w, a.stride_w, a.pad_w, a.width);
      const int64_t corner = ((oy * a.stride_h - a.pad_h) * a.width + ox * a.stride_w - a.pad_w) * a.channels;
      const int64_t out = (row * a.out_width + ox) * a.channels;
      for_each_vector<V>(a.channels, [&](auto part, int64_t c) {
        V means, scales, shifts;
        if constexpr (Norm)
          means = part.load(mean + c), scales = part.load(scale + c), shifts = part.load(shift + c);
        V best = V::broadcast(-static_cast<S>(__builtin_inf()));
        V position = V::broadcast(static_cast<S>(rows.begin * a.kernel_w + cols.begin));
        for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
          const T* x = image + corner + ky * a.width * a.channels + c;
          for (int64_t kx = cols.begin; kx < cols.end; ++kx) {
            V v = part.load(x + kx * a.channels);
            if constexpr (Norm) v = apply_prologue<T>(v, a, means, scales, shifts);
            const auto better = greater_or_nan(v, best);
            best = select(better, v, best);
            if constexpr (Indices)
              position = select(better, V::broadcast(static_cast<S>(ky * a.kernel_w + kx)), position);
          }
        }
        part.store(static_cast<T*>(a.y) + out + c, best);
        if constexpr (Indices) store_indices(a.indices + out + c, position, part);
      });
    }
  }
}

template <class T>
void max_pool_forward_nhwc(const PoolArgs& a, int64_t begin, int64_t end) {
  if (a.scale) return max_pool_rows_nhwc<T, true, true>(a, begin, end);
  if (a.indices) return max_pool_rows_nhwc<T, false, true>(a, begin, end);
  max_pool_rows_nhwc<T, false, false>(a, begin, end);
}

// Each input position gathers from the outputs whose windows cover it: no element is written twice, and the
// order of summation is fixed.
template <class T>
void max_pool_backward_nhwc(const PoolArgs& a, int64_t begin, int64_t end) {
  using V = Vec<Compute<T>>;
  const T* dy = static_cast<const T*>(a.x);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first_row = row / a.height * a.out_height;
    const int64_t y = row % a.height;
    const Range rows = covering_outputs(y, a.kernel_h, a.stride_h, a.pad_h, a.out_height);
    // covering_outputs(x, ...), without its divisions.
    Range cols = {0, 0};
    for (int64_t x = 0; x < a.width; ++x) {
      while (cols.begin * a.stride_w - a.pad_w + a.kernel_w <= x) ++cols.begin;
      while (cols.end < a.out_width && cols.end * a.stride_w - a.pad_w <= x) ++cols.end;
      T* dx = static_cast<T*>(a.y) + (row * a.width + x) * a.channels;
      for_each_vector<V>(a.channels, [&](auto part, int64_t c) {
        V sum = V::zero();
        for (int64_t oy = rows.begin; oy < rows.end; ++oy) {
          const int64_t ky = y + a.pad_h - oy * a.stride_h;
          for (int64_t ox = cols.begin; ox < cols.end; ++ox) {
            const int64_t kx = x + a.pad_w - ox * a.stride_w;
            const int64_t out = ((first_row + oy) * a.out_width + ox) * a.channels + c;
            const auto is_max =
                indices_equal<V>(a.indices + out, static_cast<uint8_t>(ky * a.kernel_w + kx), part);
            sum = sum + maskz(is_max, part.load(dy + out));
          }
        }
        part.store(dx + c, sum);
      });
    }
  }
}

// --- NCHW: rows of one plane, in tiles whose state is on the stack ---

// Maximum number of outputs per tile. A tile also reads at most kSpan input columns, so a stride above 2
// leaves fewer outputs. A window has at most 255 columns, because its index is one byte.
constexpr int64_t kPoolTile = 512;

// Updates best[n] and position[n] with every `Stride`-th value of row. With a constant stride the compiler
// vectorizes the loop; `Stride` 0 uses the run-time `stride`.
template <int Stride, class S>
inline void update_max(const S* row, int64_t n, int64_t stride, S at, S* best, S* position) {
  if constexpr (Stride != 0) stride = Stride;
  for (int64_t i = 0; i < n; ++i) {
    const S v = row[i * stride];
    const bool wins = (v > best[i]) | (v != v);
    best[i] = wins ? v : best[i];
    position[i] = wins ? at : position[i];
  }
}

template <class T>
void max_pool_forward_nchw(const PoolArgs& a, int64_t begin, int64_t end) {
  using S = Compute<T>;
  using V = Vec<S>;
  constexpr int64_t kSpan = 2 * kPoolTile + 256;  // input columns of a tile
  const int64_t tile = min(kPoolTile, (kSpan - a.kernel_w) / a.stride_w + 1);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t plane = row / a.out_height, oy = row % a.out_height;
    const Range rows = window_bounds(oy, a.kernel_h, a.stride_h, a.pad_h, a.height);
    const V mean = a.scale ? V::broadcast(static_cast<const S*>(a.mean)[plane % a.channels]) : V::zero();
    const V scale = a.scale ? V::broadcast(static_cast<const S*>(a.scale)[plane % a.channels]) : V::zero();
    const V shift = a.scale ? V::broadcast(static_cast<const S*>(a.shift)[plane % a.channels]) : V::zero();
    for (int64_t ox0 = 0; ox0 < a.out_width; ox0 += tile) {
      const int64_t n = min(tile, a.out_width - ox0);
      const int64_t left = ox0 * a.stride_w - a.pad_w;  // the input column of span[0]
      const int64_t x0 = left < 0 ? 0 : left;
      const int64_t x1 = min(a.width, left + (n - 1) * a.stride_w + a.kernel_w);
      alignas(64) S span[kSpan + V::lanes], best[kPoolTile + V::lanes], position[kPoolTile + V::lanes];
      for (int64_t i = 0; i < n; ++i) {
        best[i] = -static_cast<S>(__builtin_inf());
        const Range cols = window_bounds(ox0 + i, a.kernel_w, a.stride_w, a.pad_w, a.width);
        position[i] = static_cast<S>(rows.begin * a.kernel_w + cols.begin);
      }
      for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
        const int64_t y = oy * a.stride_h - a.pad_h + ky;
        const T* x = static_cast<const T*>(a.x) + (plane * a.height + y) * a.width;
        for_each_vector<V>(x1 - x0, [&](auto part, int64_t i) {
          part.store(span + (x0 - left) + i, apply_prologue<T>(part.load(x + x0 + i), a, mean, scale, shift));
        });
        for (int64_t kx = 0; kx < a.kernel_w; ++kx) {
          // The outputs of the tile for which this column of the window lies within the input.
          const int64_t first = left + kx < 0 ? (-left - kx + a.stride_w - 1) / a.stride_w : 0;
          const int64_t last = a.width - left - kx <= 0 ? 0 : (a.width - left - kx - 1) / a.stride_w + 1;
          const int64_t count = min(n, last) - first;
          if (count <= 0) continue;
          const S* values = span + first * a.stride_w + kx;
          const auto at = static_cast<S>(ky * a.kernel_w + kx);
          if (a.stride_w == 1) {
            update_max<1>(values, count, 1, at, best + first, position + first);
          } else if (a.stride_w == 2) {
            update_max<2>(values, count, 2, at, best + first, position + first);
          } else {
            update_max<0>(values, count, a.stride_w, at, best + first, position + first);
          }
        }
      }
      const int64_t out = row * a.out_width + ox0;
      for_each_vector<V>(n, [&](auto part, int64_t i) {
        part.store(static_cast<T*>(a.y) + out + i, part.load(best + i));
        store_indices(a.indices + out + i, part.load(position + i), part);
      });
    }
  }
}

template <class T>
void max_pool_backward_nchw(const PoolArgs& a, int64_t begin, int64_t end) {
  using S = Compute<T>;
  using V = Vec<S>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t plane = row / a.height, y = row % a.height;
    const Range rows = covering_outputs(y, a.kernel_h, a.stride_h, a.pad_h, a.out_height);
    for (int64_t x0 = 0; x0 < a.width; x0 += kPoolTile) {
      const int64_t n = min(kPoolTile, a.width - x0);
      alignas(64) S sum[kPoolTile + V::lanes];
      for (int64_t i = 0; i < n; ++i) sum[i] = S(0);
      const Range cols = {covering_outputs(x0, a.kernel_w, a.stride_w, a.pad_w, a.out_width).begin,
                          covering_outputs(x0 + n - 1, a.kernel_w, a.stride_w, a.pad_w, a.out_width).end};
      for (int64_t oy = rows.begin; oy < rows.end; ++oy) {
        const int64_t out = (plane * a.out_height + oy) * a.out_width;
        const int64_t first =
            (y + a.pad_h - oy * a.stride_h) * a.kernel_w;  // index of the window row's first element
        for (int64_t ox = cols.begin; ox < cols.end; ++ox) {
          const int64_t kx = a.indices[out + ox] - first;
          const int64_t i = ox * a.stride_w - a.pad_w + kx - x0;
          const bool in_tile = (kx >= 0) & (kx < a.kernel_w) & (i >= 0) & (i < n);
          if (in_tile) sum[i] += load_scalar(static_cast<const T*>(a.x) + out + ox);
        }
      }
      T* dx = static_cast<T*>(a.y) + row * a.width + x0;
      for_each_vector<V>(n, [&](auto part, int64_t i) { part.store(dx + i, part.load(sum + i)); });
    }
  }
}

template <class T>
inline constexpr MaxPoolKernels max_pool_nhwc = {max_pool_forward_nhwc<T>, max_pool_backward_nhwc<T>};
template <class T>
inline constexpr MaxPoolKernels max_pool_nchw = {max_pool_forward_nchw<T>, max_pool_backward_nchw<T>};

}  // namespace
}  // namespace fused_res::cpu
