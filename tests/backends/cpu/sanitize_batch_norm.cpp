// Sanitizer program for the CPU kernels of batch norm (forward and backward, single norms and pairs) and max
// pooling (test_sanitizers.py). Runs without torch, on std::thread and exact-size allocations, and compares
// all results with naive loops. With an argument, a fault is injected into the named kernels: the buffer of
// partial statistics or outputs is one element too short, and all threads write to the same part of it. The
// sanitizer must report it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>

#include "cpu/isa/batch_norm_backward.h"
#include "cpu/isa/batch_norm_forward.h"
#include "cpu/isa/fma_peak.h"
#include "cpu/isa/max_pool.h"
#include "cpu/partition.h"
#include "sanitize.h"

namespace fused_res::cpu {
namespace {

constexpr double kEps = 1e-3;
constexpr double kNegativeSlope = 0.2;

template <class T>
Array<T> random_values(int64_t n, float mean) {
  const Array<float> values = random_floats(n, mean);
  Array<T> out(n);
  for_each_vector<Vec<Compute<T>>>(n, [&](auto part, int64_t i) {
    Compute<T> wide[Vec<Compute<T>>::lanes] = {};
    for (int64_t k = 0; k < Vec<Compute<T>>::lanes && i + k < n; ++k) wide[k] = values[i + k];
    part.store(out.get() + i, load(wide));
  });
  return out;
}

template <class T>
double dtype_tolerance() {
  if constexpr (sizeof(T) == 2) return 1.0 / 128;
  return sizeof(T) == 4 ? 1e-5 : 1e-12;
}

void expect(double got, double expected, double tolerance, const char* what, const Shape& shape) {
  if (std::abs(got - expected) <= tolerance) return;
  std::printf("mismatch: %s, %.9g instead of %.9g, in %ld x %ld x %ld, %s\n", what, got, expected,
              shape.images, shape.channels, shape.spatial, shape.layout == Layout::kNhwc ? "NHWC" : "NCHW");
  std::exit(1);
}

// Return a buffer for partial statistics: `rows` x channels values per chunk.
Array<double> partials(const Partition& partition, int64_t rows) {
  const int64_t channels = partition.shape().channels;
  return Array<double>(partition.chunks() * rows * channels - (inject_fault ? 1 : 0));
}
int64_t partial_index(int64_t chunk) { return inject_fault ? 0 : chunk; }

template <class T>
struct Kernel {
  BatchNormActKernels per_layout[2] = {{moments_nhwc<T>,
                                        forward<T, Layout::kNhwc>,
                                        {reduce<ReduceNhwc, T, 1>, reduce<ReduceNhwc, T, 2>},
                                        {backward<T, Layout::kNhwc, 1>, backward<T, Layout::kNhwc, 2>}},
                                       {moments_nchw<T>,
                                        forward<T, Layout::kNchw>,
                                        {reduce<ReduceNchw, T, 1>, reduce<ReduceNchw, T, 2>},
                                        {backward<T, Layout::kNchw, 1>, backward<T, Layout::kNchw, 2>}}};
};

// A kernel table with the entries that partition.h uses.
Kernels kernel_table() {
  Kernels k = {};
  k.merge_partials = merge_partials, k.add_partials = add_partials;
  return k;
}

enum Residual { kNone, kAdded, kNormalized };

// Forward and backward of a norm in training, or of a pair of norms joined by the residual add.
template <class T>
class Norms {
 public:
  using S = Compute<T>;

  Norms(const Shape& shape, Residual kind, Activation activation, bool save_mask)
      : shape_(shape),
        kind_(kind),
        activation_(activation),
        x_(random_values<T>(shape.numel(), 3)),
        r_(random_values<T>(shape.numel(), -2)),
        dy_(random_values<T>(shape.numel(), 0)),
        y_(shape.numel()),
        weight_(random_values<S>(shape.channels, 1)),
        bias_(random_values<S>(shape.channels, 0)),
        stats_(kStatsRows * shape.channels),
        r_stats_(kStatsRows * shape.channels),
        mask_(save_mask ? shape.rows() * ((shape.cols() + 7) / 8) : 0),
        coefficients_(4 * shape.channels),
        sums_(3 * shape.channels),
        dx_(shape.numel()),
        dr_(shape.numel()) {}

