// Where the operators' outputs come from.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace fused_res {

// How many bytes of freed outputs are kept for the next ones; what is kept beyond that is freed, the oldest
// first. 0 keeps nothing.
void set_output_cache(size_t bytes);

// Bytes kept at this moment.
size_t output_cache_bytes();

namespace cpu {
// Lasts as long as the process, because outputs may.
c10::Allocator* output_allocator();
}  // namespace cpu

}  // namespace fused_res
