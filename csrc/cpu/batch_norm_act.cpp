// batch_norm_act on the CPU: act(bn(x) [+ residual]), its backward, and what belongs to it. Python has
// checked the arguments; what is checked here is what a kernel would crash on. The kernels are in
// isa/batch_norm_*.h, the scheme in partition.h.
#include <torch/library.h>

#include <array>
#include <memory>
#include <span>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/tensor.h"

namespace fused_res::cpu {
namespace {

// Outputs from this size on are written past the caches. A normal store reads the line first, and pushes out
// what the second pass is about to read: 3 MB, forward + backward, 0.57 ms with normal stores, 0.40 ms past
// the caches. In a residual block, where a convolution reads the output next, sizes from 1 to 4 MB tie,
// larger ones win.
constexpr int64_t kStreamBytes = 1 << 20;

bool may_stream(const Operand& x, const Tensor& output) {
  const int64_t line = 64, row_bytes = x.shape.cols() * output.element_size();
  return static_cast<int64_t>(output.nbytes()) >= kStreamBytes && row_bytes % line == 0 &&
         reinterpret_cast<uintptr_t>(output.data_ptr()) % line == 0;
}

const BatchNormActKernels& kernels_for(const Operand& x) {
  return kernels().batch_norm_act[static_cast<int>(x.dtype)][static_cast<int>(x.shape.layout)];
}

// A parameter of C numbers in the dtype of the statistics; undefined where there is none.
Tensor channel_vector(const OptionalTensor& tensor, const Operand& x, const char* name) {
  if (!tensor || !tensor->defined()) return {};
  TORCH_CHECK_VALUE(tensor->is_cpu(), name, ": expected a CPU tensor, got ", tensor->device());
  TORCH_CHECK_VALUE(tensor->numel() == x.shape.channels, name, ": expected ", x.shape.channels,
                    " elements, one a channel, got ", tensor->sizes());
  return tensor->to(stats_type(x.tensor)).contiguous();
}
const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* mutable_data_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

void* row_of(const Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.data_ptr()) + row * matrix.size(1) * matrix.element_size();
}

NormArgs norm_args(const Tensor& stats) {
  if (!stats.defined()) return {};
  return {row_of(stats, kMean), row_of(stats, kScale), row_of(stats, kShift)};
}

Tensor checked_stats(const Tensor& stats, const Operand& x, const char* name) {
  TORCH_CHECK_VALUE(stats.is_cpu() && stats.scalar_type() == stats_type(x.tensor) && stats.dim() == 2 &&
                        stats.size(0) == kStatsRows && stats.size(1) == x.shape.channels,
                    name, ": expected (5, ", x.shape.channels, ") of ", stats_type(x.tensor),
                    " on the CPU, got ", stats.sizes(), " of ", stats.scalar_type());
  return stats.contiguous();
}

const uint8_t* checked_mask(const OptionalTensor& mask, const Operand& x) {
  if (!mask || !mask->defined()) return nullptr;
  TORCH_CHECK_VALUE(mask->is_cpu() && mask->scalar_type() == at::kByte && mask->is_contiguous() &&
                        mask->numel() == x.mask_bytes(),
                    "relu_mask: expected a contiguous uint8 tensor of ", x.mask_bytes(),
                    " bytes on the CPU, got ", mask->sizes(), " of ", mask->scalar_type());
  return mask->const_data_ptr<uint8_t>();
}

std::unique_ptr<double[]> uninitialised(int64_t count) {
  return std::unique_ptr<double[]>(new double[count]);
}

// What a normalisation needs beside x.
struct Norm {
  Tensor weight, bias, running_mean, running_var;
  bool training;
  double eps;

  Norm(const Operand& x, const OptionalTensor& weight, const OptionalTensor& bias,
       const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double eps)
      : weight(channel_vector(weight, x, "weight")),
        bias(channel_vector(bias, x, "bias")),
        training(training),
        eps(eps) {
    if (training) return;
    this->running_mean = channel_vector(running_mean, x, "running_mean");
    this->running_var = channel_vector(running_var, x, "running_var");
    TORCH_CHECK_VALUE(this->running_mean.defined() && this->running_var.defined(),
                      "running_mean, running_var: expected tensors when not training");
  }
  ParamArgs args() const { return {data_or_null(weight), data_or_null(bias), eps}; }
};

// What is added: nothing, a tensor as it is, or one that is normalised with statistics of its own.
struct Residual {
  Tensor tensor, stats;

