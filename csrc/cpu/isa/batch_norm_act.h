// batch_norm_act: the statistics and sums, a version for each layout, and the elementwise passes, written
// once for both.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Vectors summed in float32 before the sums go to double.
constexpr int kTile = 32;
// Rows (NHWC) or vectors (NCHW) whose mean becomes the origin that a chunk's values are taken relative to.
// With n values in a chunk and k in the pilot, the cancellation in M2 is at most (1 + n / k) eps, and near 1
// eps unless the pilot is an outlier.
constexpr int kPilot = 16;
// Channels whose sums live on the stack.
constexpr int64_t kPanel = 2048;
// Bytes of each operand that are on their way to L2 before they are needed.
constexpr int64_t kAhead = 16384;
// Rows that are summed side by side.
constexpr int kRowsAtOnce = 4;
template <int N>
struct Count {
  static constexpr int value = N;
};

// --- sums ---

template <class V, int N>
struct Term {  // adds `value` to the first sum, and `value * weight[k]` to the k-th behind it
  V value, weight[N];
};

// NHWC, for `width` <= kPanel channels of rows that lie `stride` elements apart: sums[k][c] over the rows;
// term(part, row, c) reads the `operands`.
//
// A few rows go side by side, so that the sums are loaded and stored once for all of them. Memory is read in
// the order in which it lies: nothing else brings the L2's prefetcher along, and without it a core reads
// 4 to 5 GB/s here, against 12 to 20.
template <class V, int K, class F, class... T>
inline void sum_rows(int64_t rows, int64_t width, int64_t stride, double (&sums)[K][kPanel], F term,
                     const T*... operands) {
  using S = typename V::Scalar;
  alignas(64) S tile[K][kPanel];
  const int64_t padded = (width + V::lanes - 1) / V::lanes * V::lanes;
  const auto add = [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    for_each_vector<V>(width, [&](auto part, int64_t c) {
      V sum[K];
      for (int k = 0; k < K; ++k) sum[k] = load(tile[k] + c);
      for (int i = 0; i < kRows; ++i) {
        (prefetch(operands + (row + i) * stride + c + kAhead / static_cast<int64_t>(sizeof(T))), ...);
        const Term<V, K - 1> t = term(part, row + i, c);
        sum[0] = sum[0] + t.value;
        for (int k = 1; k < K; ++k) sum[k] = fma(t.value, t.weight[k - 1], sum[k]);
      }
      for (int k = 0; k < K; ++k) store(tile[k] + c, sum[k]);
    });
  };
  for (auto& sum : sums) {
    for (int64_t c = 0; c < padded; ++c) sum[c] = 0.0;
  }
  for (int64_t row = 0; row < rows;) {
    for (auto& sum : tile) {
      for (int64_t c = 0; c < padded; ++c) sum[c] = S(0);
    }
    const int64_t end = smaller(row + kTile, rows);
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) add(Count<kRowsAtOnce>{}, row);
    for (; row < end; ++row) add(Count<1>{}, row);
    for (int k = 0; k < K; ++k) {
      for (int64_t c = 0; c < padded; c += V::lanes) accumulate(sums[k] + c, load(tile[k] + c));
    }
  }
}

// NCHW, one channel: the same over runs of memory, each lane with K sums of its own until the end.
template <class V, int K>
class PlaneSums {
 public:
  template <class F>
  void add(int64_t n, F term) {  // term(part, offset)
    for_each_strip<V, kWays>(n, [&](auto strip, int64_t i) {
      for (int way = 0; way < decltype(strip)::vectors; ++way) {
        const Term<V, K - 1> t = term(strip.part, i + way * V::lanes);
        tile_[0][way] = tile_[0][way] + t.value;
        for (int k = 1; k < K; ++k) tile_[k][way] = fma(t.value, t.weight[k - 1], tile_[k][way]);
      }
      if (++filled_ == kTile) flush();
    });
  }

  void finish(double* sums, int64_t stride) {
    flush();
    for (int k = 0; k < K; ++k) {
      sums[k * stride] = 0.0;
      for (int i = 0; i < V::lanes; ++i) sums[k * stride] += sums_[k][i];
    }
  }

