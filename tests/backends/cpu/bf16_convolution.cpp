// Test of the convolutions with bfloat16 products and of their weight gradients, without torch, on
// std::thread and exact-size memory. Every kernel table of isa/bf16_kernels.cpp that is linked is compared
// with double precision, and with itself on one thread. Under the emulator (FUSED_RES_EMULATE_AMX), AMX must
// compute the same bits as its plain C++.
//
// test_amx.py runs the AMX kernels' machine code under the emulator, with guard pages around all memory;
// test_sanitizers.py runs the plain version under sanitizers. With the argument "input", "scratch" or
// "output", that memory is too short: the guard page or the sanitizer must detect it.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>

#include "common/output_size.h"
#include "cpu/conv_wgrad.h"
#include "sanitize.h"
#if defined(FUSED_RES_EMULATE_AMX)
#include "amx_emulator.h"
#endif

namespace fused_res::cpu {

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
template <class T>
using Memory = Array<T>;
bool guard_before = false;
constexpr int64_t kCaseStep = 7;  // sanitizers run a part of the cases
#else
// Whether allocations begin after, or end before, a page without access rights. It also detects accesses of
// code without instrumentation: of tile loads, and of masked vector loads and stores.
bool guard_before = false;

template <class T>
struct Memory {
  int64_t size;

  explicit Memory(int64_t n) : size(n) {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T)), pages = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = pages + 2 * kPage;
    first_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(first_ + kPage, pages, PROT_READ | PROT_WRITE);
    data_ = reinterpret_cast<T*>(first_ + kPage + (guard_before ? 0 : pages - bytes));
  }
  Memory(Memory&& other) noexcept : size(0) { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(size, other.size), std::swap(mapped_, other.mapped_);
    std::swap(first_, other.first_), std::swap(data_, other.data_);
    return *this;
  }
  ~Memory() {
    if (first_) munmap(first_, mapped_);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr int64_t kPage = 4096;
  int64_t mapped_ = 0;
  char* first_ = nullptr;
  T* data_ = nullptr;
};
constexpr int64_t kCaseStep = 1;
#endif

// The gradients of a part of the cases under the emulator, which takes microseconds for every instruction.
#if defined(FUSED_RES_EMULATE_AMX)
constexpr int64_t kGradientStep = 4;
#else
constexpr int64_t kGradientStep = 1;
#endif

std::string_view fault;  // the memory that is too short
#if defined(__SANITIZE_THREAD__)
constexpr int64_t kScratchDivisor =
    1;  // the race is found; an access far outside would end the program first
#else
constexpr int64_t kScratchDivisor = 4;
#endif

struct Case {
  int64_t images, channels, height, width, out_channels;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation = 1;
  bool bias = false, residual = false, relu = false, stream = false;
  bool any_values = false;  // operands with NaN, infinities, denormals and values that overflow
};

float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Random bfloat16 numbers of magnitudes from 2^-4 to 4, or one in 256 of any bits.
Memory<uint16_t> random_bf16(int64_t n, bool any_values) {
  Memory<uint16_t> values(n);
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525 + 1013904223;
    const bool any = any_values && (seed >> 8 & 0xFF) == 0;
    values[i] =
        static_cast<uint16_t>(any ? seed >> 16 : (seed >> 16 & 0x807F) | (123 + (seed >> 8) % 6) << 7);
  }
  return values;
}

struct Operands {
  ConvolutionArgs args = {};
  Memory<uint16_t> x, residual, weight;  // weight: [out_channels][kernel_h][kernel_w][channels]
  Memory<float> bias;

