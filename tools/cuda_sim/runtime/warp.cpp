// Warp collectives: __syncwarp, shuffles, votes, ldmatrix and mma. Only __syncwarp orders memory.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "execution_state.h"
#include "sanitizers.h"

namespace fused_res::cuda::sim {

namespace {

size_t bank_conflicts = 0;

template <class Act>
void for_each_lane(unsigned mask, Act act) {
  for (; mask != 0; mask &= mask - 1) act(static_cast<unsigned>(std::countr_zero(mask)));
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

PendingCollective& pending_collective(Warp& warp, Collective collective, unsigned mask, const Site& site) {
  for (unsigned i = 0; i < warp.pending_count; ++i) {
    PendingCollective& one = warp.pending_collectives[i];
    if (one.mask == mask && one.collective == collective && same(one.site, site)) return one;
  }
  return warp.pending_collectives[warp.pending_count++] = {collective, site, mask, 0};
}

// Waits until all lanes of the mask have arrived at this call site with this mask. The last one executes the
// collective and continues without waiting.
void run_collective(Collective collective, unsigned mask, const char* what, Site site) {
  Thread& thread = *current;
  const unsigned lane = thread.index % kWarpSize, bit = 1u << lane;
  if ((mask & bit) == 0) fail(std::string(what) + " with a mask that does not include the calling lane");
  Warp& warp = thread.block->warps[thread.index / kWarpSize];
  PendingCollective& here = pending_collective(warp, collective, mask, site);
  here.arrived |= bit;
  if (here.arrived != mask) return wait(what, site, mask);
  here = warp.pending_collectives[--warp.pending_count];
  Thread* lanes = &thread - lane;
  collective(lanes, mask);
  for_each_lane(mask & ~bit, [&](unsigned other) { wake(lanes[other]); });
}

void run_full_warp_collective(Collective collective, const char* what, Site site) {
  run_collective(collective, ~0u, what, site);
}

}  // namespace

void warp_barrier(unsigned mask, Site site) {
  Thread& thread = *current;
  Warp& warp = thread.block->warps[thread.index / kWarpSize];
  void* token =
      thread.block->memory->token(thread.index / kWarpSize, warp.barriers[thread.index % kWarpSize]++);
  release(token);
  run_collective([](Thread*, unsigned) {}, mask, "__syncwarp", site);
  acquire(token);
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane, const char* what, Site site) {
  if (source_lane >= kWarpSize || (mask >> source_lane & 1) == 0)
    fail(std::string(what) + " from lane " + std::to_string(source_lane) + ", which is not in the mask");
  uint64_t result;
  Thread& thread = *current;
  thread.value = value;
  thread.source = source_lane;
  thread.result = &result;
  const auto collective = [](Thread* lanes, unsigned mask) {
    for_each_lane(mask, [&](unsigned lane) {
      *static_cast<uint64_t*>(lanes[lane].result) = lanes[lanes[lane].source].value;
    });
  };
  run_collective(collective, mask, what, site);
  return result;
}

unsigned ballot(unsigned mask, bool value, const char* what, Site site) {
  unsigned result;
  current->value = value;
  current->result = &result;
  const auto collective = [](Thread* lanes, unsigned mask) {
    unsigned bits = 0;
    for_each_lane(mask, [&](unsigned lane) { bits |= static_cast<unsigned>(lanes[lane].value) << lane; });
    for_each_lane(mask, [&](unsigned lane) { *static_cast<unsigned*>(lanes[lane].result) = bits; });
  };
  run_collective(collective, mask, what, site);
  return result;
}

// --- ldmatrix ---

namespace {

struct LdmatrixOperand {
  uint32_t shared;
  bool transposed;
};

constexpr unsigned kRowBytes = 16, kBankGroups = 8;  // 32 banks of 4 bytes: 8 groups of 16 bytes

// Rows at different addresses in the same banks are read one after another.
void count_conflicts(const uint32_t (&addresses)[8]) {
  unsigned max_rows = 0, in_bank[kBankGroups] = {};
  for (unsigned i = 0; i < 8; ++i) {
    bool again = false;
    for (unsigned j = 0; j < i; ++j) again |= addresses[j] == addresses[i];
    if (!again) max_rows = std::max(max_rows, ++in_bank[addresses[i] / kRowBytes % kBankGroups]);
  }
  bank_conflicts += max_rows - 1;
}

void ldmatrix_collective(Thread* lanes, unsigned) {
  const unsigned char* shared = lanes->block->shared;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t addresses[8];
    uint16_t elements[8][8];
    for (unsigned row = 0; row < 8; ++row) {
      addresses[row] = static_cast<const LdmatrixOperand*>(lanes[8 * matrix + row].operand)->shared;
      std::memcpy(elements[row], shared + addresses[row], kRowBytes);
    }
    count_conflicts(addresses);
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const unsigned row = lane / 4, column = lane % 4 * 2;
      const bool transposed = static_cast<const LdmatrixOperand*>(lanes[lane].operand)->transposed;
      const uint32_t low = transposed ? elements[column][row] : elements[row][column];
      const uint32_t high = transposed ? elements[column + 1][row] : elements[row][column + 1];
      static_cast<uint32_t*>(lanes[lane].result)[matrix] = low | high << 16;
    }
  }
}

}  // namespace