 private:
  static constexpr int kWays = 4;  // independent chains of additions, each 4 cycles long

  void flush() {
    for (int k = 0; k < K; ++k) {
      accumulate(sums_[k], (tile_[k][0] + tile_[k][1]) + (tile_[k][2] + tile_[k][3]));
      for (V& sum : tile_[k]) sum = V::zero();
    }
    filled_ = 0;
  }

  V tile_[K][kWays] = {};
  double sums_[K][V::lanes] = {};
  int filled_ = 0;
};

// The origin must be a number: x - infinity would turn infinity into NaN everywhere.
template <class S>
inline S finite_or_zero(S origin) {
  return origin - origin == S(0) ? origin : S(0);
}

// --- forward: statistics ---

template <class T>
void moments_nhwc(const Block& b, const void* x, double* partial) {
  using S = Compute<T>;
  using V = Vec<S>;
  const int64_t rows = b.n1 - b.n0, pilot = smaller(rows, kPilot);
  for (int64_t c0 = b.c0; c0 < b.c1; c0 += kPanel) {
    const int64_t width = smaller(kPanel, b.c1 - c0);
    const T* first = static_cast<const T*>(x) + b.n0 * b.channels + c0;
    alignas(64) S origin[kPanel];
    const auto above_origin = [&](auto part, int64_t row, int64_t c) {
      const V d = part.load(first + row * b.channels + c) - load(origin + c);
      return Term<V, 1>{d, {d}};
    };
    double sums[2][kPanel];
    for (int64_t c = 0; c < width; ++c) origin[c] = element(first + c);
    sum_rows<V>(pilot, width, b.channels, sums, above_origin, first);
    for (int64_t c = 0; c < width; ++c) {
      origin[c] = finite_or_zero(origin[c] + static_cast<S>(sums[0][c]) / static_cast<S>(pilot));
    }
    sum_rows<V>(rows, width, b.channels, sums, above_origin, first);
    for (int64_t c = 0; c < width; ++c) {
      const Moments m = moments_from_sums(origin[c], sums[0][c], sums[1][c], static_cast<double>(rows));
      partial[c0 + c] = m.mean;
      partial[b.channels + c0 + c] = m.m2;
    }
  }
}

template <class T>
void moments_nchw(const Block& b, const void* x, double* partial) {
  using S = Compute<T>;
  using V = Vec<S>;
  const int64_t length = b.s1 - b.s0, pilot = smaller(length, kPilot * V::lanes);
  for (int64_t c = b.c0; c < b.c1; ++c) {
    const T* first = static_cast<const T*>(x) + c * b.spatial + b.s0;
    const int64_t image = b.channels * b.spatial;

    const T* pilot_plane = first + b.n0 * image;
    const S start = element(pilot_plane);
    V pilot_sum = V::zero();
    for_each_vector<V>(pilot, [&](auto part, int64_t i) {
      pilot_sum = pilot_sum + part.only(part.load(pilot_plane + i) - V::all(start));
    });
    const V origin = V::all(finite_or_zero(start + total(pilot_sum) / static_cast<S>(pilot)));

    PlaneSums<V, 2> plane_sums;
    for (int64_t n = b.n0; n < b.n1; ++n) {
      plane_sums.add(length, [&](auto part, int64_t i) {
        const V d = part.only(part.load(first + n * image + i) - origin);
        return Term<V, 1>{d, {d}};
      });
    }
    double sums[2];
    plane_sums.finish(sums, 1);
    const auto count = static_cast<double>((b.n1 - b.n0) * length);
    const Moments m = moments_from_sums(first_lane(origin), sums[0], sums[1], count);
    partial[c] = m.mean;
    partial[b.channels + c] = m.m2;
  }
}

// --- forward: normalise, add, clamp ---

// One norm along a run of memory.
template <Layout L, class S>
struct Norm {
  using Factor = typename FactorOf<L, S>::type;
  Factor mean, scale, shift;

