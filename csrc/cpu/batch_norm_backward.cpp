// Operators for the backward of act(bn(x) [+ residual]), where the residual may have its own norm. The
// kernels are in isa/batch_norm_backward.h, the two-pass scheme in partition.h.
#include <torch/library.h>

#include <array>
#include <span>
#include <string_view>
#include <tuple>

#include "cpu/batch_norm.h"

namespace fused_res::cpu {
namespace {

// Backward of one norm: its input, its saved statistics, and the requested gradients.
struct NormBackward {
  Tensor x, stats, dx, coefficients, dweight, dbias;
  at::ScalarType weight_type;

  // `norm_input`: the norm's input, converted to the memory format of the other operands.
  NormBackward(const ActivationTensor& like, const Tensor& norm_input, const Tensor& saved, const char* name,
               const OptionalTensor& weight, bool training, bool needs_input_grad, bool needs_weight_grad,
               bool needs_bias_grad)
      : x(norm_input), stats(checked_stats(saved, like, name)) {
    const int64_t channels = like.shape.channels;
    const at::ScalarType dtype = stats_type(x);
    weight_type = weight && weight->defined() ? weight->scalar_type() : dtype;
    const auto per_channel = [&](bool requested) {
      return requested ? at::detail::empty_cpu({channels}, dtype) : Tensor();
    };
    if (needs_input_grad) dx = empty_output(x);
    if (needs_input_grad && training) coefficients = at::detail::empty_cpu({2, channels}, dtype);
    dweight = per_channel(needs_weight_grad), dbias = per_channel(needs_bias_grad);
  }

  NormBackwardArgs args() const {
    return {.x = x.const_data_ptr(),
            .norm = norm_args(stats),
            .slope = coefficients.defined() ? matrix_row(coefficients, 0) : nullptr,
            .offset = coefficients.defined() ? matrix_row(coefficients, 1) : nullptr,
            .dx = mutable_data_or_null(dx)};
  }
  FinalizeBackwardArgs gradient_args() const {
    return {.stats = stats.const_data_ptr(),
            .slope = coefficients.defined() ? matrix_row(coefficients, 0) : nullptr,
            .offset = coefficients.defined() ? matrix_row(coefficients, 1) : nullptr,
            .dweight = mutable_data_or_null(dweight),
            .dbias = mutable_data_or_null(dbias)};
  }
  bool needs_reduction() const { return coefficients.defined() || dweight.defined() || dbias.defined(); }

