// batch_norm_act backward: the sums, a version for each layout, and the elementwise pass, written once for
// both.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/batch_norm_forward.h"
#include "cpu/isa/batch_norm_sums.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Where the gradient that passes the ReLU is found.
enum class Gate { kOpen, kMask, kRecompute };

template <Gate G, class Part, class V>
inline V gated(Part part, V dy, V centred, V scale, V shift, const uint8_t* mask, int64_t i) {
  if constexpr (G == Gate::kMask) return keep(V::from_bits(load_bits<V>(mask + i / 8, part)), dy);
  if constexpr (G == Gate::kRecompute) return keep(relu_active(normalize(centred, scale, shift)), dy);
  return dy;
}

// N norms: one, or a pair. A pair has a mask if it has a ReLU.
template <template <class, Gate, int> class Kernel, class T, int N, class... Args>
inline void with_gate(const BackwardArgs& a, const Args&... args) {
  if (a.mask) return Kernel<T, Gate::kMask, N>::run(a, args...);
  if constexpr (N == 1) {
    if (a.relu) return Kernel<T, Gate::kRecompute, N>::run(a, args...);
  }
  Kernel<T, Gate::kOpen, N>::run(a, args...);
}

template <class T, Gate G, int N>
struct ReduceNhwc {
  static void run(const BackwardArgs& a, const Block& b, double* partial) {
    using S = Compute<T>;
    using V = Vec<S>;
    const int64_t mask_row = (b.channels + 7) / 8;
    for (int64_t c0 = b.c0; c0 < b.c1; c0 += kSummedChannels) {
      const int64_t width = smaller(kSummedChannels, b.c1 - c0), start = b.n0 * b.channels + c0;
      const uint8_t* mask = G == Gate::kMask ? a.mask + b.n0 * mask_row + c0 / 8 : nullptr;
      const S* scale = static_cast<const S*>(a.norms[0].norm.scale) + c0;
      const S* shift = static_cast<const S*>(a.norms[0].norm.shift) + c0;
      const T* dy = static_cast<const T*>(a.dy) + start;
      const T* x[N];
      const S* mean[N];
      for (int k = 0; k < N; ++k) {
        x[k] = static_cast<const T*>(a.norms[k].x) + start;
        mean[k] = static_cast<const S*>(a.norms[k].norm.mean) + c0;
      }
      const auto term = [&](auto part, int64_t row, int64_t c) {
        const int64_t i = row * b.channels + c;
        Term<V, N> t;
        for (int k = 0; k < N; ++k) t.weight[k] = part.load(x[k] + i) - part.load(mean[k] + c);
        t.value = gated<G>(part, part.load(dy + i), t.weight[0], part.load(scale + c), part.load(shift + c),
                           mask, row * mask_row * 8 + c);
        return t;
      };
      double sums[1 + N][kSummedChannels];
      if constexpr (N == 1) {
        sum_rows<V>(b.n1 - b.n0, width, b.channels, sums, term, dy, x[0]);
      } else {
        sum_rows<V>(b.n1 - b.n0, width, b.channels, sums, term, dy, x[0], x[1]);
      }
      for (int k = 0; k < 1 + N; ++k) {
        for (int64_t c = 0; c < width; ++c) partial[k * b.channels + c0 + c] = sums[k][c];
      }
    }
  }
};

template <class T, Gate G, int N>
struct ReduceNchw {
  static void run(const BackwardArgs& a, const Block& b, double* partial) {
    using S = Compute<T>;
    using V = Vec<S>;
    const int64_t mask_row = (b.spatial + 7) / 8;
    for (int64_t c = b.c0; c < b.c1; ++c) {
      const V scale = V::all(static_cast<const S*>(a.norms[0].norm.scale)[c]);
      const V shift = V::all(static_cast<const S*>(a.norms[0].norm.shift)[c]);
      V mean[N];
      for (int k = 0; k < N; ++k) mean[k] = V::all(static_cast<const S*>(a.norms[k].norm.mean)[c]);
      PlaneSums<V, 1 + N> plane_sums;
      for (int64_t n = b.n0; n < b.n1; ++n) {
        const int64_t plane = n * b.channels + c, start = plane * b.spatial + b.s0;
        const T* dy = static_cast<const T*>(a.dy) + start;
        const T* x[N];
        for (int k = 0; k < N; ++k) x[k] = static_cast<const T*>(a.norms[k].x) + start;
        const uint8_t* mask = G == Gate::kMask ? a.mask + plane * mask_row + b.s0 / 8 : nullptr;
        plane_sums.add(b.s1 - b.s0, [&](auto part, int64_t i) {
          Term<V, N> t;
          for (int k = 0; k < N; ++k) t.weight[k] = part.load(x[k] + i) - mean[k];
          // dy is 0 in the lanes past the end
          t.value = gated<G>(part, part.load(dy + i), t.weight[0], scale, shift, mask, i);
          return t;
        });
      }
      plane_sums.finish(&partial[c], b.channels);
    }
  }
};