  void run(const Threads& parallel) {
    const auto& kernel = kernels_.per_layout[static_cast<int>(shape_.layout)];
    if (kind_ == kNormalized) statistics(kernel, r_, r_stats_, parallel, [](const Block&) {});
    const ForwardArgs args = {.x = x_.get(),
                              .residual = kind_ == kNone ? nullptr : r_.get(),
                              .norm = norm(stats_),
                              .residual_norm = kind_ == kNormalized ? norm(r_stats_) : NormArgs{},
                              .y = y_.get(),
                              .mask = mask(),
                              .activation = activation_,
                              .negative_slope = kNegativeSlope,
                              .stream = false};
    statistics(kernel, x_, stats_, parallel, [&](const Block& block) { kernel.forward(block, args); });
    backward(kernel, parallel);
  }

  void check() {
    const int64_t channels = shape_.channels;
    const auto count = static_cast<double>(shape_.values_per_channel());
    const double tolerance = 30 * dtype_tolerance<T>();
    for (int64_t c = 0; c < channels; ++c) {
      const auto [mean, var] = moments(x_, c);
      const auto [r_mean, r_var] = moments(r_, c);
      const double invstd = 1 / std::sqrt(var + kEps), r_invstd = 1 / std::sqrt(r_var + kEps);
      expect(stats_[kMean * channels + c], mean, 1e-4, "mean", shape_);
      expect(stats_[kVar * channels + c], count > 1 ? var * count / (count - 1) : var, 1e-3, "var", shape_);
      double sum = 0, product = 0, r_product = 0;
      for_channel(c, [&](int64_t i, double derivative) {
        const double g = derivative * load_scalar(dy_.get() + i);
        sum += g, product += g * (load_scalar(x_.get() + i) - mean) * invstd;
        r_product += g * (load_scalar(r_.get() + i) - r_mean) * r_invstd;
      });
      const double sum_tolerance = tolerance * (1 + std::sqrt(count));
      expect(sums_[c], sum, sum_tolerance, "dbias", shape_);
      expect(sums_[channels + c], product, sum_tolerance, "dweight", shape_);
      if (kind_ == kNormalized)
        expect(sums_[2 * channels + c], r_product, sum_tolerance, "residual's dweight", shape_);
      for_channel(c, [&](int64_t i, double derivative) {
        const double centered = load_scalar(x_.get() + i) - mean, r = load_scalar(r_.get() + i);
        double y = centered * invstd * weight_[c] + bias_[c];
        if (kind_ == kAdded) y += r;
        if (kind_ == kNormalized) y += (r - r_mean) * r_invstd * weight_[c] + bias_[c];
        const double magnitude = 1 + std::abs(y);
        expect(load_scalar(y_.get() + i), activated(y), tolerance * magnitude, "y", shape_);
        const double g = derivative * load_scalar(dy_.get() + i);
        const double dx = weight_[c] * invstd * (g - sum / count - centered * invstd * product / count);
        expect(load_scalar(dx_.get() + i), dx, tolerance * 4, "dx", shape_);
        double dr = g;
        if (kind_ == kNormalized)
          dr = weight_[c] * r_invstd * (g - sum / count - (r - r_mean) * r_invstd * r_product / count);
        if (kind_ != kNone) expect(load_scalar(dr_.get() + i), dr, tolerance * 4, "dresidual", shape_);
      });
    }
  }

