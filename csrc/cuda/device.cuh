// What device code is written in: CUDA under nvcc, and under g++ its simulation (tools/cuda_sim), which runs
// the same source on the CPU. Rules that keep both true: a kernel takes one struct by value and is no static
// function; shared memory is dynamic and comes from shared_memory(); no inline PTX outside ptx.cuh; no
// launch outside launch.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
#define FUSED_RES_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#else
#include "simulator.h"
#define FUSED_RES_KERNEL(threads, blocks) void
#endif

namespace fused_res::cuda {

constexpr int kWarp = 32;

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return sim::shared_memory();
#endif
}

// What ptx.cuh takes for a place in shared memory.
__device__ inline uint32_t shared_address(const void* pointer) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return sim::shared_address(pointer);
#endif
}

}  // namespace fused_res::cuda
