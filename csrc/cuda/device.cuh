// Common base of all device code. nvcc compiles it as CUDA; g++ compiles the same source against the CUDA
// simulator (tools/cuda_sim), which runs it on the CPU. Four rules make both possible: a kernel takes one
// struct by value and is not a static function; shared memory is dynamic and comes from shared_memory();
// inline PTX occurs only in ptx.cuh; kernels are launched only through launch.h.
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

constexpr int kWarpSize = 32;

// Return the threadblock's dynamic shared memory, aligned to 128 bytes.
__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return sim::shared_memory();
#endif
}

// Return the shared-state-space address of `pointer`, as the functions of ptx.cuh require it.
__device__ inline uint32_t shared_address(const void* pointer) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return sim::shared_address(pointer);
#endif
}

}  // namespace fused_res::cuda
