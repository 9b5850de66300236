// Host side of batch norm + residual + activation, act(bn(x) [+ residual]). Training launches three kernels
// forward and three backward, or, if FUSED_RES_SINGLE_PASS allows it, one cooperative kernel each
// (single_pass.h); running statistics need one kernel forward.
#include <ATen/ops/zeros.h>

#include <array>
#include <tuple>

#include "cuda/batch_norm_sync.h"
#include "cuda/single_pass.h"

namespace fused_res::cuda {
namespace {

// Parameters of a batch norm: weight, bias, running statistics and eps.
struct Norm {
  ChannelVector weight, bias, running_mean, running_var;
  double eps;

  Norm(const ActivationTensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
       const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double eps)
      : weight(weight, x, "weight"),
        bias(bias, x, "bias"),
        running_mean(training ? std::nullopt : running_mean, x, "running_mean"),
        running_var(training ? std::nullopt : running_var, x, "running_var"),
        eps(eps) {
    TORCH_CHECK_VALUE(training || (this->running_mean.defined() && this->running_var.defined()),
                      "running_mean, running_var: expected tensors when not training");
  }

  // Return the arguments of launch_fold(). When training on an empty batch there are no running statistics:
  // mean and variance are absent, which stands for 0.
  FoldArgs fold(const ActivationTensor& x, const Tensor& stats) const {
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

Tensor folded_stats(const ActivationTensor& x, const Norm& norm, Stream stream) {
  Tensor stats = x.empty_stats();
  if (x.shape.channels > 0) launch_fold(x.is_double(), norm.fold(x, stats), stream);
  return stats;
}

Tensor compute_stats(const ActivationTensor& x, const Norm& norm, bool training, Stream stream) {
  if (!training || x.shape.numel() == 0) return folded_stats(x, norm, stream);
  return merge_to_stats(compute_partials(x, stream), norm.weight, norm.bias, norm.eps, x.is_double(), stream);
}

ApplyArgs apply_args(const ActivationTensor& x, const Residual& residual, bool relu, void* y,
                     const Tensor& mask) {
  ApplyArgs args = {};
  args.x = x.data(), args.y = y;
  args.residual = data_or_null(residual.tensor), args.residual_stats = data_or_null(residual.stats);
  args.mask = mask.defined() && mask.numel() > 0 ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  args.relu = relu;
  return args;
}

void apply(const ActivationTensor& x, ApplyArgs args, Stream stream) {
  if (x.shape.numel() == 0) return;
  args.partition = x.partition({args.y, args.residual}, kMaxElementwiseUnits);
  launch_apply(x.dtype, args, stream);
}

// Run the forward as a single pass if choose_single_pass_forward() selects it. Returns whether it ran.
bool try_single_pass_forward(const ActivationTensor& x, const Norm& norm, ApplyArgs apply,
                             const Tensor& stats, Stream stream) {
  apply.partition = x.partition({apply.y, apply.residual}, kMaxReductionUnits);
  // The partition depends on the vector size. It must equal the vector size that the separate statistics
  // kernel would use (aligned for x only), so that the single pass and the three kernels give bitwise the
  // same result.
  if (apply.partition.vector_size != x.partition({}, kMaxReductionUnits).vector_size) return false;
  const auto config = choose_single_pass_forward(x.dtype, apply.partition);
  if (!config) return false;
  const Tensor partials = x.empty({apply.partition.parts, 4, x.shape.channels}, x.stats_type());
  const Tensor counter = x.empty({1}, at::kInt);
  const SinglePassForwardArgs args = {.apply = apply,
                                      .merge = {.partials = nullptr,
                                                .rows = 4,
                                                .parts = apply.partition.parts,
                                                .parts_per_group = apply.partition.parts,
                                                .channels = x.shape.channels,
                                                .stats = stats.data_ptr(),
                                                .merged = nullptr,
                                                .weight = norm.weight.get(),
                                                .bias = norm.bias.get(),
                                                .eps = norm.eps},
                                      .partials = partials.data_ptr(),
                                      .config = *config,
                                      .counter = static_cast<unsigned*>(counter.data_ptr())};
  launch_single_pass_forward(x.dtype, args, stream);
  return true;
}

Tensor batch_norm_stats(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                        double eps) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, training, eps);
  return compute_stats(x, norm, training, device.stream());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_forward(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& residual_stats,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double eps, std::string_view activation,
    bool save_mask, double /*negative_slope*/) {
  const DeviceGuard device(input);
  const Stream stream = device.stream();
  const ActivationTensor x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, training, eps);
  const Residual added(x, residual, residual_stats);
  const Tensor output = at::empty_like(x.tensor), mask = x.empty_mask(save_mask);
  ApplyArgs args = apply_args(x, added, is_relu(activation), output.data_ptr(), mask);
  Tensor stats;
  if (x.shape.numel() == 0) {
    stats = folded_stats(x, norm, stream);
  } else if (!training) {
    stats = x.empty_stats();
    args.fold = norm.fold(x, stats);
    apply(x, args, stream);
  } else {
    stats = x.empty_stats();
    if (!try_single_pass_forward(x, norm, args, stats, stream)) {
      stats = compute_stats(x, norm, training, stream);
      args.stats = stats.const_data_ptr();
      apply(x, args, stream);
    }
  }
  return {restore_strides(output, input, x.tensor), stats, mask};
}

std::tuple<Tensor, Tensor> batch_norm_act_apply(const Tensor& input, const Tensor& stats,
                                                const OptionalTensor& residual,
                                                const OptionalTensor& residual_stats,
                                                std::string_view activation, bool save_mask,
                                                double /*negative_slope*/) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  const Residual added(x, residual, residual_stats);
  const Tensor saved = checked_stats(stats, x, "stats");
  const Tensor output = at::empty_like(x.tensor), mask = x.empty_mask(save_mask);
  ApplyArgs args = apply_args(x, added, is_relu(activation), output.data_ptr(), mask);
  args.stats = saved.const_data_ptr();
  apply(x, args, device.stream());
  return {restore_strides(output, input, x.tensor), mask};
}

void batch_norm_act_inference_(const Tensor& input, const OptionalTensor& residual,
                               const OptionalTensor& residual_stats, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& running_mean,
                               const Tensor& running_var, double eps, std::string_view activation,
                               double /*negative_slope*/) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  const Norm norm(x, weight, bias, running_mean, running_var, /*training=*/false, eps);
  const Residual added(x, residual, residual_stats);
  ApplyArgs args = apply_args(x, added, is_relu(activation), x.tensor.data_ptr(), {});
  args.fold = norm.fold(x, {});
  apply(x, args, device.stream());
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

// Compute the requested ones of dx, dresidual and the parameter gradients.
void run_backward(const ActivationTensor& x, BackwardArgs args, const ParameterGrads& grads, Stream stream) {
  if (x.shape.numel() == 0) return;
  args.count = static_cast<double>(x.shape.images * x.shape.pixels);
  const bool writes = args.dx != nullptr || args.dresidual != nullptr;
  const bool reduces = args.training || args.residual_training || grads.requested();
  args.partition = x.partition({args.dy, args.residual, args.dx, args.dresidual}, kMaxReductionUnits);
  const bool same_partition =
      args.partition.vector_size == x.partition({args.dy, args.residual}, kMaxReductionUnits).vector_size;
  if (const auto config = reduces && writes && same_partition
                              ? choose_single_pass_backward(x.dtype, args.partition)
                              : std::nullopt) {
    const Tensor partials = x.empty({args.partition.parts, args.sums_rows, x.shape.channels}, x.stats_type());
    const Tensor counter = x.empty({1}, at::kInt);
    args.partials = partials.data_ptr();
    launch_single_pass_backward(x.dtype,
                                {.backward = args,
                                 .grads = grads,
                                 .config = *config,
                                 .counter = static_cast<unsigned*>(counter.data_ptr())},
                                stream);
    return;
  }
  Tensor sums;
  if (reduces) {
    sums = compute_sums(x, args, stream, grads);
    args.sums = sums.data_ptr();
  }
  if (writes) {
    args.partition = x.partition({args.dy, args.residual, args.dx, args.dresidual}, kMaxElementwiseUnits);
    launch_dx(x.dtype, args, stream);
  }
}

// Return the tensor of a parameter's gradient, for run_backward() to fill: zeros if x is empty. Every
// gradient has memory of its own, since an operator's outputs must not share memory.
Tensor empty_parameter_grad(bool requested, const OptionalTensor& weight, const ActivationTensor& x) {
  const bool has_weight = weight && weight->defined();
  const at::ScalarType type = has_weight ? weight->scalar_type() : x.stats_type();
  if (!requested) return empty_placeholder(x.tensor, type);
  const auto options = x.tensor.options().dtype(type);
  return x.shape.numel() == 0 ? at::zeros({x.shape.channels}, options)
                              : at::empty({x.shape.channels}, options);
}

ParameterGrad parameter_grad(const Tensor& grad) {
  return {grad.numel() > 0 ? grad.data_ptr() : nullptr, dtype_of(grad, "weight")};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const OptionalTensor& relu_mask, bool training, std::string_view activation,
    std::array<bool, 4> output_mask, double /*negative_slope*/) {
  const auto [needs_input, needs_residual, needs_weight, needs_bias] = output_mask;
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output"), saved = checked_stats(stats, x, "stats");
  const Tensor dx = needs_input ? at::empty_like(x.tensor) : Tensor();
  const Tensor dresidual = needs_residual ? at::empty_like(x.tensor) : Tensor();
  BackwardArgs args = {};
  args.dy = dy.const_data_ptr(), args.x = x.data(), args.stats = saved.const_data_ptr();
  args.mask = checked_mask(relu_mask, x), args.relu = is_relu(activation);
  args.dx = mutable_data_or_null(dx), args.dresidual = mutable_data_or_null(dresidual);
  args.training = training && needs_input, args.sums_rows = 2;
  const Tensor dweight = empty_parameter_grad(needs_weight, weight, x),
               dbias = empty_parameter_grad(needs_bias, weight, x);
  run_backward(x, args, {.weight = parameter_grad(dweight), .bias = parameter_grad(dbias)}, device.stream());
  const auto output_or_placeholder = [&](const Tensor& gradient) {
    return gradient.defined() ? restore_strides(gradient, input, x.tensor)
                              : empty_placeholder(input, input.scalar_type());
  };
  return {output_or_placeholder(dx), output_or_placeholder(dresidual), dweight, dbias};
}

// Backward of act(bn(x) + bn(residual)).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_pair(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const Tensor& residual, const OptionalTensor& residual_weight, const Tensor& residual_stats,
    const OptionalTensor& relu_mask, bool training, bool residual_training, std::array<bool, 6> output_mask) {
  const auto [needs_input, needs_residual, needs_weight, needs_bias, needs_residual_weight,
              needs_residual_bias] = output_mask;
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output"), saved = checked_stats(stats, x, "stats");
  const Residual other(x, residual, residual_stats);
  const Tensor dx = needs_input ? at::empty_like(x.tensor) : Tensor();
  const Tensor dresidual = needs_residual ? at::empty_like(x.tensor) : Tensor();
  BackwardArgs args = {};
  args.dy = dy.const_data_ptr(), args.x = x.data(), args.stats = saved.const_data_ptr();
  args.residual = other.tensor.const_data_ptr(), args.residual_stats = other.stats.const_data_ptr();
  args.mask = checked_mask(relu_mask, x);
  args.dx = mutable_data_or_null(dx), args.dresidual = mutable_data_or_null(dresidual);
  args.training = training && needs_input, args.residual_training = residual_training && needs_residual;
  args.sums_rows = 3;
  const Tensor dweight = empty_parameter_grad(needs_weight, weight, x),
               dbias = empty_parameter_grad(needs_bias, weight, x),
               dresidual_weight = empty_parameter_grad(needs_residual_weight, residual_weight, x),
               dresidual_bias = empty_parameter_grad(needs_residual_bias, residual_weight, x);
  run_backward(x, args,
               {.weight = parameter_grad(dweight),
                .bias = parameter_grad(dbias),
                .residual_weight = parameter_grad(dresidual_weight),
                .residual_bias = parameter_grad(dresidual_bias)},
               device.stream());
  const auto output_or_placeholder = [&](const Tensor& gradient, const Tensor& original,
                                         const Tensor& dense) {
    return gradient.defined() ? restore_strides(gradient, original, dense)
                              : empty_placeholder(original, original.scalar_type());
  };
  return {output_or_placeholder(dx, input, x.tensor),
          output_or_placeholder(dresidual, residual, other.tensor),
          dweight,
          dbias,
          dresidual_weight,
          dresidual_bias};
}

