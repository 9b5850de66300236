#pragma once
#include <cstdint>
namespace fused_res::cpu {
struct Caches {
  int64_t l1, l2, l3;
};
inline const Caches& caches() {
  static Caches c = {32 << 10, 1 << 20, 32 << 20};
  return c;
}
}  // namespace fused_res::cpu
