// Vectorized loops over rows of memory with a masked tail. Along a row, a per-channel parameter varies with
// the position in NHWC and is uniform in NCHW; ChannelParam abstracts over both, so that an elementwise
// kernel is written once for the two layouts.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// N consecutive vectors. `part`: FullVector, or TailVector where N is 1.
template <int N, class Part>
struct Strip {
  static constexpr int vectors = N;
  Part part;
};

// Calls f(strip, offset) for strips of N vectors, then for single vectors, then for the tail.
template <class V, int N, class F>
inline void for_each_strip(int64_t n, F f) {
  int64_t i = 0;
  for (; i + N * V::lanes <= n; i += N * V::lanes) f(Strip<N, FullVector>{}, i);
  if constexpr (N > 1) {
    for (; i + V::lanes <= n; i += V::lanes) f(Strip<1, FullVector>{}, i);
  }
  if (i < n) f(Strip<1, TailVector>{{static_cast<int>(n - i)}}, i);
}

// Calls f(part, offset) for every vector and for the tail.
template <class V, class F>
inline void for_each_vector(int64_t n, F f) {
  for_each_strip<V, 1>(n, [&](auto strip, int64_t i) { f(strip.part, i); });
}

// Copies n elements of float, bfloat16 or float16 and widens them.
template <class T>
inline void copy_floats(float* to, const T* from, int64_t n) {
  for_each_vector<Vec<float>>(n, [&](auto part, int64_t i) { part.store(to + i, part.load(from + i)); });
}

// A per-channel parameter along a row of memory.
template <class S>
struct Varying {  // NHWC
  const S* p;
  template <class Part>
  Vec<S> at(Part part, int64_t i) const {
    return part.load(p + i);
  }
};
template <class S>
struct Uniform {  // NCHW
  Vec<S> v;
  Uniform(const S* p) : v(Vec<S>::broadcast(*p)) {}
  template <class Part>
  Vec<S> at(Part, int64_t) const {
    return v;
  }
};

// Calls f(offset of the first element, of its mask byte, of its channel, number of elements) for every
// contiguous segment of the block.
template <Layout L, class F>
inline void for_each_contiguous(const Block& b, F f) {
  if constexpr (L == Layout::kNhwc) {
    const int64_t mask_row = (b.channels + 7) / 8;
    for (int64_t row = b.n0; row < b.n1; ++row) {
      f(row * b.channels + b.c0, row * mask_row + b.c0 / 8, b.c0, b.c1 - b.c0);
    }
  } else {
    const int64_t mask_row = (b.spatial + 7) / 8;
    for (int64_t n = b.n0; n < b.n1; ++n) {
      for (int64_t c = b.c0; c < b.c1; ++c) {
        const int64_t plane = n * b.channels + c;
        f(plane * b.spatial + b.s0, plane * mask_row + b.s0 / 8, c, b.s1 - b.s0);
      }
    }
  }
}
template <Layout L, class S>
struct ChannelParam {
  using type = Varying<S>;
};
template <class S>
struct ChannelParam<Layout::kNchw, S> {
  using type = Uniform<S>;
};

}  // namespace
}  // namespace fused_res::cpu
