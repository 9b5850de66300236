// Operator for the gradient of a convolution's weight (wgrad), for float32 images in channels_last memory.
// The kernels are in isa/conv_wgrad.h, the tasks in conv_wgrad.h.
#include "cpu/conv_wgrad.h"

#include <torch/library.h>

#include "cpu/convolution_host.h"

namespace fused_res::cpu {
namespace {

// True for rows that are a multiple of 2 KB apart, which alias in two sets of the L1.
bool aliases_l1_sets(int64_t channels) { return channels % 512 == 0; }

Tensor conv_weight_gradient(const Tensor& grad, const Tensor& input, const Tensor& weight,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                            bool winograd) {
  TORCH_CHECK_VALUE(input.dim() == 4 && grad.dim() == 4 && weight.dim() == 4,
                    "input: expected (N, C, H, W), got ", input.sizes(), " for a gradient of ", grad.sizes(),
                    " and a weight of ", weight.sizes());
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor dz = grad.contiguous(at::MemoryFormat::ChannelsLast);
  WeightGradientArgs args = {};
  ConvolutionArgs& shape = args.convolution;
  shape.images = x.size(0), shape.channels = x.size(1), shape.height = x.size(2), shape.width = x.size(3);
  shape.out_channels = dz.size(1);
  set_geometry(shape, weight.sizes().slice(2), stride, padding, dilation);
  TORCH_CHECK_VALUE(shape.images == dz.size(0) && weight.size(0) == shape.out_channels &&
                        weight.size(1) == shape.channels && shape.out_height == dz.size(2) &&
                        shape.out_width == dz.size(3) && dz.numel() > 0 && x.numel() > 0,
                    "grad_output: expected the gradient of this convolution, got ", grad.sizes(),
                    " for an input of ", input.sizes(), " and a weight of ", weight.sizes());
  TORCH_CHECK_VALUE(!winograd || supports_winograd(shape),
                    "weight: Winograd supports 3x3 kernels with stride 1 or 2, got ", weight.sizes());
  shape.tile = winograd ? 4 : 0;
  shape.needs_im2col = shape.needs_im2col || aliases_l1_sets(shape.channels);
  args.pack_dz = shape.out_channels % kPanelWidth != 0 || aliases_l1_sets(shape.out_channels);
  shape.x = float_data(x, "input"), args.dz = float_data(dz, "grad_output");
  Tensor dweight = empty_output(weight);
  float_data(dweight, "weight");
  args.dweight = dweight.data_ptr<float>();
  args.output_stride = dweight.stride(0), args.channel_stride = dweight.stride(1);
  args.row_stride = dweight.stride(2), args.column_stride = dweight.stride(3);
  const DynamicParallel parallel(dz.numel() * gemm_k(shape));
  const WeightGradientTasks tasks(args);
  Scratch scratch(tasks.scratch(parallel.threads()) * sizeof(float));
  tasks.run(convolution_kernels(), reinterpret_cast<float*>(scratch.data()), parallel);
  return dweight;
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  m.impl("conv_weight_gradient", TORCH_FN(fused_res::cpu::conv_weight_gradient));
}