  explicit Operands(const Case& c)
      : x(random_bf16(c.images * c.height * c.width * c.channels, c.any_values)),
        residual(0),
        weight(random_bf16(c.out_channels * c.channels * c.kernel_h * c.kernel_w, c.any_values)),
        bias(c.out_channels) {
    const Memory<uint16_t> narrow_bias = random_bf16(bias.size, false);
    for (int64_t i = 0; i < bias.size; ++i) bias[i] = widened(narrow_bias[i]) * 1.001f;
    args.images = c.images, args.channels = c.channels, args.height = c.height, args.width = c.width;
    args.out_channels = c.out_channels, args.kernel_h = c.kernel_h, args.kernel_w = c.kernel_w;
    args.out_height = output_size(c.height, c.kernel_h, c.stride_h, c.pad_h, c.dilation);
    args.out_width = output_size(c.width, c.kernel_w, c.stride_w, c.pad_w, c.dilation);
    args.stride_h = c.stride_h, args.stride_w = c.stride_w, args.pad_h = c.pad_h, args.pad_w = c.pad_w;
    args.dilation_h = args.dilation_w = c.dilation;
    args.relu = c.relu, args.stream = c.stream, args.bf16_products = true;
    if (fault == "input") x = random_bf16(x.size - c.channels, false);
    args.x = x.get();
    if (c.bias) args.bias = bias.get();
    if (c.residual) {
      residual = random_bf16(pixels() * c.out_channels, c.any_values);
      args.residual = residual.get();
    }
  }

  int64_t pixels() const { return args.images * args.out_height * args.out_width; }

  // One output in double. `magnitude`: the sum of the absolute values of its terms.
  double reference(int64_t pixel, int64_t o, double& magnitude) const {
    const int64_t out_x = pixel % args.out_width, out_y = pixel / args.out_width % args.out_height;
    const int64_t image = pixel / args.out_width / args.out_height;
    double sum = 0;
    magnitude = 0;
    const auto add = [&](double term) { sum += term, magnitude += std::abs(term); };
    if (args.bias) add(args.bias[o]);
    if (args.residual) add(widened(residual[pixel * args.out_channels + o]));
    for (int64_t i = 0; i < args.kernel_h; ++i) {
      for (int64_t j = 0; j < args.kernel_w; ++j) {
        const int64_t h = out_y * args.stride_h - args.pad_h + i * args.dilation_h;
        const int64_t w = out_x * args.stride_w - args.pad_w + j * args.dilation_w;
        if (h < 0 || h >= args.height || w < 0 || w >= args.width) continue;
        const uint16_t* from = x.get() + ((image * args.height + h) * args.width + w) * args.channels;
        const uint16_t* filter = weight.get() + ((o * args.kernel_h + i) * args.kernel_w + j) * args.channels;
        for (int64_t c = 0; c < args.channels; ++c)
          add(static_cast<double>(widened(from[c])) * widened(filter[c]));
      }
    }
    return args.relu && sum <= 0 ? 0 : sum;
  }
};

void fail(const Case& c, const char* what, double got, double expected) {
  std::printf(
      "mismatch: %s, %.9g instead of %.9g, in %ld x %ld x %ld x %ld to %ld, kernel %ld x %ld, stride %ld x "
      "%ld, "
      "pad %ld x %ld, dilation %ld, bias %d, residual %d, relu %d, stream %d\n",
      what, got, expected, c.images, c.channels, c.height, c.width, c.out_channels, c.kernel_h, c.kernel_w,
      c.stride_h, c.stride_w, c.pad_h, c.pad_w, c.dilation, c.bias, c.residual, c.relu, c.stream);
  std::exit(1);
}

// The tables that are linked; the first is the reference of the AMX machine code.
constexpr const Bf16ConvolutionKernels* kTables[] = {
    &bf16_kernels_amx_emulated,
#if defined(FUSED_RES_TEST_AMX)
    &bf16_kernels_amx,
#endif
#if defined(FUSED_RES_TEST_AVX512_BF16)
    &bf16_kernels_avx512_bf16,
#endif
};

Memory<uint16_t> run(Operands& operands, const Bf16ConvolutionKernels& k, const Threads& parallel) {
  ConvolutionArgs& args = operands.args;
  const int64_t panels = num_panels(args.out_channels);
  Memory<uint16_t> packed(
      packed_bf16_size(args.out_channels, args.channels, args.kernel_h, args.kernel_w, k.tiles));
  const Bf16WeightView view = {operands.weight.get(),
                               Dtype::kBFloat16,
                               args.out_channels,
                               args.channels,
                               args.kernel_h,
                               args.kernel_w,
                               false,
                               {},
                               {}};
  parallel(panels, [&](int64_t begin, int64_t end) { k.pack(view, {begin, end}, packed.get()); });
  Memory<uint16_t> y(operands.pixels() * args.out_channels - (fault == "output" ? 1 : 0));
  constexpr uint16_t kNan = 0x7FC1;
  std::fill_n(y.get(), y.size, kNan);
  args.packed = packed.get(), args.y = y.get();
  Kernels kernels = {};
  kernels.bf16_convolution = &k;
  const DirectBf16Tasks tasks(args, k.tiles);
  Memory<char> scratch(fault == "scratch" ? tasks.scratch(1) / kScratchDivisor
                                          : tasks.scratch(parallel.threads()));
  std::memset(scratch.get(), 0xFF, static_cast<size_t>(scratch.size));  // NaN
  tasks.run(kernels, scratch.get(), parallel, {});
  return y;
}

