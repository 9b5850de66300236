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

template <class V>
struct Term {  // adds `value` to one sum and `value * weight` to the other
  V value, weight;
};

// NHWC, for `width` <= kPanel channels of rows that lie `stride` elements apart: sums[c], products[c] over
// the rows; term(part, row, c) reads the `operands`.
//
// A few rows go side by side, so that the sums are loaded and stored once for all of them. Memory is read in
// the order in which it lies: nothing else brings the L2's prefetcher along, and without it a core reads
// 4 to 5 GB/s here, against 12 to 20.
template <class V, class F, class... T>
inline void sum_rows(int64_t rows, int64_t width, int64_t stride, double* sums, double* products, F term,
                     const T*... operands) {
  using S = typename V::Scalar;
  alignas(64) S sum[kPanel], product[kPanel];
  const int64_t padded = (width + V::lanes - 1) / V::lanes * V::lanes;
  const auto add = [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    for_each_vector<V>(width, [&](auto part, int64_t c) {
      V s = load(sum + c), p = load(product + c);
      for (int i = 0; i < kRows; ++i) {
        (prefetch(operands + (row + i) * stride + c + kAhead / static_cast<int64_t>(sizeof(T))), ...);
        const Term<V> t = term(part, row + i, c);
        s = s + t.value;
        p = fma(t.value, t.weight, p);
      }
      store(sum + c, s), store(product + c, p);
    });
  };
  for (int64_t c = 0; c < padded; ++c) sums[c] = products[c] = 0.0;
  for (int64_t row = 0; row < rows;) {
    for (int64_t c = 0; c < padded; ++c) sum[c] = product[c] = S(0);
    const int64_t end = smaller(row + kTile, rows);
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) add(Count<kRowsAtOnce>{}, row);
    for (; row < end; ++row) add(Count<1>{}, row);
    for (int64_t c = 0; c < padded; c += V::lanes) {
      accumulate(sums + c, load(sum + c));
      accumulate(products + c, load(product + c));
    }
  }
}

// NCHW, one channel: the same over runs of memory, each lane with sums of its own until the end.
template <class V>
class PlaneSums {
 public:
  template <class F>
  void add(int64_t n, F term) {  // term(part, offset)
    for_each_strip<V, kWays>(n, [&](auto strip, int64_t i) {
      for (int way = 0; way < decltype(strip)::vectors; ++way) {
        const Term<V> t = term(strip.part, i + way * V::lanes);
        sum_[way] = sum_[way] + t.value;
        product_[way] = fma(t.value, t.weight, product_[way]);
      }
      if (++filled_ == kTile) flush();
    });
  }

  void finish(double* sum, double* product) {
    flush();
    *sum = *product = 0.0;
    for (int i = 0; i < V::lanes; ++i) {
      *sum += sums_[i];
      *product += products_[i];
    }
  }

 private:
  static constexpr int kWays = 4;  // independent chains of additions, each 4 cycles long

  void flush() {
    accumulate(sums_, (sum_[0] + sum_[1]) + (sum_[2] + sum_[3]));
    accumulate(products_, (product_[0] + product_[1]) + (product_[2] + product_[3]));
    for (int way = 0; way < kWays; ++way) sum_[way] = product_[way] = V::zero();
    filled_ = 0;
  }

  V sum_[kWays] = {V::zero(), V::zero(), V::zero(), V::zero()};
  V product_[kWays] = {V::zero(), V::zero(), V::zero(), V::zero()};
  double sums_[V::lanes] = {};
  double products_[V::lanes] = {};
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
      return Term<V>{d, d};
    };
    double sums[kPanel], squares[kPanel];
    for (int64_t c = 0; c < width; ++c) origin[c] = element(first + c);
    sum_rows<V>(pilot, width, b.channels, sums, squares, above_origin, first);
    for (int64_t c = 0; c < width; ++c) {
      origin[c] = finite_or_zero(origin[c] + static_cast<S>(sums[c]) / static_cast<S>(pilot));
    }
    sum_rows<V>(rows, width, b.channels, sums, squares, above_origin, first);
    for (int64_t c = 0; c < width; ++c) {
      const Moments m = moments_from_sums(origin[c], sums[c], squares[c], static_cast<double>(rows));
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

    PlaneSums<V> plane_sums;
    for (int64_t n = b.n0; n < b.n1; ++n) {
      plane_sums.add(length, [&](auto part, int64_t i) {
        const V d = part.only(part.load(first + n * image + i) - origin);
        return Term<V>{d, d};
      });
    }
    double sum, squares;
    plane_sums.finish(&sum, &squares);
    const auto count = static_cast<double>((b.n1 - b.n0) * length);
    const Moments m = moments_from_sums(first_lane(origin), sum, squares, count);
    partial[c] = m.mean;
    partial[b.channels + c] = m.m2;
  }
}

