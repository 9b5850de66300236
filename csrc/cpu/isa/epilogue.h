// What a convolution does with its sums before they are written: bias, residual, ReLU, statistics.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// f(part) for a vector of the first n elements.
template <class F>
inline void with_part(int64_t n, F f) {
  if (n >= Vec<float>::lanes) {
    f(Whole{});
  } else {
    f(Partial{static_cast<int>(n)});
  }
}

// A line written in two pieces, with other lines between, would go to memory twice.
inline bool streams(const ConvolutionArgs& args) {
  return args.stream && Vec<float>::lanes * sizeof(float) == 64;
}

// A vector of channels, from c on, of output pixels.
class Epilogue {
 public:
  template <class Part>
  Epilogue(const ConvolutionArgs& args, Part part, int64_t c)
      : outputs_(args.outputs),
        y_(args.y + c),
        residual_(args.residual ? args.residual + c : nullptr),
        bias_(args.bias ? part.load(args.bias + c) : Vec<float>::zero()),
        relu_(args.relu),
        stream_(streams(args)) {}

  // Writes, and returns what it has written.
  template <class Part>
  Vec<float> finish(Part part, Vec<float> value, int64_t pixel) const {
    value = value + bias_;
    if (residual_) value = value + part.load(residual_ + pixel * outputs_);
    if (relu_) value = keep(not_less_equal_zero(value), value);
    put(part, y_ + pixel * outputs_, value, stream_);
    return value;
  }

 private:
  int64_t outputs_;
  float* y_;
  const float* residual_;
  Vec<float> bias_;
  bool relu_, stream_;
};

// Asks for the memory that the epilogue of an output pixel's kColumns channels will touch: it comes while the
// products are summed.
inline void epilogue_prefetch(const ConvolutionArgs& args, int64_t pixel, int64_t c) {
  const int64_t at = pixel * args.outputs + c;
  for (int64_t line = 0; line < 32; line += 16) {
    if (args.residual) prefetch(args.residual + at + line);
    if (!streams(args)) prefetch_to_write(args.y + at + line);
  }
}

// Mean and squared deviations of one vector's lanes, from sums about the mean of the first few values: sums
// about zero would lose the deviation where it is small beside the mean.
class Moments {
 public:
  // A tile's or a register block's values: summed by themselves first, which keeps the rounding small.
  void add(const Vec<float>* values, int64_t n) {
    Vec<float> sum = Vec<float>::zero(), squares = Vec<float>::zero();
    if (count_ == 0) {
      for (int64_t i = 0; i < n; ++i) sum = sum + values[i];
      shift_ = sum * Vec<float>::all(1 / static_cast<float>(n));
      sum = Vec<float>::zero();
    }
    for (int64_t i = 0; i < n; ++i) {
      const Vec<float> difference = values[i] - shift_;
      sum = sum + difference;
      squares = fma(difference, difference, squares);
    }
    count_ += n;
    sum_ = sum_ + sum;
    squares_ = squares_ + squares;
  }

  template <class Part>
  void store(Part part, double* mean, double* m2) const {
    constexpr int kLanes = Vec<float>::lanes;
    float shift[kLanes], sum[kLanes], squares[kLanes];
    cpu::store(shift, shift_);
    cpu::store(sum, sum_);
    cpu::store(squares, squares_);
    const double count = static_cast<double>(count_);
    for (int i = 0; i < lanes(part); ++i) {
      const double off = sum[i] / count;
      mean[i] = shift[i] + off;
      m2[i] = squares[i] - sum[i] * off;
      if (m2[i] < 0) m2[i] = 0;
    }
  }

 private:
  static int lanes(Whole) { return Vec<float>::lanes; }
  static int lanes(Partial part) { return part.n; }

  int64_t count_ = 0;
  Vec<float> shift_ = Vec<float>::zero(), sum_ = Vec<float>::zero(), squares_ = Vec<float>::zero();
};

}  // namespace
}  // namespace fused_res::cpu
