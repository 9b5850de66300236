// Scheduling order: the queue of runnable threads, and the order of blocks.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace fused_res::cuda::sim {

struct Thread;

inline uint64_t next_random(uint64_t& state) {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1Dull;
}

// The queue of runnable threads. Schedule 0 is first in, first out: all threads reach their next barrier
// before any continues. Schedule 1 is last in, first out: a warp runs alone until it blocks, from the last
// thread on. Other schedules take a random thread.
class ReadyQueue {
 public:
  void start(size_t capacity, int schedule) {
    queue_.resize(std::bit_ceil(capacity));
    head_ = tail_ = 0;
    schedule_ = schedule;
    random_ = 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(schedule) + 1;
  }
  bool empty() const { return head_ == tail_; }
  void add(Thread* thread) { at(tail_++) = thread; }
  Thread* take() {
    if (schedule_ == 1) return at(--tail_);
    if (schedule_ != 0) std::swap(at(head_), at(head_ + next_random(random_) % (tail_ - head_)));
    return at(head_++);
  }

 private:
  Thread*& at(size_t i) { return queue_[i & (queue_.size() - 1)]; }

  std::vector<Thread*> queue_;
  size_t head_ = 0, tail_ = 0;
  int schedule_ = 0;
  uint64_t random_ = 1;
};

// A permutation of the blocks: i -> start + i * step.
class BlockOrder {
 public:
  BlockOrder(size_t count, int schedule) : count_(count) {
    if (schedule == 1) {
      start_ = count - 1;
      step_ = count - 1;
    } else if (schedule != 0) {
      uint64_t random = static_cast<uint64_t>(schedule);
      start_ = next_random(random) % count;
      for (step_ = next_random(random) % count; std::gcd(step_, count) != 1;) ++step_;
    }
  }
  size_t operator[](size_t i) const { return (start_ + i % count_ * step_) % count_; }

 private:
  size_t count_, start_ = 0, step_ = 1;
};

}  // namespace fused_res::cuda::sim
