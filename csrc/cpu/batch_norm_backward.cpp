// The backward of act(bn(x) [+ residual]), where the residual may have a norm of its own. The kernels are in
// isa/batch_norm_backward.h, the scheme in partition.h.
#include <torch/library.h>

#include <array>
#include <span>
#include <tuple>

#include "cpu/batch_norm.h"

namespace fused_res::cpu {
namespace {

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
  const auto reduce = norm_kernels(x).reduce[norms.size() - 1];
  const auto backward = norm_kernels(x).backward[norms.size() - 1];
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

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("batch_norm_act_backward", TORCH_FN(batch_norm_act_backward));
  m.impl("batch_norm_act_backward_pair", TORCH_FN(batch_norm_act_backward_pair));
  m.impl("add_masked_", TORCH_FN(add_masked_));
}
