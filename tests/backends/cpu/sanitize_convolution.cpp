// The CPU's convolutions and the gradients of their weights without torch, on plain threads and on arrays of
// exactly their size: what AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer watch
// (test_sanitizers.py). Outputs are compared with a plain loop. With an argument, scratch memory is too
// short and shared by all threads in the kernels that it names: sanitizers have to say so.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>

#include "common/output_size.h"
#include "cpu/convolution.h"
#include "cpu/isa/direct.h"
#include "cpu/isa/weight_gradient.h"
#include "cpu/isa/winograd.h"
#include "cpu/weight_gradient.h"
#include "sanitize.h"

namespace fused_res::cpu {
namespace {

constexpr ConvolutionKernels kKernels = {direct, winograd, direct_gradient, winograd_gradient};

struct Case {
  int64_t images, channels, height, width, outputs, taps_h, taps_w, stride, pad, dilation, tile;
  bool transposed = false, bias = false, residual = false, relu = false;
};

struct Image {
  int64_t images, height, width;
};

struct Operands {
  ConvolutionArgs args = {};
  Array<float> x, plain, bias, residual;
  Weight weight;

  explicit Operands(const Case& c)
      : x(random_floats(c.images * c.height * c.width * c.channels, 1)),
        plain(random_floats(c.outputs * c.channels * c.taps_h * c.taps_w, 0)),
        bias(random_floats(c.outputs, 10)),
        residual(0) {
    const int64_t taps = c.taps_h * c.taps_w;
    weight = {plain.get(),       c.outputs, c.channels, c.taps_h, c.taps_w,
              c.channels * taps, taps,      c.taps_w,   1,        c.stride};
    if (c.transposed) {
      weight.data += taps - 1;
      weight.row_stride = -c.taps_w, weight.column_stride = -1;
      weight.output_stride = taps, weight.channel_stride = c.outputs * taps;
    }
    const auto size = [&](int64_t in, int64_t taps) {
      return output_size(in, taps, c.stride, c.pad, c.dilation);
    };
    args.images = c.images, args.channels = c.channels, args.height = c.height, args.width = c.width;
    args.outputs = c.outputs, args.taps_h = c.taps_h, args.taps_w = c.taps_w;
    args.out_height = size(c.height, c.taps_h), args.out_width = size(c.width, c.taps_w);
    args.stride_h = args.stride_w = c.stride, args.pad_h = args.pad_w = c.pad;
    args.dilation_h = args.dilation_w = c.dilation;
    args.relu = c.relu, args.tile = c.tile, args.gather = taps * c.stride != 1 || c.pad != 0;
    args.x = x.get();
    if (c.bias) args.bias = bias.get();
    if (c.residual) {
      residual = random_floats(numel(), 0);
      args.residual = residual.get();
    }
  }

  // The inputs that an output pixel sees through a tap, or null where that is padding.
  const float* under(int64_t pixel, int64_t i, int64_t j) const {
    const int64_t x = pixel % args.out_width, y = pixel / args.out_width % args.out_height;
    const int64_t image = pixel / args.out_width / args.out_height;
    const int64_t h = y * args.stride_h - args.pad_h + i * args.dilation_h;
    const int64_t w = x * args.stride_w - args.pad_w + j * args.dilation_w;
    if (h < 0 || h >= args.height || w < 0 || w >= args.width) return nullptr;
    return args.x + ((image * args.height + h) * args.width + w) * args.channels;
  }
  // Where an element of the weight is, and one of its gradient.
  int64_t at(int64_t o, int64_t c, int64_t i, int64_t j) const {
    return weight.data - plain.get() + o * weight.output_stride + c * weight.channel_stride +
           i * weight.row_stride + j * weight.column_stride;
  }

  int64_t pixels() const { return args.images * args.out_height * args.out_width; }
  int64_t numel() const { return pixels() * args.outputs; }

