#include "cpu/fma_peak.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace fused_res {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int64_t multiply_add(int64_t rounds) {
  float values[cpu::kFmaValues];
  std::fill_n(values, cpu::kFmaValues, 0.5f);  // x / 2 + 1 / 2 stays far from subnormal numbers
  return cpu::kernels().multiply_add(rounds, values);
}

}  // namespace

double fma_peak(int threads) {
  if (threads < 1 || threads > at::get_num_threads()) {
    throw std::invalid_argument("threads: expected 1 to " + std::to_string(at::get_num_threads()) +
                                ", as many as PyTorch has, got " + std::to_string(threads));
  }
  // 10 ms of one thread's work, to which waking the others adds little. A run that was interrupted is no
  // measure: two in a row are long enough.
  int64_t rounds = 1 << 14;
  for (int long_enough = 0; long_enough < 2;) {
    const auto start = Clock::now();
    multiply_add(rounds);
    const bool enough = seconds_since(start) > 0.01;
    long_enough = enough ? long_enough + 1 : 0;
    if (!enough) rounds *= 2;
  }
  double best = 0;  // of four: a neighbour may be busy at one moment
  for (int i = 0; i < 4; ++i) {
    std::atomic<int64_t> flop = 0;
    const auto start = Clock::now();
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) flop += multiply_add(rounds);
    });
    best = std::max(best, static_cast<double>(flop) / seconds_since(start));
  }
  return best;
}

}  // namespace fused_res
