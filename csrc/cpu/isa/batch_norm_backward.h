// Batch norm + residual add + activation, backward: the reductions sum dy and sum dy * (x - mean), with a kernel
// for each layout, and the elementwise pass for dx, written once for both.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/activation.h"
#include "cpu/isa/batch_norm_forward.h"
#include "cpu/isa/batch_norm_sums.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Source of act'(z): 1 without an activation, the ReLU mask saved by the forward, or recomputed from x.
enum class ActGrad { kNone, kStoredMask, kRelu, kRelu6, kLeakyRelu, kSilu };

constexpr Activation activation_of(ActGrad grad) {
  switch (grad) {
    case ActGrad::kRelu:
      return Activation::kRelu;
    case ActGrad::kRelu6:
      return Activation::kRelu6;
    case ActGrad::kLeakyRelu:
      return Activation::kLeakyRelu;
    case ActGrad::kSilu:
      return Activation::kSilu;
    case ActGrad::kNone:
    case ActGrad::kStoredMask:
      break;
  }
  return Activation::kIdentity;
}

// dy * act'(z).
template <ActGrad kGrad, class Part, class V>
inline V apply_act_grad(Part part, V dy, V centered, V scale, V shift, V negative_slope, const uint8_t* mask,
                        int64_t i) {
  if constexpr (kGrad == ActGrad::kNone) return dy;
  if constexpr (kGrad == ActGrad::kStoredMask)
    return maskz(V::from_bits(load_bits<V>(mask + i / 8, part)), dy);
  return activation_backward<activation_of(kGrad)>(part, dy, normalize(centered, scale, shift),
                                                   negative_slope);
}

// N: 1, or 2 for a pair of norms joined by the residual add. A pair with a ReLU always has a stored mask.
template <template <class, ActGrad, int> class Kernel, class T, int N, class... Args>
inline void dispatch_act_grad(const BackwardArgs& a, const Args&... args) {
  if (a.mask) return Kernel<T, ActGrad::kStoredMask, N>::run(a, args...);
  if constexpr (N == 1) {
    switch (a.activation) {
      case Activation::kRelu:
        return Kernel<T, ActGrad::kRelu, N>::run(a, args...);
      case Activation::kRelu6:
        return Kernel<T, ActGrad::kRelu6, N>::run(a, args...);
      case Activation::kLeakyRelu:
        return Kernel<T, ActGrad::kLeakyRelu, N>::run(a, args...);
      case Activation::kSilu:
        return Kernel<T, ActGrad::kSilu, N>::run(a, args...);
      case Activation::kIdentity:
        break;
    }
  }
  Kernel<T, ActGrad::kNone, N>::run(a, args...);
}

