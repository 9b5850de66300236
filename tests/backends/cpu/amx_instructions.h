// AMX instructions as functions of tile numbers, and data for them, for the test of the emulator
// (amx_instructions.cpp).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "amx_emulator.h"

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Configuration {
  uint8_t palette = 0, start_row = 0, reserved_2[14] = {};
  uint16_t colsb[kTiles] = {};
  uint8_t reserved_32[16] = {};
  uint8_t rows[kTiles] = {};
  uint8_t reserved_56[8] = {};
};

Configuration full_configuration() {
  Configuration config;
  config.palette = 1;
  for (int i = 0; i < kTiles; ++i) config.rows[i] = kRows, config.colsb[i] = kRowBytes;
  return config;
}

void check(bool condition, const char* what, long detail = 0) {
  if (condition) return;
  std::printf("mismatch: %s, %ld\n", what, detail);
  std::exit(1);
}

// --- instructions ------------------------------------------------------------------------------------------

void ldtilecfg(const Configuration& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
void sttilecfg(Configuration& config) { asm volatile("sttilecfg %0" : "=m"(config)); }
void tilerelease() { asm volatile("tilerelease"); }

// Calls operation(std::integral_constant<int, tile>) for a tile number that is known at run time only.
template <class Operation>
void with_tile(int tile, const Operation& operation) {
  switch (tile) {
#define FUSED_RES_CASE(n) \
  case n:                 \
    return operation(std::integral_constant<int, n>())
    FUSED_RES_CASE(0);
    FUSED_RES_CASE(1);
    FUSED_RES_CASE(2);
    FUSED_RES_CASE(3);
    FUSED_RES_CASE(4);
    FUSED_RES_CASE(5);
    FUSED_RES_CASE(6);
    FUSED_RES_CASE(7);
#undef FUSED_RES_CASE
  }
}

void tilezero(int tile) {
  with_tile(tile, [](auto n) { asm volatile("tilezero %%tmm%c0" : : "i"(n())); });
}
void tileloadd(int tile, const void* from, int64_t stride = kRowBytes) {
  with_tile(tile, [&](auto n) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(n()), "r"(from), "r"(stride) : "memory");
  });
}
void tileloaddt1(int tile, const void* from, int64_t stride = kRowBytes) {
  with_tile(tile, [&](auto n) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(n()), "r"(from), "r"(stride) : "memory");
  });
}
void tilestored(int tile, void* to, int64_t stride = kRowBytes) {
  with_tile(tile, [&](auto n) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(n()), "r"(to), "r"(stride) : "memory");
  });
}
void tdpbf16ps(int c, int a, int b) {
  with_tile(c, [&](auto c_number) {
    with_tile(a, [&](auto a_number) {
      with_tile(b, [&](auto b_number) {
        constexpr int c = c_number(), a = a_number(), b = b_number();
        if constexpr (c != a && c != b && a != b)
          asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
      });
    });
  });
}

struct TileData {
  alignas(64) uint8_t row[kRows][kRowBytes];

  bool operator==(const TileData& other) const { return !std::memcmp(row, other.row, sizeof(row)); }
};

TileData stored(int tile) {
  TileData data;
  std::memset(&data, 0xEE, sizeof(data));
  tilestored(tile, &data);
  return data;
}

uint32_t seed = 1;
uint32_t random_bits() {
  seed = seed * 1664525 + 1013904223;
  return seed >> 8;
}

TileData random_tile() {
  TileData data;
  for (auto& row : data.row)
    for (uint8_t& byte : row) byte = static_cast<uint8_t>(random_bits() >> 5);
  return data;
}

}  // namespace