  // The gradients as an operator returns them: an empty placeholder for one that was not requested.
  Tensor grad_input(const Tensor& input) const {
    return dx.defined() ? restore_strides(dx, input, x) : empty_placeholder(input.scalar_type());
  }
  Tensor grad_weight() const {
    return dweight.defined() ? dweight.to(weight_type) : empty_placeholder(weight_type);
  }
  Tensor grad_bias() const {
    return dbias.defined() ? dbias.to(weight_type) : empty_placeholder(weight_type);
  }
};

// Runs the reductions of all norms, if a requested gradient needs them, and the elementwise pass.
void run_backward(const ActivationTensor& x, const Tensor& dy, const OptionalTensor& relu_mask,
                  std::string_view activation, double negative_slope, std::span<const NormBackward> norms,
                  const Tensor& dresidual) {
  BackwardArgs args = {.dy = dy.const_data_ptr(),
                       .mask = checked_mask(relu_mask, x),
                       .norms = {},
                       .dresidual = mutable_data_or_null(dresidual),
                       .activation = parse_backward_activation(activation, relu_mask),
                       .negative_slope = negative_slope,
                       .stream = true};
  bool writes = false, needs_reduction = false;
  const auto note_output = [&](const Tensor& output) {
    if (!output.defined()) return;
    writes = true;
    args.stream = args.stream && use_streaming_stores(x, output);
  };
  note_output(dresidual);
  for (size_t i = 0; i < norms.size(); ++i) {
    args.norms[i] = norms[i].args();
    note_output(norms[i].dx);
    needs_reduction = needs_reduction || norms[i].needs_reduction();
  }
  if (x.shape.numel() == 0) {
    for (const NormBackward& norm : norms) {
      if (norm.dweight.defined()) norm.dweight.zero_();
      if (norm.dbias.defined()) norm.dbias.zero_();
    }
    return;
  }
  const auto reduce = norm_kernels(x).reduce[norms.size() - 1];
  const auto backward = norm_kernels(x).backward[norms.size() - 1];
  const Parallel parallel(x.shape.numel());
  if (!needs_reduction) {
    if (writes) one_pass(x.shape, parallel, [&](const Block& block) { backward(block, args); });
    return;
  }
  const auto rows = static_cast<int64_t>(1 + norms.size()), channels = x.shape.channels;
  const Partition partition(x.shape, rows * x.tensor.element_size(), parallel.threads());
  const auto partial = make_uninitialized(partition.chunks() * rows * channels);
  const auto count = static_cast<double>(x.shape.values_per_channel());
  two_passes(
      partition, parallel,
      [&](const Block& block, int64_t chunk) { reduce(block, args, &partial[chunk * rows * channels]); },
      [&](ChannelRange group) {
        add_chunks(kernels(), partition, partial.get(), rows, group);
        const double* sum_dy_xmu = partial.get();
        for (const NormBackward& norm : norms) {
          sum_dy_xmu += channels;
          kernels().finalize_backward[stats_index(x.tensor)](norm.gradient_args(), partial.get(), sum_dy_xmu,
                                                             count, channels, group.begin, group.end);
        }
      },
      [&](const Block& block) {
        if (writes) backward(block, args);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const OptionalTensor& relu_mask, bool training, std::string_view activation,
    std::array<bool, 4> output_mask, double negative_slope) {
  const auto [needs_input_grad, needs_residual_grad, needs_weight_grad, needs_bias_grad] = output_mask;
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output");
  const NormBackward norm(x, x.tensor, stats, "stats", weight, training, needs_input_grad, needs_weight_grad,
                          needs_bias_grad);
  const Tensor dresidual = needs_residual_grad ? empty_output(x.tensor) : Tensor();
  run_backward(x, dy, relu_mask, activation, negative_slope, {&norm, 1}, dresidual);
  return {norm.grad_input(input),
          needs_residual_grad ? restore_strides(dresidual, input, x.tensor)
                              : empty_placeholder(input.scalar_type()),
          norm.grad_weight(), norm.grad_bias()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_pair(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
    const Tensor& residual, const OptionalTensor& residual_weight, const Tensor& residual_stats,
    const OptionalTensor& relu_mask, bool training, bool residual_training, std::array<bool, 6> output_mask) {
  const auto [needs_input_grad, needs_residual_grad, needs_weight_grad, needs_bias_grad,
              needs_residual_weight_grad, needs_residual_bias_grad] = output_mask;
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output");
  const NormBackward norms[2] = {
      {x, x.tensor, stats, "stats", weight, training, needs_input_grad, needs_weight_grad, needs_bias_grad},
      {x, x.checked_like(residual, "residual"), residual_stats, "residual_stats", residual_weight,
       residual_training, needs_residual_grad, needs_residual_weight_grad, needs_residual_bias_grad}};
  run_backward(x, dy, relu_mask, "identity", /*negative_slope=*/0, norms, {});
  return {norms[0].grad_input(input), norms[1].grad_input(residual), norms[0].grad_weight(),
          norms[0].grad_bias(),       norms[1].grad_weight(),        norms[1].grad_bias()};
}

void add_masked_(const Tensor& self, const Tensor& grad, const OptionalTensor& relu_mask) {
  const ActivationTensor g(grad);
  const Tensor out = g.checked_like(self, "self");
  const uint8_t* mask = checked_mask(relu_mask, g);
  const auto add = kernels().add_masked[static_cast<int>(g.dtype)];
  Parallel{g.shape.numel()}(g.shape.rows(), [&](int64_t begin, int64_t end) {
    add(out.data_ptr(), g.tensor.const_data_ptr(), mask, begin, end, g.shape.cols());
  });
  if (!out.is_same(self)) self.copy_(out);
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("batch_norm_act_backward", TORCH_FN(batch_norm_act_backward));
  m.impl("batch_norm_act_backward_pair", TORCH_FN(batch_norm_act_backward_pair));
  m.impl("add_masked_", TORCH_FN(add_masked_));
}
