// Matrix tiles as of Intel AMX: eight tiles of 16 rows x 64 bytes, and products of bfloat16 tiles. Two
// implementations of one interface: the instructions, and plain C++ for tests, sanitizers and machines
// without AMX (FUSED_RES_EMULATED_TILES).
//
// The instructions are inline assembly: GCC 12's intrinsic for ldtilecfg names only 8 bytes of the
// configuration as its input, so that the compiler removes the stores to the others, and its other
// intrinsics require literal tile numbers.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fused_res::cpu {
namespace {

constexpr int kTileRows = 16, kTileRowBytes = 64;

// The operand of ldtilecfg: palette 1. Tiles 0 to 3 are accumulators, 4 and 5 hold A, 6 and 7 hold B. K of a
// product may be less than a full tile's 32.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kTileRowBytes, kTileRowBytes, kTileRowBytes, kTileRowBytes,
                            kTileRowBytes, kTileRowBytes, kTileRowBytes, kTileRowBytes};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};

  explicit TileConfiguration(int k) {
    row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(k * 2);
    rows[6] = rows[7] = static_cast<uint8_t>(k / 2);
  }
};
static_assert(sizeof(TileConfiguration) == 64);

#if !defined(FUSED_RES_EMULATED_TILES)

// Configures the tiles of the calling thread, and releases them at the end of the object's life: a thread
// with live tile data saves 8 KB at every context switch.
class Tiles {
 public:
  // k: an even number of at most 32.
  explicit Tiles(int k) {
    const TileConfiguration configuration(k);
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~Tiles() { asm volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;

  // Sets tile I to zero.
  template <int I>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(I));
  }
  // Loads the rows of tile I; `stride`: distance of rows in bytes.
  template <int I>
  void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(I) : "memory");
  }
  template <int I>
  void store(void* p, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(I) : "memory");
  }
  // C[m][n] += sum over k of A[m][k] * B[k / 2][n][k % 2]: C has 16 x 16 floats, A 16 x k bfloat16, B k / 2
  // pairs of rows in VNNI layout.
  template <int C, int A, int B>
  void multiply_add_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

#else

class Tiles {
 public:
  explicit Tiles(int k) : configuration_(k) {}

  template <int I>
  void zero() {
    memset(tiles_[I], 0, sizeof tiles_[I]);
  }
  template <int I>
  void load(const void* p, int64_t stride) {
    for (int row = 0; row < configuration_.rows[I]; ++row)
      memcpy(tiles_[I][row], static_cast<const char*>(p) + row * stride, configuration_.row_bytes[I]);
  }
  template <int I>
  void store(void* p, int64_t stride) const {
    for (int row = 0; row < kTileRows; ++row)
      memcpy(static_cast<char*>(p) + row * stride, tiles_[I][row], kTileRowBytes);
  }
  // The order of additions of TDPBF16PS (Intel SDM, volume 2): the products of even and of odd elements are
  // accumulated from zero in fp32, both sums are added, and their sum to C. Denormals are flushed to zero
  // everywhere.
  template <int C, int A, int B>
  void multiply_add_bf16() {
    for (int m = 0; m < kTileRows; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < configuration_.rows[B]; ++k) {
        for (int n = 0; n < 16; ++n) {
          even[n] = flush(__builtin_fmaf(element(A, m, 2 * k), element(B, k, 2 * n), even[n]));
          odd[n] = flush(__builtin_fmaf(element(A, m, 2 * k + 1), element(B, k, 2 * n + 1), odd[n]));
        }
      }
      float sums[16];
      memcpy(sums, tiles_[C][m], sizeof sums);
      for (int n = 0; n < 16; ++n) sums[n] = flush(flush(sums[n]) + flush(even[n] + odd[n]));
      memcpy(tiles_[C][m], sums, sizeof sums);
    }
  }

 private:
  static float flush(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    memcpy(&x, &bits, 4);
    return x;
  }
  float element(int tile, int row, int column) const {
    uint16_t half;
    memcpy(&half, tiles_[tile][row] + 2 * column, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return flush(value);
  }

  TileConfiguration configuration_;
  alignas(64) char tiles_[8][kTileRows][kTileRowBytes];
};

#endif

}  // namespace
}  // namespace fused_res::cpu
