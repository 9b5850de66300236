// Micro-kernels of GEMMs with bfloat16 operands and fp32 accumulators, for the instruction sets amx (matrix
// tiles) and avx512_bf16 (vdpbf16ps). Both read B from the same blocks.
//
// B is packed in blocks of kBlockK rows x kPanelWidth columns, in VNNI layout: [half of the
// columns][pair of rows][16 columns][2 rows]. A half of a block is one tile, and a pair of rows of it one
// vector.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"
#if defined(FUSED_RES_TILES)
#include "cpu/isa/tile.h"
#endif

namespace fused_res::cpu {
namespace {

constexpr int kHalfWidth = kPanelWidth / 2;
constexpr int64_t kBlockElements = kBlockK * kPanelWidth, kHalfElements = kBlockElements / 2;

// The K loop of one GEMM: for each filter tap, `blocks` blocks of kBlockK channels, of which the first
// `channels` are multiplied. The rows of A of tap i begin offsets[i] elements after `a`.
struct TapLoop {
  int64_t taps, blocks;
  const int64_t* offsets;
  int channels = kBlockK;
};

// Whether the instruction set multiplies matrix tiles.
#if defined(FUSED_RES_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

// Rows of the micro-kernel's block.
constexpr int kDotRows = kTiles ? 32 : 14;

// Memory that is read or written next: `row_lines` cache lines of every row, prefetched a few lines per block
// of K.
struct PrefetchStream {
  const char* next = nullptr;
  int64_t lines = 0;  // per block of K
  int64_t row_lines = 0, left_in_row = 0;
  int64_t skip = 0;  // bytes between the lines of consecutive rows
  bool write = false;

  PrefetchStream() = default;
  PrefetchStream(const void* begin, int64_t lines_per_block, int64_t lines_per_row, int64_t row_bytes)
      : next(static_cast<const char*>(begin)),
        lines(lines_per_block),
        row_lines(lines_per_row),
        left_in_row(lines_per_row),
        skip(row_bytes - lines_per_row * 64) {}

  void advance() {
    for (int64_t i = 0; i < lines; ++i) {
      write ? prefetch_to_write(next) : prefetch(next);
      next += 64;
      if (--left_in_row == 0) next += skip, left_in_row = row_lines;
    }
  }
};
struct PrefetchStreams {
  PrefetchStream input, residual, output, weight;
  void advance() { input.advance(), residual.advance(), output.advance(), weight.advance(); }
};

#if defined(FUSED_RES_TILES)

static_assert(kDotRows == 2 * kTileRows);

// C += A B for a block of B, in the accumulators, tiles 0 to 3: 16 * RowTiles rows x 32 columns. One tile
// load for each product, the least that eight tiles allow, because tile loads and not products limit the
// throughput.
template <int RowTiles>
inline void multiply_block(Tiles& tiles, const bfloat16* a, int64_t lda, const bfloat16* b) {
  constexpr int64_t kElement = sizeof(bfloat16);
  tiles.load<4>(a, lda * kElement);
  tiles.load<6>(b, kTileRowBytes);
  tiles.multiply_add_bf16<0, 4, 6>();
  tiles.load<7>(b + kHalfElements, kTileRowBytes);
  tiles.multiply_add_bf16<1, 4, 7>();
  if constexpr (RowTiles == 2) {
    tiles.load<5>(a + kTileRows * lda, lda * kElement);
    tiles.multiply_add_bf16<2, 5, 6>();
    tiles.multiply_add_bf16<3, 5, 7>();
  }
}

// Stores the accumulators to rows of kPanelWidth.
template <int RowTiles>
inline void store_accumulators(const Tiles& tiles, float* to) {
  constexpr int64_t kRowBytes = kPanelWidth * sizeof(float);
  tiles.store<0>(to, kRowBytes), tiles.store<1>(to + kHalfWidth, kRowBytes);
  if constexpr (RowTiles == 2) {
    to += kTileRows * kPanelWidth;
    tiles.store<2>(to, kRowBytes), tiles.store<3>(to + kHalfWidth, kRowBytes);
  }
}

// The micro-kernel of products that are rounded and stored: 32 rows x 32 columns.
//
// The epilogue of a block runs while the next block is multiplied, a few rows after every block of K: with a
// K of 64 it takes longer than the products, and out-of-order execution does not reach from one to the other.
// Hence finish() at the end.
//
// Epilogue: copyable. It stores count() rows; row i is row(i) of the block, and store(i, low, high) takes its
// columns [0, 16) and [16, 32).
template <class Epilogue>
class DotMicroKernel {
 public:
  static constexpr int kRows = kDotRows;

  // channels: TapLoop::channels of all runs.
  explicit DotMicroKernel(int channels) : tiles_(channels) {}

