// Helpers of the sanitizer programs (test_sanitizers.py): exact-size allocations, random numbers, and a
// parallel loop on std::thread instead of OpenMP.
#pragma once

#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/task_queue.h"

namespace fused_res::cpu {
namespace {

// Inject a fault: scratch memory is too short, and shared by all threads. The sanitizer must report it.
bool inject_fault = false;

// An allocation of exactly this size, so that a sanitizer detects an access to the first element after it.
template <class T>
struct Array {
  int64_t size;
  std::unique_ptr<T[]> data;

  explicit Array(int64_t n) : size(n), data(new T[n]) {}
  T* get() const { return data.get(); }
  T& operator[](int64_t i) const { return data[i]; }
};

uint32_t seed = 1;

// Reproducible random numbers: multiples of 1/64 around `mean`.
inline Array<float> random_floats(int64_t n, float mean) {
  Array<float> values(n);
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525 + 1013904223;
    values[i] = mean + static_cast<float>(static_cast<int>(seed >> 24) - 128) / 64;
  }
  return values;
}

// The parallel loops of the tasks. Threads are synchronized only at the start and the end of a loop, and by
// its queue.
struct Threads {
  int64_t count;
  static thread_local int64_t number;

  int64_t threads() const { return count; }
  int64_t thread() const { return inject_fault ? 0 : number; }

  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    run([&] {
      const Range part = balanced_range(n, number, count);
      if (part.begin < part.end) body(part.begin, part.end);
    });
  }

  template <class Size, class Body>
  void in_stages(int64_t stages, const Size& size, const Body& body) const {
    TaskQueue queue(stages, size, body, count);
    run([&] { queue.work(number); });
  }

 private:
  template <class Work>
  void run(const Work& work) const {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) {
      threads.emplace_back([&, i] {
        number = i;
        work();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};
thread_local int64_t Threads::number = 0;

}  // namespace
}  // namespace fused_res::cpu
