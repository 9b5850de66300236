// What the operators' host sides share. They are plain C++: what launches kernels is in the .cu of the same
// name, free of torch, behind the functions of the .h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "common/layout.h"
#include "cuda/operands.h"

#ifndef FUSED_RES_SIMULATED
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// Simulated kernels run on CPU tensors and have a namespace of their own: both can be loaded in one process.
#ifdef FUSED_RES_SIMULATED
#define FUSED_RES_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(fused_res_sim, CPU, m)
#else
#define FUSED_RES_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(fused_res_cuda, CUDA, m)
#endif

namespace fused_res::cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// For as long as it lives, the tensor's device is the current one; kernels go to that device's current
// stream.
class OnDeviceOf {
 public:
#ifdef FUSED_RES_SIMULATED
  explicit OnDeviceOf(const Tensor&) {}
  Stream stream() const { return nullptr; }
#else
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.device()) {}
  Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

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

// Kernels read it with the pointers of `like`'s device.
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

inline const void* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// A tensor that was not asked for.
inline Tensor nothing(const Tensor& like, at::ScalarType dtype) {
  return at::empty({0}, like.options().dtype(dtype));
}

}  // namespace fused_res::cuda
