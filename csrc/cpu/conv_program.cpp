// Several layers as one call: a program of convolutions and poolings whose values in between lie in an arena.
// The format of a program is in conv_program.h.
#include "cpu/conv_program.h"

#include <torch/library.h>

#include <span>

#include "cpu/convolution_host.h"

namespace fused_res::cpu {
namespace {

class Program {
 public:
  Program(at::IntArrayRef numbers, at::TensorList packed, at::TensorList bias, int64_t arena, int64_t chunk)
      : packed_(packed), bias_(bias), arena_(arena), chunk_(chunk) {
    TORCH_CHECK_VALUE(numbers.size() % kStepNumbers == 0 && !numbers.empty() && packed.size() == bias.size(),
                      "steps: expected ", kStepNumbers, " numbers each");
    steps_ = {reinterpret_cast<const Step*>(numbers.data()), numbers.size() / kStepNumbers};
  }

  Tensor run(const Tensor& input, at::IntArrayRef sizes) const {
    const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
    Tensor output = empty_output(sizes, at::kFloat, at::MemoryFormat::ChannelsLast);
    const int64_t images = x.size(0);
    if (output.numel() == 0) return output;
    const int64_t chunk = std::min(chunk_, images), in = x.numel() / images, out = output.numel() / images;
    // Chunks of images, as equal as can be.
    const int64_t chunks = divide_up(images, chunk), largest = divide_up(images, chunks);
    int64_t scratch = 0;
    for (const Step& step : steps_) {
      check_places(step, in, out);
      scratch = std::max(scratch, scratch_of(step, largest));
    }
    Scratch memory(arena_ * largest + scratch);
    for (int64_t i = 0; i < chunks; ++i) {
      const Range part = part_of(images, i, chunks);
      Places places = {floats(x, "input") + part.begin * in, output.data_ptr<float>() + part.begin * out,
                       memory.data(), part.end - part.begin};
      for (const Step& step : steps_) run(step, images, places, memory.data() + arena_ * largest);
    }
    return output;
  }

 private:
  struct Places {
    const float* input;
    float* output;
    float* arena;
    int64_t images;

    const float* read(int64_t place) const { return place == kInput ? input : write(place); }
    float* write(int64_t place) const {
      return place == kNowhere ? nullptr : place == kOutput ? output : arena + place * images;
    }
  };

  ConvolutionArgs convolution(const Step& step, int64_t images) const {
    ConvolutionArgs args = {};
    args.images = images, args.channels = step.channels, args.height = step.height, args.width = step.width;
    args.outputs = step.outputs, args.tile = step.tile, args.relu = step.relu != 0;
    set_geometry(args, step.taps, step.stride, step.padding, step.dilation);
    check(args, packed_[step.weight].numel());
    args.packed = floats(packed_[step.weight], "packed");
    TORCH_CHECK_VALUE(bias_[step.weight].numel() == step.outputs && bias_[step.weight].is_contiguous(),
                      "bias: expected ", step.outputs, " elements");
    args.bias = floats(bias_[step.weight], "bias");
    return args;
  }
  PoolArgs pool(const Step& step, int64_t images) const {
    PoolArgs args = {};
    args.images = images, args.channels = step.channels, args.height = step.height, args.width = step.width;
    args.kernel_h = step.taps[0], args.kernel_w = step.taps[1];
    args.stride_h = step.stride[0], args.stride_w = step.stride[1];
    args.pad_h = step.padding[0], args.pad_w = step.padding[1];
    args.out_height = output_size(args.height, args.kernel_h, args.stride_h, args.pad_h, 1);
    args.out_width = output_size(args.width, args.kernel_w, args.stride_w, args.pad_w, 1);
    return args;
  }

  void check_places(const Step& step, int64_t in, int64_t out) const {
    int64_t written;
    if (step.kind == kConvolution) {
      TORCH_CHECK_VALUE(step.weight >= 0 && step.weight < static_cast<int64_t>(packed_.size()),
                        "steps: no such weight");
      const ConvolutionArgs args = convolution(step, 1);
      written = args.outputs * args.out_height * args.out_width;
    } else {
      const PoolArgs args = pool(step, 1);
      written = args.channels * args.out_height * args.out_width;
    }
    const auto room = [&](int64_t place) {
      return place == kInput ? in : place == kOutput ? out : place >= 0 ? arena_ - place : -1;
    };
    TORCH_CHECK_VALUE(step.channels * step.height * step.width <= room(step.from) &&
                          written <= room(step.to) && step.to != kInput &&
                          (step.residual == kNowhere || written <= room(step.residual)),
                      "steps: a value does not fit into its place");
  }

  int64_t scratch_of(const Step& step, int64_t images) const {
    if (step.kind == kMaxPool) return 0;
    const ConvolutionArgs args = convolution(step, images);
    return with_tasks(args, [&](const auto& tasks) { return tasks.scratch(Threads(args).threads()); });
  }

  void run(const Step& step, int64_t images, const Places& places, float* scratch) const {
    if (step.kind == kMaxPool) {
      PoolArgs args = pool(step, places.images);
      args.x = places.read(step.from), args.y = places.write(step.to);
      const auto forward =
          kernels().max_pool[static_cast<int>(Dtype::kFloat32)][static_cast<int>(Layout::kNhwc)].forward;
      const int64_t rows = args.images * args.out_height;
      Parallel{rows * args.width * args.channels}(
          rows, [&](int64_t begin, int64_t end) { forward(args, begin, end); });
      return;
    }
    ConvolutionArgs args = convolution(step, places.images);
    args.x = places.read(step.from), args.y = places.write(step.to),
    args.residual = places.read(step.residual);
    args.stream = may_stream(args, step.to == kOutput ? images : places.images);
    with_tasks(args,
               [&](const auto& tasks) { tasks.run(convolution_kernels(), scratch, Threads(args), {}); });
  }

  std::span<const Step> steps_;
  at::TensorList packed_, bias_;
  int64_t arena_, chunk_;
};

Tensor conv_program(const Tensor& input, at::TensorList packed, at::TensorList bias, at::IntArrayRef steps,
                    int64_t arena, int64_t chunk, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(input.dim() == 4 && sizes.size() == 4 && chunk > 0 && arena >= 0,
                    "input: expected (N, C, H, W), got ", input.sizes());
  return Program(steps, packed, bias, arena, chunk).run(input, sizes);
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) { m.impl("conv_program", TORCH_FN(fused_res::cpu::conv_program)); }
