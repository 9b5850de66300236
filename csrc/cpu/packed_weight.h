// Weights of the convolutions, packed into the panels that the kernels read.
#pragma once

#include <memory>

#include "cpu/convolution_host.h"

namespace fused_res::cpu {

// The weight of one convolution. Lives as long as the ConvolutionArgs whose `packed` or `weight` it sets.
class PackedWeight {
 public:
  // `weight`: packed by pack_conv_weight, of one dimension, or (K, C, kh, kw), which is packed here.
  PackedWeight(ConvolutionArgs& args, const Tensor& weight);
  // For a gradient with respect to the input (dgrad) of a convolution with this weight (K, C, kh, kw): input
  // and output channels are exchanged, and the taps are these, reversed.
  PackedWeight(ConvolutionArgs& args, const Tensor& weight, TapSubset rows, TapSubset columns);

 private:
  void set(ConvolutionArgs& args, const WeightView& view);

  Tensor memory_;
  std::unique_ptr<WeightView> view_;
};

}  // namespace fused_res::cpu
