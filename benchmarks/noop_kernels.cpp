// CPU kernels of the operators of a residual block that only allocate their results: of convolutions, and
// with NOOP_NORMS of everything else.
//
// `launch-cost` loads them in order to time what leads to a kernel instead of the kernel: dispatch, autograd,
// allocation.

#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using std::optional;

#ifndef NOOP_NORMS

Tensor convolution(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  int64_t sizes[2];
  for (int i = 0; i < 2; i++) {
    const int64_t extent = dilation[i].expect_int() * (weight.size(i + 2) - 1) + 1;
    sizes[i] = (input.size(i + 2) + 2 * padding[i].expect_int() - extent) / stride[i].expect_int() + 1;
  }
  return at::empty({input.size(0), weight.size(0), sizes[0], sizes[1]},
                   input.options().memory_format(at::MemoryFormat::ChannelsLast));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input,
                                                        const Tensor& weight,
                                                        at::OptionalSymIntArrayRef bias_sizes,
                                                        c10::SymIntArrayRef, c10::SymIntArrayRef,
                                                        c10::SymIntArrayRef, bool, c10::SymIntArrayRef,
                                                        c10::SymInt, std::array<bool, 3> mask) {
  return {mask[0] ? at::empty_like(input) : Tensor(), mask[1] ? at::empty_like(weight) : Tensor(), Tensor()};
}

#else

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const optional<Tensor>& weight,
                                              const optional<Tensor>&, const optional<Tensor>& running_mean,
                                              const optional<Tensor>&, bool, double, double) {
  const auto options = input.options().dtype(at::kFloat);
  return {at::empty_like(input), at::empty({input.size(1)}, options), at::empty({input.size(1)}, options)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& input,
                                                       const optional<Tensor>& weight,
                                                       const optional<Tensor>&, const optional<Tensor>&,
                                                       const optional<Tensor>&, const optional<Tensor>&, bool,
                                                       double, std::array<bool, 3>) {
  return {at::empty_like(input), at::empty_like(*weight), at::empty_like(*weight)};
}

Tensor like(const Tensor& input) { return at::empty_like(input); }
Tensor add(const Tensor& input, const Tensor&, const at::Scalar&) { return at::empty_like(input); }
Tensor& in_place(Tensor& self) { return self; }
Tensor& add_(Tensor& self, const Tensor&, const at::Scalar&) { return self; }
Tensor threshold_backward(const Tensor& grad, const Tensor&, const at::Scalar&) {
  return at::empty_like(grad);
}
void foreach_add_(at::TensorList, const at::Scalar&) {}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, library) {
#ifndef NOOP_NORMS
  library.impl("convolution", convolution);
  library.impl("convolution_backward", convolution_backward);
#else
  library.impl("native_batch_norm", batch_norm);
  library.impl("native_batch_norm_backward", batch_norm_backward);
  library.impl("relu", like);
  library.impl("relu_", in_place);
  library.impl("add.Tensor", add);
  library.impl("add_.Tensor", add_);
  library.impl("threshold_backward", threshold_backward);
  library.impl("_foreach_add_.Scalar", foreach_add_);
#endif
}
