// Helpers of the convolution operators' host code: scratch memory, the parallel loop, and the geometry of one
// layer.
#pragma once

#include "common/output_size.h"
#include "cpu/caches.h"
#include "cpu/convolution.h"
#include "cpu/isa.h"
#include "cpu/task_queue.h"
#include "cpu/tensor.h"

namespace fused_res::cpu {
namespace {

inline const ConvolutionKernels& convolution_kernels() {
  const ConvolutionKernels* found = kernels().convolution;
  TORCH_CHECK(found, "this instruction set, ", kernels().name, ", has no convolution kernels");
  return *found;
}

// The dtype of an image that the convolutions support.
inline Dtype image_dtype(const Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE((dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) && tensor.is_cpu(),
                   name, ": expected float32, bfloat16 or float16 on the CPU, got ", dtype, " on ",
                   tensor.device());
  return dtype_of(tensor, name);
}
inline at::ScalarType scalar_type_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? at::kFloat : dtype == Dtype::kBFloat16 ? at::kBFloat16 : at::kHalf;
}
// The data of a tensor that must have the input's dtype.
inline const void* data_like_input(const Tensor& tensor, Dtype dtype, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == scalar_type_of(dtype) && tensor.is_cpu(), name,
                   ": expected the dtype of input, ", scalar_type_of(dtype), ", on the CPU, got ",
                   tensor.scalar_type(), " on ", tensor.device());
  return tensor.const_data_ptr();
}

inline const float* float_data(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat && tensor.is_cpu(), name,
                   ": expected float32 on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
  return tensor.const_data_ptr<float>();
}

// The parallel loops of convolution.h: threads that fetch tasks from a queue. thread() indexes per-thread
// scratch memory. Uses one thread if the work does not amortize waking others.
class DynamicParallel {
 public:
  // `fmas`: the number of FMAs.
  explicit DynamicParallel(int64_t fmas) : threads_(Parallel(fmas / kFmasPerElement).threads()) {}
  explicit DynamicParallel(const ConvolutionArgs& args)
      : DynamicParallel((args.images * args.out_height * args.out_width + kFmasPerWeight) *
                        args.out_channels * gemm_k(args)) {}

  int64_t threads() const { return threads_; }
  int64_t thread() const { return threads_ == 1 ? 0 : at::get_thread_num(); }

  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    if (n == 1) return body(int64_t{0}, n);
    in_stages(1, [&](int64_t) { return n; }, [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
  }

  template <class Size, class Body>
  void in_stages(int64_t stages, const Size& size, const Body& body) const {
    if (threads_ == 1) {
      for (int64_t stage = 0; stage < stages; ++stage) body(stage, int64_t{0}, size(stage));
      return;
    }
    TaskQueue queue(stages, size, body, threads_);
    at::parallel_for(0, threads_, 1, [&](int64_t, int64_t) { queue.work(at::get_thread_num()); });
  }

 private:
  // As many FMAs take about as long as one element of an elementwise kernel.
  static constexpr int64_t kFmasPerElement = 64;
  // Reading an element of the weight from memory takes as long as so many FMAs (_READ_COST in
  // convolution.py): most of the time of a linear layer and one image.
  static constexpr int64_t kFmasPerWeight = 10;

  int64_t threads_;
};

// Uninitialized scratch memory for one call. Its size is rounded up to a megabyte, so that calls of similar
// size reuse the same cached block.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t kUnit = 1 << 20;
    const int64_t size = ceil_div(std::max<int64_t>(bytes, 1), kUnit) * kUnit;
    memory_ = empty_output({size}, at::kByte, at::MemoryFormat::Contiguous);
  }
  char* data() { return static_cast<char*>(memory_.mutable_data_ptr()); }

 private:
  Tensor memory_;
};

