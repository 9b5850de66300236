// The kernel table of one instruction set. Compiled once per instruction set, whose name is FUSED_RES_ISA.
// The table is the only external symbol of this file; it is constant-initialized, so that no code of this
// file runs before the table is selected.
#include "cpu/isa/kernels.h"

#include "cpu/isa/batch_norm.h"
#if defined(__AVX2__)
#include "cpu/isa/conv_wgrad.h"
#include "cpu/isa/direct.h"
#include "cpu/isa/winograd.h"
#endif
#include "cpu/isa/fma_peak.h"
#include "cpu/isa/global_pool.h"
#include "cpu/isa/max_pool.h"

namespace fused_res::cpu {
namespace {

#if defined(__AVX2__)
inline constexpr ConvolutionKernels convolution = {
    .direct = {direct<float>, {}, direct<bfloat16>, direct<float16>},
    .winograd = {winograd<float>, {}, winograd<bfloat16>, winograd<float16>},
    .direct_wgrad = direct_wgrad,
    .winograd_wgrad = winograd_wgrad};
#endif

}  // namespace

#define FUSED_RES_PASTE(a, b) a##b
#define FUSED_RES_TABLE(isa) FUSED_RES_PASTE(kernels_, isa)
#define FUSED_RES_STRING(isa) FUSED_RES_QUOTE(isa)
#define FUSED_RES_QUOTE(isa) #isa

extern constexpr Kernels FUSED_RES_TABLE(FUSED_RES_ISA) = {
    .name = FUSED_RES_STRING(FUSED_RES_ISA),
#if defined(__AVX2__)
    .convolution = &convolution,
#else
    .convolution = nullptr,
#endif
    .bf16_convolution = nullptr,
    .batch_norm_act = {{batch_norm_act_nhwc<float>, batch_norm_act_nchw<float>},
                       {batch_norm_act_nhwc<double>, batch_norm_act_nchw<double>},
                       {batch_norm_act_nhwc<bfloat16>, batch_norm_act_nchw<bfloat16>},
                       {batch_norm_act_nhwc<float16>, batch_norm_act_nchw<float16>}},
    .max_pool = {{max_pool_nhwc<float>, max_pool_nchw<float>},
                 {max_pool_nhwc<double>, max_pool_nchw<double>},
                 {max_pool_nhwc<bfloat16>, max_pool_nchw<bfloat16>},
                 {max_pool_nhwc<float16>, max_pool_nchw<float16>}},
    .global_average_pool = {global_average_pool<float>, nullptr, global_average_pool<bfloat16>,
                            global_average_pool<float16>},
    .add_masked = {add_masked<float>, add_masked<double>, add_masked<bfloat16>, add_masked<float16>},
    .merge_partials = merge_partials,
    .add_partials = add_partials,
    .finalize_stats = {finalize_stats<float>, finalize_stats<double>},
    .finalize_backward = {finalize_backward<float>, finalize_backward<double>},
    .fma_loop = fma_loop,
};

}  // namespace fused_res::cpu
