// The one place where a kernel is launched: checked, on a stream, without waiting for it.
#pragma once

#include <cstddef>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "simulator.h"
#endif

namespace fused_res::cuda {

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken notice of: the next launch shall not report it once more
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A block gets more than 48 KB only where the kernel was allowed to.
template <class Arguments>
void allow_shared_memory(void (*kernel)(Arguments), size_t shared) {
  constexpr size_t kAlways = 48 << 10;
  if (shared <= kAlways) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "cannot set a kernel's shared memory");
}

template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
            Arguments arguments) {
  allow_shared_memory(kernel, shared);
  void* parameters[] = {&arguments};
  check(cudaLaunchKernel(kernel, grid, dim3(threads), parameters, shared, stream), "cannot launch a kernel");
}

// All blocks run at once: what ptx::grid_barrier needs.
template <class Arguments>
void launch_cooperative(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared,
                        cudaStream_t stream, Arguments arguments) {
  allow_shared_memory(kernel, shared);
  void* parameters[] = {&arguments};
  check(cudaLaunchCooperativeKernel(kernel, grid, dim3(threads), parameters, shared, stream),
        "cannot launch a cooperative kernel");
}

// How many blocks of a kernel the current device can run at once: none where one is too large. The driver is
// asked once.
template <class Arguments>
int resident_blocks(void (*kernel)(Arguments), unsigned threads, size_t shared) {
  int device, most, multiprocessors, each;
  check(cudaGetDevice(&device), "cannot ask for the device");
  thread_local std::map<std::tuple<int, void (*)(Arguments), unsigned, size_t>, int> known;
  const auto [at, is_new] = known.try_emplace({device, kernel, threads, shared}, 0);
  if (!is_new) return at->second;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cannot ask for a block's shared memory");
  if (shared > static_cast<size_t>(most)) return 0;
  allow_shared_memory(kernel, shared);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cannot ask for the number of multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(threads), shared),
        "cannot ask for a kernel's occupancy");
  return at->second = multiprocessors * each;
}

inline void fill_zero(void* memory, size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "cannot clear memory");
}

#else

using sim::fill_zero;
using sim::launch;
using sim::launch_cooperative;
using sim::resident_blocks;

#endif

}  // namespace fused_res::cuda