void ldmatrix_x4(uint32_t (&registers)[4], uint32_t shared, bool transposed, Site site) {
  note_read(shared_at(shared, kRowBytes, "ldmatrix"), kRowBytes, __builtin_return_address(0));
  const LdmatrixOperand operand{shared, transposed};
  current->operand = &operand;
  current->result = registers;
  run_full_warp_collective(ldmatrix_collective, "ldmatrix", site);
}

// --- mma ---

namespace {

float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

float from_f16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7FFF, sign = (bits & 0x8000) << 16;
  // The exponent's bias differs by 112; the product is exact for subnormals too.
  const float value = magnitude < 0x7C00 ? std::bit_cast<float>(magnitude << 13) * 0x1p112f
                                         : std::bit_cast<float>(0x7F800000u | magnitude << 13);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

float from_tf32(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1FFFu); }

struct Fragments {
  const uint32_t *a, *b;
};

// accumulators += a b, row by row.
template <int depth>
void multiply(const float (&a)[16][depth], const float (&b)[depth][8], double (&accumulators)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column)
        accumulators[row][column] += static_cast<double>(a[row][k]) * b[k][column];
    }
  }
}

// `elements`: number of operand elements in a register, at consecutive k: 2 of 16 bits, or 1 of 32 bits.
template <int elements, float (*convert)(uint32_t)>
void mma_collective(Thread* lanes, unsigned) {
  constexpr int kDepth = 8 * elements, kBits = 32 / elements;
  constexpr uint32_t kElementMask = elements == 2 ? 0xFFFF : ~0u;
  float a[16][kDepth], b[kDepth][8];
  double accumulators[16][8];
  const auto coordinates = [](unsigned lane, int i) -> std::pair<int, int> {
    return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
  };
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto* fragments = static_cast<const Fragments*>(lanes[lane].operand);
    const int group = lane / 4, thread_in_group = lane % 4;
    for (int e = 0; e < elements; ++e) {
      const auto element = [&](uint32_t word) { return convert(word >> e * kBits & kElementMask); };
      for (int i = 0; i < 4; ++i)
        a[group + i % 2 * 8][thread_in_group * elements + e + i / 2 * kDepth / 2] = element(fragments->a[i]);
      for (int i = 0; i < 2; ++i)
        b[thread_in_group * elements + e + i * kDepth / 2][group] = element(fragments->b[i]);
    }
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = coordinates(lane, i);
      accumulators[row][column] = static_cast<const float*>(lanes[lane].result)[i];
    }
  }
  multiply<kDepth>(a, b, accumulators);
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = coordinates(lane, i);
      static_cast<float*>(lanes[lane].result)[i] = static_cast<float>(accumulators[row][column]);
    }
  }
}

}  // namespace

void mma_sync(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* type, Site site) {
  const Fragments fragments{a, b};
  current->operand = &fragments;
  current->result = d;
  const Collective collective = type[0] == 'b'   ? mma_collective<2, from_bf16>
                                : type[0] == 'f' ? mma_collective<2, from_f16>
                                                 : mma_collective<1, from_tf32>;
  run_full_warp_collective(collective, "mma", site);
}

uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1FFFu : bits;
}

}  // namespace fused_res::cuda::sim

// Returns the number of bank conflicts of ldmatrix since the last call.
extern "C" size_t fused_res_sim_bank_conflicts() {
  return std::exchange(fused_res::cuda::sim::bank_conflicts, 0);
}
