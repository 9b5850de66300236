// Kernel launches, the only ones in the library: asynchronous, on a stream, with CUDA errors thrown as
// exceptions. A launch beyond the limits of the device throws before anything is launched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#ifdef FUSED_RES_SIMULATED
#include "simulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace fused_res::cuda {

// Return a grid of x by y by z threadblocks, or throw if it exceeds the limits, which are equal for all GPUs
// of compute capability 3.0 and newer. Only the first kernel of an operator can exceed them, so the operator
// throws before it has launched anything: statistics and apply have one threadblock per channel block at
// least, and split-K, whose reductions follow a GEMM, is used for outputs of few tiles only.
inline dim3 checked_grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  constexpr int64_t kMaxX = (int64_t{1} << 31) - 1, kMaxYZ = 65535;
  if (x < 1 || x > kMaxX || y < 1 || y > kMaxYZ || z < 1 || z > kMaxYZ) {
    throw std::runtime_error("grid: expected 1 to " + std::to_string(kMaxX) + " by " +
                             std::to_string(kMaxYZ) + " by " + std::to_string(kMaxYZ) +
                             " threadblocks, got " + std::to_string(x) + " by " + std::to_string(y) + " by " +
                             std::to_string(z));
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

#ifdef FUSED_RES_SIMULATED

using sim::fill_zero;
using sim::launch;
using sim::launch_cooperative;
using sim::resident_blocks;

#else

// Whether CUDA documents an error with "any further CUDA work will return the same error. To continue using
// CUDA, the process must be terminated and relaunched." cudaGetLastError() does not clear such an error.
inline bool is_sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorContained:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the error, so that the next launch does not report it again
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (is_sticky(error)) {
    message += ". A kernel launched earlier failed; CUDA cannot be used in this process anymore: restart it";
  }
  throw std::runtime_error(message);
}

// Properties of devices and kernels, queried once per process. Every entry is inserted when its query has
// succeeded. Launches come from any thread: autograd has one per device.
struct LaunchCache {
  std::mutex mutex;
  // By device and kernel: the device's maximum of dynamic shared memory, which the kernel is allowed to use.
  std::map<std::tuple<int, const void*>, size_t> max_shared;
  // By device, kernel, threads and shared memory.
  std::map<std::tuple<int, const void*, unsigned, size_t>, int> resident_blocks;

  static LaunchCache& instance() {
    static LaunchCache cache;
    return cache;
  }
};

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* what) {
  int value;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}

inline int current_device() {
  int device;
  check_cuda(cudaGetDevice(&device), "cannot query the current device");
  return device;
}

// Return the current device's maximum of dynamic shared memory per threadblock. More than 48 KB require an
// opt-in per kernel: the first call for a kernel and device opts in to the maximum. The limit is never
// lowered, because another thread, or a captured graph, may launch the kernel at any time.
inline size_t opt_in_to_max_shared_memory(const void* kernel) {
  const int device = current_device();
  LaunchCache& cache = LaunchCache::instance();
  const std::lock_guard lock(cache.mutex);
  if (const auto found = cache.max_shared.find({device, kernel}); found != cache.max_shared.end())
    return found->second;
  const int max_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device,
                                          "cannot query the shared memory limit of a threadblock");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared),
             "cannot set a kernel's shared memory limit");
  return cache.max_shared[{device, kernel}] = static_cast<size_t>(max_shared);
}

inline bool fits_in_shared_memory(const void* kernel, size_t shared) {
  constexpr size_t kLimitWithoutOptIn = 48 << 10;
  return shared <= kLimitWithoutOptIn || shared <= opt_in_to_max_shared_memory(kernel);
}

inline void check_shared_memory(const void* kernel, size_t shared) {
  if (fits_in_shared_memory(kernel, shared)) return;
  throw std::runtime_error("shared memory: expected at most " +
                           std::to_string(opt_in_to_max_shared_memory(kernel)) +
                           " bytes per threadblock, the limit of this GPU, got " + std::to_string(shared));
}

template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
            Arguments arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check_shared_memory(function, shared);
  void* parameters[] = {&arguments};
  check_cuda(cudaLaunchKernel(function, grid, dim3(threads), parameters, shared, stream),
             "cannot launch a kernel");
}

// Cooperative launch: all threadblocks are resident at the same time, as ptx::grid_barrier requires.
template <class Arguments>
void launch_cooperative(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared,
                        cudaStream_t stream, Arguments arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check_shared_memory(function, shared);
  void* parameters[] = {&arguments};
  check_cuda(cudaLaunchCooperativeKernel(function, grid, dim3(threads), parameters, shared, stream),
             "cannot launch a cooperative kernel");
}

// Return the number of threadblocks of a kernel that the current device runs at once: 0 if one needs too much
// shared memory.
template <class Arguments>
int resident_blocks(void (*kernel)(Arguments), unsigned threads, size_t shared) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (!fits_in_shared_memory(function, shared)) return 0;
  const int device = current_device();
  LaunchCache& cache = LaunchCache::instance();
  const std::lock_guard lock(cache.mutex);
  const std::tuple key(device, function, threads, shared);
  if (const auto found = cache.resident_blocks.find(key); found != cache.resident_blocks.end())
    return found->second;
  const int multiprocessors =
      device_attribute(cudaDevAttrMultiProcessorCount, device, "cannot query the number of multiprocessors");
  int blocks_per_multiprocessor;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, function,
                                                           static_cast<int>(threads), shared),
             "cannot query a kernel's occupancy");
  return cache.resident_blocks[key] = multiprocessors * blocks_per_multiprocessor;
}

inline void fill_zero(void* memory, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, stream), "cannot clear memory");
}

#endif

}  // namespace fused_res::cuda
