// Graph executor for inference: runs a sequence of convolutions, poolings and linear layers as one operator
// call, with all intermediate activations in an arena. conv_program.h defines the encoding of the graph.
#include "cpu/conv_program.h"

#include <torch/library.h>

#include <span>

#include "cpu/convolution_host.h"

namespace fused_res::cpu {
namespace {

class GraphExecutor {
 public:
  GraphExecutor(at::IntArrayRef steps, at::TensorList packed, at::TensorList bias, int64_t arena,
                int64_t chunk, Dtype dtype)
      : packed_(packed), bias_(bias), arena_(arena), chunk_(chunk), dtype_(dtype) {
    TORCH_CHECK_VALUE(steps.size() % kStepSize == 0 && !steps.empty(),
                      "steps: expected a positive multiple of ", kStepSize, " integers, got ", steps.size());
    TORCH_CHECK_VALUE(packed.size() == bias.size(), "bias: expected as many tensors as packed weights, ",
                      packed.size(), ", got ", bias.size());
    steps_ = {reinterpret_cast<const Step*>(steps.data()), steps.size() / kStepSize};
  }

  Tensor run(const Tensor& input, at::IntArrayRef sizes) const {
    const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
    Tensor output = empty_output(sizes, x.scalar_type(), at::MemoryFormat::ChannelsLast);
    const int64_t images = x.size(0);
    if (output.numel() == 0) return output;
    const int64_t chunk = std::min(chunk_, images), input_elements = x.numel() / images,
                  output_elements = output.numel() / images, size = element_size(dtype_);
    // Chunks of images of nearly equal size.
    const int64_t chunks = ceil_div(images, chunk), largest = ceil_div(images, chunks);
    int64_t scratch = 0;
    for (const Step& step : steps_) {
      check_bounds(step, input_elements, output_elements);
      scratch = std::max(scratch, scratch_bytes(step, largest));
    }
    // Scratch memory begins at a cache line.
    const int64_t arena_bytes = ceil_div(arena_ * largest * size, 64) * 64;
    Scratch memory(arena_bytes + scratch);
    for (int64_t i = 0; i < chunks; ++i) {
      const Range part = balanced_range(images, i, chunks);
      Buffers buffers = {static_cast<const char*>(x.const_data_ptr()) + part.begin * input_elements * size,
                         static_cast<char*>(output.mutable_data_ptr()) + part.begin * output_elements * size,
                         memory.data(), part.end - part.begin, size};
      for (const Step& step : steps_) run(step, images, buffers, memory.data() + arena_bytes);
    }
    return output;
  }

 private:
  struct Buffers {
    const char* input;
    char* output;
    char* arena;
    int64_t images, element_size;

    const void* input_pointer(int64_t location) const {
      return location == kInput ? input : output_pointer(location);
    }
    void* output_pointer(int64_t location) const {
      return location == kNoOperand ? nullptr
             : location == kOutput  ? output
                                    : arena + location * images * element_size;
    }
  };

  ConvolutionArgs convolution(const Step& step, int64_t images) const {
    ConvolutionArgs args = {};
    args.images = images, args.channels = step.channels, args.height = step.height, args.width = step.width;
    args.out_channels = step.out_channels, args.tile = step.tile, args.relu = step.relu != 0;
    args.dtype = dtype_, args.bf16_products = step.bf16_products != 0;
    set_geometry(args, step.kernel_size, step.stride, step.padding, step.dilation);
    check_conv_args(args);
    args.packed = packed_data(args, packed_[step.weight]);
    TORCH_CHECK_VALUE(bias_[step.weight].numel() == step.out_channels && bias_[step.weight].is_contiguous(),
                      "bias: expected ", step.out_channels, " contiguous elements, got ",
                      bias_[step.weight].sizes(), " with strides ", bias_[step.weight].strides());
    args.bias = float_data(bias_[step.weight], "bias");
    return args;
  }
  PoolArgs pool(const Step& step, int64_t images) const {
    PoolArgs args = {};
    args.images = images, args.channels = step.channels, args.height = step.height, args.width = step.width;
    if (step.kind == kGlobalAveragePool) return args;
    args.kernel_h = step.kernel_size[0], args.kernel_w = step.kernel_size[1];
    args.stride_h = step.stride[0], args.stride_w = step.stride[1];
    args.pad_h = step.padding[0], args.pad_w = step.padding[1];
    args.out_height = output_size(args.height, args.kernel_h, args.stride_h, args.pad_h, 1);
    args.out_width = output_size(args.width, args.kernel_w, args.stride_w, args.pad_w, 1);
    return args;
  }

