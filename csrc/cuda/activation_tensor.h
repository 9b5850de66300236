// Checked operator arguments of the batch norm and max pooling host code. Python validates the arguments of
// the public functions; the checks here cover what would make a kernel access invalid memory.
#pragma once

#include <ATen/ops/empty.h>

#include <initializer_list>

#include "cuda/host.h"
#include "cuda/work_partition.h"

namespace fused_res::cuda {

// An activation (N, C, ...) in one of the two layouts that the kernels support: contiguous or channels_last.
struct ActivationTensor {
  Tensor tensor;
  ActivationShape shape;
  Dtype dtype;

  explicit ActivationTensor(const Tensor& input) : dtype(dtype_of(input, "input")) {
    TORCH_CHECK_VALUE(input.dim() >= 2 && input.dim() <= 5,
                      "input: expected (N, C, ...) of 2 to 5 dimensions, got ", input.sizes());
    shape = {input.size(0), input.size(1), 1, is_channels_last(input)};
    for (int64_t d = 2; d < input.dim(); ++d) shape.pixels *= input.size(d);
    tensor = to_memory_format(input, shape.channels_last);
  }

  const void* data() const { return tensor.const_data_ptr(); }
  bool is_double() const { return dtype == Dtype::kFloat64; }
  at::ScalarType stats_type() const { return is_double() ? at::kDouble : at::kFloat; }

  // Return `other`, checked to have the same shape and dtype, in the same memory format.
  Tensor checked_like(const Tensor& other, const char* name) const {
    check_like(other, tensor, name);
    return to_memory_format(other, shape.channels_last);
  }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, tensor.options().dtype(type));
  }
  Tensor empty_stats() const { return empty({5, shape.channels}, stats_type()); }
  Tensor empty_mask(bool requested) const {
    return requested ? empty({shape.rows(), shape.mask_cols()}, at::kByte)
                     : empty_placeholder(tensor, at::kByte);
  }

  // Partition the work of a kernel that accesses x and `others` (null for an absent tensor).
  WorkPartition partition(std::initializer_list<const void*> others, int64_t max_units) const {
    return cuda::partition_work(shape, vector_size(shape.cols(), others), max_units);
  }
  // Return the number of elements per access: 16 bytes if rows of `cols` elements and all addresses allow it,
  // else one.
  int vector_size(int64_t cols, std::initializer_list<const void*> others) const {
    const int max_size = max_vector_size(dtype);
    const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    return cols % max_size == 0 && aligned(data()) && std::ranges::all_of(others, aligned) ? max_size : 1;
  }
};

// Return `stats`, checked to be (5, C) of the statistics dtype of x, contiguous.
inline Tensor checked_stats(const Tensor& stats, const ActivationTensor& x, const char* name) {
  check_device(stats, x.tensor, name);
  TORCH_CHECK_VALUE(stats.scalar_type() == x.stats_type() && stats.dim() == 2 && stats.size(0) == 5 &&
                        stats.size(1) == x.shape.channels,
                    name, ": expected (5, ", x.shape.channels, ") of ", x.stats_type(), ", got ",
                    stats.sizes(), " of ", stats.scalar_type());
  return stats.contiguous();
}

// An optional per-channel parameter of any floating-point dtype. Owns the contiguous tensor that get() points
// to.
class ChannelVector {
 public:
  ChannelVector(const OptionalTensor& tensor, const Tensor& like, int64_t channels, const char* name) {
    if (!tensor || !tensor->defined()) return;
    check_device(*tensor, like, name);
    TORCH_CHECK_VALUE(tensor->numel() == channels, name, ": expected ", channels,
                      " elements, one per channel, got ", tensor->sizes());
    dtype_ = dtype_of(*tensor, name);
    tensor_ = tensor->contiguous();
  }
  ChannelVector(const OptionalTensor& tensor, const ActivationTensor& x, const char* name)
      : ChannelVector(tensor, x.tensor, x.shape.channels, name) {}

  bool defined() const { return tensor_.defined(); }
  Parameter get() const { return {data_or_null(tensor_), dtype_}; }

 private:
  Tensor tensor_;
  Dtype dtype_ = Dtype::kFloat32;
};

}  // namespace fused_res::cuda