void check_error(const Case& c, const Operands& operands, const Memory<uint16_t>& y) {
  const auto k = static_cast<double>(gemm_k(operands.args));
  for (int64_t i = 0; i < y.size; ++i) {
    double magnitude;
    const double expected = operands.reference(i / c.out_channels, i % c.out_channels, magnitude);
    // Half an ulp of bfloat16 for the result, and of float for each of k products and four more additions.
    const double bound = 0x1p-8 * std::abs(expected) + (k + 4) * 0x1p-24 * magnitude;
    if (!(std::abs(widened(y[i]) - expected) <= 1.01 * bound)) fail(c, "output", widened(y[i]), expected);
  }
}

void check_bits(const Case& c, const char* what, const Memory<uint16_t>& got,
                const Memory<uint16_t>& expected) {
  for (int64_t i = 0; i < got.size; ++i) {
    const float a = widened(got[i]), b = widened(expected[i]);
    if (got[i] != expected[i] && !(std::isnan(a) && std::isnan(b))) fail(c, what, a, b);
  }
}

// The operands of a weight gradient as they are, or copied chunk by chunk, as the passes of norms write them.
class TestFusion final : public GradientFusion {
 public:
  TestFusion(const ConvolutionArgs& shape, const uint16_t* dz, bool copies)
      : shape_(shape), dz_(dz), copies_(copies) {}
  bool computes_input() const override { return copies_; }
  void input(Range pixels, void* to) const override {
    copy(static_cast<const uint16_t*>(shape_.x), pixels, shape_.channels, to);
  }
  bool computes_grad_output() const override { return copies_; }
  void grad_output(Range pixels, void* to) const override { copy(dz_, pixels, shape_.out_channels, to); }
  std::array<MemoryRange, kMaxNextRanges> operands(Range) const override { return {}; }

 private:
  static void copy(const uint16_t* from, Range pixels, int64_t channels, void* to) {
    std::memcpy(to, from + pixels.begin * channels,
                static_cast<size_t>((pixels.end - pixels.begin) * channels) * sizeof(uint16_t));
  }

  const ConvolutionArgs& shape_;
  const uint16_t* dz_;
  bool copies_;
};

// The weight gradient, [out_channels][kernel_h][kernel_w][channels].
Memory<float> run_gradient(const Operands& operands, const Memory<uint16_t>& dz,
                           const Bf16ConvolutionKernels& k, const Threads& parallel, bool copies) {
  const ConvolutionArgs& shape = operands.args;
  Memory<float> dweight(operands.weight.size - (fault == "output" ? 1 : 0));
  std::fill_n(dweight.get(), dweight.size, NAN);
  WeightGradientArgs args = {};
  args.convolution = shape, args.dz = dz.get(), args.dweight = dweight.get();
  args.channel_stride = 1, args.column_stride = shape.channels;
  args.row_stride = shape.kernel_w * shape.channels, args.output_stride = shape.kernel_h * args.row_stride;
  const WeightGradientBf16Tasks tasks(args, k.tiles);
  const TestFusion fusion(shape, dz.get(), copies);
  Memory<char> scratch(fault == "scratch" ? tasks.scratch(1, fusion) / kScratchDivisor
                                          : tasks.scratch(parallel.threads(), fusion));
  std::memset(scratch.get(), 0xFF, static_cast<size_t>(scratch.size));  // NaN
  tasks.run(k, scratch.get(), parallel, fusion);
  return dweight;
}