  // One output in double, and the sum of the absolute values that it is made of.
  double naive(int64_t pixel, int64_t o, double& magnitude) const {
    double sum = args.bias ? args.bias[o] : 0;
    if (args.residual) sum += args.residual[pixel * args.outputs + o];
    magnitude = std::abs(sum);
    for (int64_t i = 0; i < args.taps_h; ++i) {
      for (int64_t j = 0; j < args.taps_w; ++j) {
        const float* from = under(pixel, i, j);
        for (int64_t c = 0; from && c < args.channels; ++c) {
          const double product = static_cast<double>(from[c]) * plain[at(o, c, i, j)];
          sum += product, magnitude += std::abs(product);
        }
      }
    }
    return args.relu && sum <= 0 ? 0 : sum;
  }

  // The same for one element of the weight's gradient.
  double naive_gradient(const Array<float>& dz, int64_t o, int64_t c, int64_t i, int64_t j,
                        double& magnitude) const {
    double sum = 0;
    magnitude = 0;
    for (int64_t pixel = 0; pixel < pixels(); ++pixel) {
      const float* from = under(pixel, i, j);
      if (!from) continue;
      const double product = static_cast<double>(from[c]) * dz[pixel * args.outputs + o];
      sum += product, magnitude += std::abs(product);
    }
    return sum;
  }
};

void fail(const Case& c, const char* what, double got, double expected) {
  std::printf(
      "wrong: %s, %.9g instead of %.9g, in %ld x %ld x %ld x %ld to %ld, taps %ld x %ld, stride %ld, pad "
      "%ld, dilation %ld, tile %ld\n",
      what, got, expected, c.images, c.channels, c.height, c.width, c.outputs, c.taps_h, c.taps_w, c.stride,
      c.pad, c.dilation, c.tile);
  std::exit(1);
}

// Chunks' moments, merged here by another formula, against those of the outputs.
template <class Tasks>
void check_moments(const Case& c, const Operands& on, const Array<float>& y, const Tasks& tasks,
                   const Array<double>& moments) {
  const int64_t outputs = c.outputs, pixels = on.pixels();
  for (int64_t o = 0; o < outputs; ++o) {
    double mean = 0, m2 = 0, exact = 0, exact_m2 = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < tasks.chunks(); ++i) {
      count += tasks.outputs_in(i);
      mean += moments[i * 2 * outputs + o] * static_cast<double>(tasks.outputs_in(i));
    }
    if (count != pixels) fail(c, "count", static_cast<double>(count), static_cast<double>(pixels));
    mean /= static_cast<double>(count);
    for (int64_t i = 0; i < tasks.chunks(); ++i) {
      const double off = moments[i * 2 * outputs + o] - mean;
      m2 += moments[(i * 2 + 1) * outputs + o] + static_cast<double>(tasks.outputs_in(i)) * off * off;
    }
    for (int64_t p = 0; p < pixels; ++p) exact += y[p * outputs + o];
    exact /= static_cast<double>(pixels);
    for (int64_t p = 0; p < pixels; ++p) exact_m2 += std::pow(y[p * outputs + o] - exact, 2);
    if (!(std::abs(mean - exact) <= 1e-5 * (1 + std::abs(exact)))) fail(c, "mean", mean, exact);
    if (!(std::abs(m2 - exact_m2) <= 1e-4 * exact_m2 + 1e-6)) fail(c, "M2", m2, exact_m2);
  }
}

// NaN: what is read before it is written reaches an output.
Array<float> poisoned(int64_t size) {
  Array<float> values(size);
  std::fill_n(values.get(), size, std::numeric_limits<float>::quiet_NaN());
  return values;
}

template <class Tasks>
Array<float> scratch_of(const Tasks& tasks, const Threads& parallel) {
  return poisoned(broken ? tasks.scratch(1) - 1 : tasks.scratch(parallel.threads()));
}

void check_bits(const Case& c, const Array<float>& many, const Array<float>& alone) {
  if (std::memcmp(many.get(), alone.get(), static_cast<size_t>(many.size) * sizeof(float)) != 0)
    fail(c, "bits on one thread", 0, 0);
}

Array<float> run(const Case& c, Operands& on, const Threads& parallel) {
  Array<float> packed(packed_size(c.outputs, c.channels, c.taps_h * c.taps_w, c.tile != 0));
  const auto pack = c.tile ? kKernels.winograd.pack : kKernels.direct.pack;
  parallel(panels_of(c.outputs),
           [&](int64_t begin, int64_t end) { pack(on.weight, {begin, end}, packed.get()); });
  Array<float> y(on.numel());
  on.args.packed = packed.get(), on.args.y = y.get();
  with_tasks(on.args, [&](const auto& tasks) {
    Array<double> moments(tasks.chunks() * 2 * c.outputs);
    const Array<float> scratch = scratch_of(tasks, parallel);
    tasks.run(kKernels, scratch.get(), parallel, ChunkMoments{moments.get()});
    check_moments(c, on, y, tasks, moments);
  });
  return y;
}

void check(const Case& c) {
  Operands on(c);
  const Array<float> y = run(c, on, Threads{3});
  // Winograd's error is that of a whole tile's window, of which the image's edge may leave an output little.
  const auto window = static_cast<double>(depth_of(on.args));
  // In large ones, each pixel some outputs, others than its neighbour.
  const int64_t step = on.numel() > 40000 ? 997 : 1;
  for (int64_t i = 0; i < on.numel(); i += step) {
    double magnitude;
    const double expected = on.naive(i / c.outputs, i % c.outputs, magnitude);
    if (!(std::abs(y[i] - expected) <= 1e-5 * (magnitude + window))) fail(c, "output", y[i], expected);
  }
  check_bits(c, y, run(c, on, Threads{1}));
}

// `pack`: copies of both factors, also where those in memory would do.
Array<float> run_gradient(const Case& c, const Operands& on, const Array<float>& dz, bool pack,
                          const Threads& parallel) {
  Array<float> dweight = poisoned(on.plain.size);
  WeightGradientArgs args = {};
  args.convolution = on.args, args.dz = dz.get();
  args.convolution.gather |= pack, args.pack_dz = pack || c.outputs % kPanelOutputs != 0;
  args.dweight = dweight.get() + on.at(0, 0, 0, 0);
  args.output_stride = on.weight.output_stride, args.channel_stride = on.weight.channel_stride;
  args.row_stride = on.weight.row_stride, args.column_stride = on.weight.column_stride;
  const WeightGradientTasks tasks(args);
  tasks.run(kKernels, scratch_of(tasks, parallel).get(), parallel);
  return dweight;
}

void check_gradient(const Case& c, bool pack) {
  const Operands on(c);
  const Array<float> dz = random_floats(on.numel(), 0);
  const Array<float> dweight = run_gradient(c, on, dz, pack, Threads{3});
  // In large ones, each channel some elements, others than its neighbour.
  const int64_t taps = c.taps_h * c.taps_w, step = dweight.size > 3000 ? 97 : 1;
  for (int64_t n = 0; n < dweight.size; n += step) {
    const int64_t o = n / (c.channels * taps), channel = n / taps % c.channels, i = n % taps / c.taps_w,
                  j = n % c.taps_w;
    double magnitude;
    const double expected = on.naive_gradient(dz, o, channel, i, j, magnitude);
    const double got = dweight[on.at(o, channel, i, j)];
    // Winograd rounds all pixels in every tap, of which padding may leave one few.
    const double error = 1e-5 * (magnitude + static_cast<double>(on.pixels()));
    if (!(std::abs(got - expected) <= error)) fail(c, "gradient", got, expected);
  }
  check_bits(c, dweight, run_gradient(c, on, dz, pack, Threads{1}));
}

void check_all() {
  int64_t count = 0;
  const auto next = [&](Case c) {
    c.transposed = count & 1, c.bias = count & 2, c.residual = count & 4, c.relu = count & 8;
    ++count;
    check(c);
  };
  for (const int64_t tile : {2, 3, 4}) {
    for (const int64_t pad : {0, 1, 2}) {
      // Few tiles, which share the transformed input, and then a task's own.
      for (const auto [images, height, width] : {Image{1, 1, 3}, {2, 3, 5}, {1, 7, 6}, {3, 14, 31}}) {
        if (height + 2 * pad < 3 || width + 2 * pad < 3) continue;
        for (const auto [channels, outputs] : {Range{1, 33}, {17, 1}, {19, 70}})
          for (int64_t stride = 1; stride <= (tile == 4 ? 2 : 1); ++stride)
            next({images, channels, height, width, outputs, 3, 3, stride, pad, 1, tile});
      }
    }
  }
  // A weight beyond the caches and many tiles: blocks in several rounds share the transformed input.
  next({2, 512, 61, 62, 161, 3, 3, 1, 1, 1, 4});
  for (const auto [taps_h, taps_w] : {Range{1, 1}, {3, 3}, {5, 3}, {1, 7}}) {
    for (const auto [stride, dilation] : {Range{1, 1}, {2, 1}, {3, 2}}) {
      for (const int64_t pad : {0, 1, 2}) {
        next({2, 5, 13, 15, 35, taps_h, taps_w, stride, pad, dilation, 0});
        next({1, 33, 11, 13, 130, taps_h, taps_w, stride, pad, dilation, 0});
      }
    }
  }
  std::printf("%ld convolutions are right\n", count);
}

void check_all_gradients() {
  int64_t count = 0;
  const auto next = [&](Case c) {
    c.transposed = count & 1;
    check_gradient(c, count & 2);
    ++count;
  };
  for (const int64_t pad : {0, 1, 2}) {
    for (const auto [images, height, width] : {Image{1, 1, 3}, {2, 3, 5}, {1, 7, 6}, {3, 14, 31}}) {
      if (height + 2 * pad < 3 || width + 2 * pad < 3) continue;
      for (const auto [channels, outputs] : {Range{1, 33}, {17, 1}, {19, 70}})
        for (const int64_t stride : {1, 2})
          next({images, channels, height, width, outputs, 3, 3, stride, pad, 1, 4});
    }
  }
  for (const auto [taps_h, taps_w] : {Range{1, 1}, {3, 3}, {5, 3}, {1, 7}}) {
    for (const auto [stride, dilation] : {Range{1, 1}, {2, 1}, {3, 2}}) {
      for (const int64_t pad : {0, 1, 2}) {
        next({2, 5, 13, 15, 35, taps_h, taps_w, stride, pad, dilation, 0});
        next({1, 33, 11, 13, 130, taps_h, taps_w, stride, pad, dilation, 0});
      }
    }
  }
  // Both factors as they are in memory, and copies.
  for (int64_t i = 0; i < 4; ++i) next({2, 13, 9, 11, 64, 1, 1, 1, 0, 1, 0});
  // More chunks than parts.
  next({3, 5, 50, 49, 33, 3, 3, 1, 1, 1, 4});
  next({3, 5, 27, 29, 33, 3, 3, 1, 1, 1, 0});
  // Sums beyond a thread's cache, which all threads add to in several rounds.
  next({2, 77, 54, 50, 70, 3, 3, 1, 1, 1, 4});
  next({1, 190, 24, 23, 130, 3, 3, 1, 1, 1, 0});
  std::printf("%ld gradients are right\n", count);
}

}  // namespace
}  // namespace fused_res::cpu

int main(int argc, char** argv) {
  using namespace fused_res::cpu;
  const std::string_view name = argc > 1 ? argv[1] : "";
  broken = argc > 1;
  if (name == "convolution") {
    check({3, 19, 16, 32, 70, 3, 3, 1, 1, 1, 4});
  } else if (name == "gradient") {
    check_gradient({3, 19, 16, 32, 70, 3, 3, 1, 1, 1, 0}, true);
  } else if (name == "winograd_gradient") {
    check_gradient({3, 19, 16, 32, 70, 3, 3, 1, 1, 1, 4}, true);
  } else {
    check_all();
    check_all_gradients();
  }
}