template <class T, ActGrad kGrad, int N>
struct ReduceNhwc {
  static void run(const BackwardArgs& a, const Block& b, double* partial) {
    using S = Compute<T>;
    using V = Vec<S>;
    const int64_t mask_row = (b.channels + 7) / 8;
    const V negative_slope = V::broadcast(static_cast<S>(a.negative_slope));
    for (int64_t c0 = b.c0; c0 < b.c1; c0 += kStackChannels) {
      const int64_t width = min(kStackChannels, b.c1 - c0), start = b.n0 * b.channels + c0;
      const uint8_t* mask = kGrad == ActGrad::kStoredMask ? a.mask + b.n0 * mask_row + c0 / 8 : nullptr;
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
        t.value = apply_act_grad<kGrad>(part, part.load(dy + i), t.weight[0], part.load(scale + c),
                                        part.load(shift + c), negative_slope, mask, row * mask_row * 8 + c);
        return t;
      };
      double sums[1 + N][kStackChannels];
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

template <class T, ActGrad kGrad, int N>
struct ReduceNchw {
  static void run(const BackwardArgs& a, const Block& b, double* partial) {
    using S = Compute<T>;
    using V = Vec<S>;
    const int64_t mask_row = (b.spatial + 7) / 8;
    const V negative_slope = V::broadcast(static_cast<S>(a.negative_slope));
    for (int64_t c = b.c0; c < b.c1; ++c) {
      const V scale = V::broadcast(static_cast<const S*>(a.norms[0].norm.scale)[c]);
      const V shift = V::broadcast(static_cast<const S*>(a.norms[0].norm.shift)[c]);
      V mean[N];
      for (int k = 0; k < N; ++k) mean[k] = V::broadcast(static_cast<const S*>(a.norms[k].norm.mean)[c]);
      PlaneSums<V, 1 + N> plane_sums;
      for (int64_t n = b.n0; n < b.n1; ++n) {
        const int64_t plane = n * b.channels + c, start = plane * b.spatial + b.s0;
        const T* dy = static_cast<const T*>(a.dy) + start;
        const T* x[N];
        for (int k = 0; k < N; ++k) x[k] = static_cast<const T*>(a.norms[k].x) + start;
        const uint8_t* mask = kGrad == ActGrad::kStoredMask ? a.mask + plane * mask_row + b.s0 / 8 : nullptr;
        plane_sums.add(b.s1 - b.s0, [&](auto part, int64_t i) {
          Term<V, N> t;
          for (int k = 0; k < N; ++k) t.weight[k] = part.load(x[k] + i) - mean[k];
          // In a tail, the lanes after the end are 0 because dy is loaded as 0.
          t.value = apply_act_grad<kGrad>(part, part.load(dy + i), t.weight[0], scale, shift, negative_slope,
                                          mask, i);
          return t;
        });
      }
      plane_sums.reduce(&partial[c], b.channels);
    }
  }
};

template <template <class, ActGrad, int> class Reduce, class T, int N>
void reduce(const Block& b, const BackwardArgs& a, double* partial) {
  dispatch_act_grad<Reduce, T, N>(a, b, partial);
}

// Backward of one norm along a contiguous segment.
template <class T, Layout L>
struct NormBackward {
  using S = Compute<T>;
  Norm<L, S> norm;
  const bool has_coefficients;
  // Only used with has_coefficients; without them they need a valid pointer.
  typename Norm<L, S>::Param slope, offset;
  const T* x;
  T* dx;

  NormBackward(const NormBackwardArgs& a, int64_t start, int64_t channel)
      : norm(a.norm, channel),
        has_coefficients(a.slope != nullptr),
        slope{static_cast<const S*>(has_coefficients ? a.slope : a.norm.scale) + channel},
        offset{static_cast<const S*>(has_coefficients ? a.offset : a.norm.scale) + channel},
        x(static_cast<const T*>(a.x) + start),
        dx(static_cast<T*>(a.dx) + (a.dx ? start : 0)) {}

  template <class Part>
  Vec<S> centered(Part part, int64_t i) const {
    return norm.centered(part, part.load(x + i), i);
  }
  template <class Part>
  void write(Part part, Vec<S> g, Vec<S> centered, int64_t i, bool stream) const {
    if (!dx) return;
    Vec<S> d = g * norm.scale.at(part, i);
    if (has_coefficients)
      d = fma(g, norm.scale.at(part, i), fma(centered, slope.at(part, i), offset.at(part, i)));
    store_or_stream(part, dx + i, d, stream);
  }
};

template <Layout L>
struct ElementwiseBackward {
  template <class T, ActGrad kGrad, int N>
  struct Kernel {
    static void run(const BackwardArgs& a, const Block& b) {
      using S = Compute<T>;
      using V = Vec<S>;
      const bool stream = a.stream;
      const V negative_slope = V::broadcast(static_cast<S>(a.negative_slope));
      for_each_contiguous<L>(b, [&](int64_t start, int64_t mask_start, int64_t channel, int64_t n) {
        const NormBackward<T, L> first(a.norms[0], start, channel), second(a.norms[N - 1], start, channel);
        const T* dy = static_cast<const T*>(a.dy) + start;
        const uint8_t* mask = kGrad == ActGrad::kStoredMask ? a.mask + mask_start : nullptr;
        T* dresidual = static_cast<T*>(a.dresidual) + (a.dresidual ? start : 0);
        for_each_vector<V>(n, [&](auto part, int64_t i) {
          const V centered = first.centered(part, i);
          const V g = apply_act_grad<kGrad>(part, part.load(dy + i), centered, first.norm.scale.at(part, i),
                                            first.norm.shift.at(part, i), negative_slope, mask, i);
          first.write(part, g, centered, i, stream);
          if constexpr (N == 2) {
            second.write(part, g, second.centered(part, i), i, stream);
          } else if (dresidual) {
            store_or_stream(part, dresidual + i, g, stream);
          }
        });
      });
      if (stream) stream_fence();
    }
  };
};

template <class T, Layout L, int N>
void backward(const Block& b, const BackwardArgs& a) {
  dispatch_act_grad<ElementwiseBackward<L>::template Kernel, T, N>(a, b);
}

// self += mask ? grad : 0 for rows [begin, end).
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
      if (bits) g = maskz(V::from_bits(load_bits<V>(bits + i / 8, part)), g);
      part.store(out + i, part.load(out + i) + g);
    });
  }
}

// --- between the two passes, per channel ---

// The backward coefficients, dweight and dbias from the sums over the batch.
template <class S>
void finalize_backward(const FinalizeBackwardArgs& a, const double* sum_dy, const double* sum_dy_xmu,
                       double count, int64_t channels, int64_t c0, int64_t c1) {
  const S* stats = static_cast<const S*>(a.stats);
  for (int64_t c = c0; a.slope && c < c1; ++c) {
    const BackwardCoefficients<S> f = backward_coefficients<S>(
        sum_dy[c], sum_dy_xmu[c], count, stats[kInvstd * channels + c], stats[kScale * channels + c]);
    static_cast<S*>(a.slope)[c] = f.slope;
    static_cast<S*>(a.offset)[c] = f.offset;
  }
  for (int64_t c = c0; a.dweight && c < c1; ++c) {
    static_cast<S*>(a.dweight)[c] = static_cast<S>(sum_dy_xmu[c] * stats[kInvstd * channels + c]);
  }
  for (int64_t c = c0; a.dbias && c < c1; ++c) static_cast<S*>(a.dbias)[c] = static_cast<S>(sum_dy[c]);
}

}  // namespace
}  // namespace fused_res::cpu