void check_gradient(const Case& c) {
  const Operands operands(c);
  const ConvolutionArgs& args = operands.args;
  if (operands.pixels() == 0) return;
  const Memory<uint16_t> dz = random_bf16(operands.pixels() * c.out_channels, false);
  const Memory<float> plain = run_gradient(operands, dz, *kTables[0], Threads{3}, false);
  for (const Bf16ConvolutionKernels* k : kTables) {
    const Memory<float> dweight = run_gradient(operands, dz, *k, Threads{1}, false),
                        again = run_gradient(operands, dz, *k, Threads{3}, true);
    for (int64_t i = 0; i < dweight.size; ++i) {
      if (dweight[i] != again[i])
        fail(c, "bitwise equality of gradients with three threads and copied operands", again[i], dweight[i]);
#if defined(FUSED_RES_EMULATE_AMX)
      if (k == &bf16_kernels_amx && dweight[i] != plain[i])
        fail(c, "bitwise equality of gradients of AMX and plain C++", dweight[i], plain[i]);
#endif
      const int64_t channel = i % c.channels, column = i / c.channels % c.kernel_w,
                    row = i / c.channels / c.kernel_w % c.kernel_h,
                    o = i / c.channels / c.kernel_w / c.kernel_h;
      double expected = 0, magnitude = 0;
      for (int64_t pixel = 0; pixel < operands.pixels(); ++pixel) {
        const int64_t out_x = pixel % args.out_width, out_y = pixel / args.out_width % args.out_height,
                      image = pixel / args.out_width / args.out_height;
        const int64_t y = out_y * c.stride_h - c.pad_h + row * c.dilation,
                      x = out_x * c.stride_w - c.pad_w + column * c.dilation;
        if (y < 0 || y >= c.height || x < 0 || x >= c.width) continue;
        const double term =
            static_cast<double>(widened(dz[pixel * c.out_channels + o])) *
            widened(operands.x[((image * c.height + y) * c.width + x) * c.channels + channel]);
        expected += term, magnitude += std::abs(term);
      }
      const double bound = (static_cast<double>(operands.pixels()) + 4) * 0x1p-24 * magnitude;
      if (!(std::abs(dweight[i] - expected) <= bound)) fail(c, "gradient", dweight[i], expected);
    }
  }
}

void check(const Case& c) {
  Operands operands(c);
  if (operands.pixels() == 0) return;
  const Memory<uint16_t> plain = run(operands, *kTables[0], Threads{3});
  for (const Bf16ConvolutionKernels* k : kTables) {
#if defined(FUSED_RES_EMULATE_AMX)
    amx_emulator_reset();
#endif
    const Memory<uint16_t> y = run(operands, *k, Threads{1});
    if (!c.any_values) check_error(c, operands, y);
    check_bits(c, "bitwise equality with three threads", run(operands, *k, Threads{3}), y);
#if defined(FUSED_RES_EMULATE_AMX)
    const bool machine_code = k == &bf16_kernels_amx;
    if (machine_code) check_bits(c, "bitwise equality of AMX and plain C++", y, plain);
    const int64_t products = amx_emulator_executed(kTdpbf16ps),
                  configurations = amx_emulator_executed(kLdtilecfg);
    if ((products > 0) != machine_code || (configurations > 0) != machine_code)
      fail(c, "number of AMX instructions", static_cast<double>(products), machine_code);
    if (amx_emulator_executed(kTilerelease) != configurations || amx_emulator_threads_with_tiles())
      fail(c, "threads with tiles", static_cast<double>(amx_emulator_threads_with_tiles()), 0);
#endif
  }
}

void check_dot_loops() {
  for (const Bf16ConvolutionKernels* k : kTables) {
    float values[kFmaValues] = {};
    const int64_t flops = k->dot_loop(3, values);
    if (flops <= 0) fail({}, "operations of dot_loop", static_cast<double>(flops), 1);
#if defined(FUSED_RES_EMULATE_AMX)
    const int64_t products = amx_emulator_executed(kTdpbf16ps);
    if (k == &bf16_kernels_amx && (products * 2 * 16 * 16 * 32 != flops || amx_emulator_threads_with_tiles()))
      fail({}, "instructions of dot_loop", static_cast<double>(products), 1);
#endif
  }
}

