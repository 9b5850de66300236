// Epilogue of the convolution kernels, applied to the accumulators before they are stored: bias, residual
// add, ReLU, and partial batch statistics of the output.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Calls f(FullVector{}), or f(TailVector) if fewer than a vector of elements remain.
template <class F>
inline void dispatch_tail(int64_t n, F f) {
  if (n >= Vec<float>::lanes) {
    f(FullVector{});
  } else {
    f(TailVector{static_cast<int>(n)});
  }
}

// Streaming stores only with vectors of a full cache line (AVX-512, float): a line written in two halves,
// with stores to other lines between them, would go to memory twice.
template <class T>
inline bool streaming_enabled(const ConvolutionArgs& args) {
  return args.stream && Vec<float>::lanes * sizeof(T) == 64;
}

// The epilogue for one vector of output channels, starting at channel c.
template <class T>
class Epilogue {
 public:
  template <class Part>
  Epilogue(const ConvolutionArgs& args, Part part, int64_t c)
      : out_channels_(args.out_channels),
        y_(static_cast<T*>(args.y) + c),
        residual_(args.residual ? static_cast<const T*>(args.residual) + c : nullptr),
        bias_(args.bias ? part.load(args.bias + c) : Vec<float>::zero()),
        relu_(args.relu),
        stream_(streaming_enabled<T>(args)) {}

  // Applies the epilogue to the accumulators of an output pixel, stores the result and returns it.
  template <class Part>
  Vec<float> apply(Part part, Vec<float> value, int64_t pixel) const {
    value = value + bias_;
    if (residual_) value = value + part.load(residual_ + pixel * out_channels_);
    if (relu_) value = maskz(not_less_equal_zero(value), value);
    store_or_stream(part, y_ + pixel * out_channels_, value, stream_);
    return value;
  }

 private:
  int64_t out_channels_;
  T* y_;
  const T* residual_;
  Vec<float> bias_;
  bool relu_, stream_;
};

// Prefetch the epilogue's operands for kNr channels of an output pixel so that their loads overlap the GEMM
// main loop.
template <class T>
inline void prefetch_epilogue(const ConvolutionArgs& args, int64_t pixel, int64_t c) {
  const int64_t at = pixel * args.out_channels + c;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t line = 0; line < 32; line += kLine) {
    if (args.residual) prefetch(static_cast<const T*>(args.residual) + at + line);
    if (!streaming_enabled<T>(args)) prefetch_to_write(static_cast<T*>(args.y) + at + line);
  }
}

// Mean and M2 = sum (x - mean)^2 of every lane, from sums of x - pivot and (x - pivot)^2 where the pivot is
// the mean of the first few values. Sums of x and x^2 would lose M2 to cancellation where the deviation is
// small against the mean.
class MomentAccumulator {
 public:
  // Adds the n values of a tile or a register block. They are summed on their own first, which keeps the
  // rounding error small.
  void add(const Vec<float>* values, int64_t n) {
    Vec<float> sum = Vec<float>::zero(), squares = Vec<float>::zero();
    if (count_ == 0) {
      for (int64_t i = 0; i < n; ++i) sum = sum + values[i];
      pivot_ = sum * Vec<float>::broadcast(1 / static_cast<float>(n));
      sum = Vec<float>::zero();
    }
    for (int64_t i = 0; i < n; ++i) {
      const Vec<float> difference = values[i] - pivot_;
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
    float pivot[kLanes], sum[kLanes], squares[kLanes];
    cpu::store(pivot, pivot_);
    cpu::store(sum, sum_);
    cpu::store(squares, squares_);
    const double count = static_cast<double>(count_);
    for (int i = 0; i < lanes(part); ++i) {
      const double offset = sum[i] / count;
      mean[i] = pivot[i] + offset;
      m2[i] = squares[i] - sum[i] * offset;
      if (m2[i] < 0) m2[i] = 0;
    }
  }

 private:
  static int lanes(FullVector) { return Vec<float>::lanes; }
  static int lanes(TailVector part) { return part.n; }

  int64_t count_ = 0;
  Vec<float> pivot_ = Vec<float>::zero(), sum_ = Vec<float>::zero(), squares_ = Vec<float>::zero();
};

}  // namespace
}  // namespace fused_res::cpu
