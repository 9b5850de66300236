// State of the simulated machine: threads, warps, blocks and their shared memory. Internal to the runtime.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fibers.h"
#include "runtime.h"
#include "sanitizers.h"

namespace fused_res::cuda::sim {

constexpr unsigned kWarpSize = 32;

struct Block;
struct Thread;

// A warp collective, executed once, by the last lane to arrive, for every `lanes[lane]` of the mask.
using Collective = void (*)(Thread* lanes, unsigned mask);

struct AsyncCopy {
  const void* global;
  uint32_t shared;
  uint32_t bytes;
};

// The copies of a thread that are in flight, in ring buffers: groups[i] is the number of copies that were
// issued before group i was committed.
struct CopyQueue {
  static constexpr unsigned kCapacity = 512, kMaxGroups = 64;
  AsyncCopy copy[kCapacity];
  uint64_t groups[kMaxGroups];
};

struct Thread {
  enum class State : uint8_t { kNew, kStarted, kEnded };

  Context context;
  Block* block;
  unsigned index;  // in the block
  State state;
  // What the thread waits for, for messages.
  const char* what;
  Site site;
  unsigned mask;
  // Inputs and output of a collective. `value` is also the result of a block barrier.
  uint64_t value;
  unsigned source;
  const void* operand;
  void* result;
  // The grid barrier that the thread waits at: its counter, and the count that it waits for.
  const unsigned* grid_counter;
  unsigned grid_arrivals;
  // Asynchronous copies and their groups.
  CopyQueue* copy_queue;
  uint64_t copies_issued, groups_committed, copies_completed, groups_completed;
};

// A collective for which some lanes of the mask have arrived and wait for the others, at one call site.
struct PendingCollective {
  Collective collective;
  Site site;
  unsigned mask, arrived;
};

struct Warp {
  PendingCollective pending_collectives[kWarpSize];
  unsigned pending_count;
  unsigned barriers[kWarpSize];  // number of __syncwarp() calls that each lane has passed
};

struct SharedMemory;

struct Block {
  uint3 index;
  unsigned thread_count;
  Thread* threads;
  Warp* warps;
  unsigned char* shared;
  size_t shared_bytes;
  const SharedMemory* memory;  // the owner of `shared`
  // State of __syncthreads().
  unsigned threads_arrived, barriers;
  unsigned or_of_votes, and_of_votes, count_of_votes;
  Site site;
  Thread* grid_barrier_waiter;
};

extern Thread* current;

[[noreturn]] void fail(const std::string& message);  // throws, with block and thread in the message
void wait(const char* what, Site site, unsigned mask = 0);
void wake(Thread& thread);

// --- settings of the scheduler ---

// 0: first in, first out, blocks ascending; 1: last in, first out, blocks descending; others: pseudo-random
// with that seed.
int schedule();

// --- shared memory ---

// Returns the block's memory at an address, after checking that an access of `bytes` is aligned and in
// bounds.
unsigned char* shared_at(uint32_t address, size_t bytes, const char* what);

struct SharedMemory {
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  void clear();  // fills memory and margins with NaN
  // The address that ThreadSanitizer associates with barrier number `barrier` of a warp or of the block. Two
  // addresses alternate, because a thread can arrive at the next barrier before others have left this one.
  void* token(unsigned warp, unsigned barrier) const { return mapped_ + 2 * warp + barrier % 2; }
  bool overrun() const;  // whether a margin was modified
  unsigned char* begin;

 private:
  unsigned char* mapped_;
  size_t bytes_, mapped_bytes_;
};

}  // namespace fused_res::cuda::sim
