// All inline PTX, for sm_80 and newer: cp.async, ldmatrix, mma.sync, TF32 conversion, vector stores and the
// grid barrier. Each wrapper calls its counterpart in the CUDA simulator (tools/cuda_sim) when g++ compiles
// it.
//
// Register fragments of mma.sync, as in the PTX ISA manual, with group = lane / 4 and pair = lane % 4:
//   m16n8k16, 16-bit:
//     a[0..3]: rows group, group + 8, group, group + 8; columns 2 pair + {0, 1}, and 8 more in a[2] and a[3];
//     b[0..1]: column group; rows 2 pair + {0, 1}, and 8 more in b[1];
//     d[0..1]: row group, columns 2 pair + {0, 1}; d[2..3]: row group + 8, the same columns.
//   m16n8k8, TF32:
//     a[0..3]: rows group, group + 8, group, group + 8; columns pair, and pair + 4 in a[2] and a[3];
//     b[0..1]: column group; rows pair and pair + 4;
//     d as above.
#pragma once

#include <string.h>

#include "cuda/device.cuh"

namespace fused_res::cuda::ptx {

// Start an asynchronous copy of 16 bytes from global to shared memory, bypassing L1. If not `valid`, write 16
// zero bytes and read nothing; `global` should then still be an address within the tensor.
__device__ inline void cp_async(uint32_t shared, const void* global, bool valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  sim::cp_async(shared, global, valid ? 16 : 0);
#endif
}

// Commit this thread's pending copies as one group.
__device__ inline void cp_async_commit_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  sim::cp_async_commit_group();
#endif
}

// Wait until at most the last `groups` groups of this thread's copies are pending. The copies of other
// threads are visible only after a barrier.
template <int groups>
__device__ inline void cp_async_wait_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
  sim::cp_async_wait_group(groups);
#endif
}

// Load four 8x8 matrices of 16-bit elements. Lane l supplies the address of row l % 8 of matrix l / 8 and
// receives row l / 4, columns 2 (l % 4) + {0, 1} of each matrix.
__device__ inline void ldmatrix_x4(uint32_t (&registers)[4], uint32_t shared) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared)
               : "memory");
#else
  sim::ldmatrix_x4(registers, shared, false);
#endif
}

// As ldmatrix_x4, with each matrix transposed.
__device__ inline void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t shared) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared)
               : "memory");
#else
  sim::ldmatrix_x4(registers, shared, true);
#endif
}

// Compute d += a * b on tensor cores. T: operand type; uint32_t stands for TF32.
template <class T>
__device__ void mma_sync(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef __CUDACC__
#define FUSED_RES_MMA(T, SHAPE, TYPE)                                                                 \
  template <>                                                                                         \
  __device__ inline void mma_sync<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                              \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
  }
#else
#define FUSED_RES_MMA(T, SHAPE, TYPE)                                                      \
  template <>                                                                              \
  inline void mma_sync<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    sim::mma_sync(d, a, b, TYPE);                                                          \
  }
#endif
FUSED_RES_MMA(__nv_bfloat16, "m16n8k16", "bf16")
FUSED_RES_MMA(__half, "m16n8k16", "f16")
FUSED_RES_MMA(uint32_t, "m16n8k8", "tf32")
#undef FUSED_RES_MMA

// Round to the nearest TF32 value, ties away from zero.
__device__ inline uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return sim::to_tf32(x);
#endif
}

// Store 16 bytes to global memory in one access. nvcc combines the element stores of a vector only sometimes.
__device__ inline void store_16_bytes(void* global, const void* bytes) {
#ifdef __CUDACC__
  uint4 words;
  memcpy(&words, bytes, sizeof(words));
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  struct alignas(16) Access {
    unsigned char bytes[16];
  };
  *static_cast<Access*>(global) = *static_cast<const Access*>(bytes);
#endif
}

// Make the compiler reload values from memory after this point instead of keeping them in registers, which
// would exceed the register budget.
__device__ inline void compiler_memory_barrier() { asm volatile("" ::: "memory"); }

// Barrier over all threadblocks of a cooperative launch: wait until `arrivals` threadblocks in total have
// incremented the counter. What they wrote to global memory before is visible afterwards. The counter starts
// at 0 and is never reset: the n-th barrier of b threadblocks waits for n * b.
__device__ inline void grid_barrier(unsigned* counter, unsigned arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
#ifdef __CUDACC__
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    unsigned arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    } while (arrived < arrivals);
#else
    sim::grid_barrier(counter, arrivals);
#endif
  }
  __syncthreads();
}

}  // namespace fused_res::cuda::ptx
