// Host-side tensor helpers of all backends: dtype, memory format, and checks against another tensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "common/activation.h"
#include "common/dtype.h"

namespace fused_res {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected a floating point tensor, got ", tensor.scalar_type());
  }
}

inline Activation parse_activation(std::string_view name) {
  if (name == "identity") return Activation::kIdentity;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK_VALUE(false, "activation: expected identity, relu, relu6, leaky_relu or silu, got ", name);
}

// `context` says where only these two are supported.
inline Activation parse_relu_or_identity(std::string_view name, const char* context) {
  const Activation activation = parse_activation(name);
  TORCH_CHECK_VALUE(activation == Activation::kRelu || activation == Activation::kIdentity,
                    "activation: expected identity or relu ", context, ", got ", name);
  return activation;
}

// Kernels dereference the tensor's pointer on the device of `like`.
inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, ": expected a tensor on the input's device, ",
                    like.device(), ", got ", tensor.device());
}

inline void check_like(const Tensor& tensor, const Tensor& like, const char* name) {
  check_device(tensor, like, name);
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), name, ": expected the shape of input, ", like.sizes(),
                    ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), name, ": expected the dtype of input, ",
                   like.scalar_type(), ", got ", tensor.scalar_type());
}

inline const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
inline void* mutable_data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr() : nullptr;
}

inline at::MemoryFormat channels_last_of(int64_t dim) {
  return dim == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

// True if kernels process the tensor as rows of channels (NHWC). The same rule as
// fused_res.ops.memory_format.is_channels_last.
inline bool is_channels_last(const Tensor& input) {
  if (input.dim() == 2) return true;
  if (input.size(1) == 1) return false;
  if (std::all_of(input.sizes().begin() + 2, input.sizes().end(), [](int64_t size) { return size == 1; }))
    return true;
  return input.dim() > 3 && !input.is_contiguous() && input.is_contiguous(channels_last_of(input.dim()));
}

// `input` in channels_last memory format, or contiguous; the same tensor if it already is.
inline Tensor to_memory_format(const Tensor& input, bool channels_last) {
  const bool use_channels_last = channels_last && input.dim() > 3;
  return input.contiguous(use_channels_last ? channels_last_of(input.dim()) : at::MemoryFormat::Contiguous);
}

// Returns `output` with the strides that PyTorch gives an output for `input`: copied to the strides of
// `input` if the kernels read a copy of it, else unchanged. `kernel_input`: the tensor that the kernels read.
inline Tensor restore_strides(const Tensor& output, const Tensor& input, const Tensor& kernel_input) {
  return kernel_input.is_same(input) ? output : at::empty_like(input).copy_(output);
}

}  // namespace fused_res
