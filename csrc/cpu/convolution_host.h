// What the operators around convolutions share on the host: memory, threads, and the geometry of one layer.
#pragma once

#include <atomic>

#include "common/output_size.h"
#include "cpu/convolution.h"
#include "cpu/isa.h"
#include "cpu/tensor.h"

namespace fused_res::cpu {
namespace {

inline const ConvolutionKernels& convolution_kernels() {
  const ConvolutionKernels* found = kernels().convolution;
  TORCH_CHECK(found, "this instruction set, ", kernels().name, ", has no convolution kernels");
  return *found;
}

inline const float* floats(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat && tensor.is_cpu(), name,
                   ": expected float32 on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
  return tensor.const_data_ptr<float>();
}

// parallel(n, body) for convolution.h. Each thread takes the next task when it is done with its last: tasks
// differ in length, and so do processors that others use, too. Threads have numbers, for scratch memory of
// their own; as many are woken as are worth it for this much work.
class Threads {
 public:
  // For this many multiply-adds.
  explicit Threads(int64_t products) : threads_(Parallel(products / kProducts).threads()) {}
  explicit Threads(const ConvolutionArgs& args)
      : Threads(args.images * args.out_height * args.out_width * args.outputs * depth_of(args)) {}

  int64_t threads() const { return threads_; }
  int64_t thread() const { return threads_ == 1 ? 0 : at::get_thread_num(); }

  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    if (threads_ == 1 || n == 1) return body(int64_t{0}, n);
    std::atomic<int64_t> next = 0;
    at::parallel_for(0, threads_, 1, [&](int64_t, int64_t) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(task, task + 1);
    });
  }

 private:
  static constexpr int64_t kProducts = 64;  // take about as long as an element of an elementwise pass

  int64_t threads_;
};

// Uninitialised memory for one call; in whole megabytes, so that many calls can have the same.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    constexpr int64_t kUnit = 1 << 18;
    const int64_t size = divide_up(std::max<int64_t>(floats, 1), kUnit) * kUnit;
    memory_ = empty_output({size}, at::kFloat, at::MemoryFormat::Contiguous);
  }
  float* data() { return memory_.data_ptr<float>(); }

 private:
  Tensor memory_;
};

inline void set_geometry(ConvolutionArgs& args, at::IntArrayRef taps, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation) {
  const auto check_pair = [](const char* name, at::IntArrayRef pair, int64_t least) {
    TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name,
                      ": expected two numbers of at least ", least, ", got ", pair);
  };
  check_pair("kernel_size", taps, 1), check_pair("stride", stride, 1);
  check_pair("padding", padding, 0), check_pair("dilation", dilation, 1);
  args.taps_h = taps[0], args.taps_w = taps[1];
  args.stride_h = stride[0], args.stride_w = stride[1];
  args.pad_h = padding[0], args.pad_w = padding[1];
  args.dilation_h = dilation[0], args.dilation_w = dilation[1];
  args.out_height = output_size(args.height, args.taps_h, args.stride_h, args.pad_h, args.dilation_h);
  args.out_width = output_size(args.width, args.taps_w, args.stride_w, args.pad_w, args.dilation_w);
  const bool pointwise =
      args.taps_h * args.taps_w * args.stride_h * args.stride_w == 1 && args.pad_h + args.pad_w == 0;
  // Rows a multiple of 4 KB apart would fall into one set of the L1.
  args.gather = !pointwise || args.channels % 1024 == 0;
}

// Whether to write past the caches. A normal store reads the line first, and an output that no cache holds
// until it is read has nothing from it: 64 -> 256 channels of 16 images of 56x56, with a residual, 13.4 ms
// with normal stores, 9.8 ms without. `images`: of the whole output, which `args` may have a part of.
inline bool may_stream(const ConvolutionArgs& args, int64_t images) {
  constexpr int64_t kCached = 2 << 20, kLine = 16;  // floats
  return images * args.out_height * args.out_width * args.outputs > kCached && args.outputs % kLine == 0 &&
         reinterpret_cast<uintptr_t>(args.y) % (kLine * sizeof(float)) == 0;
}

inline void check(const ConvolutionArgs& args, int64_t packed) {
  TORCH_CHECK_VALUE(args.outputs > 0, "outputs: expected at least one, got ", args.outputs);
  TORCH_CHECK_VALUE(
      args.out_height > 0 && args.out_width > 0 && args.channels > 0 && args.height > 0 && args.width > 0,
      "input: expected channels, and images at least as large as the kernel");
  TORCH_CHECK_VALUE(args.tile == 0 || (is_winograd_tile(args.tile) && is_winograd(args)),
                    "tile: Winograd is for 3x3 kernels with stride 1 or 2, in tiles of 2 to 4");
  TORCH_CHECK_VALUE(
      packed == packed_size(args.outputs, args.channels, args.taps_h * args.taps_w, args.tile != 0),
      "packed: expected the weight packed for this convolution");
}

}  // namespace
}  // namespace fused_res::cpu
