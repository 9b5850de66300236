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

// Returns the throughput in FLOP/s of a loop over registers. `loop` runs a number of rounds on kFmaValues
// floats and returns the number of floating-point operations.
double peak(int threads, int64_t (*loop)(int64_t rounds, float* values)) {
  const auto run = [loop](int64_t rounds) {
    float values[cpu::kFmaValues];
    std::fill_n(values, cpu::kFmaValues, 0.5f);  // x / 2 + 1 / 2 never becomes subnormal
    return loop(rounds, values);
  };
  if (threads < 1 || threads > at::get_num_threads()) {
    throw std::invalid_argument("threads: expected 1 to " + std::to_string(at::get_num_threads()) +
                                ", the number of PyTorch's threads, got " + std::to_string(threads));
  }
  // Choose the number of rounds so that one thread works for 10 ms, against which waking the others is
  // negligible. Two runs in a row have to be that long, because a single one may have been interrupted.
  int64_t rounds = 1 << 14;
  for (int long_enough = 0; long_enough < 2;) {
    const auto start = Clock::now();
    run(rounds);
    const bool enough = seconds_since(start) > 0.01;
    long_enough = enough ? long_enough + 1 : 0;
    if (!enough) rounds *= 2;
  }
  double best = 0;  // of four runs: other processes may disturb one of them
  for (int i = 0; i < 4; ++i) {
    std::atomic<int64_t> flop = 0;
    const auto start = Clock::now();
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) flop += run(rounds);
    });
    best = std::max(best, static_cast<double>(flop) / seconds_since(start));
  }
  return best;
}

}  // namespace

double fma_peak(int threads) { return peak(threads, cpu::kernels().fma_loop); }

double bf16_peak(int threads) {
  const auto* bf16 = cpu::kernels().bf16_convolution;
  if (bf16 == nullptr) {
    throw std::runtime_error("bf16_peak: expected the instruction set avx512_bf16 or amx, got " +
                             std::string(cpu::kernels().name));
  }
  return peak(threads, bf16->dot_loop);
}

}  // namespace fused_res