void check_all() {
  int64_t count = 0, checked = 0;
  const auto next = [&](Case c) {
    if (count++ % kCaseStep) return;
    c.bias = count & 1, c.residual = count & 2, c.relu = count & 4;
    c.stream = count % 3 == 0 && c.out_channels % 32 == 0;
    c.any_values = count % 5 == 0;
    guard_before = count % 7 > 3;
    check(c);
    c.any_values = false;
    if (checked % kGradientStep == 0) check_gradient(c);
    ++checked;
  };
  // 1x1: in place and, with a channel tail or few pixels, im2col.
  for (const int64_t channels : {32, 96, 1, 33}) {
    for (const int64_t out_channels : {1, 32, 50, 64}) {
      next({.images = 2, .channels = channels, .height = 5, .width = 7, .out_channels = out_channels});
      next({.images = 1, .channels = channels, .height = 3, .width = 5, .out_channels = out_channels});
    }
  }
  // Bands and im2col. Channels rotate through the other combinations.
  constexpr Range kChannels[] = {{5, 33}, {32, 35}, {64, 64}, {32, 8}};
  for (const auto [kernel_h, kernel_w] : {Range{3, 3}, {5, 3}, {1, 7}, {3, 1}, {1, 1}}) {
    for (const auto [stride_h, stride_w] : {Range{1, 1}, {2, 2}, {1, 2}}) {
      for (const auto [pad, dilation] : {Range{0, 1}, {1, 1}, {2, 2}, {0, 2}, {3, 1}}) {
        const auto [channels, out_channels] = kChannels[count % 4];
        next({.images = 2,
              .channels = channels,
              .height = 9,
              .width = 12,
              .out_channels = out_channels,
              .kernel_h = kernel_h,
              .kernel_w = kernel_w,
              .stride_h = stride_h,
              .stride_w = stride_w,
              .pad_h = pad,
              .pad_w = pad / 2,
              .dilation = dilation});
      }
    }
  }
  // Output lines of every alignment to the blocks of 32 pixels, with one to four columns of padding after
  // them.
  for (const int64_t width : {30, 31, 32, 63, 64, 65}) {
    for (const int64_t kernel_w : {2, 3, 5}) {
      next({.images = 1,
            .channels = 32,
            .height = 3,
            .width = width,
            .out_channels = 8,
            .kernel_h = 1,
            .kernel_w = kernel_w,
            .pad_w = kernel_w / 2});
    }
  }
  // Several chunks of pixels.
  for (const auto [channels, taps] : {Range{32, 1}, {32, 3}, {5, 3}}) {
    next({.images = 3,
          .channels = channels,
          .height = 21,
          .width = 24,
          .out_channels = 33,
          .kernel_h = taps,
          .kernel_w = taps,
          .pad_h = taps / 2,
          .pad_w = taps / 2});
  }
  // Few channels: bands whose blocks of K are rows of the filter.
  for (const int64_t channels : {1, 3, 4}) {
    for (const auto [kernel_w, stride_w] : {Range{1, 1}, {3, 2}, {7, 1}, {7, 2}, {8, 3}}) {
      for (const int64_t pad_w : {0, 3, 9}) {
        next({.images = 2,
              .channels = channels,
              .height = 12,
              .width = 17,
              .out_channels = 40,
              .kernel_h = 3,
              .kernel_w = kernel_w,
              .stride_h = 3 - stride_w % 2,
              .stride_w = stride_w,
              .pad_h = 2,
              .pad_w = pad_w});
      }
    }
  }
  // A stem.
  next({.images = 1,
        .channels = 3,
        .height = 23,
        .width = 21,
        .out_channels = 64,
        .kernel_h = 7,
        .kernel_w = 7,
        .stride_h = 2,
        .stride_w = 2,
        .pad_h = 3,
        .pad_w = 3});
  std::printf("%ld convolutions are correct\n", checked);
}

}  // namespace
}  // namespace fused_res::cpu

int main(int argc, char** argv) {
  using namespace fused_res::cpu;
#if defined(FUSED_RES_EMULATE_AMX)
  amx_emulator_install();
#elif defined(FUSED_RES_TEST_AMX)
  syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif
  if (argc == 1) {
    check_dot_loops();
    check_all();
    return 0;
  }
  fault = argv[1];
  inject_fault = fault == "scratch";
  if (fault == "scratch") {
    check({.images = 3,
           .channels = 19,
           .height = 16,
           .width = 32,
           .out_channels = 70,
           .kernel_h = 3,
           .kernel_w = 3,
           .pad_h = 1,
           .pad_w = 1});
  } else {
    check({.images = 1, .channels = 32, .height = 8, .width = 8, .out_channels = 33});
  }
}
