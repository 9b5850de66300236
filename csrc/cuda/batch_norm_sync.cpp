// Host side of the SyncBatchNorm operators: partial statistics of this process, merge of those of all
// processes, backward sums, and dx from the total sums. Also the helpers shared with batch_norm_act.cpp.
#include "cuda/batch_norm_sync.h"

#include <ATen/ops/zeros.h>

namespace fused_res::cuda {
namespace {

// Maximum number of parts that one launch merges into one. A convolution epilogue writes one part per row
// tile, which can be more; those are first merged in groups of kPartsPerGroup.
constexpr int64_t kMaxPartsPerMerge = 1024, kPartsPerGroup = 64;

int64_t merge_group_size(int64_t parts) { return parts <= kMaxPartsPerMerge ? parts : kPartsPerGroup; }

MergeArgs merge_args(const Tensor& partials) {
  const int64_t parts = partials.size(0);
  return {.partials = partials.const_data_ptr(),
          .rows = static_cast<int>(partials.size(1)),
          .parts = parts,
          .parts_per_group = merge_group_size(parts),
          .channels = partials.size(2),
          .stats = nullptr,
          .merged = nullptr,
          .weight = {},
          .bias = {},
          .eps = 0};
}

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == at::kDouble; }

Tensor merge_groups(const Tensor& partials, Stream stream) {
  MergeArgs args = merge_args(partials);
  const int64_t groups = ceil_div(args.parts, args.parts_per_group);
  const Tensor merged = at::empty({groups, 3, args.channels}, partials.options().dtype(at::kDouble));
  args.merged = merged.mutable_data_ptr<double>();
  launch_merge(is_double(partials), true, args, stream);
  return merged;
}

}  // namespace

Tensor merge_partial_stats(const Tensor& partials, Stream stream) {
  Tensor merged = partials;
  do merged = merge_groups(merged, stream);
  while (merged.size(0) > 1);
  return merged;
}

Tensor merge_to_stats(Tensor partials, const ChannelVector& weight, const ChannelVector& bias, double eps,
                      bool is_double, Stream stream) {
  while (partials.size(0) > kMaxPartsPerMerge) partials = merge_groups(partials, stream);
  const auto type = is_double ? at::kDouble : at::kFloat;
  Tensor stats = at::empty({5, partials.size(2)}, partials.options().dtype(type));
  MergeArgs args = merge_args(partials);
  args.stats = stats.data_ptr(), args.weight = weight.get(), args.bias = bias.get(), args.eps = eps;
  launch_merge(cuda::is_double(partials), is_double, args, stream);
  return stats;
}

Tensor sum_partials(const Tensor& partials, Stream stream, const ParameterGrads& grads) {
  Tensor sums = partials;
  const int64_t rows = partials.size(1), channels = partials.size(2);
  if (partials.size(0) == 1 && !grads.requested()) return partials.view({rows, channels});
  do {
    const int64_t parts = sums.size(0), group = merge_group_size(parts), groups = ceil_div(parts, group);
    const Tensor merged = at::empty({groups, rows, channels}, sums.options());
    launch_sum_partials(is_double(sums),
                        {.partials = sums.const_data_ptr(),
                         .sums = merged.data_ptr(),
                         .parts = parts,
                         .parts_per_group = group,
                         .width = rows * channels,
                         .grads = groups == 1 ? grads : ParameterGrads{},
                         .channels = channels},
                        stream);
    sums = merged;
  } while (sums.size(0) > 1);
  return sums.view({rows, channels});
}

Residual::Residual(const ActivationTensor& x, const OptionalTensor& residual,
                   const OptionalTensor& residual_stats) {
  if (residual && residual->defined()) tensor = x.checked_like(*residual, "residual");
  if (!residual_stats || !residual_stats->defined()) return;
  TORCH_CHECK_VALUE(tensor.defined(), "residual_stats: expected a residual with them");
  stats = checked_stats(*residual_stats, x, "residual_stats");
}

const uint8_t* checked_mask(const OptionalTensor& mask, const ActivationTensor& x) {
  if (!mask || !mask->defined()) return nullptr;
  check_device(*mask, x.tensor, "relu_mask");
  const int64_t bytes = x.shape.rows() * x.shape.mask_cols();
  TORCH_CHECK_VALUE(mask->scalar_type() == at::kByte && mask->is_contiguous() && mask->numel() == bytes,
                    "relu_mask: expected a contiguous uint8 tensor of ", bytes, " bytes, got ", mask->sizes(),
                    " of ", mask->scalar_type());
  return mask->const_data_ptr<uint8_t>();
}

Tensor compute_partials(const ActivationTensor& x, Stream stream) {
  const WorkPartition partition = x.partition({}, kMaxReductionUnits);
  Tensor partials = x.empty({partition.parts, 4, x.shape.channels}, x.stats_type());
  launch_partials(x.dtype, {.partition = partition, .x = x.data(), .partials = partials.data_ptr()}, stream);
  return partials;
}

