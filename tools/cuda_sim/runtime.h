// Interface of the simulator's runtime: launches, shared memory, cp.async, barriers and warp collectives.
// device.cuh, ptx.cuh and launch.h call it, and cuda_builtins.h implements CUDA's built-ins with it.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <source_location>

struct CUstream_st;

namespace fused_res::cuda::sim {

using Site = std::source_location;
using Stream = CUstream_st*;

// --- launches ---

struct Launch {
  const void* kernel;
  void (*call)(const void* kernel, const void* arguments);  // runs one thread
  const void* arguments;
  size_t arguments_bytes;
  dim3 grid;
  unsigned threads;
  size_t shared;
  bool cooperative;
};

// Runs a kernel and returns when all of its threads have ended. Throws std::runtime_error if the launch
// configuration is invalid, or if the kernel violates a rule of the CUDA programming model.
void run(const Launch& launch);

template <class Arguments>
void run(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, const Arguments& arguments,
         bool cooperative) {
  const auto call = [](const void* any_kernel, const void* any_arguments) {
    reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(any_kernel))(
        *static_cast<const Arguments*>(any_arguments));
  };
  run({reinterpret_cast<const void*>(kernel), call, &arguments, sizeof(Arguments), grid, threads, shared,
       cooperative});
}

template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, Stream,
            Arguments arguments) {
  run(kernel, grid, threads, shared, arguments, false);
}

template <class Arguments>
void launch_cooperative(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, Stream,
                        Arguments arguments) {
  run(kernel, grid, threads, shared, arguments, true);
}

// Returns how many blocks can be resident at once on a GPU with the number of multiprocessors set by
// fused_res_sim_multiprocessors() and the H200's limits for each of them.
int resident_blocks(unsigned threads, size_t shared);

template <class Arguments>
int resident_blocks(void (*)(Arguments), unsigned threads, size_t shared) {
  return resident_blocks(threads, shared);
}

void fill_zero(void* memory, size_t bytes, Stream);

// --- memory ---

// The shared memory of the current block. An address is an offset from its beginning.
unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);

// Copies 16 bytes to shared memory: the first `bytes` are read from `global`, the others are zeros. The copy
// is done at the wait, with the contents of `global` at that time; until then `shared` holds NaN.
void cp_async(uint32_t shared, const void* global, int bytes);
void cp_async_commit_group();
void cp_async_wait_group(int groups);

// --- barriers and warp collectives ---

enum class Vote { kNone, kOr, kAnd, kCount };
int block_barrier(Vote vote, bool value, const char* what, Site site);

// Grid barrier, called by one thread per block: increments `*counter` and waits until it reaches `arrivals`,
// n * blocks at the n-th barrier.
void grid_barrier(unsigned* counter, unsigned arrivals, Site site = Site::current());

void warp_barrier(unsigned mask, Site site);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane, const char* what, Site site);
unsigned ballot(unsigned mask, bool value, const char* what, Site site);

void ldmatrix_x4(uint32_t (&registers)[4], uint32_t shared, bool transposed, Site site = Site::current());
// D += A B. `type`: "bf16" or "f16" for m16n8k16, or "tf32" for m16n8k8, which ignores the low 13 bits of its
// operands. Accumulates in double precision and rounds once, which is at least as accurate as any GPU.
void mma_sync(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* type,
              Site site = Site::current());

// Rounds to TF32 (10 bits of mantissa), ties away from zero.
uint32_t to_tf32(float x);

}  // namespace fused_res::cuda::sim