  Residual(const Operand& x, const OptionalTensor& residual, const OptionalTensor& residual_stats) {
    if (residual && residual->defined()) tensor = x.match(*residual, "residual");
    if (!residual_stats || !residual_stats->defined()) return;
    TORCH_CHECK_VALUE(tensor.defined(), "residual_stats: expected a residual that they are of");
    stats = checked_stats(*residual_stats, x, "residual_stats");
  }
};

// Statistics that do not depend on x: the running ones, or those of no values at all.
void finish_given(const Operand& x, const Norm& norm, void* stats) {
  const int64_t channels = x.shape.channels;
  const auto moments = uninitialised(2 * channels);
  const auto fill = [&](const Tensor& source, double* out) {
    for (int64_t c = 0; c < channels; ++c) {
      if (!source.defined()) {
        out[c] = 0.0;
      } else {
        out[c] = source.scalar_type() == at::kDouble ? source.const_data_ptr<double>()[c]
                                                     : static_cast<double>(source.const_data_ptr<float>()[c]);
      }
    }
  };
  fill(norm.running_mean, moments.get());
  fill(norm.running_var, moments.get() + channels);
  kernels().finish[stats_index(x.tensor)](stats, moments.get(), 1.0, norm.args(), channels, 0, channels);
}

// Statistics of the batch, then second(block) for every block.
template <class Second>
void with_batch_stats(const Operand& x, const Norm& norm, void* stats, const Second& second) {
  const Parallel parallel(x.shape.numel());
  const Partition partition(x.shape, x.tensor.element_size(), parallel.threads());
  const auto partial = uninitialised(partition.chunks() * 2 * x.shape.channels);
  const auto count = static_cast<double>(x.shape.values_per_channel());
  const void* data = x.tensor.const_data_ptr();
  const auto moments = kernels_for(x).moments;
  two_passes(
      partition, parallel,
      [&](const Block& block, int64_t chunk) {
        moments(block, data, &partial[chunk * 2 * x.shape.channels]);
      },
      [&](Channels group) {
        merge_chunks(kernels(), partition, partial.get(), group);
        kernels().finish[stats_index(x.tensor)](stats, partial.get(), count, norm.args(), x.shape.channels,
                                                group.begin, group.end);
      },
      second);
}

Tensor empty_stats(const Operand& x) {
  return at::detail::empty_cpu({kStatsRows, x.shape.channels}, stats_type(x.tensor));
}

Tensor empty_mask(const Operand& x, bool wanted) {
  return wanted ? at::detail::empty_cpu({x.shape.rows(), x.mask_cols()}, at::kByte) : nothing(at::kByte);
}

ForwardArgs forward_args(const Operand& x, const Residual& residual, const Tensor& stats, bool relu,
                         const Tensor& y, const Tensor& mask) {
  return {.x = x.tensor.const_data_ptr(),
          .residual = data_or_null(residual.tensor),
          .norm = norm_args(stats),
          .residual_norm = norm_args(residual.stats),
          .y = y.data_ptr(),
          .mask = mask.defined() && mask.numel() > 0 ? mask.data_ptr<uint8_t>() : nullptr,
          .relu = relu,
          .stream = !y.is_same(x.tensor) && may_stream(x, y)};
}

void run_forward(const Operand& x, const ForwardArgs& args) {
  const auto forward = kernels_for(x).forward;
  one_pass(x.shape, Parallel(x.shape.numel()), [&](const Block& block) { forward(block, args); });
}

// --- the operators ---

Tensor batch_norm_stats(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                        double eps) {
  const Operand x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, training, eps);
  Tensor stats = empty_stats(x);
  if (training && x.shape.numel() > 0) {
    with_batch_stats(x, norm, stats.data_ptr(), [](const Block&) {});
  } else {
    finish_given(x, norm, stats.data_ptr());
  }
  return stats;
}

