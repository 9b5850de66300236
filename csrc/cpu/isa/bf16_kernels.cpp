// The kernels with bfloat16 products of one instruction set, amx or avx512_bf16, as a table. Everything else
// of these instruction sets is that of avx512. The rules of kernels.cpp hold: the table is the only external
// symbol.
#include "cpu/isa/batch_norm.h"
#include "cpu/isa/conv_wgrad_bf16.h"
#include "cpu/isa/direct_bf16.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/max_pool.h"
#include "cpu/isa/pack_bf16.h"

namespace fused_res::cpu {

#define FUSED_RES_PASTE(a, b) a##b
#define FUSED_RES_TABLE(isa) FUSED_RES_PASTE(bf16_kernels_, isa)

extern constexpr Bf16ConvolutionKernels FUSED_RES_TABLE(FUSED_RES_ISA) = {
    .pack = direct_bf16_pack,
    .run = direct_bf16_run,
    .weight_gradient = wgrad_bf16,
    .tiles = kTiles,
    .batch_norm_act = {batch_norm_act_nhwc<bfloat16>, batch_norm_act_nchw<bfloat16>},
    .max_pool = {max_pool_nhwc<bfloat16>, max_pool_nchw<bfloat16>},
    .dot_loop = dot_loop,
};

}  // namespace fused_res::cpu
