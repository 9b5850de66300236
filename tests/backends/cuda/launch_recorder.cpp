// csrc/cuda/launch.h on a recording stand-in for the CUDA runtime, compiled by g++ and driven from
// test_cuda_launch.py. The stand-in has two devices with different limits and behaves like the runtime where
// launch.h relies on it: a launch beyond the kernel's limit of dynamic shared memory fails, and an error is
// reported again by the next call until cudaGetLastError() clears it.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "cuda/launch.h"

namespace {

constexpr int kDevices = 2, kMultiprocessors[] = {132, 84}, kMaxShared[] = {227 << 10, 99 << 10};
constexpr size_t kLimitWithoutOptIn = 48 << 10;

struct Kernel {
  size_t limit[kDevices] = {kLimitWithoutOptIn, kLimitWithoutOptIn};
  int opt_ins[kDevices] = {}, launches[kDevices] = {};
};

std::mutex mutex;
std::map<const void*, Kernel> kernels;
thread_local int device = 0;
std::atomic<int> last_error = cudaSuccess;
std::atomic<int> lowered = 0, queries = 0;
const char* failing_call = "";  // this call fails with `failure`
cudaError_t failure = cudaSuccess;

cudaError_t result(const char* call, cudaError_t error = cudaSuccess) {
  if (std::strcmp(call, failing_call) == 0) error = failure;
  if (error == cudaSuccess) error = static_cast<cudaError_t>(last_error.load());
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t record_launch(const char* call, const void* kernel, size_t shared) {
  const std::lock_guard lock(mutex);
  Kernel& one = kernels[kernel];
  const cudaError_t error = result(call, shared > one.limit[device] ? cudaErrorInvalidValue : cudaSuccess);
  if (error == cudaSuccess) ++one.launches[device];
  return error;
}

struct Arguments {
  int value;
};
void first_kernel(Arguments) {}
void second_kernel(Arguments) {}

using KernelFunction = void (*)(Arguments);
KernelFunction kernel_of(int index) { return index == 0 ? first_kernel : second_kernel; }

std::string message;

template <class F>
const char* message_of(const F& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
  return "";
}

}  // namespace

extern "C" {

// --- the CUDA runtime ---

cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return result("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of) {
  ++queries;
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors[of] : kMaxShared[of];
  return result("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard lock(mutex);
  const cudaError_t error =
      result("cudaFuncSetAttribute", value > kMaxShared[device] ? cudaErrorInvalidValue : cudaSuccess);
  if (error != cudaSuccess) return error;
  Kernel& one = kernels[kernel];
  lowered += static_cast<size_t>(value) < one.limit[device];
  one.limit[device] = static_cast<size_t>(value);
  ++one.opt_ins[device];
  return error;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared) {
  ++queries;
  const int by_threads = 2048 / threads, by_shared = static_cast<int>((228 << 10) / (shared + (1 << 10)));
  *blocks = by_threads < by_shared ? by_threads : by_shared;
  return result("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t shared, cudaStream_t) {
  return record_launch("cudaLaunchKernel", kernel, shared);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t shared, cudaStream_t) {
  return record_launch("cudaLaunchCooperativeKernel", kernel, shared);
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return result("cudaMemsetAsync"); }
cudaError_t cudaGetLastError() {
  const auto error = static_cast<cudaError_t>(last_error.load());
  if (!fused_res::cuda::is_sticky(error)) last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? "illegal address" : "some error";
}

// --- for the test ---

void set_device(int index) { device = index; }
void fail(const char* call, int error) {
  failing_call = call;
  failure = static_cast<cudaError_t>(error);
}
int pending_error() { return last_error; }
int times_lowered() { return lowered; }
int driver_queries() { return queries; }
int sticky(int error) { return fused_res::cuda::is_sticky(static_cast<cudaError_t>(error)); }
int opt_ins(int index, int on) {
  return kernels[reinterpret_cast<const void*>(kernel_of(index))].opt_ins[on];
}
int launches(int index, int on) {
  return kernels[reinterpret_cast<const void*>(kernel_of(index))].launches[on];
}

// Return the message of the exception, or "".
const char* launch(int index, int64_t blocks, size_t shared, bool cooperative) {
  return message_of([&] {
    const dim3 grid = fused_res::cuda::checked_grid(blocks);
    const auto launch =
        cooperative ? fused_res::cuda::launch_cooperative<Arguments> : fused_res::cuda::launch<Arguments>;
    launch(kernel_of(index), grid, 256, shared, nullptr, {});
  });
}
const char* grid(int64_t x, int64_t y, int64_t z) {
  return message_of([&] { fused_res::cuda::checked_grid(x, y, z); });
}
const char* resident(int index, size_t shared, int* blocks) {
  return message_of([&] { *blocks = fused_res::cuda::resident_blocks(kernel_of(index), 256, shared); });
}

// Launch both kernels `repeats` times from `threads` threads on alternating devices, with every other size of
// shared memory above the limit without opt-in. Returns the number of exceptions.
int launch_from_threads(int threads, int repeats) {
  std::atomic<int> exceptions = 0;
  std::vector<std::thread> all;
  for (int thread = 0; thread < threads; ++thread) {
    all.emplace_back([&, thread] {
      set_device(thread % kDevices);
      for (int i = 0; i < repeats; ++i) {
        try {
          const size_t shared = i % 2 == 0 ? 90 << 10 : 60 << 10;
          fused_res::cuda::launch(kernel_of(i / 2 % 2), dim3(1), 256, shared, nullptr, Arguments{});
          fused_res::cuda::resident_blocks(kernel_of(i % 2), 256, shared);
        } catch (const std::runtime_error&) {
          ++exceptions;
        }
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  return exceptions;
}
}