// From what convolutions bring of their outputs: (P, 3, C), count, mean and M2 of P parts.
Tensor merge_stats(const Tensor& partials, const OptionalTensor& weight, const OptionalTensor& bias,
                   double eps, bool wide) {
  TORCH_CHECK_VALUE(partials.dim() == 3 && partials.size(0) > 0 && partials.size(1) == 3 &&
                        partials.scalar_type() == at::kDouble && partials.is_cpu(),
                    "partials: expected (P, 3, C) of float64 on the CPU, got ", partials.sizes(), " of ",
                    partials.scalar_type());
  const Tensor parts = partials.contiguous();
  const int64_t channels = parts.size(2);
  const auto type = wide ? at::kDouble : at::kFloat;
  const auto parameter = [&](const OptionalTensor& tensor, const char* name) -> Tensor {
    if (!tensor || !tensor->defined()) return {};
    TORCH_CHECK_VALUE(tensor->is_cpu() && tensor->numel() == channels, name, ": expected ", channels,
                      " elements on the CPU, got ", tensor->sizes(), " on ", tensor->device());
    return tensor->to(type).contiguous();
  };
  const Tensor scale = parameter(weight, "weight"), shift = parameter(bias, "bias");
  Tensor stats = at::detail::empty_cpu({kStatsRows, channels}, type);
  if (channels == 0) return stats;
  const auto moments = uninitialised(2 * channels);
  std::fill_n(moments.get(), 2 * channels, 0.0);
  double count = 0;
  for (int64_t i = 0; i < parts.size(0); ++i) {
    const double* part = parts.const_data_ptr<double>() + i * 3 * channels;
    if (part[0] == 0) continue;
    if (count == 0) {
      std::copy_n(part + channels, 2 * channels, moments.get());
    } else {
      kernels().merge(moments.get(), part + channels, count, part[0], channels, 0, channels);
    }
    count += part[0];
  }
  const ParamArgs params = {data_or_null(scale), data_or_null(shift), eps};
  kernels().finish[wide](stats.data_ptr(), moments.get(), std::max(count, 1.0), params, channels, 0,
                         channels);
  return stats;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_forward(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& residual_stats,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double eps, bool relu, bool save_mask) {
  const Operand x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, training, eps);
  const Residual added(x, residual, residual_stats);
  Tensor output = empty_output(x.tensor), stats = empty_stats(x), mask = empty_mask(x, save_mask);
  const ForwardArgs args = forward_args(x, added, stats, relu, output, mask);
  if (training && x.shape.numel() > 0) {
    const auto forward = kernels_for(x).forward;
    with_batch_stats(x, norm, stats.data_ptr(), [&](const Block& block) { forward(block, args); });
  } else {
    finish_given(x, norm, stats.data_ptr());
    run_forward(x, args);
  }
  return {restored(output, input, x.tensor), stats, mask};
}

std::tuple<Tensor, Tensor> batch_norm_act_apply(const Tensor& input, const Tensor& stats,
                                                const OptionalTensor& residual,
                                                const OptionalTensor& residual_stats, bool relu,
                                                bool save_mask) {
  const Operand x(input);
  const Residual added(x, residual, residual_stats);
  Tensor output = empty_output(x.tensor), mask = empty_mask(x, save_mask);
  run_forward(x, forward_args(x, added, checked_stats(stats, x, "stats"), relu, output, mask));
  return {restored(output, input, x.tensor), mask};
}

void batch_norm_act_inference_(const Tensor& input, const OptionalTensor& residual,
                               const OptionalTensor& residual_stats, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& running_mean,
                               const Tensor& running_var, double eps, bool relu) {
  const Operand x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, /*training=*/false, eps);
  const Residual added(x, residual, residual_stats);
  const Tensor stats = empty_stats(x);
  finish_given(x, norm, stats.data_ptr());
  run_forward(x, forward_args(x, added, stats, relu, x.tensor, {}));
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

// One norm on the way back: what was saved of it, and the gradients that are wanted.
struct NormBackward {
  Tensor x, stats, dx, factors, dweight, dbias;
  at::ScalarType weight_type;

  // `read` is what of the norm's input the kernels read, in the order of memory that all operands share.
  NormBackward(const Operand& like, const Tensor& read, const Tensor& saved, const char* name,
               const OptionalTensor& weight, bool training, bool want_input, bool want_weight, bool want_bias)
      : x(read), stats(checked_stats(saved, like, name)) {
    const int64_t channels = like.shape.channels;
    const at::ScalarType dtype = stats_type(x);
    weight_type = weight && weight->defined() ? weight->scalar_type() : dtype;
    const auto per_channel = [&](bool wanted) {
      return wanted ? at::detail::empty_cpu({channels}, dtype) : Tensor();
    };
    if (want_input) dx = empty_output(x);
    if (want_input && training) factors = at::detail::empty_cpu({2, channels}, dtype);
    dweight = per_channel(want_weight), dbias = per_channel(want_bias);
  }

