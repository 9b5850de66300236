// Sanitizer program for the CPU kernels of convolutions and their weight gradients (test_sanitizers.py): run
// under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer without torch, on std::thread and
// exact-size allocations. Results are compared with naive loops. With an argument, a fault is injected into
// the named kernels: scratch memory is too short and shared by all threads. The sanitizer must report it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>

#include "common/output_size.h"
#include "cpu/conv_wgrad.h"
#include "cpu/convolution.h"
#include "cpu/isa/conv_wgrad.h"
#include "cpu/isa/direct.h"
#include "cpu/isa/winograd.h"
#include "sanitize.h"

namespace fused_res::cpu {
namespace {

constexpr ConvolutionKernels kConvolution = {.direct = {direct<float>, {}, direct<bfloat16>, {}},
                                             .winograd = {winograd<float>, {}, winograd<bfloat16>, {}},
                                             .direct_wgrad = direct_wgrad,
                                             .winograd_wgrad = winograd_wgrad};
const Kernels kKernels = [] {
  Kernels kernels = {};
  kernels.convolution = &kConvolution;
  return kernels;
}();

struct Case {
  int64_t images, channels, height, width, out_channels, kernel_h, kernel_w, stride, pad, dilation, tile;
  bool transposed = false, bias = false, residual = false, relu = false, bf16 = false;
};

float widened(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
// Truncates the values to bfloat16 in place and returns them as such.
Array<bfloat16> truncated(const Array<float>& values) {
  Array<bfloat16> narrow(values.size);
  for (int64_t i = 0; i < values.size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    narrow[i] = {static_cast<uint16_t>(bits >> 16)};
    values[i] = widened(narrow[i]);
  }
  return narrow;
}

struct Image {
  int64_t images, height, width;
};

struct Operands {
  ConvolutionArgs args = {};
  Array<float> x, weight_data, bias, residual;
  Array<bfloat16> x_bf16, residual_bf16;  // the memory of the operands with Case::bf16
  WeightView weight;

  explicit Operands(const Case& c)
      : x(random_floats(c.images * c.height * c.width * c.channels, 1)),
        weight_data(random_floats(c.out_channels * c.channels * c.kernel_h * c.kernel_w, 0)),
        bias(random_floats(c.out_channels, 10)),
        residual(0),
        x_bf16(0),
        residual_bf16(0) {
    const int64_t taps = c.kernel_h * c.kernel_w;
    weight = {weight_data.get(),
              c.out_channels,
              c.channels,
              c.kernel_h,
              c.kernel_w,
              c.channels * taps,
              taps,
              c.kernel_w,
              1,
              c.stride,
              false};
    if (c.transposed) {
      weight.data += taps - 1;
      weight.row_stride = -c.kernel_w, weight.column_stride = -1;
      weight.output_stride = taps, weight.channel_stride = c.out_channels * taps;
    }
    const auto size = [&](int64_t in, int64_t taps) {
      return output_size(in, taps, c.stride, c.pad, c.dilation);
    };
    args.images = c.images, args.channels = c.channels, args.height = c.height, args.width = c.width;
    args.out_channels = c.out_channels, args.kernel_h = c.kernel_h, args.kernel_w = c.kernel_w;
    args.out_height = size(c.height, c.kernel_h), args.out_width = size(c.width, c.kernel_w);
    args.stride_h = args.stride_w = c.stride, args.pad_h = args.pad_w = c.pad;
    args.dilation_h = args.dilation_w = c.dilation;
    args.relu = c.relu, args.tile = c.tile, args.needs_im2col = taps * c.stride != 1 || c.pad != 0 || c.bf16;
    args.dtype = c.bf16 ? Dtype::kBFloat16 : Dtype::kFloat32;
    args.x = x.get();
    if (c.bf16) x_bf16 = truncated(x), args.x = x_bf16.get();
    if (c.bias) args.bias = bias.get();
    if (c.residual) {
      residual = random_floats(numel(), 0);
      args.residual = residual.get();
      if (c.bf16) residual_bf16 = truncated(residual), args.residual = residual_bf16.get();
    }
  }

  // The input pixel that an output pixel reads at tap (i, j), or null for padding.
  const float* input_at(int64_t pixel, int64_t i, int64_t j) const {
    const int64_t x = pixel % args.out_width, y = pixel / args.out_width % args.out_height;
    const int64_t image = pixel / args.out_width / args.out_height;
    const int64_t h = y * args.stride_h - args.pad_h + i * args.dilation_h;
    const int64_t w = x * args.stride_w - args.pad_w + j * args.dilation_w;
    if (h < 0 || h >= args.height || w < 0 || w >= args.width) return nullptr;
    return this->x.get() + ((image * args.height + h) * args.width + w) * args.channels;
  }
  // The offset of an element of the weight and of its gradient.
  int64_t at(int64_t o, int64_t c, int64_t i, int64_t j) const {
    return weight.data - weight_data.get() + o * weight.output_stride + c * weight.channel_stride +
           i * weight.row_stride + j * weight.column_stride;
  }

  int64_t pixels() const { return args.images * args.out_height * args.out_width; }
  int64_t numel() const { return pixels() * args.out_channels; }

  // One output in double. `magnitude`: the sum of the absolute values of its terms.
  double reference_output(int64_t pixel, int64_t o, double& magnitude) const {
    double sum = args.bias ? args.bias[o] : 0;
    if (args.residual) sum += residual[pixel * args.out_channels + o];
    magnitude = std::abs(sum);
    for (int64_t i = 0; i < args.kernel_h; ++i) {
      for (int64_t j = 0; j < args.kernel_w; ++j) {
        const float* from = input_at(pixel, i, j);
        for (int64_t c = 0; from && c < args.channels; ++c) {
          const double product = static_cast<double>(from[c]) * weight_data[at(o, c, i, j)];
          sum += product, magnitude += std::abs(product);
        }
      }
    }
    return args.relu && sum <= 0 ? 0 : sum;
  }

  // The same for one element of the weight gradient.
  double reference_dweight(const Array<float>& dz, int64_t o, int64_t c, int64_t i, int64_t j,
                           double& magnitude) const {
    double sum = 0;
    magnitude = 0;
    for (int64_t pixel = 0; pixel < pixels(); ++pixel) {
      const float* from = input_at(pixel, i, j);
      if (!from) continue;
      const double product = static_cast<double>(from[c]) * dz[pixel * args.out_channels + o];
      sum += product, magnitude += std::abs(product);
    }
    return sum;
  }
};

void fail(const Case& c, const char* what, double got, double expected) {
  std::printf(
      "mismatch: %s, %.9g instead of %.9g, in %ld x %ld x %ld x %ld to %ld, kernel %ld x %ld, stride %ld, "
      "pad "
      "%ld, dilation %ld, tile %ld\n",
      what, got, expected, c.images, c.channels, c.height, c.width, c.out_channels, c.kernel_h, c.kernel_w,
      c.stride, c.pad, c.dilation, c.tile);
  std::exit(1);
}

// Compares the chunks' partial statistics, merged here by another formula, with the moments of the output.
template <class Tasks>
void check_moments(const Case& c, const Operands& operands, const Array<float>& y, const Tasks& tasks,
                   const Array<double>& moments) {
  const int64_t out_channels = c.out_channels, pixels = operands.pixels();
  for (int64_t o = 0; o < out_channels; ++o) {
    double mean = 0, m2 = 0, exact = 0, exact_m2 = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < tasks.chunks(); ++i) {
      count += tasks.pixel_count(i);
      mean += moments[i * 2 * out_channels + o] * static_cast<double>(tasks.pixel_count(i));
    }
    if (count != pixels) fail(c, "count", static_cast<double>(count), static_cast<double>(pixels));
    mean /= static_cast<double>(count);
    for (int64_t i = 0; i < tasks.chunks(); ++i) {
      const double off = moments[i * 2 * out_channels + o] - mean;
      m2 += moments[(i * 2 + 1) * out_channels + o] + static_cast<double>(tasks.pixel_count(i)) * off * off;
    }
    for (int64_t p = 0; p < pixels; ++p) exact += y[p * out_channels + o];
    exact /= static_cast<double>(pixels);
    for (int64_t p = 0; p < pixels; ++p) exact_m2 += std::pow(y[p * out_channels + o] - exact, 2);
    if (!(std::abs(mean - exact) <= 1e-5 * (1 + std::abs(exact)))) fail(c, "mean", mean, exact);
    if (!(std::abs(m2 - exact_m2) <= 1e-4 * exact_m2 + 1e-6)) fail(c, "M2", m2, exact_m2);
  }
}

// Filled with NaN, so that a value that is read before it is written propagates to the output.
Array<float> nan_filled(int64_t size) {
  Array<float> values(size);
  std::fill_n(values.get(), size, std::numeric_limits<float>::quiet_NaN());
  return values;
}

template <class Tasks>
Array<float> scratch_of(const Tasks& tasks, const Threads& parallel) {
  return nan_filled(inject_fault ? tasks.scratch(1) / 4 - 1 : tasks.scratch(parallel.threads()) / 4);
}

void check_bits(const Case& c, const Array<float>& multi_threaded, const Array<float>& single_threaded) {
  if (std::memcmp(multi_threaded.get(), single_threaded.get(),
                  static_cast<size_t>(multi_threaded.size) * sizeof(float)) != 0)
    fail(c, "bitwise equality with one thread", 0, 0);
}

Array<float> run(const Case& c, Operands& operands, const Threads& parallel) {
  Array<float> packed(packed_size(c.out_channels, c.channels, c.kernel_h * c.kernel_w, c.tile != 0));
  const auto pack = c.tile ? kConvolution.winograd[0].pack : kConvolution.direct[0].pack;
  parallel(num_panels(c.out_channels),
           [&](int64_t begin, int64_t end) { pack(operands.weight, {begin, end}, packed.get()); });
  Array<float> y(operands.numel());
  Array<bfloat16> y_bf16(c.bf16 ? y.size : 0);
  operands.args.packed = packed.get(), operands.args.y = c.bf16 ? static_cast<void*>(y_bf16.get()) : y.get();
  dispatch_tasks(kKernels, operands.args, [&](const auto& tasks) {
    Array<double> moments(tasks.chunks() * 2 * c.out_channels);
    const Array<float> scratch = scratch_of(tasks, parallel);
    tasks.run(kKernels, scratch.get(), parallel, ChunkMoments{c.bf16 ? nullptr : moments.get()});
    if (!c.bf16) check_moments(c, operands, y, tasks, moments);
  });
  for (int64_t i = 0; i < y_bf16.size; ++i) y[i] = widened(y_bf16[i]);
  return y;
}

void check(const Case& c) {
  Operands operands(c);
  const Array<float> y = run(c, operands, Threads{3});
  // Winograd's error depends on the whole input tile, of which an output at the image's edge may use only a
  // small part.
  const auto field = static_cast<double>(gemm_k(operands.args));
  // Large outputs are sampled: a few channels of each pixel, different ones for neighboring pixels.
  const int64_t step = operands.numel() > 40000 ? 997 : 1;
  for (int64_t i = 0; i < operands.numel(); i += step) {
    double magnitude;
    const double expected = operands.reference_output(i / c.out_channels, i % c.out_channels, magnitude);
    const double rounding = c.bf16 ? std::abs(expected) / 256 : 0;  // half a unit in the last place
    if (!(std::abs(y[i] - expected) <= 1e-5 * (magnitude + field) + rounding))
      fail(c, "output", y[i], expected);
  }
  check_bits(c, y, run(c, operands, Threads{1}));
}

class NoFusion final : public GradientFusion {
 public:
  std::array<MemoryRange, kMaxNextRanges> operands(Range) const override { return {}; }
};

// `pack`: pack both operands, even where the kernels could read them in place.
Array<float> run_gradient(const Case& c, const Operands& operands, const Array<float>& dz, bool pack,
                          const Threads& parallel) {
  Array<float> dweight = nan_filled(operands.weight_data.size);
  WeightGradientArgs args = {};
  args.convolution = operands.args, args.dz = dz.get();
  args.convolution.needs_im2col |= pack, args.pack_dz = pack || c.out_channels % kPanelWidth != 0;
  args.dweight = dweight.get() + operands.at(0, 0, 0, 0);
  args.output_stride = operands.weight.output_stride, args.channel_stride = operands.weight.channel_stride;
  args.row_stride = operands.weight.row_stride, args.column_stride = operands.weight.column_stride;
  const WeightGradientTasks tasks(args);
  const NoFusion fusion;
  const Array<float> scratch = nan_filled(inject_fault ? tasks.scratch(1, fusion) / 4 - 1
                                                       : tasks.scratch(parallel.threads(), fusion) / 4);
  tasks.run(kConvolution, reinterpret_cast<char*>(scratch.get()), parallel, fusion);
  return dweight;
}

void check_gradient(const Case& c, bool pack) {
  const Operands operands(c);
  const Array<float> dz = random_floats(operands.numel(), 0);
  const Array<float> dweight = run_gradient(c, operands, dz, pack, Threads{3});
  // Large gradients are sampled: a few elements of each channel, different ones for neighboring channels.
  const int64_t taps = c.kernel_h * c.kernel_w, step = dweight.size > 3000 ? 97 : 1;
  for (int64_t n = 0; n < dweight.size; n += step) {
    const int64_t o = n / (c.channels * taps), channel = n / taps % c.channels, i = n % taps / c.kernel_w,
                  j = n % c.kernel_w;
    double magnitude;
    const double expected = operands.reference_dweight(dz, o, channel, i, j, magnitude);
    const double got = dweight[operands.at(o, channel, i, j)];
    // In Winograd, the rounding errors of all pixels affect every tap, of which padding may leave only a few
    // terms.
    const double error = 1e-5 * (magnitude + static_cast<double>(operands.pixels()));
    if (!(std::abs(got - expected) <= error)) fail(c, "gradient", got, expected);
  }
  check_bits(c, dweight, run_gradient(c, operands, dz, pack, Threads{1}));
}

void check_all() {
  int64_t count = 0;
  const auto next = [&](Case c) {
    c.transposed = count & 1, c.bias = count & 2, c.residual = count & 4, c.relu = count & 8;
    c.bf16 = count % 3 == 0;
    ++count;
    check(c);
  };
  for (const int64_t tile : {2, 3, 4}) {
    for (const int64_t pad : {0, 1, 2}) {
      // Few tiles, for the staged schedule, then many, for the fused one.
      for (const auto [images, height, width] : {Image{1, 1, 3}, {2, 3, 5}, {1, 7, 6}, {3, 14, 31}}) {
        if (height + 2 * pad < 3 || width + 2 * pad < 3) continue;
        for (const auto [channels, out_channels] : {Range{1, 33}, {17, 1}, {19, 70}})
          for (int64_t stride = 1; stride <= (tile == 4 ? 2 : 1); ++stride)
            next({images, channels, height, width, out_channels, 3, 3, stride, pad, 1, tile});
      }
    }
  }
  // A transformed filter that exceeds the caches and multi_threaded tiles: the staged schedule with several
  // stages.
  next({2, 512, 61, 62, 161, 3, 3, 1, 1, 1, 4});
  for (const auto [kernel_h, kernel_w] : {Range{1, 1}, {3, 3}, {5, 3}, {1, 7}}) {
    for (const auto [stride, dilation] : {Range{1, 1}, {2, 1}, {3, 2}}) {
      for (const int64_t pad : {0, 1, 2}) {
        next({2, 5, 13, 15, 35, kernel_h, kernel_w, stride, pad, dilation, 0});
        next({1, 33, 11, 13, 130, kernel_h, kernel_w, stride, pad, dilation, 0});
      }
    }
  }
  std::printf("%ld convolutions are correct\n", count);
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
      for (const auto [channels, out_channels] : {Range{1, 33}, {17, 1}, {19, 70}})
        for (const int64_t stride : {1, 2})
          next({images, channels, height, width, out_channels, 3, 3, stride, pad, 1, 4});
    }
  }
  for (const auto [kernel_h, kernel_w] : {Range{1, 1}, {3, 3}, {5, 3}, {1, 7}}) {
    for (const auto [stride, dilation] : {Range{1, 1}, {2, 1}, {3, 2}}) {
      for (const int64_t pad : {0, 1, 2}) {
        next({2, 5, 13, 15, 35, kernel_h, kernel_w, stride, pad, dilation, 0});
        next({1, 33, 11, 13, 130, kernel_h, kernel_w, stride, pad, dilation, 0});
      }
    }
  }
  // Both operands read in place, and packed.
  for (int64_t i = 0; i < 4; ++i) next({2, 13, 9, 11, 64, 1, 1, 1, 0, 1, 0});
  // Split-K with more chunks than parts.
  next({3, 5, 50, 49, 33, 3, 3, 1, 1, 1, 4});
  next({3, 5, 27, 29, 33, 3, 3, 1, 1, 1, 0});
  // Accumulators that exceed a core's cache: the staged schedule with several stages.
  next({2, 77, 54, 50, 70, 3, 3, 1, 1, 1, 4});
  next({1, 190, 24, 23, 130, 3, 3, 1, 1, 1, 0});
  std::printf("%ld weight gradients are correct\n", count);
}

}  // namespace
}  // namespace fused_res::cpu

int main(int argc, char** argv) {
  using namespace fused_res::cpu;
  const std::string_view name = argc > 1 ? argv[1] : "";
  inject_fault = argc > 1;
  if (name == "convolution") {
    check({3, 19, 16, 32, 70, 3, 3, 1, 1, 1, 4});
  } else if (name == "direct_wgrad") {
    check_gradient({3, 19, 16, 32, 70, 3, 3, 1, 1, 1, 0}, true);
  } else if (name == "winograd_wgrad") {
    check_gradient({3, 19, 16, 32, 70, 3, 3, 1, 1, 1, 4}, true);
  } else {
    check_all();
    check_all_gradients();
  }
}