  // Rows that are read: the rows of a last tile beyond `rows` must be readable, and are not stored.
  static int64_t rows_read(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

  // Computes `rows` rows of A B, from rows of A that are `lda` elements apart, for the epilogue.
  void run(int64_t rows, const bfloat16* a, int64_t lda, const bfloat16* b, const TapLoop& taps,
           PrefetchStreams& streams, Epilogue epilogue) {
    if (rows > kTileRows) {
      multiply<2>(a, lda, b, taps, streams);
    } else {
      multiply<1>(a, lda, b, taps, streams);
    }
    finish();
    epilogue_ = epilogue, pending_rows_ = epilogue.count(), next_row_ = 0;
    current_ ^= 1;
  }
  void finish() { store_rows(pending_rows_); }

 private:
  template <int RowTiles>
  void multiply(const bfloat16* a, int64_t lda, const bfloat16* b, const TapLoop& taps,
                PrefetchStreams& prefetched) {
    PrefetchStreams streams = prefetched;  // in registers
    const int64_t steps = taps.taps * taps.blocks, rows_per_step = (kRows + steps - 1) / steps;
    tiles_.zero<0>(), tiles_.zero<1>();
    if constexpr (RowTiles == 2) tiles_.zero<2>(), tiles_.zero<3>();
    for (int64_t tap = 0; tap < taps.taps; ++tap) {
      const bfloat16* rows = a + taps.offsets[tap];
      for (int64_t block = 0; block < taps.blocks; ++block, rows += kBlockK, b += kBlockElements) {
        streams.advance();
        multiply_block<RowTiles>(tiles_, rows, lda, b);
        store_rows(rows_per_step);
      }
    }
    prefetched = streams;
    store_accumulators<RowTiles>(tiles_, acc_[current_][0]);
  }

  // Runs the epilogue of the next `count` rows of the previous block.
  void store_rows(int64_t count) {
    const int64_t end = next_row_ + count < pending_rows_ ? next_row_ + count : pending_rows_;
    if (next_row_ < end) epilogue_.store(acc_[current_ ^ 1], next_row_, end);
    next_row_ = end;
  }

  Tiles tiles_;
  alignas(64) float acc_[2][kRows][kPanelWidth];
  int current_ = 0;
  Epilogue epilogue_;
  int64_t pending_rows_ = 0, next_row_ = 0;
};

// The micro-kernel of products that are accumulated in memory: c (+)= A B for kRows rows x 32 columns.
class DotAccumulator {
 public:
  static constexpr int64_t kRows = kDotRows;

  DotAccumulator() : tiles_(kBlockK) {}

  // For each block of K, the rows of A begin offsets[block] elements after `a`. c: `rows` rows of
  // kPanelWidth, which `overwrite` overwrites; rows: kRows. advance() is called once per block of K.
  template <class Advance>
  void run(int64_t /*rows*/, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t blocks,
           const int64_t* offsets, bool overwrite, float* c, Advance advance) {
    constexpr int64_t kRowBytes = kPanelWidth * sizeof(float);
    if (overwrite) {
      tiles_.zero<0>(), tiles_.zero<1>(), tiles_.zero<2>(), tiles_.zero<3>();
    } else {
      float* lower = c + kTileRows * kPanelWidth;
      tiles_.load<0>(c, kRowBytes), tiles_.load<1>(c + kHalfWidth, kRowBytes);
      tiles_.load<2>(lower, kRowBytes), tiles_.load<3>(lower + kHalfWidth, kRowBytes);
    }
    for (int64_t i = 0; i < blocks; ++i, b += kBlockElements) {
      multiply_block<2>(tiles_, a + offsets[i], lda, b);
      advance();
    }
    store_accumulators<2>(tiles_, c);
  }

