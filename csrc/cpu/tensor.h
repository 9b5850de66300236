// Helpers of the operators' host code: tensors as kernels read them, allocation of outputs, the parallel
// loop.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "common/tensor.h"
#include "cpu/output_allocator.h"
#include "cpu/partition.h"

namespace fused_res::cpu {

inline at::ScalarType stats_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
// Index into the kernel tables of functions on statistics: 0 for float, 1 for double.
inline int stats_index(const Tensor& tensor) { return tensor.scalar_type() == at::kDouble ? 1 : 0; }

// An activation (N, C, ...) in one of the two layouts that the kernels support.
struct ActivationTensor {
  Tensor tensor;
  Shape shape;
  Dtype dtype;
  at::MemoryFormat format;

  explicit ActivationTensor(const Tensor& input) {
    const int64_t dim = input.dim();
    TORCH_CHECK_VALUE(dim >= 2 && dim <= 5, "input: expected (N, C, ...) of 2 to 5 dimensions, got ",
                      input.sizes());
    dtype = dtype_of(input, "input");
    const bool channels_last = is_channels_last(input);
    const int64_t pixels = input.size(0) * input.size(1);
    shape = {input.size(0), input.size(1), 1, channels_last ? Layout::kNhwc : Layout::kNchw};
    for (int64_t d = 2; d < dim; ++d) shape.spatial *= input.size(d);
    const bool rows = channels_last && pixels != 0 && shape.spatial > 1;
    format = rows ? channels_last_of(dim) : at::MemoryFormat::Contiguous;
    tensor = input.contiguous(format);
  }

  // Another tensor, checked to have the same shape and dtype, in the same memory format.
  Tensor checked_like(const Tensor& other, const char* name) const {
    check_like(other, tensor, name);
    return other.contiguous(format);
  }

  // Bytes of a row of the mask, and of the whole mask.
  int64_t mask_cols() const { return (shape.cols() + 7) / 8; }
  int64_t mask_bytes() const { return shape.rows() * mask_cols(); }
};

// Uninitialized outputs from the output allocator, with given sizes or like another tensor.
inline Tensor empty_output(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return Tensor(at::detail::empty_generic(sizes, output_allocator(), keys, dtype, format));
}
inline Tensor empty_output(const Tensor& like) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return Tensor(at::detail::empty_strided_generic(like.sizes(), like.strides(), output_allocator(), keys,
                                                  like.scalar_type()));
}

// A tensor of 0 elements, returned for an output that was not requested.
inline Tensor empty_placeholder(at::ScalarType dtype) { return at::detail::empty_cpu({0}, dtype); }

// The parallel loop parallel(n, body) of partition.h. Below ATen's grain size, waking a thread costs more
// time than it saves.
struct Parallel {
  static constexpr int64_t kGrain = 32768;
  bool enabled;

  explicit Parallel(int64_t numel) : enabled(numel >= kGrain) {}
  int64_t threads() const { return enabled && !at::in_parallel_region() ? at::get_num_threads() : 1; }

  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    if (enabled) {
      at::parallel_for(0, n, 1, body);
    } else if (n > 0) {
      body(int64_t{0}, n);
    }
  }
};

}  // namespace fused_res::cpu
