// Caching allocator of the operators' outputs.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace fused_res {

// Sets the cache's limit: the bytes of freed outputs that are cached for later outputs. Blocks in excess of
// it are freed, the oldest first. 0 disables the cache.
void set_output_cache(size_t bytes);

// Returns the bytes that are cached now.
size_t output_cache_bytes();

namespace cpu {
// Lives until the process ends, because outputs may.
c10::Allocator* output_allocator();

// Asks for huge pages where they lie within this memory, without effect if there are none. They mean fewer
// page faults now and fewer TLB misses for all later readers.
void advise_huge_pages(void* data, size_t bytes);
}  // namespace cpu

}  // namespace fused_res