template <template <class, Gate, int> class Reduce, class T, int N>
void reduce(const Block& b, const BackwardArgs& a, double* partial) {
  with_gate<Reduce, T, N>(a, b, partial);
}

// One norm on the way back, along a run of memory.
template <class T, Layout L>
struct NormBackward {
  using S = Compute<T>;
  Norm<L, S> norm;
  const bool slopes;
  // Never used without a slope, but a factor has to point at something.
  typename Norm<L, S>::Factor slope, offset;
  const T* x;
  T* dx;

  NormBackward(const NormBackwardArgs& a, int64_t start, int64_t channel)
      : norm(a.norm, channel),
        slopes(a.slope != nullptr),
        slope{static_cast<const S*>(slopes ? a.slope : a.norm.scale) + channel},
        offset{static_cast<const S*>(slopes ? a.offset : a.norm.scale) + channel},
        x(static_cast<const T*>(a.x) + start),
        dx(static_cast<T*>(a.dx) + (a.dx ? start : 0)) {}

  template <class Part>
  Vec<S> centred(Part part, int64_t i) const {
    return norm.centred(part, part.load(x + i), i);
  }
  template <class Part>
  void write(Part part, Vec<S> g, Vec<S> centred, int64_t i, bool stream) const {
    if (!dx) return;
    Vec<S> d = g * norm.scale.at(part, i);
    if (slopes) d = fma(g, norm.scale.at(part, i), fma(centred, slope.at(part, i), offset.at(part, i)));
    put(part, dx + i, d, stream);
  }
};

template <Layout L>
struct BackwardOf {
  template <class T, Gate G, int N>
  struct Kernel {
    static void run(const BackwardArgs& a, const Block& b) {
      using V = Vec<Compute<T>>;
      const bool stream = a.stream;
      for_each_run<L>(b, [&](int64_t start, int64_t mask_start, int64_t channel, int64_t n) {
        const NormBackward<T, L> first(a.norms[0], start, channel), second(a.norms[N - 1], start, channel);
        const T* dy = static_cast<const T*>(a.dy) + start;
        const uint8_t* mask = G == Gate::kMask ? a.mask + mask_start : nullptr;
        T* dresidual = static_cast<T*>(a.dresidual) + (a.dresidual ? start : 0);
        for_each_vector<V>(n, [&](auto part, int64_t i) {
          const V centred = first.centred(part, i);
          const V g = gated<G>(part, part.load(dy + i), centred, first.norm.scale.at(part, i),
                               first.norm.shift.at(part, i), mask, i);
          first.write(part, g, centred, i, stream);
          if constexpr (N == 2) {
            second.write(part, g, second.centred(part, i), i, stream);
          } else if (dresidual) {
            put(part, dresidual + i, g, stream);
          }
        });
      });
      if (stream) stream_fence();
    }
  };
};

template <class T, Layout L, int N>
void backward(const Block& b, const BackwardArgs& a) {
  with_gate<BackwardOf<L>::template Kernel, T, N>(a, b);
}

template <class T>
void add_masked(void* self, const void* grad, const uint8_t* mask, int64_t begin, int64_t end, int64_t cols) {
  using V = Vec<Compute<T>>;
  const int64_t mask_row = (cols + 7) / 8;
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(self) + row * cols;
    const T* in = static_cast<const T*>(grad) + row * cols;
    const uint8_t* bits = mask ? mask + row * mask_row : nullptr;
    for_each_vector<V>(cols, [&](auto part, int64_t i) {
      V g = part.load(in + i);
      if (bits) g = keep(V::from_bits(load_bits<V>(bits + i / 8, part)), g);
      part.store(out + i, part.load(out + i) + g);
    });
  }
}

// --- between the passes: one number a channel ---

template <class S>
void finish_gradient(const GradientArgs& a, const double* sums, const double* products, double count,
                     int64_t channels, int64_t c0, int64_t c1) {
  const S* stats = static_cast<const S*>(a.stats);
  for (int64_t c = c0; a.slope && c < c1; ++c) {
    const GradientFactors<S> f = gradient_factors<S>(
        sums[c], products[c], count, stats[kInvstd * channels + c], stats[kScale * channels + c]);
    static_cast<S*>(a.slope)[c] = f.slope;
    static_cast<S*>(a.offset)[c] = f.offset;
  }
  for (int64_t c = c0; a.dweight && c < c1; ++c) {
    static_cast<S*>(a.dweight)[c] = static_cast<S>(products[c] * stats[kInvstd * channels + c]);
  }
  for (int64_t c = c0; a.dbias && c < c1; ++c) static_cast<S*>(a.dbias)[c] = static_cast<S>(sums[c]);
}

}  // namespace
}  // namespace fused_res::cpu
