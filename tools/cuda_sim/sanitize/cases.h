// Launches of all kernels at small shapes, most of them not multiples of the tile sizes, on arrays of exactly
// the required size, for programs that are compiled with a sanitizer. Results are not checked here: other
// tests do that.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/kernel_args.h"

namespace fused_res::cuda::sanitize {

struct Case {
  std::string name;
  std::function<void()> run;
};
using Cases = std::vector<Case>;

void add_norms(Cases& cases);
void add_max_pools(Cases& cases);
void add_convolutions(Cases& cases);
void add_conv1x1_backward(Cases& cases);

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

inline size_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Arrays with the lifetime of a case, allocated by malloc(), so that AddressSanitizer checks their bounds.
class Arrays {
 public:
  Arrays() = default;
  ~Arrays() {
    for (void* memory : all_) std::free(memory);
  }
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;

  // Uninitialized memory.
  void* bytes(size_t count) {
    all_.push_back(std::malloc(count));
    return all_.back();
  }
  void* empty(Dtype dtype, int64_t count) { return bytes(bytes_of(dtype) * count); }
  float* floats(int64_t count) { return static_cast<float*>(empty(Dtype::kFloat32, count)); }

  // Random values of both signs with magnitudes between 1/2 and 2.
  void* random(Dtype dtype, int64_t count) {
    void* memory = empty(dtype, count);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t number = next();
      const float value = std::bit_cast<float>((number & 0x80FFFFFF) + 0x3F000000);
      if (dtype == Dtype::kFloat64)
        static_cast<double*>(memory)[i] = value;
      else if (dtype == Dtype::kFloat32)
        static_cast<float*>(memory)[i] = value;
      else if (dtype == Dtype::kBFloat16)
        static_cast<uint16_t*>(memory)[i] = std::bit_cast<uint32_t>(value) >> 16;
      else
        static_cast<uint16_t*>(memory)[i] = (number >> 16 & 0x87FF) + 0x3800;
    }
    return memory;
  }
  float* random_floats(int64_t count) { return static_cast<float*>(random(Dtype::kFloat32, count)); }
  uint8_t* random_bits(int64_t count) {
    auto* memory = static_cast<uint8_t*>(bytes(count));
    for (int64_t i = 0; i < count; ++i) memory[i] = static_cast<uint8_t>(next() >> 24);
    return memory;
  }

 private:
  uint32_t next() { return state_ = state_ * 1664525u + 1013904223u; }

  std::vector<void*> all_;
  uint32_t state_ = 1;
};

}  // namespace fused_res::cuda::sanitize