// self += grad where the mask, in grad's memory order, is set.
void add_masked_(const Tensor& self, const Tensor& grad, const OptionalTensor& relu_mask) {
  const DeviceGuard device(grad);
  const ActivationTensor g(grad);
  const Tensor into = g.checked_like(self, "self");
  const uint8_t* mask = checked_mask(relu_mask, g);
  if (g.shape.numel() == 0) return;
  const ActivationShape matrix = {g.shape.rows(), g.shape.cols(), 1, true};
  const WorkPartition partition =
      partition_work(matrix, g.vector_size(matrix.channels, {into.const_data_ptr()}), kMaxElementwiseUnits);
  launch_add_masked(g.dtype,
                    {.partition = partition, .into = into.data_ptr(), .grad = g.data(), .mask = mask},
                    device.stream());
  if (!into.is_same(self)) self.copy_(into);
}

// Update the running statistics of all given norms with one launch per kMaxNorms norms. Non-contiguous
// tensors are updated through a contiguous copy.
void update_running_stats(at::TensorList running_mean, at::TensorList running_var, at::TensorList stats,
                          at::ArrayRef<double> momentum) {
  const size_t n = stats.size();
  TORCH_CHECK_VALUE(running_mean.size() == n && running_var.size() == n && momentum.size() == n,
                    "running_mean, running_var, momentum: expected as many entries as stats, ", n);
  if (n == 0) return;
  const DeviceGuard device(stats[0]);
  std::vector<Tensor> means(n), vars(n), batch_stats(n);
  for (size_t i = 0; i < n; ++i) {
    batch_stats[i] = stats[i].contiguous();
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
  for (size_t first = 0; first < n; first += UpdateRunningArgs::kMaxNorms) {
    const size_t last = std::min(n, first + UpdateRunningArgs::kMaxNorms);
    UpdateRunningArgs args = {};
    int64_t channels = 0;
    for (size_t i = first; i < last; ++i) {
      args.norms[i - first] = {means[i].data_ptr(),
                               vars[i].data_ptr(),
                               dtype_of(means[i], "running_mean"),
                               dtype_of(vars[i], "running_var"),
                               batch_stats[i].const_data_ptr(),
                               batch_stats[i].scalar_type() == at::kDouble,
                               batch_stats[i].size(1),
                               momentum[i]};
      channels = std::max(channels, batch_stats[i].size(1));
    }
    if (channels > 0) launch_update_running(args, static_cast<int>(last - first), channels, device.stream());
  }
  for (size_t i = 0; i < n; ++i) {
    if (!means[i].is_same(running_mean[i])) running_mean[i].copy_(means[i]);
    if (!vars[i].is_same(running_var[i])) running_var[i].copy_(vars[i]);
    // The dispatcher does not bump the version for operators of extensions. Autograd must detect the in-place
    // update if it saved one of these tensors.
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
