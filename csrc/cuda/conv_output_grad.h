// Host side of conv_dgrad and conv_wgrad: checks the operator arguments that describe the gradient with
// respect to the convolution output and builds the arguments of its operand prologue.
#pragma once

#include "cuda/conv1x1_backward.h"
#include "cuda/convolution_host.h"

namespace fused_res::cuda {

// Return the data of a relu_mask in channels_last order, after checking it. For one channel, a channels_last
// tensor is also contiguous and its mask has the rows of a contiguous tensor, which the kernels do not read.
inline const uint8_t* checked_row_mask(const OptionalTensor& mask, const Tensor& like, const char* name) {
  if (!mask.has_value()) return nullptr;
  check_device(*mask, like, name);
  const int64_t channels = like.size(1), rows = like.numel() / channels, bytes = rows * ceil_div(channels, 8);
  TORCH_CHECK_VALUE(mask->scalar_type() == at::kByte && mask->is_contiguous() && mask->numel() == bytes, name,
                    ": expected a contiguous uint8 tensor of ", bytes, " bytes, got ", mask->sizes(), " of ",
                    mask->scalar_type());
  TORCH_CHECK_VALUE(channels > 1, name, ": there is no kernel for a mask of one channel");
  return mask->const_data_ptr<uint8_t>();
}

class ConvOutputGradOperands {
 public:
  // `grad_output`: gradient of the output of the norm after the convolution. `output`: the convolution
  // output, which is that norm's input. Without `output` and `stats`, `grad_output` is the gradient of the
  // convolution output itself.
  ConvOutputGradOperands(const Tensor& grad_output, const OptionalTensor& norm_input,
                         const OptionalTensor& stats, const OptionalTensor& relu_mask, bool relu,
                         const OptionalTensor& sums, int64_t count, const Tensor& weight) {
    const Tensor& output = norm_input.has_value() ? *norm_input : grad_output;
    check_4d_tensor(output, norm_input.has_value() ? "output" : "grad_output");
    check_4d_tensor(weight, "weight");
    check_like(grad_output, output, "grad_output");
    TORCH_CHECK_VALUE(norm_input.has_value() == stats.has_value(),
                      "stats: expected it with output, and only then");
    TORCH_CHECK_VALUE(norm_input.has_value() || !(relu_mask.has_value() || relu || sums.has_value()),
                      "output: expected a tensor with relu_mask, relu or sums");
    TORCH_CHECK_VALUE(weight.numel() > 0, "weight: expected at least one element, got ", weight.sizes());
    check_device(weight, output, "weight");
    TORCH_CHECK_TYPE(weight.scalar_type() == output.scalar_type(), "weight: expected the dtype of output, ",
                     output.scalar_type(), ", got ", weight.scalar_type());
    TORCH_CHECK_VALUE(weight.size(0) == output.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
                      "weight: expected (", output.size(1), ", channels, 1, 1), got ", weight.sizes());
    TORCH_CHECK_VALUE(!relu_mask.has_value() || is_channels_last(output),
                      "relu_mask: expected a channels_last output with it");
    const int64_t channels = output.size(1);
    dy_ = to_memory_format(grad_output, true);
    if (norm_input.has_value()) {
      z_ = to_memory_format(output, true);
      stats_ = aligned_channel_rows(*stats, output, 5, channels, "stats");
    }
    if (sums.has_value()) sums_ = aligned_channel_rows(*sums, output, 2, channels, "sums");
    TORCH_CHECK_VALUE(!sums.has_value() || count > 0, "count: expected a positive number, got ", count);
    args_.dy = dy_.const_data_ptr();
    args_.z = z_.defined() ? z_.const_data_ptr() : nullptr;
    args_.stats = stats_.defined() ? stats_.const_data_ptr<float>() : nullptr;
    args_.sums = sums_.defined() ? sums_.const_data_ptr<float>() : nullptr;
    args_.mask = checked_row_mask(relu_mask, output, "relu_mask");
    args_.relu = relu;
    args_.inv_count = sums_.defined() ? static_cast<float>(1.0 / static_cast<double>(count)) : 0.0f;
    args_.rows = output.numel() / channels;
    args_.channels = narrow(channels, "channels");
  }

  const ConvOutputGradArgs& args() const { return args_; }
  bool aligned() const {
    return args_.channels * dy_.element_size() % 16 == 0 && is_aligned(dy_) &&
           (!z_.defined() || is_aligned(z_));
  }

 private:
  Tensor dy_, z_, stats_, sums_;
  ConvOutputGradArgs args_ = {};
};

}  // namespace fused_res::cuda
