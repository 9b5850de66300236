// How the host sides of the norms and of the pooling look at the tensors they are given. Python has checked
// the arguments of the public functions; what is checked here is what a kernel would crash on.
#pragma once

#include <ATen/ops/empty.h>

#include <initializer_list>

#include "cuda/cut.h"
#include "cuda/host.h"

namespace fused_res::cuda {

// A tensor in one of the two layouts that kernels know.
struct Operand {
  Tensor tensor;
  Activation shape;
  Dtype dtype;

  explicit Operand(const Tensor& input) : dtype(dtype_of(input, "input")) {
    TORCH_CHECK_VALUE(input.dim() >= 2 && input.dim() <= 5,
                      "input: expected (N, C, ...) of 2 to 5 dimensions, got ", input.sizes());
    shape = {input.size(0), input.size(1), 1, is_channels_last(input)};
    for (int64_t d = 2; d < input.dim(); ++d) shape.pixels *= input.size(d);
    tensor = laid_out(input, shape.channels_last);
  }

  const void* data() const { return tensor.const_data_ptr(); }
  bool is_double() const { return dtype == Dtype::kFloat64; }
  at::ScalarType stats_type() const { return is_double() ? at::kDouble : at::kFloat; }

  // Another tensor of the same shape, in the same order of memory.
  Tensor match(const Tensor& other, const char* name) const {
    check_like(other, tensor, name);
    return laid_out(other, shape.channels_last);
  }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, tensor.options().dtype(type));
  }
  Tensor empty_stats() const { return empty({5, shape.channels}, stats_type()); }
  Tensor empty_mask(bool wanted) const {
    return wanted ? empty({shape.rows(), shape.mask_cols()}, at::kByte) : nothing(tensor, at::kByte);
  }

  // The work, for kernels that access these tensors beside x; those that are not there are skipped.
  Cut cut(std::initializer_list<const void*> others, int64_t most_units) const {
    return cuda::cut(shape, vector(shape.cols(), others), most_units);
  }
  // Elements of an access: 16 bytes where all addresses allow it.
  int vector(int64_t cols, std::initializer_list<const void*> others) const {
    const int widest = widest_vector(dtype);
    const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
    return cols % widest == 0 && aligned(data()) && std::ranges::all_of(others, aligned) ? widest : 1;
  }
};

inline Tensor checked_stats(const Tensor& stats, const Operand& x, const char* name) {
  check_device(stats, x.tensor, name);
  TORCH_CHECK_VALUE(stats.scalar_type() == x.stats_type() && stats.dim() == 2 && stats.size(0) == 5 &&
                        stats.size(1) == x.shape.channels,
                    name, ": expected (5, ", x.shape.channels, ") of ", x.stats_type(), ", got ",
                    stats.sizes(), " of ", stats.scalar_type());
  return stats.contiguous();
}

// A parameter of one number a channel, of any dtype, for as long as it lives; or none.
class ChannelVector {
 public:
  ChannelVector(const OptionalTensor& tensor, const Tensor& like, int64_t channels, const char* name) {
    if (!tensor || !tensor->defined()) return;
    check_device(*tensor, like, name);
    TORCH_CHECK_VALUE(tensor->numel() == channels, name, ": expected ", channels,
                      " elements, one a channel, got ", tensor->sizes());
    dtype_ = dtype_of(*tensor, name);
    tensor_ = tensor->contiguous();
  }
  ChannelVector(const OptionalTensor& tensor, const Operand& x, const char* name)
      : ChannelVector(tensor, x.tensor, x.shape.channels, name) {}

  bool defined() const { return tensor_.defined(); }
  Parameter get() const { return {data_or_null(tensor_), dtype_}; }

 private:
  Tensor tensor_;
  Dtype dtype_ = Dtype::kFloat32;
};

}  // namespace fused_res::cuda