 private:
  Tiles tiles_;
};

// Saturates the multiplier of tiles and returns the number of floating-point operations.
int64_t dot_loop(int64_t rounds, float* values) {
  constexpr int64_t kFlops = 2 * kTileRows * kTileRows * kBlockK;
  alignas(64) bfloat16 operand[kTileRows][kBlockK] = {};
  Tiles tiles(kBlockK);
  tiles.load<6>(operand, kTileRowBytes), tiles.load<7>(operand, kTileRowBytes);
  tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
  for (int64_t round = 0; round < rounds; ++round) {
    tiles.multiply_add_bf16<0, 6, 7>(), tiles.multiply_add_bf16<1, 6, 7>();
    tiles.multiply_add_bf16<2, 6, 7>(), tiles.multiply_add_bf16<3, 6, 7>();
  }
  alignas(64) float acc[kTileRows][kTileRows];
  tiles.store<0>(acc, kTileRowBytes);
  values[0] = acc[0][0];
  return rounds * 4 * kFlops;
}

#else

inline __m512bh broadcast_pair(const bfloat16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}
inline __m512bh load_pairs(const bfloat16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }

// acc += A B, in registers; a broadcast element of A is a pair of channels. advance() is called once per
// block of K.
template <int R, class Advance>
[[gnu::always_inline]] inline void multiply_blocks(__m512 (&acc)[R][2], const bfloat16* a, int64_t lda,
                                                   const bfloat16* b, const TapLoop& taps, Advance advance) {
  constexpr int64_t kPrefetchDistance = 2 * kBlockElements;
  // One pointer for three rows, as in micro_kernel.h.
  constexpr int kPointers = (R + 2) / 3;
  for (int64_t tap = 0; tap < taps.taps; ++tap) {
    const bfloat16* pointers[kPointers];
    for (int p = 0; p < kPointers; ++p) pointers[p] = a + taps.offsets[tap] + 3 * p * lda;
    for (int64_t block = 0; block < taps.blocks; ++block, b += kHalfElements) {
      advance();
      for (int pair = 0; pair < kBlockK / 2; ++pair) {
        prefetch(b + kPrefetchDistance);
        prefetch(b + kPrefetchDistance + kHalfElements);
        const __m512bh b0 = load_pairs(b), b1 = load_pairs(b + kHalfElements);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
          const __m512bh element = broadcast_pair(pointers[r / 3] + r % 3 * lda);
          acc[r][0] = _mm512_dpbf16_ps(acc[r][0], element, b0);
          acc[r][1] = _mm512_dpbf16_ps(acc[r][1], element, b1);
        }
#pragma GCC unroll 5
        for (int p = 0; p < kPointers; ++p) pointers[p] += 2;
        b += kPanelWidth;
      }
    }
  }
}

// The micro-kernel of products that are rounded and stored: 14 rows x 32 columns, as the fp32 micro-kernel.
template <class Epilogue>
class DotMicroKernel {
 public:
  static constexpr int kRows = kDotRows;

  explicit DotMicroKernel(int) {}

  static int64_t rows_read(int64_t rows) { return rows; }

  void run(int64_t rows, const bfloat16* a, int64_t lda, const bfloat16* b, const TapLoop& taps,
           PrefetchStreams& streams, Epilogue epilogue) {
    dispatch<kRows>(rows, a, lda, b, taps, streams, epilogue);
  }
  void finish() {}

 private:
  template <int R>
  static void dispatch(int64_t rows, const bfloat16* a, int64_t lda, const bfloat16* b, const TapLoop& taps,
                       PrefetchStreams& streams, Epilogue epilogue) {
    if constexpr (R > 1) {
      if (rows < R) return dispatch<R - 1>(rows, a, lda, b, taps, streams, epilogue);
    }
    multiply<R>(a, lda, b, taps, streams, epilogue);
  }

  template <int R>
  static void multiply(const bfloat16* a, int64_t lda, const bfloat16* b, const TapLoop& taps,
                       PrefetchStreams& streams, Epilogue epilogue) {
    __m512 acc[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    multiply_blocks<R>(acc, a, lda, b, taps, [&] { streams.advance(); });
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) epilogue.store(r, {acc[r][0]}, {acc[r][1]});
  }
};

// The micro-kernel of products that are accumulated in memory: c (+)= A B for up to kRows rows x 32 columns.
class DotAccumulator {
 public:
  static constexpr int64_t kRows = kDotRows;

  // For each block of K, the rows of A begin offsets[block] elements after `a`. c: `rows` rows of
  // kPanelWidth, which `overwrite` overwrites. advance() is called once per block of K.
  template <class Advance>
  void run(int64_t rows, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t blocks,
           const int64_t* offsets, bool overwrite, float* c, Advance advance) {
    dispatch<kRows>(rows, a, lda, b, {blocks, 1, offsets}, overwrite, c, advance);
  }

 private:
  template <int R, class Advance>
  static void dispatch(int64_t rows, const bfloat16* a, int64_t lda, const bfloat16* b, const TapLoop& taps,
                       bool overwrite, float* c, Advance advance) {
    if constexpr (R > 1) {
      if (rows < R) return dispatch<R - 1>(rows, a, lda, b, taps, overwrite, c, advance);
    }
    __m512 acc[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half)
        acc[r][half] =
            overwrite ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelWidth + half * kHalfWidth);
    }
    multiply_blocks<R>(acc, a, lda, b, taps, advance);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half)
        _mm512_storeu_ps(c + r * kPanelWidth + half * kHalfWidth, acc[r][half]);
    }
  }
};

// Saturates the units of vdpbf16ps and returns the number of floating-point operations.
int64_t dot_loop(int64_t rounds, float* values) {
  constexpr int kChains = kFmaValues - 2;
  const auto operand = reinterpret_cast<__m512bh>(_mm512_set1_ps(values[kChains]));
  __m512 chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = _mm512_setzero_ps();
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = _mm512_dpbf16_ps(chains[i], operand, operand);
  }
  for (int i = 0; i < kChains; ++i) values[i] = _mm512_cvtss_f32(chains[i]);
  return rounds * kChains * 16 * 4;
}

#endif

}  // namespace
}  // namespace fused_res::cpu
