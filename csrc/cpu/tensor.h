// What the operators' host sides share: how a tensor looks to a kernel, where outputs come from, the parallel
// loop.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "common/tensor.h"
#include "cpu/output_memory.h"
#include "cpu/partition.h"

namespace fused_res::cpu {

inline at::ScalarType stats_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
// Index into the tables of functions on statistics.
inline int stats_index(const Tensor& tensor) { return tensor.scalar_type() == at::kDouble ? 1 : 0; }

// A tensor in one of the two layouts that kernels know.
struct Operand {
  Tensor tensor;
  Shape shape;
  Dtype dtype;
  at::MemoryFormat format;

  explicit Operand(const Tensor& input) {
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

  // Another tensor of the same shape, in the same order of memory.
  Tensor match(const Tensor& other, const char* name) const {
    check_like(other, tensor, name);
    return other.contiguous(format);
  }

  // The bytes of a mask row, and of the mask.
  int64_t mask_cols() const { return (shape.cols() + 7) / 8; }
  int64_t mask_bytes() const { return shape.rows() * mask_cols(); }
};

// Uninitialised outputs: of any size, and like an operand's tensor.
inline Tensor empty_output(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return Tensor(at::detail::empty_generic(sizes, output_allocator(), keys, dtype, format));
}
inline Tensor empty_output(const Tensor& like) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return Tensor(at::detail::empty_strided_generic(like.sizes(), like.strides(), output_allocator(), keys,
                                                  like.scalar_type()));
}

// A tensor that was not asked for.
inline Tensor nothing(at::ScalarType dtype) { return at::detail::empty_cpu({0}, dtype); }

// parallel(n, body) for partition.h. For fewer elements than ATen's own grain, waking a thread costs more
// than it brings.
struct Parallel {
  static constexpr int64_t kGrain = 32768;
  bool worthwhile;

  explicit Parallel(int64_t numel) : worthwhile(numel >= kGrain) {}
  int64_t threads() const { return worthwhile && !at::in_parallel_region() ? at::get_num_threads() : 1; }

  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    if (worthwhile) {
      at::parallel_for(0, n, 1, body);
    } else if (n > 0) {
      body(int64_t{0}, n);
    }
  }
};

}  // namespace fused_res::cpu