  bool bitwise_equal(const Norms& other) const {
    const auto equal = [](const auto& a, const auto& b) {
      return std::memcmp(a.get(), b.get(), static_cast<size_t>(a.size) * sizeof(a[0])) == 0;
    };
    return equal(y_, other.y_) && equal(dx_, other.dx_) && (kind_ == kNone || equal(dr_, other.dr_)) &&
           equal(stats_, other.stats_) && equal(mask_, other.mask_);
  }

 private:
  NormArgs norm(const Array<S>& stats) const {
    const int64_t channels = shape_.channels;
    return {stats.get() + kMean * channels, stats.get() + kScale * channels, stats.get() + kShift * channels};
  }
  uint8_t* mask() const { return mask_.size ? mask_.get() : nullptr; }

  template <class Second>
  void statistics(const BatchNormActKernels& kernel, const Array<T>& values, Array<S>& stats,
                  const Threads& parallel, const Second& second) {
    const Partition partition(shape_, sizeof(T), parallel.threads());
    const Array<double> partial = partials(partition, 2);
    const AffineArgs params = {weight_.get(), bias_.get(), kEps};
    two_passes(
        partition, parallel,
        [&](const Block& block, int64_t chunk) {
          kernel.moments(block, values.get(), partial.get() + partial_index(chunk) * 2 * shape_.channels);
        },
        [&](ChannelRange group) {
          merge_chunks(kernel_table(), partition, partial.get(), group);
          finalize_stats<S>(stats.get(), partial.get(), static_cast<double>(shape_.values_per_channel()),
                            params, shape_.channels, group.begin, group.end);
        },
        second);
  }

  void backward(const BatchNormActKernels& kernel, const Threads& parallel) {
    const int64_t channels = shape_.channels, norms = kind_ == kNormalized ? 2 : 1, rows = 1 + norms;
    const bool pair = norms == 2;
    S* coefficients = coefficients_.get();
    const BackwardArgs args = {
        .dy = dy_.get(),
        .mask = mask(),
        .norms = {{x_.get(), norm(stats_), coefficients, coefficients + channels, dx_.get()},
                  {r_.get(), norm(r_stats_), coefficients + 2 * channels, coefficients + 3 * channels,
                   dr_.get()}},
        .dresidual = kind_ == kAdded ? dr_.get() : nullptr,
        .activation = mask() ? Activation::kIdentity : activation_,
        .negative_slope = kNegativeSlope,
        .stream = false};
    const Partition partition(shape_, rows * static_cast<int64_t>(sizeof(T)), parallel.threads());
    const Array<double> partial = partials(partition, rows);
    two_passes(
        partition, parallel,
        [&](const Block& block, int64_t chunk) {
          kernel.reduce[pair](block, args, partial.get() + partial_index(chunk) * rows * channels);
        },
        [&](ChannelRange group) {
          add_chunks(kernel_table(), partition, partial.get(), rows, group);
          for (int64_t k = 0; k < norms; ++k) {
            const FinalizeBackwardArgs out = {.stats = (k ? r_stats_ : stats_).get(),
                                              .slope = coefficients + 2 * k * channels,
                                              .offset = coefficients + (2 * k + 1) * channels,
                                              .dweight = sums_.get() + (1 + k) * channels,
                                              .dbias = sums_.get()};
            finalize_backward<S>(out, partial.get(), partial.get() + (1 + k) * channels,
                                 static_cast<double>(shape_.values_per_channel()), channels, group.begin,
                                 group.end);
          }
        },
        [&](const Block& block) { kernel.backward[pair](block, args); });
  }

