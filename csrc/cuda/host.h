// What the operators' host sides share. They are plain C++: what launches kernels is in the .cu of the same
// name, free of torch, behind the functions of the .h.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensor.h"
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

inline const void* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// A tensor that was not asked for.
inline Tensor nothing(const Tensor& like, at::ScalarType dtype) {
  return at::empty({0}, like.options().dtype(dtype));
}

}  // namespace fused_res::cuda
