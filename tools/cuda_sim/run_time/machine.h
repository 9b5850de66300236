// The simulated machine: what a thread, a warp and a block are made of, between the files of the run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fibers.h"
#include "run_time.h"
#include "sanitizers.h"

namespace fused_res::cuda::sim {

constexpr unsigned kWarp = 32;

struct Block;
struct Thread;

// What lanes do together: done once, by the last to come, for all of `lanes[lane]` named in the mask.
using Deed = void (*)(Thread* lanes, unsigned mask);

struct Copy {
  const void* global;
  uint32_t shared;
  uint32_t bytes;
};

// This thread's copies on the way, in rings: groups[i] is how many were issued before group i ended.
struct Copies {
  static constexpr unsigned kMost = 512, kMostGroups = 64;
  Copy copy[kMost];
  uint64_t groups[kMostGroups];
};

struct Thread {
  enum class State : uint8_t { kNew, kStarted, kEnded };

  Context context;
  Block* block;
  unsigned index;  // in the block
  State state;
  // The reason for waiting.
  const char* what;
  Site site;
  unsigned mask;
  // What it brings to a deed and takes away.
  uint64_t value;
  unsigned source;
  const void* operand;
  void* result;
  // Copies issued, committed groups, and those that have arrived.
  Copies* copies;
  uint64_t issued, committed, arrived, groups_arrived;
};

// Lanes that wait for the others of their mask, at one place.
struct Meeting {
  Deed deed;
  Site site;
  unsigned mask, present;
};

struct Warp {
  Meeting meetings[kWarp];
  unsigned meeting_count;
  unsigned barriers[kWarp];  // that a lane has passed
};

struct SharedMemory;

struct Block {
  uint3 index;
  unsigned threads;
  Thread* thread;  // all of them
  Warp* warp;
  unsigned char* shared;
  size_t shared_bytes;
  const SharedMemory* memory;
  // The barrier.
  unsigned arrived, barriers;
  unsigned or_of_votes, and_of_votes, count_of_votes;
  Site site;
  Thread* at_grid_barrier;
};

extern Thread* current;

[[noreturn]] void fail(const std::string& message);  // of the current thread
void wait(const char* what, Site site, unsigned mask = 0);
void wake(Thread& thread);

// --- scheduler's settings
// -----------------------------------------------------------------------------------

// 0: forward, 1: backward, others: pseudo-random from that seed.
int schedule();

// The block's memory at an address, for `bytes` from there, aligned.
unsigned char* shared_at(uint32_t address, size_t bytes, const char* what);

struct SharedMemory {
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  void clear();  // NaN, and intact margins
  // An address for what barrier number `barrier`, of a warp or of the block, makes visible. Two in turn: who
  // is through already may come to the next one before others have left this one.
  void* token(unsigned warp, unsigned barrier) const { return mapped_ + 2 * warp + barrier % 2; }
  bool overrun() const;  // whether a margin was written to
  unsigned char* begin;

 private:
  unsigned char* mapped_;
  size_t bytes_, mapped_bytes_;
};

}  // namespace fused_res::cuda::sim