  NormBackwardArgs args() const {
    return {.x = x.const_data_ptr(),
            .norm = norm_args(stats),
            .slope = factors.defined() ? row_of(factors, 0) : nullptr,
            .offset = factors.defined() ? row_of(factors, 1) : nullptr,
            .dx = mutable_data_or_null(dx)};
  }
  GradientArgs gradient_args() const {
    return {.stats = stats.const_data_ptr(),
            .slope = factors.defined() ? row_of(factors, 0) : nullptr,
            .offset = factors.defined() ? row_of(factors, 1) : nullptr,
            .dweight = mutable_data_or_null(dweight),
            .dbias = mutable_data_or_null(dbias)};
  }
  bool reduces() const { return factors.defined() || dweight.defined() || dbias.defined(); }

  // The results, as an operator returns them.
  Tensor grad_input(const Tensor& input) const {
    return dx.defined() ? restored(dx, input, x) : nothing(input.scalar_type());
  }
  Tensor grad_weight() const { return dweight.defined() ? dweight.to(weight_type) : nothing(weight_type); }
  Tensor grad_bias() const { return dbias.defined() ? dbias.to(weight_type) : nothing(weight_type); }
};

// The sums for all norms, where anything is made of them, and the gradients of the elements.
void run_backward(const Operand& x, const Tensor& dy, const OptionalTensor& relu_mask, bool relu,
                  std::span<const NormBackward> norms, const Tensor& dresidual) {
  BackwardArgs args = {.dy = dy.const_data_ptr(),
                       .mask = checked_mask(relu_mask, x),
                       .norms = {},
                       .dresidual = mutable_data_or_null(dresidual),
                       .relu = relu,
                       .stream = true};
  bool writes = false, reduces = false;
  const auto note_output = [&](const Tensor& output) {
    if (!output.defined()) return;
    writes = true;
    args.stream = args.stream && may_stream(x, output);
  };
  note_output(dresidual);
  for (size_t i = 0; i < norms.size(); ++i) {
    args.norms[i] = norms[i].args();
    note_output(norms[i].dx);
    reduces = reduces || norms[i].reduces();
  }
  if (x.shape.numel() == 0) {
    for (const NormBackward& norm : norms) {
      if (norm.dweight.defined()) norm.dweight.zero_();
      if (norm.dbias.defined()) norm.dbias.zero_();
    }
    return;
  }
  const auto reduce = kernels_for(x).reduce[norms.size() - 1];
  const auto backward = kernels_for(x).backward[norms.size() - 1];
  const Parallel parallel(x.shape.numel());
  if (!reduces) {
    if (writes) one_pass(x.shape, parallel, [&](const Block& block) { backward(block, args); });
    return;
  }
  const auto operands = static_cast<int64_t>(1 + norms.size()), channels = x.shape.channels;
  const Partition partition(x.shape, operands * x.tensor.element_size(), parallel.threads());
  const auto partial = uninitialised(partition.chunks() * operands * channels);
  const auto count = static_cast<double>(x.shape.values_per_channel());
  two_passes(
      partition, parallel,
      [&](const Block& block, int64_t chunk) { reduce(block, args, &partial[chunk * operands * channels]); },
      [&](Channels group) {
        add_chunks(kernels(), partition, partial.get(), operands, group);
        const double* products = partial.get();
        for (const NormBackward& norm : norms) {
          products += channels;
          kernels().finish_gradient[stats_index(x.tensor)](norm.gradient_args(), partial.get(), products,
                                                           count, channels, group.begin, group.end);
        }
      },
      [&](const Block& block) {
        if (writes) backward(block, args);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const OptionalTensor& relu_mask, bool training, bool relu, std::array<bool, 4> output_mask) {
  const auto [want_input, want_residual, want_weight, want_bias] = output_mask;
  const Operand x(input);
  const Tensor dy = x.match(grad_output, "grad_output");
  const NormBackward norm(x, x.tensor, stats, "stats", weight, training, want_input, want_weight, want_bias);
  const Tensor dresidual = want_residual ? empty_output(x.tensor) : Tensor();
  run_backward(x, dy, relu_mask, relu, {&norm, 1}, dresidual);
  return {norm.grad_input(input),
          want_residual ? restored(dresidual, input, x.tensor) : nothing(input.scalar_type()),
          norm.grad_weight(), norm.grad_bias()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_pair(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const Tensor& residual, const OptionalTensor& residual_weight, const Tensor& residual_stats,
    const OptionalTensor& relu_mask, bool training, bool residual_training, std::array<bool, 6> output_mask) {
  const auto [want_input, want_residual, want_weight, want_bias, want_residual_weight, want_residual_bias] =
      output_mask;
  const Operand x(input);
  const Tensor dy = x.match(grad_output, "grad_output");
  const NormBackward norms[2] = {
      {x, x.tensor, stats, "stats", weight, training, want_input, want_weight, want_bias},
      {x, x.match(residual, "residual"), residual_stats, "residual_stats", residual_weight, residual_training,
       want_residual, want_residual_weight, want_residual_bias}};
  run_backward(x, dy, relu_mask, /*relu=*/false, norms, {});
  return {norms[0].grad_input(input), norms[1].grad_input(residual), norms[0].grad_weight(),
          norms[0].grad_bias(),       norms[1].grad_weight(),        norms[1].grad_bias()};
}

void add_masked_(const Tensor& self, const Tensor& grad, const OptionalTensor& relu_mask) {
  const Operand g(grad);
  const Tensor out = g.match(self, "self");
  const uint8_t* mask = checked_mask(relu_mask, g);
  const auto add = kernels().add_masked[static_cast<int>(g.dtype)];
  Parallel{g.shape.numel()}(g.shape.rows(), [&](int64_t begin, int64_t end) {
    add(out.data_ptr(), g.tensor.const_data_ptr(), mask, begin, end, g.shape.cols());
  });
  if (!out.is_same(self)) self.copy_(out);
}

template <class T, class S>
void update_running(Tensor running, const S* batch, double momentum) {
  const Tensor dense = running.contiguous();
  T* out = dense.mutable_data_ptr<T>();
  for (int64_t c = 0; c < dense.numel(); ++c) {
    const double updated = (1.0 - momentum) * static_cast<double>(out[c]) + momentum * batch[c];
    out[c] = static_cast<T>(updated);
  }
  if (!dense.is_same(running)) running.copy_(dense);
}

template <class S>
void update_running(const Tensor& running, const Tensor& stats, StatsRow row, double momentum) {
  const S* batch = stats.const_data_ptr<S>() + row * stats.size(1);
  switch (running.scalar_type()) {
    case at::kFloat:
      return update_running<float>(running, batch, momentum);
    case at::kDouble:
      return update_running<double>(running, batch, momentum);
    case at::kBFloat16:
      return update_running<at::BFloat16>(running, batch, momentum);
    case at::kHalf:
      return update_running<at::Half>(running, batch, momentum);
    default:
      TORCH_CHECK_TYPE(false, "running_mean, running_var: expected floating point, got ",
                       running.scalar_type());
  }
}

void update_running_stats(at::TensorList running_mean, at::TensorList running_var, at::TensorList stats,
                          at::ArrayRef<double> momentum) {
  const size_t n = stats.size();
  TORCH_CHECK_VALUE(running_mean.size() == n && running_var.size() == n && momentum.size() == n,
                    "running_mean, running_var, momentum: expected as many entries as stats, ", n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor batch = stats[i].contiguous();
    const bool is_double = batch.scalar_type() == at::kDouble;
    TORCH_CHECK_VALUE(
        batch.dim() == 2 && batch.size(0) == kStatsRows && (is_double || batch.scalar_type() == at::kFloat),
        "stats: expected (5, C) of float32 or float64, got ", batch.sizes(), " of ", batch.scalar_type());
    for (const Tensor& running : {running_mean[i], running_var[i]}) {
      TORCH_CHECK_VALUE(running.is_cpu() && running.numel() == batch.size(1),
                        "running_mean, running_var: expected ", batch.size(1), " elements on the CPU, got ",
                        running.sizes());
    }
    const auto update = is_double ? &update_running<double> : &update_running<float>;
    update(running_mean[i], batch, kMean, momentum[i]);
    update(running_var[i], batch, kVar, momentum[i]);
    // The dispatcher does not do this for operators of extensions: autograd shall notice if it had saved one
    // of them.
    for (const Tensor& running : {running_mean[i], running_var[i]})
      running.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("batch_norm_stats", TORCH_FN(batch_norm_stats));
  m.impl("batch_norm_act_forward", TORCH_FN(batch_norm_act_forward));
  m.impl("batch_norm_act_apply", TORCH_FN(batch_norm_act_apply));
  m.impl("batch_norm_act_inference_", TORCH_FN(batch_norm_act_inference_));
  m.impl("batch_norm_act_backward", TORCH_FN(batch_norm_act_backward));
  m.impl("batch_norm_act_backward_pair", TORCH_FN(batch_norm_act_backward_pair));
  m.impl("add_masked_", TORCH_FN(add_masked_));
  m.impl("merge_stats", TORCH_FN(merge_stats));
  m.impl("update_running_stats", TORCH_FN(update_running_stats));
}