// The data of a weight that must be packed for this convolution.
inline const void* packed_data(const ConvolutionArgs& args, const Tensor& packed) {
  const auto expected = args.bf16_products ? at::kBFloat16 : at::kFloat;
  TORCH_CHECK_TYPE(packed.scalar_type() == expected && packed.is_cpu(), "weight: expected ",
                   args.bf16_products ? "bfloat16" : "float32", " on the CPU, got ", packed.scalar_type(),
                   " on ", packed.device());
  const int64_t size = args.bf16_products ? packed_bf16_size(args.out_channels, args.channels, args.kernel_h,
                                                             args.kernel_w, kernels().bf16_convolution->tiles)
                                          : packed_size(args.out_channels, args.channels,
                                                        args.kernel_h * args.kernel_w, args.tile != 0);
  TORCH_CHECK_VALUE(
      packed.is_contiguous() && packed.numel() == size,
      "weight: expected the weight packed for this convolution, as pack_conv_weight returns it");
  return packed.const_data_ptr();
}

inline bool needs_im2col(const ConvolutionArgs& args) {
  // Rows that are a multiple of 4 KB apart would alias in one set of the L1, and 16-bit elements are widened
  // first.
  return !is_pointwise(args) || args.channels % 1024 == 0 || args.dtype != Dtype::kFloat32;
}

inline void set_geometry(ConvolutionArgs& args, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation) {
  const auto check_pair = [](const char* name, at::IntArrayRef pair, int64_t least) {
    TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name,
                      ": expected two integers of at least ", least, ", got ", pair);
  };
  check_pair("kernel_size", kernel_size, 1), check_pair("stride", stride, 1);
  check_pair("padding", padding, 0), check_pair("dilation", dilation, 1);
  args.kernel_h = kernel_size[0], args.kernel_w = kernel_size[1];
  args.stride_h = stride[0], args.stride_w = stride[1];
  args.pad_h = padding[0], args.pad_w = padding[1];
  args.dilation_h = dilation[0], args.dilation_w = dilation[1];
  args.out_height = output_size(args.height, args.kernel_h, args.stride_h, args.pad_h, args.dilation_h);
  args.out_width = output_size(args.width, args.kernel_w, args.stride_w, args.pad_w, args.dilation_w);
  args.needs_im2col = needs_im2col(args);
}

// True if the output is to be written with streaming stores. A normal store reads the cache line first, which
// does not pay off for an output that is evicted before it is read (keeps_in_l3() has the measurements).
// `images`: the images of the whole output, of which `args` may describe a part.
inline bool use_streaming_stores(const ConvolutionArgs& args, int64_t images) {
  constexpr int64_t kLine = 64;  // bytes
  const int64_t pixel_bytes = args.out_channels * element_size(args.dtype);
  return !caches().keeps_in_l3(images * args.out_height * args.out_width * pixel_bytes) &&
         pixel_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(args.y) % kLine == 0;
}

inline void check_conv_args(const ConvolutionArgs& args) {
  convolution_kernels();  // raises without them
  TORCH_CHECK_VALUE(args.out_channels > 0, "outputs: expected a positive integer, got ", args.out_channels);
  TORCH_CHECK_VALUE(
      args.out_height > 0 && args.out_width > 0 && args.channels > 0 && args.height > 0 && args.width > 0,
      "input: expected channels, and images at least as large as the kernel");
  TORCH_CHECK_VALUE(args.tile == 0 || (supports_winograd_tile(args.tile) && supports_winograd(args)),
                    "tile: Winograd supports 3x3 kernels with stride 1 or 2, and tiles of 2 to 4");
  TORCH_CHECK_VALUE(
      !args.bf16_products || (args.dtype == Dtype::kBFloat16 && args.tile == 0 && kernels().bf16_convolution),
      "bf16_products: expected a direct convolution of bfloat16, and an instruction set with products of "
      "bfloat16, "
      "got ",
      kernels().name);
  TORCH_CHECK_VALUE(!args.bf16_products || args.channels > kPixelChannels || args.dilation_w == 1,
                    "dilation: products of bfloat16 do not support dilated filters of images of up to ",
                    kPixelChannels, " channels");
}

}  // namespace
}  // namespace fused_res::cpu