  Norm(const NormArgs& a, int64_t channel)
      : mean{static_cast<const S*>(a.mean) + channel},
        scale{static_cast<const S*>(a.scale) + channel},
        shift{static_cast<const S*>(a.shift) + channel} {}

  template <class Part>
  Vec<S> centred(Part part, Vec<S> v, int64_t i) const {
    return v - mean.at(part, i);
  }
  template <class Part>
  Vec<S> operator()(Part part, Vec<S> v, int64_t i) const {
    return normalize(centred(part, v, i), scale.at(part, i), shift.at(part, i));
  }
};

template <class T, Layout L, bool kPair>
void forward(const Block& b, const ForwardArgs& a) {
  using S = Compute<T>;
  using V = Vec<S>;
  const bool relu = a.relu, stream = a.stream;
  for_each_run<L>(b, [&](int64_t start, int64_t mask_start, int64_t channel, int64_t n) {
    const Norm<L, S> norm(a.norm, channel);
    // Used in a pair only, but it has to point at something.
    const Norm<L, S> residual_norm(kPair ? a.residual_norm : a.norm, channel);
    const T* x = static_cast<const T*>(a.x) + start;
    const T* residual = static_cast<const T*>(a.residual) + (a.residual ? start : 0);
    T* y = static_cast<T*>(a.y) + start;
    uint8_t* mask = a.mask ? a.mask + mask_start : nullptr;
    for_each_vector<V>(n, [&](auto part, int64_t i) {
      V v = norm(part, part.load(x + i), i);
      if constexpr (kPair) {
        v = v + residual_norm(part, part.load(residual + i), i);
      } else if (residual) {
        v = v + part.load(residual + i);
      }
      const auto active = relu_active(v);
      if (mask) store_bits<V>(mask + i / 8, to_bits(active), part);
      if (relu) v = keep(active, v);
      put(part, y + i, v, stream);
    });
  });
  if (stream) stream_fence();
}

template <class T, Layout L>
void forward(const Block& b, const ForwardArgs& a) {
  if (a.residual_norm.mean) return forward<T, L, true>(b, a);
  forward<T, L, false>(b, a);
}

// --- backward ---

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
    for (int64_t c0 = b.c0; c0 < b.c1; c0 += kPanel) {
      const int64_t width = smaller(kPanel, b.c1 - c0), start = b.n0 * b.channels + c0;
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
      double sums[1 + N][kPanel];
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

inline void merge_partials(double* a, const double* b, double count_a, double count_b, int64_t channels,
                           int64_t c0, int64_t c1) {
  const MergeFactors factors = merge_factors(count_a, count_b);
  for (int64_t c = c0; c < c1; ++c) {
    const Moments m = merge({a[c], a[channels + c]}, {b[c], b[channels + c]}, factors);
    a[c] = m.mean;
    a[channels + c] = m.m2;
  }
}

inline void add_partials(double* a, const double* b, int64_t rows, int64_t channels, int64_t c0, int64_t c1) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = row * channels + c0; c < row * channels + c1; ++c) a[c] += b[c];
  }
}

template <class S>
void finish(void* stats, const double* moments, double count, const ParamArgs& params, int64_t channels,
            int64_t c0, int64_t c1) {
  S* out = static_cast<S*>(stats);
  const S* weight = static_cast<const S*>(params.weight);
  const S* bias = static_cast<const S*>(params.bias);
  for (int64_t c = c0; c < c1; ++c) {
    const double m2 = moments[channels + c], var = m2 / count;
    const double invstd = 1.0 / __builtin_sqrt(var + params.eps);
    const ChannelStats<S> s =
        channel_stats<S>(moments[c], invstd, weight ? weight[c] : S(1), bias ? bias[c] : S(0));
    out[kMean * channels + c] = s.mean;
    out[kInvstd * channels + c] = s.invstd;
    out[kScale * channels + c] = s.scale;
    out[kShift * channels + c] = s.shift;
    out[kVar * channels + c] = static_cast<S>(count > 1.0 ? m2 / (count - 1.0) : var);
  }
}

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
