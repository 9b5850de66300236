// act(bn(x) [+ residual]) and what belongs to it: in training three kernels forward and three backward, or
// one each (single_pass.h); with running statistics one.
#include <ATen/ops/zeros.h>

#include <array>
#include <tuple>

#include "cuda/batch_norm_sync.h"
#include "cuda/single_pass.h"

namespace fused_res::cuda {
namespace {

// What a normalisation needs beside x.
struct Norm {
  ChannelVector weight, bias, running_mean, running_var;
  double eps;

  Norm(const Operand& x, const OptionalTensor& weight, const OptionalTensor& bias,
       const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double eps)
      : weight(weight, x, "weight"),
        bias(bias, x, "bias"),
        running_mean(training ? std::nullopt : running_mean, x, "running_mean"),
        running_var(training ? std::nullopt : running_var, x, "running_var"),
        eps(eps) {
    TORCH_CHECK_VALUE(training || (this->running_mean.defined() && this->running_var.defined()),
                      "running_mean, running_var: expected tensors when not training");
  }

  // Statistics that do not depend on x: the running ones, or those of no values at all.
  FoldArgs fold(const Operand& x, const Tensor& stats) const {
    return {.active = true,
            .mean = running_mean.get(),
            .var = running_var.get(),
            .weight = weight.get(),
            .bias = bias.get(),
            .eps = eps,
            .stats = mutable_data_or_null(stats),
            .channels = x.shape.channels};
  }
};

Tensor folded_stats(const Operand& x, const Norm& norm, Stream stream) {
  Tensor stats = x.empty_stats();
  if (x.shape.channels > 0) launch_fold(x.is_double(), norm.fold(x, stats), stream);
  return stats;
}

Tensor compute_stats(const Operand& x, const Norm& norm, bool training, Stream stream) {
  if (!training || x.shape.numel() == 0) return folded_stats(x, norm, stream);
  return merge_to_stats(tile_partials(x, stream), norm.weight, norm.bias, norm.eps, x.is_double(), stream);
}

ApplyArgs apply_args(const Operand& x, const Residual& residual, bool relu, void* y, const Tensor& mask) {
  ApplyArgs args = {};
  args.x = x.data(), args.y = y;
  args.residual = data_or_null(residual.tensor), args.residual_stats = data_or_null(residual.stats);
  args.mask = mask.defined() && mask.numel() > 0 ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  args.relu = relu;
  return args;
}

void apply(const Operand& x, ApplyArgs args, Stream stream) {
  if (x.shape.numel() == 0) return;
  args.cut = x.cut({args.y, args.residual}, kPassUnits);
  launch_apply(x.dtype, args, stream);
}

// In one kernel, where that is possible and thought to be faster; returns whether.
bool forward_in_one_pass(const Operand& x, const Norm& norm, ApplyArgs apply, const Tensor& stats,
                         Stream stream) {
  apply.cut = x.cut({apply.y, apply.residual}, kReductionUnits);
  // Partials of vectors are other partials: both ways shall give the same bits.
  if (apply.cut.vector != x.cut({}, kReductionUnits).vector) return false;
  const auto work = choose_single_pass_forward(x.dtype, apply.cut);
  if (!work) return false;
  const Tensor partials = x.empty({apply.cut.parts, 4, x.shape.channels}, x.stats_type());
  const Tensor counter = x.empty({1}, at::kInt);
  const SinglePassForwardArgs args = {.apply = apply,
                                      .merge = {.partials = nullptr,
                                                .rows = 4,
                                                .parts = apply.cut.parts,
                                                .parts_per_group = apply.cut.parts,
                                                .channels = x.shape.channels,
                                                .stats = stats.data_ptr(),
                                                .merged = nullptr,
                                                .weight = norm.weight.get(),
                                                .bias = norm.bias.get(),
                                                .eps = norm.eps},
                                      .partials = partials.data_ptr(),
                                      .work = *work,
                                      .counter = static_cast<unsigned*>(counter.data_ptr())};
  launch_single_pass_forward(x.dtype, args, stream);
  return true;
}

Tensor batch_norm_stats(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                        double eps) {
  const OnDeviceOf device(input);
  const Operand x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, training, eps);
  return compute_stats(x, norm, training, device.stream());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_forward(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& residual_stats,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double eps, bool relu, bool save_mask) {
  const OnDeviceOf device(input);
  const Stream stream = device.stream();
  const Operand x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, training, eps);
  const Residual added(x, residual, residual_stats);
  const Tensor output = at::empty_like(x.tensor), mask = x.empty_mask(save_mask);
  ApplyArgs args = apply_args(x, added, relu, output.data_ptr(), mask);
  Tensor stats;
  if (x.shape.numel() == 0) {
    stats = folded_stats(x, norm, stream);
  } else if (!training) {
    stats = x.empty_stats();
    args.fold = norm.fold(x, stats);
    apply(x, args, stream);
  } else {
    stats = x.empty_stats();
    if (!forward_in_one_pass(x, norm, args, stats, stream)) {
      stats = compute_stats(x, norm, training, stream);
      args.stats = stats.const_data_ptr();
      apply(x, args, stream);
    }
  }
  return {restored(output, input, x.tensor), stats, mask};
}

std::tuple<Tensor, Tensor> batch_norm_act_apply(const Tensor& input, const Tensor& stats,
                                                const OptionalTensor& residual,
                                                const OptionalTensor& residual_stats, bool relu,
                                                bool save_mask) {
  const OnDeviceOf device(input);
  const Operand x(input);
  const Residual added(x, residual, residual_stats);
  const Tensor saved = checked_stats(stats, x, "stats");
  const Tensor output = at::empty_like(x.tensor), mask = x.empty_mask(save_mask);
  ApplyArgs args = apply_args(x, added, relu, output.data_ptr(), mask);
  args.stats = saved.const_data_ptr();
  apply(x, args, device.stream());
  return {restored(output, input, x.tensor), mask};
}

void batch_norm_act_inference_(const Tensor& input, const OptionalTensor& residual,
                               const OptionalTensor& residual_stats, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& running_mean,
                               const Tensor& running_var, double eps, bool relu) {
  const OnDeviceOf device(input);
  const Operand x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, /*training=*/false, eps);
  const Residual added(x, residual, residual_stats);
  ApplyArgs args = apply_args(x, added, relu, x.tensor.data_ptr(), {});
  args.fold = norm.fold(x, {});
  apply(x, args, device.stream());
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

// The gradients of the elements, and the sums where anything is made of them.
Tensor run_backward(const Operand& x, BackwardArgs args, bool reduces, Stream stream) {
  args.count = static_cast<double>(x.shape.images * x.shape.pixels);
  const bool writes = args.dx != nullptr || args.dresidual != nullptr;
  if (x.shape.numel() == 0) {
    return reduces ? at::zeros({args.sums_rows, x.shape.channels}, x.tensor.options().dtype(x.stats_type()))
                   : Tensor();
  }
  Tensor sums;
  args.cut = x.cut({args.dy, args.residual, args.dx, args.dresidual}, kReductionUnits);
  const bool same_cut = args.cut.vector == x.cut({args.dy, args.residual}, kReductionUnits).vector;
  if (const auto work =
          reduces && writes && same_cut ? choose_single_pass_backward(x.dtype, args.cut) : std::nullopt) {
    sums = x.empty({args.sums_rows, x.shape.channels}, x.stats_type());
    const Tensor partials = x.empty({args.cut.parts, args.sums_rows, x.shape.channels}, x.stats_type());
    const Tensor counter = x.empty({1}, at::kInt);
    args.sums = sums.data_ptr(), args.partials = partials.data_ptr();
    launch_single_pass_backward(
        x.dtype, {.backward = args, .work = *work, .counter = static_cast<unsigned*>(counter.data_ptr())},
        stream);
    return sums;
  }
  if (reduces) {
    sums = compute_sums(x, args, stream);
    args.sums = sums.data_ptr();
  }
  if (writes) {
    args.cut = x.cut({args.dy, args.residual, args.dx, args.dresidual}, kPassUnits);
    launch_dx(x.dtype, args, stream);
  }
  return sums;
}

// A parameter's gradient: a copy, as what an operator returns must not share memory.
Tensor parameter_gradient(const Tensor& sums, int64_t row, bool wanted, const OptionalTensor& weight,
                          const Operand& x) {
  const bool has_weight = weight && weight->defined();
  const at::ScalarType type = has_weight ? weight->scalar_type() : x.stats_type();
  if (!wanted) return nothing(x.tensor, type);
  return sums.select(0, row).to(type, /*non_blocking=*/false, /*copy=*/true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const OptionalTensor& relu_mask, bool training, bool relu, std::array<bool, 4> output_mask) {
  const auto [want_input, want_residual, want_weight, want_bias] = output_mask;
  const OnDeviceOf device(input);
  const Operand x(input);
  const Tensor dy = x.match(grad_output, "grad_output"), saved = checked_stats(stats, x, "stats");
  const Tensor dx = want_input ? at::empty_like(x.tensor) : Tensor();
  const Tensor dresidual = want_residual ? at::empty_like(x.tensor) : Tensor();
  BackwardArgs args = {};
  args.dy = dy.const_data_ptr(), args.x = x.data(), args.stats = saved.const_data_ptr();
  args.mask = checked_mask(relu_mask, x), args.relu = relu;
  args.dx = mutable_data_or_null(dx), args.dresidual = mutable_data_or_null(dresidual);
  args.training = training && want_input, args.sums_rows = 2;
  const bool reduces = want_weight || want_bias || (want_input && training);
  const Tensor sums = run_backward(x, args, reduces, device.stream());
  const auto returned = [&](const Tensor& gradient) {
    return gradient.defined() ? restored(gradient, input, x.tensor) : nothing(input, input.scalar_type());
  };
  return {returned(dx), returned(dresidual), parameter_gradient(sums, 1, want_weight, weight, x),
          parameter_gradient(sums, 0, want_bias, weight, x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_pair(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const Tensor& residual, const OptionalTensor& residual_weight, const Tensor& residual_stats,
    const OptionalTensor& relu_mask, bool training, bool residual_training, std::array<bool, 6> output_mask) {
  const auto [want_input, want_residual, want_weight, want_bias, want_residual_weight, want_residual_bias] =
      output_mask;
  const OnDeviceOf device(input);
  const Operand x(input);
  const Tensor dy = x.match(grad_output, "grad_output"), saved = checked_stats(stats, x, "stats");
  const Residual other(x, residual, residual_stats);
  const Tensor dx = want_input ? at::empty_like(x.tensor) : Tensor();
  const Tensor dresidual = want_residual ? at::empty_like(x.tensor) : Tensor();
  BackwardArgs args = {};
  args.dy = dy.const_data_ptr(), args.x = x.data(), args.stats = saved.const_data_ptr();
  args.residual = other.tensor.const_data_ptr(), args.residual_stats = other.stats.const_data_ptr();
  args.mask = checked_mask(relu_mask, x);
  args.dx = mutable_data_or_null(dx), args.dresidual = mutable_data_or_null(dresidual);
  args.training = training && want_input, args.residual_training = residual_training && want_residual;
  args.sums_rows = 3;
  const bool reduces = want_weight || want_bias || want_residual_weight || want_residual_bias ||
                       (want_input && training) || (want_residual && residual_training);
  const Tensor sums = run_backward(x, args, reduces, device.stream());
  const auto returned = [&](const Tensor& gradient, const Tensor& of, const Tensor& read) {
    return gradient.defined() ? restored(gradient, of, read) : nothing(of, of.scalar_type());
  };
  return {returned(dx, input, x.tensor),
          returned(dresidual, residual, other.tensor),
          parameter_gradient(sums, 1, want_weight, weight, x),
          parameter_gradient(sums, 0, want_bias, weight, x),
          parameter_gradient(sums, 2, want_residual_weight, residual_weight, x),
          parameter_gradient(sums, 0, want_residual_bias, residual_weight, x)};
}

// self += grad where the mask, which lies in grad's order, says so.
void add_masked_(const Tensor& self, const Tensor& grad, const OptionalTensor& relu_mask) {
  const OnDeviceOf device(grad);
  const Operand g(grad);
  const Tensor into = g.match(self, "self");
  const uint8_t* mask = checked_mask(relu_mask, g);
  if (g.shape.numel() == 0) return;
  const Activation matrix = {g.shape.rows(), g.shape.cols(), 1, true};
  const Cut work = cut(matrix, g.vector(matrix.channels, {into.const_data_ptr()}), kPassUnits);
  launch_add_masked(g.dtype, {.cut = work, .into = into.data_ptr(), .grad = g.data(), .mask = mask},
                    device.stream());
  if (!into.is_same(self)) self.copy_(into);
}

// For all units of a block at once; what is not contiguous is made so, and copied back.
void update_running_stats(at::TensorList running_mean, at::TensorList running_var, at::TensorList stats,
                          at::ArrayRef<double> momentum) {
  const size_t n = stats.size();
  TORCH_CHECK_VALUE(running_mean.size() == n && running_var.size() == n && momentum.size() == n,
                    "running_mean, running_var, momentum: expected as many entries as stats, ", n);
  if (n == 0) return;
  const OnDeviceOf device(stats[0]);
  std::vector<Tensor> means(n), vars(n), batches(n);
  for (size_t i = 0; i < n; ++i) {
    batches[i] = stats[i].contiguous();
    const at::ScalarType type = stats[i].scalar_type();
    check_device(stats[i], stats[0], "stats");
    TORCH_CHECK_VALUE(
        stats[i].dim() == 2 && stats[i].size(0) == 5 && (type == at::kFloat || type == at::kDouble),
        "stats: expected (5, C) of float32 or float64, got ", stats[i].sizes(), " of ", type);
    for (const Tensor& running : {running_mean[i], running_var[i]}) {
      check_device(running, stats[0], "running_mean, running_var");
      dtype_of(running, "running_mean, running_var");
      TORCH_CHECK_VALUE(running.numel() == stats[i].size(1), "running_mean, running_var: expected ",
                        stats[i].size(1), " elements, got ", running.sizes());
    }
    means[i] = running_mean[i].contiguous(), vars[i] = running_var[i].contiguous();
  }
  for (size_t first = 0; first < n; first += UpdateRunningArgs::kMost) {
    const size_t last = std::min(n, first + UpdateRunningArgs::kMost);
    UpdateRunningArgs args = {};
    int64_t channels = 0;
    for (size_t i = first; i < last; ++i) {
      args.norms[i - first] = {means[i].data_ptr(),
                               vars[i].data_ptr(),
                               dtype_of(means[i], "running_mean"),
                               dtype_of(vars[i], "running_var"),
                               batches[i].const_data_ptr(),
                               batches[i].scalar_type() == at::kDouble,
                               batches[i].size(1),
                               momentum[i]};
      channels = std::max(channels, batches[i].size(1));
    }
    if (channels > 0) launch_update_running(args, static_cast<int>(last - first), channels, device.stream());
  }
  for (size_t i = 0; i < n; ++i) {
    if (!means[i].is_same(running_mean[i])) running_mean[i].copy_(means[i]);
    if (!vars[i].is_same(running_var[i])) running_var[i].copy_(vars[i]);
    // The dispatcher does not do this for operators of extensions: autograd shall notice if it had saved one
    // of them.
    for (const Tensor& running : {running_mean[i], running_var[i]})
      running.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) {
  m.impl("batch_norm_stats", TORCH_FN(batch_norm_stats));
  m.impl("batch_norm_act_forward", TORCH_FN(batch_norm_act_forward));
  m.impl("batch_norm_act_apply", TORCH_FN(batch_norm_act_apply));
  m.impl("batch_norm_act_inference_", TORCH_FN(batch_norm_act_inference_));
  m.impl("batch_norm_act_backward", TORCH_FN(batch_norm_act_backward));
  m.impl("batch_norm_act_backward_pair", TORCH_FN(batch_norm_act_backward_pair));
  m.impl("add_masked_", TORCH_FN(add_masked_));
  m.impl("update_running_stats", TORCH_FN(update_running_stats));
}

}  // namespace fused_res::cuda
