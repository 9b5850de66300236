// Convolutions of float32 images in channels_last memory: packed weights, one layer with its epilogue, and
// programs of several layers whose values between them never leave an arena. The kernels are in isa/direct.h
// and isa/winograd.h, the tasks in convolution.h. Who calls them, and for which shapes:
// fused_res/backends/cpu/convolution.py.
#include "cpu/convolution.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <span>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tensor.h"

namespace fused_res::cpu {
namespace {

const ConvolutionKernels& convolution_kernels() {
  const ConvolutionKernels* found = kernels().convolution;
  TORCH_CHECK(found, "this instruction set, ", kernels().name, ", has no convolution kernels");
  return *found;
}

const float* floats(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat && tensor.is_cpu(), name,
                   ": expected float32 on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
  return tensor.const_data_ptr<float>();
}

// parallel(n, body) for convolution.h. Each thread takes the next task when it is done with its last: tasks
// differ in length, and so do processors that others use, too. Threads have numbers, for scratch memory of
// their own; as many are woken as are worth it for this much work.
class Threads {
 public:
  explicit Threads(const ConvolutionArgs& args)
      : threads_(Parallel(args.images * args.out_height * args.out_width * args.outputs * depth_of(args) /
                          kProducts)
                     .threads()) {}

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

// transposed: the weight of the gradient with respect to the input, its taps reversed, inputs and outputs
// exchanged.
Tensor pack_conv_weight(const Tensor& weight, bool winograd, bool transposed) {
  TORCH_CHECK_VALUE(weight.dim() == 4, "weight: expected (K, C, kh, kw), got ", weight.sizes());
  const int64_t taps_h = weight.size(2), taps_w = weight.size(3);
  TORCH_CHECK_VALUE(!winograd || (taps_h == 3 && taps_w == 3), "weight: Winograd is for 3x3 kernels, got ",
                    weight.sizes());
  Weight w = {floats(weight, "weight"), weight.size(0),   weight.size(1),   taps_h,          taps_w,
              weight.stride(0),         weight.stride(1), weight.stride(2), weight.stride(3)};
  if (transposed) {
    w.data += (taps_h - 1) * w.row_stride + (taps_w - 1) * w.column_stride;
    w.row_stride = -w.row_stride, w.column_stride = -w.column_stride;
    std::swap(w.outputs, w.channels);
    std::swap(w.output_stride, w.channel_stride);
  }
  const int64_t size = packed_size(w.outputs, w.channels, taps_h * taps_w, winograd);
  Tensor packed = empty_output({size}, at::kFloat, at::MemoryFormat::Contiguous);
  float* to = packed.data_ptr<float>();
  const auto& k = convolution_kernels();
  const auto pack = winograd ? k.winograd.pack : k.direct.pack;
  Parallel{size}(panels_of(w.outputs), [&](int64_t begin, int64_t end) { pack(w, {begin, end}, to); });
  return packed;
}

void set_geometry(ConvolutionArgs& args, at::IntArrayRef taps, at::IntArrayRef stride,
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
  const auto size = [](int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t room = in + 2 * pad - dilation * (taps - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  };
  args.out_height = size(args.height, args.taps_h, args.stride_h, args.pad_h, args.dilation_h);
  args.out_width = size(args.width, args.taps_w, args.stride_w, args.pad_w, args.dilation_w);
  const bool pointwise =
      args.taps_h * args.taps_w * args.stride_h * args.stride_w == 1 && args.pad_h + args.pad_w == 0;
  // Rows a multiple of 4 KB apart would fall into one set of the L1.
  args.gather = !pointwise || args.channels % 1024 == 0;
}

void check(const ConvolutionArgs& args, int64_t packed) {
  TORCH_CHECK_VALUE(args.outputs > 0, "outputs: expected at least one, got ", args.outputs);
  TORCH_CHECK_VALUE(
      args.out_height > 0 && args.out_width > 0 && args.channels > 0 && args.height > 0 && args.width > 0,
      "input: expected channels, and images at least as large as the kernel");
  TORCH_CHECK_VALUE(
      args.tile == 0 || (args.tile >= 2 && args.tile <= 4 && args.taps_h == 3 && args.taps_w == 3 &&
                         args.stride_h * args.stride_w * args.dilation_h * args.dilation_w == 1),
      "tile: Winograd is for 3x3 kernels with stride 1, in tiles of 2 to 4");
  TORCH_CHECK_VALUE(
      packed == packed_size(args.outputs, args.channels, args.taps_h * args.taps_w, args.tile != 0),
      "packed: expected the weight packed for this convolution");
}

// As one part, (1, 3, C): count, mean, M2.
Tensor merged(const ConvolutionArgs& args, double* partial, const std::vector<double>& counts) {
  const int64_t channels = args.outputs;
  const Parallel parallel(static_cast<int64_t>(counts.size()) * channels);
  parallel(divide_up(channels, kPanelOutputs), [&](int64_t begin, int64_t end) {
    const int64_t c0 = begin * kPanelOutputs, c1 = std::min(end * kPanelOutputs, channels);
    double count = counts[0];
    for (size_t i = 1; i < counts.size(); ++i) {
      kernels().merge(partial, partial + i * 2 * channels, count, counts[i], channels, c0, c1);
      count += counts[i];
    }
  });
  Tensor merged = at::empty({1, 3, channels}, at::kDouble);
  double* to = merged.data_ptr<double>();
  double count = 0;
  for (const double more : counts) count += more;
  std::fill(to, to + channels, count);
  std::copy(partial, partial + 2 * channels, to + channels);
  return merged;
}

std::tuple<Tensor, Tensor> convolve(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
                                    const OptionalTensor& residual, int64_t outputs,
                                    at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t tile,
                                    bool relu, bool partials) {
  TORCH_CHECK_VALUE(input.dim() == 4, "input: expected (N, C, H, W), got ", input.sizes());
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  ConvolutionArgs args = {};
  args.images = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.outputs = outputs, args.tile = tile, args.relu = relu;
  set_geometry(args, kernel_size, stride, padding, dilation);
  check(args, packed.numel());
  TORCH_CHECK_VALUE(packed.is_contiguous(), "packed: expected contiguous memory, as it was packed");
  const std::array<int64_t, 4> sizes = {args.images, outputs, args.out_height, args.out_width};
  Tensor added;
  if (residual && residual->defined()) {
    TORCH_CHECK_VALUE(residual->sizes().equals(sizes), "residual: expected the shape of the output, ",
                      at::IntArrayRef(sizes), ", got ", residual->sizes());
    added = residual->contiguous(at::MemoryFormat::ChannelsLast);
    args.residual = floats(added, "residual");
  }
  if (bias && bias->defined()) {
    TORCH_CHECK_VALUE(bias->numel() == outputs && bias->is_contiguous(), "bias: expected ", outputs,
                      " elements, got ", bias->sizes());
    args.bias = floats(*bias, "bias");
  }
  Tensor output = empty_output(sizes, at::kFloat, at::MemoryFormat::ChannelsLast);
  args.x = floats(x, "input"), args.packed = floats(packed, "packed"), args.y = output.data_ptr<float>();
  Tensor statistics = nothing(at::kDouble);
  if (output.numel() == 0) return {output, partials ? at::zeros({1, 3, outputs}, at::kDouble) : statistics};
  const Threads parallel(args);
  with_tasks(args, [&](const auto& tasks) {
    Scratch scratch(tasks.scratch(parallel.threads()));
    std::unique_ptr<double[]> partial(partials ? new double[tasks.chunks() * 2 * outputs] : nullptr);
    tasks.run(convolution_kernels(), scratch.data(), parallel, ChunkMoments{partial.get()});
    if (partials) {
      std::vector<double> counts;
      for (int64_t i = 0; i < tasks.chunks(); ++i) counts.push_back(static_cast<double>(tasks.outputs_in(i)));
      statistics = merged(args, partial.get(), counts);
    }
  });
  return {output, statistics};
}

// --- programs ---

// One step: kind, from, to, residual, weight, then what ConvolutionArgs and PoolArgs hold. Places are offsets
// into the arena, in floats an image.
enum Place : int64_t { kInput = -1, kOutput = -2, kNowhere = -3 };
enum Kind : int64_t { kConvolution, kMaxPool };
struct Step {
  int64_t kind, from, to, residual, weight, tile, relu;
  int64_t channels, height, width, outputs;
  int64_t taps[2], stride[2], padding[2], dilation[2];
};
constexpr int64_t kStepNumbers = sizeof(Step) / sizeof(int64_t);

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
      for (const Step& step : steps_) run(step, places, memory.data() + arena_ * largest);
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
    TORCH_CHECK_VALUE(bias_[step.weight].numel() == step.outputs, "bias: expected ", step.outputs,
                      " elements");
    args.bias = floats(bias_[step.weight], "bias");
    return args;
  }
  PoolArgs pool(const Step& step, int64_t images) const {
    PoolArgs args = {};
    args.images = images, args.channels = step.channels, args.height = step.height, args.width = step.width;
    args.kernel_h = step.taps[0], args.kernel_w = step.taps[1];
    args.stride_h = step.stride[0], args.stride_w = step.stride[1];
    args.pad_h = step.padding[0], args.pad_w = step.padding[1];
    args.out_height = (args.height + 2 * args.pad_h - args.kernel_h) / args.stride_h + 1;
    args.out_width = (args.width + 2 * args.pad_w - args.kernel_w) / args.stride_w + 1;
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

  void run(const Step& step, const Places& places, float* scratch) const {
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
    with_tasks(args,
               [&](const auto& tasks) { tasks.run(convolution_kernels(), scratch, Threads(args), {}); });
  }

  std::span<const Step> steps_;
  at::TensorList packed_, bias_;
  int64_t arena_, chunk_;
};

Tensor conv_program(const Tensor& input, at::TensorList packed, at::TensorList bias, at::IntArrayRef steps,
                    int64_t arena, int64_t chunk, at::IntArrayRef output_size) {
  TORCH_CHECK_VALUE(input.dim() == 4 && output_size.size() == 4 && chunk > 0 && arena >= 0,
                    "input: expected (N, C, H, W), got ", input.sizes());
  return Program(steps, packed, bias, arena, chunk).run(input, output_size);
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("pack_conv_weight", TORCH_FN(pack_conv_weight));
  m.impl("convolve", TORCH_FN(convolve));
  m.impl("conv_program", TORCH_FN(conv_program));
}
