// What the simulated kernels and their launchers call: device.cuh, ptx.cuh and launch.h name these functions,
// and words.h makes CUDA's own from them.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <source_location>

struct CUstream_st;

namespace fused_res::cuda::sim {

using Site = std::source_location;
using Stream = CUstream_st*;

// --- launches
// -----------------------------------------------------------------------------------------------

struct Launch {
  const void* kernel;
  void (*call)(const void* kernel, const void* arguments);  // one thread
  const void* arguments;
  size_t arguments_bytes;
  dim3 grid;
  unsigned threads;
  size_t shared;
  bool cooperative;
};

// Returns when all threads have. Throws std::runtime_error where CUDA would not launch the kernel, or where
// the kernel breaks a rule.
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

// Of a GPU as large as fused_res_sim_multiprocessors() says, with the H200's limits for each of them.
int resident_blocks(unsigned threads, size_t shared);

template <class Arguments>
int resident_blocks(void (*)(Arguments), unsigned threads, size_t shared) {
  return resident_blocks(threads, shared);
}

void fill_zero(void* memory, size_t bytes, Stream);

// --- memory
// -------------------------------------------------------------------------------------------------

// Of the running block. An address is the distance from its beginning.
unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);

// 16 bytes, of which the first `bytes` are read and the others are zeros. What is read is what `global` holds
// at the wait; until then `shared` holds NaN.
void copy_async(uint32_t shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int groups);

// --- threads that meet
// --------------------------------------------------------------------------------------

enum class Vote { kNone, kOr, kAnd, kCount };
int block_barrier(Vote vote, bool value, const char* what, Site site);

// `arrivals` blocks, each with one thread.
void grid_barrier(unsigned* counter, unsigned arrivals, Site site = Site::current());

void warp_barrier(unsigned mask, Site site);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane, const char* what, Site site);
unsigned ballot(unsigned mask, bool value, const char* what, Site site);
unsigned reduce(unsigned mask, unsigned value, unsigned (*operation)(unsigned, unsigned), const char* what,
                Site site);

void load_matrices(uint32_t (&registers)[4], uint32_t shared, bool transposed, Site site = Site::current());
// `type`: "bf16" or "f16", m16n8k16, or "tf32", m16n8k8, of whose operands the last 13 bits are not seen.
// Products and their sum are formed in double precision and rounded once: at least as exact as any GPU.
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* type,
                  Site site = Site::current());

// The nearest number of 10 bits, ties away from zero.
uint32_t to_tf32(float x);

}  // namespace fused_res::cuda::sim