  double activated(double z) const {
    switch (activation_) {
      case Activation::kRelu:
        return std::max(z, 0.0);
      case Activation::kRelu6:
        return std::min(std::max(z, 0.0), 6.0);
      case Activation::kLeakyRelu:
        return z > 0 ? z : kNegativeSlope * z;
      case Activation::kSilu:
        return z / (1 + std::exp(-z));
      case Activation::kIdentity:
        break;
    }
    return z;
  }
  double derivative(double z) const {
    const double s = 1 / (1 + std::exp(-z));
    switch (activation_) {
      case Activation::kRelu:
        return z > 0;
      case Activation::kRelu6:
        return z > 0 && z < 6;
      case Activation::kLeakyRelu:
        return z > 0 ? 1 : kNegativeSlope;
      case Activation::kSilu:
        return s * (1 + z * (1 - s));
      case Activation::kIdentity:
        break;
    }
    return 1;
  }

  // Calls f(index, derivative of the activation) for every value of a channel.
  template <class F>
  void for_channel(int64_t c, F f) const {
    for (int64_t n = 0; n < shape_.images; ++n) {
      for (int64_t s = 0; s < shape_.spatial; ++s) {
        const int64_t i = shape_.layout == Layout::kNhwc ? (n * shape_.spatial + s) * shape_.channels + c
                                                         : (n * shape_.channels + c) * shape_.spatial + s;
        const int64_t row = i / shape_.cols(), col = i % shape_.cols();
        if (mask()) {
          const bool bit = mask_[row * ((shape_.cols() + 7) / 8) + col / 8] >> (col % 8) & 1;
          if (sizeof(T) > 2) expect(bit, !(load_scalar(y_.get() + i) <= 0), 0, "mask", shape_);
          f(i, bit);
        } else {
          const int64_t channels = shape_.channels;
          const S centered = load_scalar(x_.get() + i) - stats_[kMean * channels + c];
          const S scale = stats_[kScale * channels + c], shift = stats_[kShift * channels + c];
          f(i, derivative(std::fma(centered, scale, shift)));
        }
      }
    }
  }
  std::pair<double, double> moments(const Array<T>& values, int64_t c) const {
    const auto count = static_cast<double>(shape_.values_per_channel());
    double mean = 0, m2 = 0;
    for_channel(c, [&](int64_t i, double) { mean += load_scalar(values.get() + i) / count; });
    for_channel(c, [&](int64_t i, double) { m2 += std::pow(load_scalar(values.get() + i) - mean, 2); });
    return {mean, m2 / count};
  }

