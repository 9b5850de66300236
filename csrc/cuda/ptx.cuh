// All inline PTX, for sm_80 and newer, each instruction beside its simulation.
//
// Layouts of fragments, as in the PTX manual, with group = lane / 4 and pair = lane % 4:
//   m16n8k16, 16-bit: a[0..3] hold rows (group, group + 8, group, group + 8), columns 2 pair + {0, 1} and, in
//   a[2] and
//     a[3], 8 more; b[0..1] hold column group, rows 2 pair + {0, 1} and 8 more; the sums d[0..1] are row
//     group, columns 2 pair + {0, 1}, and d[2..3] the same of row group + 8.
//   m16n8k8, TF32: a[0..3] hold rows (group, group + 8, group, group + 8), columns pair and, in a[2] and
//   a[3], pair + 4;
//     b[0..1] hold column group, rows pair and pair + 4; the sums as above.
#pragma once

#include <string.h>

#include "cuda/device.cuh"

namespace fused_res::cuda::ptx {

// Copies 16 bytes to shared memory, without waiting and past L1, or zeros where not `valid` (nothing is read
// then, but `global` should be an address of the tensor).
__device__ inline void copy_async(uint32_t shared, const void* global, bool valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  sim::copy_async(shared, global, valid ? 16 : 0);
#endif
}

// Ends a group of this thread's copies.
__device__ inline void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  sim::copy_async_commit();
#endif
}

// Waits for this thread's own copies, but for the last `groups` groups; other threads' need a barrier behind
// it.
template <int groups>
__device__ inline void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
  sim::copy_async_wait(groups);
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8 and receives,
// of each matrix, row l / 4, columns 2 (l % 4) + {0, 1}.
__device__ inline void load_matrices(uint32_t (&registers)[4], uint32_t shared) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared)
               : "memory");
#else
  sim::load_matrices(registers, shared, false);
#endif
}

// The same, each matrix transposed.
__device__ inline void load_matrices_transposed(uint32_t (&registers)[4], uint32_t shared) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared)
               : "memory");
#else
  sim::load_matrices(registers, shared, true);
#endif
}

// d += a * b on tensor cores. T: the operands' type; uint32_t stands for TF32.
template <class T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef __CUDACC__
#define FUSED_RES_MMA(T, SHAPE, TYPE)                                                                     \
  template <>                                                                                             \
  __device__ inline void multiply_add<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }
#else
#define FUSED_RES_MMA(T, SHAPE, TYPE)                                                          \
  template <>                                                                                  \
  inline void multiply_add<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    sim::multiply_add(d, a, b, TYPE);                                                          \
  }
#endif
FUSED_RES_MMA(__nv_bfloat16, "m16n8k16", "bf16")
FUSED_RES_MMA(__half, "m16n8k16", "f16")
FUSED_RES_MMA(uint32_t, "m16n8k8", "tf32")
#undef FUSED_RES_MMA

// The nearest TF32 number, ties away from zero.
__device__ inline uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return sim::to_tf32(x);
#endif
}

// To global memory, in one access: stores of a vector's elements nvcc joins only now and then.
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

// What is in memory is read again behind it, where the compiler would have held it in registers, too many.
__device__ inline void reread_memory() { asm volatile("" ::: "memory"); }

// Waits until `arrivals` threads in all have come here with this counter, one for each block of a cooperative
// launch; what they wrote to global memory before is visible behind it. The counter is 0 at the start and
// never goes back: the n-th barrier of b blocks waits for n * b.
__device__ inline void grid_barrier(unsigned* counter, unsigned arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
#ifdef __CUDACC__
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < arrivals);
#else
    sim::grid_barrier(counter, arrivals);
#endif
  }
  __syncthreads();
}

}  // namespace fused_res::cuda::ptx
