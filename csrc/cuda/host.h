// Common base of the operators' host code. Host code is plain C++ on torch tensors; the kernels are launched
// by functions that the .h of an operator declares and the .cu of the same name defines, free of torch
// headers.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensor.h"
#include "cuda/kernel_args.h"

#ifndef FUSED_RES_SIMULATED
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// Simulated kernels run on CPU tensors under an operator namespace of their own, so that both libraries can
// be loaded in one process.
#ifdef FUSED_RES_SIMULATED
#define FUSED_RES_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(fused_res_sim, CPU, m)
#else
#define FUSED_RES_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(fused_res_cuda, CUDA, m)
#endif

namespace fused_res::cuda {

// Make the tensor's device the current one for the lifetime of the guard. stream() is that device's current
// stream, which the kernels are launched on.
class DeviceGuard {
 public:
#ifdef FUSED_RES_SIMULATED
  explicit DeviceGuard(const Tensor&) {}
  Stream stream() const { return nullptr; }
#else
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.device()) {}
  Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

// The kernels have no activation but ReLU and identity.
inline bool is_relu(std::string_view activation) {
  return parse_relu_or_identity(activation, "on the backend \"cuda\"") == Activation::kRelu;
}

inline const void* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// Return a tensor of zero elements, the placeholder of an absent output.
inline Tensor empty_placeholder(const Tensor& like, at::ScalarType dtype) {
  return at::empty({0}, like.options().dtype(dtype));
}

}  // namespace fused_res::cuda
