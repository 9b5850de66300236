// The tables of the batch norm kernels.
#pragma once

#include "cpu/isa/batch_norm_backward.h"
#include "cpu/isa/batch_norm_forward.h"

namespace fused_res::cpu {
namespace {

template <class T>
inline constexpr BatchNormActKernels batch_norm_act_nhwc = {
    moments_nhwc<T>,
    forward<T, Layout::kNhwc>,
    {reduce<ReduceNhwc, T, 1>, reduce<ReduceNhwc, T, 2>},
    {backward<T, Layout::kNhwc, 1>, backward<T, Layout::kNhwc, 2>}};
template <class T>
inline constexpr BatchNormActKernels batch_norm_act_nchw = {
    moments_nchw<T>,
    forward<T, Layout::kNchw>,
    {reduce<ReduceNchw, T, 1>, reduce<ReduceNchw, T, 2>},
    {backward<T, Layout::kNchw, 1>, backward<T, Layout::kNchw, 2>}};

}  // namespace
}  // namespace fused_res::cpu