  Kernel<T> kernels_;
  Shape shape_;
  Residual kind_;
  Activation activation_;
  Array<T> x_, r_, dy_, y_;
  Array<S> weight_, bias_, stats_, r_stats_;
  Array<uint8_t> mask_;
  Array<S> coefficients_, sums_;
  Array<T> dx_, dr_;
};

template <class T>
void check_norm(const Shape& shape, Residual kind, Activation activation, bool mask) {
  const auto before = seed;
  Norms<T> multi_threaded(shape, kind, activation, mask);
  multi_threaded.run(Threads{3});
  multi_threaded.check();
  seed = before;
  Norms<T> single_threaded(shape, kind, activation, mask);
  single_threaded.run(Threads{1});
  expect(multi_threaded.bitwise_equal(single_threaded), 1, 0, "bitwise equality with one thread", shape);
}

template <class T>
void check_norms() {
  for (const Layout layout : {Layout::kNhwc, Layout::kNchw}) {
    for (const Shape& shape : {Shape{1, 1, 2, layout}, Shape{2, 3, 1, layout}, Shape{5, 17, 7, layout},
                               Shape{3, 33, 50, layout}, Shape{7, 9, 131, layout}}) {
      int64_t count = 0;
      for (const Residual kind : {kNone, kAdded, kNormalized}) {
        check_norm<T>(shape, kind, Activation::kIdentity, false);
        // A ReLU after a residual add has a stored mask. Without a residual, the mask is alternately stored
        // and recomputed.
        check_norm<T>(shape, kind, Activation::kRelu, kind != kNone || ++count % 2);
      }
      for (const Activation activation : {Activation::kRelu6, Activation::kLeakyRelu, Activation::kSilu})
        check_norm<T>(shape, kNone, activation, false);
    }
  }
}

void check_large() {
  // Several chunks and groups in either layout, more channels than kStackChannels, and chunks that are part
  // of an image.
  check_norm<float>({2, 2100, 70, Layout::kNhwc}, kAdded, Activation::kRelu, true);
  check_norm<float>({3, 20, 900, Layout::kNhwc}, kNormalized, Activation::kRelu, true);
  check_norm<float>({2, 3, 40000, Layout::kNchw}, kAdded, Activation::kRelu, true);
  check_norm<float>({3, 40, 900, Layout::kNchw}, kNormalized, Activation::kRelu, true);
}

// --- max pooling ---

struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

template <class T, Layout L>
void check_pool(int64_t images, int64_t channels, int64_t height, int64_t width, const Window& w, bool norm) {
  using S = Compute<T>;
  const int64_t oh = (height + 2 * w.pad_h - w.kernel_h) / w.stride_h + 1,
                ow = (width + 2 * w.pad_w - w.kernel_w) / w.stride_w + 1;
  const Shape in = {images, channels, height * width, L}, out = {images, channels, oh * ow, L};
  const Array<T> x = random_values<T>(in.numel(), 0), dy = random_values<T>(out.numel(), 0);
  const Array<S> mean = random_values<S>(channels, 0), scale = random_values<S>(channels, 0),
                 shift = random_values<S>(channels, 0);
  const Array<T> y(inject_fault ? out.numel() - 1 : out.numel()), dx(in.numel());
  const Array<uint8_t> indices(out.numel());
  PoolArgs args = {.images = images,
                   .channels = channels,
                   .height = height,
                   .width = width,
                   .out_height = oh,
                   .out_width = ow,
                   .kernel_h = w.kernel_h,
                   .kernel_w = w.kernel_w,
                   .stride_h = w.stride_h,
                   .stride_w = w.stride_w,
                   .pad_h = w.pad_h,
                   .pad_w = w.pad_w,
                   .x = x.get(),
                   .mean = mean.get(),
                   .scale = norm ? scale.get() : nullptr,
                   .shift = shift.get(),
                   .relu = true,
                   .y = y.get(),
                   .indices = indices.get()};
  const Threads parallel{3};
  const int64_t maps = L == Layout::kNhwc ? images : images * channels;
  const auto pool = [&](int64_t begin, int64_t end) {
    if (inject_fault) begin = 0, end = maps * oh;
    if constexpr (L == Layout::kNhwc) max_pool_forward_nhwc<T>(args, begin, end);
    if constexpr (L == Layout::kNchw) max_pool_forward_nchw<T>(args, begin, end);
  };
  parallel(maps * oh, pool);
  args.x = dy.get(), args.y = dx.get();
  parallel(maps * height, [&](int64_t begin, int64_t end) {
    if constexpr (L == Layout::kNhwc) max_pool_backward_nhwc<T>(args, begin, end);
    if constexpr (L == Layout::kNchw) max_pool_backward_nchw<T>(args, begin, end);
  });

  const auto at = [&](const Shape& shape, int64_t n, int64_t c, int64_t s) {
    return L == Layout::kNhwc ? (n * shape.spatial + s) * channels + c
                              : (n * channels + c) * shape.spatial + s;
  };
  Array<double> gradient(in.numel());
  std::fill_n(gradient.get(), gradient.size, 0.0);
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t s = 0; s < oh * ow; ++s) {
        double best = -std::numeric_limits<double>::infinity();
        const int64_t o = at(out, n, c, s), index = indices[o];
        double picked = best;
        for (int64_t k = 0; k < w.kernel_h * w.kernel_w; ++k) {
          const int64_t h = s / ow * w.stride_h - w.pad_h + k / w.kernel_w,
                        v = s % ow * w.stride_w - w.pad_w + k % w.kernel_w;
          if (h < 0 || h >= height || v < 0 || v >= width) continue;
          const int64_t i = at(in, n, c, h * width + v);
          double value = load_scalar(x.get() + i);
          if (norm) value = std::max(0.0, (value - mean[c]) * scale[c] + shift[c]);
          best = std::max(best, value);
          if (k == index) picked = value, gradient[i] += load_scalar(dy.get() + o);
        }
        const double tolerance = 4 * dtype_tolerance<T>() * (1 + std::abs(best));
        expect(load_scalar(y.get() + o), best, tolerance, "pooled", in);
        expect(picked, best, tolerance, "index", in);
      }
    }
  }
  for (int64_t i = 0; i < in.numel(); ++i)
    expect(load_scalar(dx.get() + i), gradient[i], 8 * dtype_tolerance<T>() * (1 + std::abs(gradient[i])),
           "pool's dx", in);
}

