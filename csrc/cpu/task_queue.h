// Tasks for the threads of one parallel region, in stages. Free of torch: tests run the queue on std::thread
// under ThreadSanitizer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_res::cpu {

// `stages` stages of size(stage) tasks. A stage begins when all tasks of the previous one are done: several
// stages in one region, because a region of two threads costs 1.2 us, and the end of a stage 0.2 us (libgomp,
// two cores).
//
// A thread runs the tasks of its own range first, the same part of every layer, so that it reads what it
// wrote: ResNet-18 at batch 1 takes 0.88 of the time in float32, and where the two cores do not share an L3,
// ResNet-50 in bfloat16 0.88. Then it takes tasks of other ranges, because tasks differ in length, and cores
// may be shared with other processes. What a thread waits for is always being computed by another one: any
// number of threads can work, even one.
//
// body(stage, begin, end) runs tasks [begin, end) of a stage, and does not throw.
template <class Size, class Body>
class TaskQueue {
 public:
  TaskQueue(int64_t stages, const Size& size, const Body& body, int64_t threads)
      : stages_(stages),
        threads_(threads),
        size_(size),
        body_(body),
        taken_(new std::atomic<int64_t>[static_cast<size_t>(stages * threads)]()) {}

  // Runs tasks until none is left. Threads of the region call it with their numbers in [0, threads).
  void work(int64_t thread) {
    int64_t before = 0;  // tasks of earlier stages
    for (int64_t stage = 0; stage < stages_; ++stage) {
      const int64_t count = size_(stage);
      for (int64_t i = 0; i < threads_; ++i) {
        const int64_t range = (thread + i) % threads_;
        const int64_t begin = count * range / threads_, end = count * (range + 1) / threads_;
        std::atomic<int64_t>& taken = taken_[stage * threads_ + range];
        for (int64_t task; (task = begin + taken.fetch_add(1, std::memory_order_relaxed)) < end;) {
          wait_for(before);
          body_(stage, task, task + 1);
          done_.fetch_add(1, std::memory_order_release);
        }
      }
      before += count;
    }
  }

 private:
  // Waits until this many tasks are done: by spinning, which a stage's end rarely needs for long, then by
  // giving the core to the thread that computes, which may have lost it.
  void wait_for(int64_t tasks) const {
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }
  static constexpr int kSpins = 1000;  // 20 to 40 us

  int64_t stages_, threads_;
  const Size& size_;
  const Body& body_;
  std::unique_ptr<std::atomic<int64_t>[]> taken_;  // of each range of each stage
  std::atomic<int64_t> done_ = 0;
};

}  // namespace fused_res::cpu
