// Kernel launches, the only ones in the library: asynchronous, on a stream, with CUDA errors thrown as
// exceptions.
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

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the error, so that the next launch does not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Opt in to more than 48 KB of dynamic shared memory per threadblock.
template <class Arguments>
void set_max_dynamic_shared_memory(void (*kernel)(Arguments), size_t shared) {
  constexpr size_t kDefaultLimit = 48 << 10;
  if (shared <= kDefaultLimit) return;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
      "cannot set a kernel's shared memory limit");
}

template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
            Arguments arguments) {
  set_max_dynamic_shared_memory(kernel, shared);
  void* parameters[] = {&arguments};
  check_cuda(cudaLaunchKernel(kernel, grid, dim3(threads), parameters, shared, stream),
             "cannot launch a kernel");
}

// Cooperative launch: all threadblocks are resident at the same time, as ptx::grid_barrier requires.
template <class Arguments>
void launch_cooperative(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared,
                        cudaStream_t stream, Arguments arguments) {
  set_max_dynamic_shared_memory(kernel, shared);
  void* parameters[] = {&arguments};
  check_cuda(cudaLaunchCooperativeKernel(kernel, grid, dim3(threads), parameters, shared, stream),
             "cannot launch a cooperative kernel");
}

// Return the number of threadblocks of a kernel that the current device runs at once: 0 if one needs too much
// shared memory. The result of the driver queries is cached.
template <class Arguments>
int resident_blocks(void (*kernel)(Arguments), unsigned threads, size_t shared) {
  int device, max_shared, multiprocessors, blocks_per_multiprocessor;
  check_cuda(cudaGetDevice(&device), "cannot query the current device");
  thread_local std::map<std::tuple<int, void (*)(Arguments), unsigned, size_t>, int> cache;
  const auto [entry, is_new] = cache.try_emplace({device, kernel, threads, shared}, 0);
  if (!is_new) return entry->second;
  check_cuda(cudaDeviceGetAttribute(&max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cannot query the shared memory limit of a threadblock");
  if (shared > static_cast<size_t>(max_shared)) return 0;
  set_max_dynamic_shared_memory(kernel, shared);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "cannot query the number of multiprocessors");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel,
                                                           static_cast<int>(threads), shared),
             "cannot query a kernel's occupancy");
  return entry->second = multiprocessors * blocks_per_multiprocessor;
}

inline void fill_zero(void* memory, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, stream), "cannot clear memory");
}

#else

using sim::fill_zero;
using sim::launch;
using sim::launch_cooperative;
using sim::resident_blocks;

#endif

}  // namespace fused_res::cuda
