// What the run time tells AddressSanitizer and ThreadSanitizer, which know nothing of fibers, of barriers and
// of copies made on a kernel's behalf. Without them everything here is empty.
//
// The run time itself is compiled without -fsanitize=thread (its own work is no thread's work), so that it
// cannot see from a predefined macro that the kernels are compiled with it.
#pragma once

#include <cstddef>

#ifdef FUSED_RES_SIM_THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range_pc(void* address, size_t size, void* pc);
void __tsan_write_range_pc(void* address, size_t size, void* pc);
}
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fused_res::cuda::sim {

#if defined(FUSED_RES_SIM_THREAD_SANITIZER) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

#ifdef FUSED_RES_SIM_THREAD_SANITIZER
constexpr bool kThreadSanitizer = true;
constexpr unsigned kNoSynchronisation = 1;  // by a switch of fibers
// The two halves of "what happened before here is visible there".
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }
// An access made for the kernel's code at `code`.
inline void reads(const void* at, size_t bytes, void* code) {
  __tsan_read_range_pc(const_cast<void*>(at), bytes, code);
}

// What a thread's cp.async are copied by: at the earliest when they are issued, and not before the thread has
// waited is any of it visible to it. So a copy is an access of another thread, which the issue comes before,
// and which comes before the wait.
class CopyEngine {
 public:
  void copy(void* to, size_t bytes, const void* from, size_t bytes_read, size_t group, void* code) {
    if (fiber_ == nullptr) fiber_ = __tsan_create_fiber(0);
    void* thread = __tsan_get_current_fiber();
    __tsan_release(fiber_);
    __tsan_switch_to_fiber(fiber_, kNoSynchronisation);
    __tsan_acquire(fiber_);
    __tsan_write_range_pc(to, bytes, code);
    if (bytes_read != 0) __tsan_read_range_pc(const_cast<void*>(from), bytes_read, code);
    __tsan_release(token(group));
    __tsan_switch_to_fiber(thread, kNoSynchronisation);
  }
  void wait(size_t group) {
    if (fiber_ != nullptr) __tsan_acquire(token(group));
  }

 private:
  // Addresses that nothing else is told of.
  void* token(size_t group) const { return static_cast<char*>(fiber_) + 1 + group; }

  void* fiber_ = nullptr;
};
#else
constexpr bool kThreadSanitizer = false;
inline void release(void*) {}
inline void acquire(void*) {}
inline void reads(const void*, size_t, void*) {}
struct CopyEngine {
  void copy(void*, size_t, const void*, size_t, size_t, void*) {}
  void wait(size_t) {}
};
#endif

#ifdef __SANITIZE_ADDRESS__
inline void poison(void* at, size_t bytes) { ASAN_POISON_MEMORY_REGION(at, bytes); }
inline void unpoison(void* at, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(at, bytes); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

}  // namespace fused_res::cuda::sim