Tensor compute_sums(const ActivationTensor& x, BackwardArgs args, Stream stream,
                    const ParameterGrads& grads) {
  args.partition = x.partition({args.dy, args.residual}, kMaxReductionUnits);
  const Tensor partials = x.empty({args.partition.parts, args.sums_rows, x.shape.channels}, x.stats_type());
  args.partials = partials.data_ptr();
  launch_sums(x.dtype, args, stream);
  return sum_partials(partials, stream, grads);
}

namespace {

Tensor batch_norm_partials(const Tensor& input) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  // As in PyTorch, an empty batch has no statistics. Zeros keep NaN out of the merge with other partial
  // statistics.
  if (x.shape.numel() == 0) return at::zeros({1, 3, x.shape.channels}, input.options().dtype(at::kDouble));
  return merge_partial_stats(compute_partials(x, device.stream()), device.stream());
}

Tensor merge_stats(const Tensor& partials, const OptionalTensor& weight, const OptionalTensor& bias,
                   double eps, bool is_double) {
  const DeviceGuard device(partials);
  const at::ScalarType type = partials.scalar_type();
  TORCH_CHECK_VALUE(
      partials.dim() == 3 && partials.size(0) > 0 && (partials.size(1) == 3 || partials.size(1) == 4) &&
          (type == at::kFloat || type == at::kDouble),
      "partials: expected (P, 3 or 4, C) of float32 or float64, got ", partials.sizes(), " of ", type);
  const int64_t channels = partials.size(2);
  const ChannelVector weights(weight, partials, channels, "weight"), biases(bias, partials, channels, "bias");
  if (channels == 0) return at::empty({5, 0}, partials.options().dtype(is_double ? at::kDouble : at::kFloat));
  return merge_to_stats(partials.contiguous(), weights, biases, eps, is_double, device.stream());
}

Tensor batch_norm_sums(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                       const OptionalTensor& relu_mask, std::string_view activation,
                       const OptionalTensor& residual, const OptionalTensor& residual_stats,
                       double /*negative_slope*/) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output"), saved = checked_stats(stats, x, "stats");
  const Residual added(x, residual, residual_stats);
  TORCH_CHECK_VALUE(added.tensor.defined() == added.stats.defined(),
                    "residual: expected together with residual_stats");
  BackwardArgs args = {};
  args.dy = dy.const_data_ptr(), args.x = x.data(), args.stats = saved.const_data_ptr();
  args.residual = data_or_null(added.tensor), args.residual_stats = data_or_null(added.stats);
  args.mask = checked_mask(relu_mask, x), args.relu = is_relu(activation);
  args.sums_rows = added.tensor.defined() ? 3 : 2;
  if (x.shape.numel() == 0) return at::zeros({args.sums_rows, x.shape.channels}, stats.options());
  return compute_sums(x, args, device.stream());
}

Tensor batch_norm_act_dx(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                         const OptionalTensor& relu_mask, std::string_view activation,
                         const OptionalTensor& sums, int64_t count, double /*negative_slope*/) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output"), saved = checked_stats(stats, x, "stats");
  const Tensor dense_sums = sums && sums->defined() ? sums->contiguous() : Tensor();
  if (dense_sums.defined()) {
    check_device(dense_sums, input, "sums");
    TORCH_CHECK_VALUE(dense_sums.dim() == 2 && dense_sums.size(0) == 2 &&
                          dense_sums.size(1) == x.shape.channels &&
                          dense_sums.scalar_type() == x.stats_type(),
                      "sums: expected (2, ", x.shape.channels, ") of ", x.stats_type(), ", got ",
                      dense_sums.sizes(), " of ", dense_sums.scalar_type());
  }
  const Tensor dx = at::empty_like(x.tensor);
  BackwardArgs args = {};
  args.dy = dy.const_data_ptr(), args.x = x.data(), args.stats = saved.const_data_ptr();
  args.mask = checked_mask(relu_mask, x), args.relu = is_relu(activation);
  args.sums = mutable_data_or_null(dense_sums), args.training = dense_sums.defined();
  args.dx = dx.data_ptr(), args.count = static_cast<double>(count);
  if (x.shape.numel() > 0) {
    args.partition = x.partition({args.dy, args.dx}, kMaxElementwiseUnits);
    launch_dx(x.dtype, args, device.stream());
  }
  return restore_strides(dx, input, x.tensor);
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) {
  m.impl("batch_norm_partials", TORCH_FN(batch_norm_partials));
  m.impl("merge_stats", TORCH_FN(merge_stats));
  m.impl("batch_norm_sums", TORCH_FN(batch_norm_sums));
  m.impl("batch_norm_act_dx", TORCH_FN(batch_norm_act_dx));
}

}  // namespace fused_res::cuda