template <class T>
void check_pools() {
  for (const Window& w :
       {Window{3, 3, 2, 2, 1, 1}, {2, 3, 1, 2, 0, 1}, {1, 5, 3, 1, 0, 2}, {5, 3, 2, 3, 2, 0}}) {
    for (const bool norm : {false, true}) {
      check_pool<T, Layout::kNhwc>(2, 19, 7, 9, w, norm);
      check_pool<T, Layout::kNchw>(2, 3, 7, 9, w, norm);
    }
  }
}

// --- gradient of a shortcut ---

template <class T>
void check_add_masked() {
  for (const auto [rows, cols] : {Range{5, 3}, {7, 33}, {2, 64}}) {
    for (const bool masked : {false, true}) {
      const Array<T> grad = random_values<T>(rows * cols, 0), self = random_values<T>(rows * cols, 1);
      const Array<uint8_t> mask(rows * ((cols + 7) / 8));
      for (int64_t i = 0; i < mask.size; ++i) mask[i] = static_cast<uint8_t>(37 * i + 11);
      Array<double> expected(rows * cols);
      for (int64_t i = 0; i < expected.size; ++i) {
        const bool bit = mask[i / cols * ((cols + 7) / 8) + i % cols / 8] >> (i % cols % 8) & 1;
        expected[i] = load_scalar(self.get() + i) + (!masked || bit ? load_scalar(grad.get() + i) : 0.0);
      }
      Threads{3}(rows, [&, cols = cols](int64_t begin, int64_t end) {
        add_masked<T>(self.get(), grad.get(), masked ? mask.get() : nullptr, begin, end, cols);
      });
      const Shape shape = {rows, cols, 1, Layout::kNhwc};
      for (int64_t i = 0; i < expected.size; ++i)
        expect(load_scalar(self.get() + i), expected[i], 4 * dtype_tolerance<T>(), "add_masked", shape);
    }
  }
}

template <class T>
void check_all() {
  check_norms<T>();
  check_pools<T>();
  check_add_masked<T>();
}

}  // namespace
}  // namespace fused_res::cpu

int main(int argc, char** argv) {
  using fused_res::Layout;
  using namespace fused_res::cpu;
  const std::string_view name = argc > 1 ? argv[1] : "";
  inject_fault = argc > 1;
  if (name == "nhwc") {
    check_norm<float>({3, 20, 900, Layout::kNhwc}, kNone, fused_res::Activation::kIdentity, false);
  } else if (name == "nchw") {
    check_norm<float>({2, 2, 40000, Layout::kNchw}, kNone, fused_res::Activation::kIdentity, false);
  } else if (name == "max_pool") {
    check_pool<float, Layout::kNhwc>(2, 19, 17, 19, {3, 3, 2, 2, 1, 1}, true);
  } else {
    check_all<float>();
#if !defined(__SANITIZE_THREAD__)  // races do not depend on the dtype
    check_all<double>();
    check_all<bfloat16>();
    check_all<float16>();
#endif
    check_large();
    float values[kFmaValues] = {};
    fma_loop(10, values);
    std::printf("batch norms and poolings are correct\n");
  }
}
