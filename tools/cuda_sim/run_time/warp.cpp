// What the lanes of a warp do together. None of it orders memory, but for the barrier.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "machine.h"
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

Meeting& meeting(Warp& warp, Deed deed, unsigned mask, const Site& site) {
  for (unsigned i = 0; i < warp.meeting_count; ++i) {
    Meeting& one = warp.meetings[i];
    if (one.mask == mask && one.deed == deed && same(one.site, site)) return one;
  }
  return warp.meetings[warp.meeting_count++] = {deed, site, mask, 0};
}

// Waits for all lanes of the mask to come to this place with this mask; the last one does the deed and goes
// on at once.
void meet(Deed deed, unsigned mask, const char* what, Site site) {
  Thread& thread = *current;
  const unsigned lane = thread.index % kWarp, bit = 1u << lane;
  if ((mask & bit) == 0) fail(std::string(what) + " with a mask that does not name the thread itself");
  Warp& warp = thread.block->warp[thread.index / kWarp];
  Meeting& here = meeting(warp, deed, mask, site);
  here.present |= bit;
  if (here.present != mask) return wait(what, site, mask);
  here = warp.meetings[--warp.meeting_count];
  Thread* lanes = &thread - lane;
  deed(lanes, mask);
  for_each_lane(mask & ~bit, [&](unsigned other) { wake(lanes[other]); });
}

void meet_whole_warp(Deed deed, const char* what, Site site) { meet(deed, ~0u, what, site); }

}  // namespace

void warp_barrier(unsigned mask, Site site) {
  Thread& thread = *current;
  Warp& warp = thread.block->warp[thread.index / kWarp];
  void* token = thread.block->memory->token(thread.index / kWarp, warp.barriers[thread.index % kWarp]++);
  release(token);
  meet([](Thread*, unsigned) {}, mask, "__syncwarp", site);
  acquire(token);
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane, const char* what, Site site) {
  if (source_lane >= kWarp || (mask >> source_lane & 1) == 0)
    fail(std::string(what) + " from lane " + std::to_string(source_lane) + ", which the mask does not name");
  uint64_t result;
  Thread& thread = *current;
  thread.value = value;
  thread.source = source_lane;
  thread.result = &result;
  const auto deed = [](Thread* lanes, unsigned named) {
    for_each_lane(named, [&](unsigned lane) {
      *static_cast<uint64_t*>(lanes[lane].result) = lanes[lanes[lane].source].value;
    });
  };
  meet(deed, mask, what, site);
  return result;
}

unsigned ballot(unsigned mask, bool value, const char* what, Site site) {
  unsigned result;
  current->value = value;
  current->result = &result;
  const auto deed = [](Thread* lanes, unsigned named) {
    unsigned bits = 0;
    for_each_lane(named, [&](unsigned lane) { bits |= static_cast<unsigned>(lanes[lane].value) << lane; });
    for_each_lane(named, [&](unsigned lane) { *static_cast<unsigned*>(lanes[lane].result) = bits; });
  };
  meet(deed, mask, what, site);
  return result;
}

// --- ldmatrix
// -----------------------------------------------------------------------------------------------

namespace {

struct Load {
  uint32_t shared;
  bool transposed;
};

constexpr unsigned kRowBytes = 16, kBanksInRows = 8;  // 8 rows of 16 bytes are read at once

// Rows at different addresses in the same banks come one after another.
void count_conflicts(const uint32_t (&addresses)[8]) {
  unsigned most = 0, in_bank[kBanksInRows] = {};
  for (unsigned i = 0; i < 8; ++i) {
    bool again = false;
    for (unsigned j = 0; j < i; ++j) again |= addresses[j] == addresses[i];
    if (!again) most = std::max(most, ++in_bank[addresses[i] / kRowBytes % kBanksInRows]);
  }
  bank_conflicts += most - 1;
}

void load_matrices_of(Thread* lanes, unsigned) {
  const unsigned char* shared = lanes->block->shared;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t addresses[8];
    uint16_t elements[8][8];
    for (unsigned row = 0; row < 8; ++row) {
      addresses[row] = static_cast<const Load*>(lanes[8 * matrix + row].operand)->shared;
      std::memcpy(elements[row], shared + addresses[row], kRowBytes);
    }
    count_conflicts(addresses);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const unsigned row = lane / 4, column = lane % 4 * 2;
      const bool transposed = static_cast<const Load*>(lanes[lane].operand)->transposed;
      const uint32_t low = transposed ? elements[column][row] : elements[row][column];
      const uint32_t high = transposed ? elements[column + 1][row] : elements[row][column + 1];
      static_cast<uint32_t*>(lanes[lane].result)[matrix] = low | high << 16;
    }
  }
}

}  // namespace

void load_matrices(uint32_t (&registers)[4], uint32_t shared, bool transposed, Site site) {
  reads(shared_at(shared, kRowBytes, "ldmatrix"), kRowBytes, __builtin_return_address(0));
  const Load load{shared, transposed};
  current->operand = &load;
  current->result = registers;
  meet_whole_warp(load_matrices_of, "ldmatrix", site);
}

// --- mma
// ----------------------------------------------------------------------------------------------------

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

// 8 columns of sums, one row after another.
template <int depth>
void multiply(const float (&a)[16][depth], const float (&b)[depth][8], double (&sums)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column)
        sums[row][column] += static_cast<double>(a[row][k]) * b[k][column];
    }
  }
}

// `elements` of 16 or 32 bits in a register, at neighbouring k.
template <int elements, float (*convert)(uint32_t)>
void multiply_add_of(Thread* lanes, unsigned) {
  constexpr int kDepth = 8 * elements, kBits = 32 / elements;
  constexpr uint32_t kElement = elements == 2 ? 0xFFFF : ~0u;
  float a[16][kDepth], b[kDepth][8];
  double sums[16][8];
  const auto place = [](unsigned lane, int i) -> std::pair<int, int> {
    return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
  };
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto* fragments = static_cast<const Fragments*>(lanes[lane].operand);
    const int group = lane / 4, pair = lane % 4;
    for (int e = 0; e < elements; ++e) {
      const auto element = [&](uint32_t word) { return convert(word >> e * kBits & kElement); };
      for (int i = 0; i < 4; ++i)
        a[group + i % 2 * 8][pair * elements + e + i / 2 * kDepth / 2] = element(fragments->a[i]);
      for (int i = 0; i < 2; ++i) b[pair * elements + e + i * kDepth / 2][group] = element(fragments->b[i]);
    }
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = place(lane, i);
      sums[row][column] = static_cast<const float*>(lanes[lane].result)[i];
    }
  }
  multiply<kDepth>(a, b, sums);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = place(lane, i);
      static_cast<float*>(lanes[lane].result)[i] = static_cast<float>(sums[row][column]);
    }
  }
}

}  // namespace

void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* type,
                  Site site) {
  const Fragments fragments{a, b};
  current->operand = &fragments;
  current->result = d;
  const Deed deed = type[0] == 'b'   ? multiply_add_of<2, from_bf16>
                    : type[0] == 'f' ? multiply_add_of<2, from_f16>
                                     : multiply_add_of<1, from_tf32>;
  meet_whole_warp(deed, "mma", site);
}

uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1FFFu : bits;
}

}  // namespace fused_res::cuda::sim

// Of ldmatrix, since the last call: how many times rows had to wait for others in their banks.
extern "C" size_t fused_res_sim_bank_conflicts() {
  return std::exchange(fused_res::cuda::sim::bank_conflicts, 0);
}