// --- forward: normalise, add, clamp ---

template <class T, Layout L>
void forward(const Block& b, const ForwardArgs& a) {
  using S = Compute<T>;
  using V = Vec<S>;
  const bool relu = a.relu, stream = a.stream;
  for_each_run<L>(b, [&](int64_t start, int64_t mask_start, int64_t channel, int64_t n) {
    using Factor = typename FactorOf<L, S>::type;
    const Factor mean{static_cast<const S*>(a.mean) + channel},
        scale{static_cast<const S*>(a.scale) + channel};
    const Factor shift{static_cast<const S*>(a.shift) + channel};
    const T* x = static_cast<const T*>(a.x) + start;
    const T* residual = static_cast<const T*>(a.residual) + (a.residual ? start : 0);
    T* y = static_cast<T*>(a.y) + start;
    uint8_t* mask = a.mask ? a.mask + mask_start : nullptr;
    for_each_vector<V>(n, [&](auto part, int64_t i) {
      V v = normalize(part.load(x + i) - mean.at(part, i), scale.at(part, i), shift.at(part, i));
      if (residual) v = v + part.load(residual + i);
      const auto active = relu_active(v);
      if (mask) store_bits<V>(mask + i / 8, to_bits(active), part);
      if (relu) v = keep(active, v);
      put(part, y + i, v, stream);
    });
  });
  if (stream) stream_fence();
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

template <template <class, Gate> class Kernel, class T, class... Args>
inline void with_gate(const BackwardArgs& a, const Args&... args) {
  if (a.mask) return Kernel<T, Gate::kMask>::run(a, args...);
  if (a.relu) return Kernel<T, Gate::kRecompute>::run(a, args...);
  Kernel<T, Gate::kOpen>::run(a, args...);
}

template <class T, Gate G>
struct ReduceNhwc {
  static void run(const BackwardArgs& a, const Block& b, double* partial) {
    using S = Compute<T>;
    using V = Vec<S>;
    const int64_t mask_row = (b.channels + 7) / 8;
    for (int64_t c0 = b.c0; c0 < b.c1; c0 += kPanel) {
      const int64_t width = smaller(kPanel, b.c1 - c0);
      const T* dy = static_cast<const T*>(a.dy) + b.n0 * b.channels + c0;
      const T* x = static_cast<const T*>(a.x) + b.n0 * b.channels + c0;
      const uint8_t* mask = G == Gate::kMask ? a.mask + b.n0 * mask_row + c0 / 8 : nullptr;
      const S* mean = static_cast<const S*>(a.mean) + c0;
      const S* scale = static_cast<const S*>(a.scale) + c0;
      const S* shift = static_cast<const S*>(a.shift) + c0;
      double sums[kPanel], products[kPanel];
      sum_rows<V>(
          b.n1 - b.n0, width, b.channels, sums, products,
          [&](auto part, int64_t row, int64_t c) {
            const V centred = part.load(x + row * b.channels + c) - part.load(mean + c);
            const V g = gated<G>(part, part.load(dy + row * b.channels + c), centred, part.load(scale + c),
                                 part.load(shift + c), mask, row * mask_row * 8 + c);
            return Term<V>{g, centred};
          },
          dy, x);
      for (int64_t c = 0; c < width; ++c) {
        partial[c0 + c] = sums[c];
        partial[b.channels + c0 + c] = products[c];
      }
    }
  }
};

template <class T, Gate G>
struct ReduceNchw {
  static void run(const BackwardArgs& a, const Block& b, double* partial) {
    using S = Compute<T>;
    using V = Vec<S>;
    const int64_t mask_row = (b.spatial + 7) / 8;
    for (int64_t c = b.c0; c < b.c1; ++c) {
      const V mean = V::all(static_cast<const S*>(a.mean)[c]);
      const V scale = V::all(static_cast<const S*>(a.scale)[c]);
      const V shift = V::all(static_cast<const S*>(a.shift)[c]);
      PlaneSums<V> plane_sums;
      for (int64_t n = b.n0; n < b.n1; ++n) {
        const int64_t plane = n * b.channels + c;
        const T* dy = static_cast<const T*>(a.dy) + plane * b.spatial + b.s0;
        const T* x = static_cast<const T*>(a.x) + plane * b.spatial + b.s0;
        const uint8_t* mask = G == Gate::kMask ? a.mask + plane * mask_row + b.s0 / 8 : nullptr;
        plane_sums.add(b.s1 - b.s0, [&](auto part, int64_t i) {
          const V centred = part.load(x + i) - mean;
          // dy is 0 in the lanes past the end
          return Term<V>{gated<G>(part, part.load(dy + i), centred, scale, shift, mask, i), centred};
        });
      }
      plane_sums.finish(&partial[c], &partial[b.channels + c]);
    }
  }
};

template <class T>
void reduce_nhwc(const Block& b, const BackwardArgs& a, double* partial) {
  with_gate<ReduceNhwc, T>(a, b, partial);
}
template <class T>
void reduce_nchw(const Block& b, const BackwardArgs& a, double* partial) {
  with_gate<ReduceNchw, T>(a, b, partial);
}

template <Layout L>
struct BackwardOf {
  template <class T, Gate G>
  struct Kernel {
    static void run(const BackwardArgs& a, const Block& b) {
      using S = Compute<T>;
      using V = Vec<S>;
      using Factor = typename FactorOf<L, S>::type;
      const bool stream = a.stream, slopes = a.slope != nullptr;
      for_each_run<L>(b, [&](int64_t start, int64_t mask_start, int64_t channel, int64_t n) {
        const Factor mean{static_cast<const S*>(a.mean) + channel};
        const Factor scale{static_cast<const S*>(a.scale) + channel};
        const Factor shift{static_cast<const S*>(a.shift) + channel};
        // Never used without a slope, but a factor has to point at something.
        const Factor slope{static_cast<const S*>(a.slope ? a.slope : a.scale) + channel};
        const Factor offset{static_cast<const S*>(a.slope ? a.offset : a.scale) + channel};
        const T* dy = static_cast<const T*>(a.dy) + start;
        const T* x = static_cast<const T*>(a.x) + start;
        const uint8_t* mask = G == Gate::kMask ? a.mask + mask_start : nullptr;
        T* dx = static_cast<T*>(a.dx) + (a.dx ? start : 0);
        T* dresidual = static_cast<T*>(a.dresidual) + (a.dresidual ? start : 0);
        for_each_vector<V>(n, [&](auto part, int64_t i) {
          const V centred = part.load(x + i) - mean.at(part, i);
          const V g =
              gated<G>(part, part.load(dy + i), centred, scale.at(part, i), shift.at(part, i), mask, i);
          if (dx) {
            V d = g * scale.at(part, i);
            if (slopes) {
              d = fma(g, scale.at(part, i), fma(centred, slope.at(part, i), offset.at(part, i)));
            }
            put(part, dx + i, d, stream);
          }
          if (dresidual) put(part, dresidual + i, g, stream);
        });
      });
      if (stream) stream_fence();
    }
  };
};

template <class T, Layout L>
void backward(const Block& b, const BackwardArgs& a) {
  with_gate<BackwardOf<L>::template Kernel, T>(a, b);
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

inline void add_partials(double* a, const double* b, int64_t channels, int64_t c0, int64_t c1) {
  for (int64_t c = c0; c < c1; ++c) {
    a[c] += b[c];
    a[channels + c] += b[channels + c];
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
void finish_gradient(const GradientArgs& a, const double* sums, double count, int64_t channels, int64_t c0,
                     int64_t c1) {
  const S* stats = static_cast<const S*>(a.stats);
  const double* products = sums + channels;
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
