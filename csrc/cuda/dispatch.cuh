// From what the host knows to a template's arguments.
#pragma once

#include "cuda/walk.cuh"

namespace fused_res::cuda {

// f.template operator()<T>().
template <class F>
void with_type(Dtype dtype, const F& f) {
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

// f.template operator()<T, n>(), for elements one by one and in vectors.
template <class F>
void with_vector(Dtype dtype, int vector, const F& f) {
  with_type(dtype, [&]<class T>() {
    if (vector == 1) {
      f.template operator()<T, 1>();
    } else {
      f.template operator()<T, widest_vector(kDtype<T>)>();
    }
  });
}

// f.template operator()<T, layout, n>().
template <class F>
void with_walk(Dtype dtype, const Cut& cut, const F& f) {
  with_vector(dtype, cut.vector, [&]<class T, int n>() {
    if (cut.channels_last) {
      f.template operator()<T, Layout::kNhwc, n>();
    } else {
      f.template operator()<T, Layout::kNchw, n>();
    }
  });
}

}  // namespace fused_res::cuda
