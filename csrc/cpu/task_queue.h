// Tasks for the threads of one parallel region, in stages. Free of torch: tests run the queue on std::thread
// under ThreadSanitizer.
#pragma once

#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_res::cpu {

// `stages` stages of size(stage) tasks. A stage begins when all tasks of the previous one are done: several
// stages in one region, because a region of two threads costs 1.2 us, and the end of a stage 0.2 us (libgomp,
// two cores). Threads fetch the next task when they have finished one, because tasks differ in length, and
// cores may be shared with other processes. Tasks are fetched in order, so what a thread waits for is always
// being computed by another one: any number of threads can work, even one.
//
// body(stage, begin, end) runs tasks [begin, end) of a stage, and does not throw.
template <class Size, class Body>
class TaskQueue {
 public:
  TaskQueue(int64_t stages, const Size& size, const Body& body) : stages_(stages), size_(size), body_(body) {}

  // Runs tasks until none is left. Every thread of the region calls it.
  void work() {
    int64_t stage = 0, first = 0,
            end = size_(0);  // the tasks [first, end) of the stage, counted through all stages
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      while (task >= end) {
        if (++stage == stages_) return;
        first = end, end += size_(stage);
      }
      while (done_.load(std::memory_order_acquire) < first) pause();
      body_(stage, task - first, task - first + 1);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  int64_t stages_;
  const Size& size_;
  const Body& body_;
  std::atomic<int64_t> next_ = 0, done_ = 0;
};

}  // namespace fused_res::cpu
