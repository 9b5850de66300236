// Dispatch of runtime dtype, vector size and layout to the template arguments of a kernel.
#pragma once

#include "cuda/tile_iterator.cuh"

namespace fused_res::cuda {

// Call f.template operator()<T>().
template <class F>
void dispatch_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f.template operator()<float>();
    case Dtype::kFloat64:
      return f.template operator()<double>();
    case Dtype::kBFloat16:
      return f.template operator()<__nv_bfloat16>();
    case Dtype::kFloat16:
      return f.template operator()<__half>();
  }
}

template <class T>
constexpr Dtype kDtype = Dtype::kFloat32;
template <>
inline constexpr Dtype kDtype<double> = Dtype::kFloat64;
template <>
inline constexpr Dtype kDtype<__nv_bfloat16> = Dtype::kBFloat16;
template <>
inline constexpr Dtype kDtype<__half> = Dtype::kFloat16;

// Call f.template operator()<T, n>() with n elements per access: one, or max_vector_size(dtype).
template <class F>
void dispatch_vector_size(Dtype dtype, int vector_size, const F& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    if (vector_size == 1) {
      f.template operator()<T, 1>();
    } else {
      f.template operator()<T, max_vector_size(kDtype<T>)>();
    }
  });
}

// Call f.template operator()<T, layout, n>().
template <class F>
void dispatch_layout(Dtype dtype, const WorkPartition& partition, const F& f) {
  dispatch_vector_size(dtype, partition.vector_size, [&]<class T, int n>() {
    if (partition.channels_last) {
      f.template operator()<T, Layout::kNhwc, n>();
    } else {
      f.template operator()<T, Layout::kNchw, n>();
    }
  });
}

}  // namespace fused_res::cuda