  void check_bounds(const Step& step, int64_t input_elements, int64_t output_elements) const {
    TORCH_CHECK_VALUE(step.kind == kConvolution || step.kind == kMaxPool || step.kind == kGlobalAveragePool,
                      "steps: expected a kind of 0 to 2, got ", step.kind);
    TORCH_CHECK_VALUE(step.channels > 0 && step.height > 0 && step.width > 0,
                      "steps: expected positive channels, height and width, got ", step.channels, ", ",
                      step.height, " and ", step.width);
    int64_t written;
    if (step.kind == kConvolution) {
      TORCH_CHECK_VALUE(step.weight >= 0 && step.weight < static_cast<int64_t>(packed_.size()),
                        "steps: weight is out of range");
      const ConvolutionArgs args = convolution(step, 1);
      written = args.out_channels * args.out_height * args.out_width;
    } else if (step.kind == kGlobalAveragePool) {
      written = step.channels;
    } else {
      const PoolArgs args = pool(step, 1);
      written = args.channels * args.out_height * args.out_width;
    }
    const auto room = [&](int64_t location) {
      return location == kInput    ? input_elements
             : location == kOutput ? output_elements
             : location >= 0       ? arena_ - location
                                   : -1;
    };
    TORCH_CHECK_VALUE(step.channels * step.height * step.width <= room(step.input) &&
                          written <= room(step.output) && step.output != kInput &&
                          (step.residual == kNoOperand || written <= room(step.residual)),
                      "steps: a value does not fit into its location");
  }

  int64_t scratch_bytes(const Step& step, int64_t images) const {
    if (step.kind != kConvolution) return 0;
    const ConvolutionArgs args = convolution(step, images);
    return dispatch_tasks(kernels(), args,
                          [&](const auto& tasks) { return tasks.scratch(DynamicParallel(args).threads()); });
  }

  void run(const Step& step, int64_t images, const Buffers& buffers, void* scratch) const {
    if (step.kind != kConvolution) {
      PoolArgs args = pool(step, buffers.images);
      args.x = buffers.input_pointer(step.input), args.y = buffers.output_pointer(step.output);
      const int dtype = static_cast<int>(dtype_);
      const bool global = step.kind == kGlobalAveragePool;
      const auto forward = global ? kernels().global_average_pool[dtype]
                                  : kernels().max_pool[dtype][static_cast<int>(Layout::kNhwc)].forward;
      const int64_t tasks =
          args.images * (global ? ceil_div(args.channels, kPooledChannels) : args.out_height);
      const int64_t lines = args.images * (global ? args.height : args.out_height);
      Parallel{lines * args.width * args.channels}(
          tasks, [&](int64_t begin, int64_t end) { forward(args, begin, end); });
      return;
    }
    ConvolutionArgs args = convolution(step, buffers.images);
    args.x = buffers.input_pointer(step.input), args.y = buffers.output_pointer(step.output),
    args.residual = buffers.input_pointer(step.residual);
    args.stream = use_streaming_stores(args, step.output == kOutput ? images : buffers.images);
    dispatch_tasks(kernels(), args,
                   [&](const auto& tasks) { tasks.run(kernels(), scratch, DynamicParallel(args), {}); });
  }

  std::span<const Step> steps_;
  at::TensorList packed_, bias_;
  int64_t arena_, chunk_;
  Dtype dtype_;
};

Tensor conv_program(const Tensor& input, at::TensorList packed, at::TensorList bias, at::IntArrayRef steps,
                    int64_t arena, int64_t chunk, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(input.dim() == 4, "input: expected (N, C, H, W), got ", input.sizes());
  TORCH_CHECK_VALUE(sizes.size() == 4, "output_size: expected (N, C, H, W), got ", sizes);
  TORCH_CHECK_VALUE(chunk > 0, "chunk: expected a positive integer, got ", chunk);
  TORCH_CHECK_VALUE(arena >= 0, "arena: expected a non-negative integer, got ", arena);
  return GraphExecutor(steps, packed, bias, arena, chunk, image_dtype(input, "input")).run(input, sizes);
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) { m.impl("conv_program", TORCH_FN(fused_res::cpu::conv_program)); }
