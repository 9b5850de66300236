// Packing of a weight as the matrix B of dot_micro_kernel.h.
#pragma once

#include "cpu/isa/bf16_blocks.h"
#include "cpu/isa/dot_micro_kernel.h"
#include "cpu/isa/operand.h"

namespace fused_res::cpu {
namespace {

// Loads 32 elements, or those of the mask and zeros, as bfloat16.
inline __m512i load_bf16(const bfloat16* p, __mmask32 columns) {
  return _mm512_maskz_loadu_epi16(columns, p);
}
inline __m512i load_bf16(const float* p, __mmask32 columns) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns), p),
               high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns >> 16), p + 16);
  return narrow_pair({low}, {high});
}
inline __mmask32 first_columns(int64_t n) { return static_cast<__mmask32>(n < 32 ? (1u << n) - 1 : ~0u); }

// Packs B: packed[panel][block of K][...], dot_micro_kernel.h has the layout of a block. K is padded with
// zeros to whole blocks; where packs_filter_rows(), a block is one row of the filter.
template <class T>
void pack_blocks(const Bf16WeightView& w, Range panels, bfloat16* to) {
  const auto* weight = static_cast<const T*>(w.data);
  const bool filter_rows = packs_filter_rows(w.channels, w.kernel_w, kTiles);
  const int64_t k = w.kernel_h * w.kernel_w * w.channels;
  const int64_t blocks = padded_k(w.channels, w.kernel_h, w.kernel_w, kTiles) / kBlockK;
  to += panels.begin * blocks * kBlockElements;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t half = 0; half < kPanelWidth; half += kHalfWidth, to += kHalfElements) {
        // The transpose of 16 output channels x 16 pairs of rows of K.
        const int64_t first = panel * kPanelWidth + half;
        __m512i pairs[kHalfWidth];
        for (int64_t o = 0; o < kHalfWidth; ++o) {
          pairs[o] = _mm512_setzero_si512();
          if (first + o >= w.out_channels) continue;
          const T* from = weight + (first + o) * k;
          if (!filter_rows) {
            pairs[o] = load_bf16(from + block * kBlockK, first_columns(k - block * kBlockK));
            continue;
          }
          alignas(64) bfloat16 row[kBlockK] = {};
          for (int64_t j = 0; j < w.kernel_w; ++j) {
            const __m512i pixel =
                load_bf16(from + (block * w.kernel_w + j) * w.channels, first_columns(w.channels));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(row + j * kPixelChannels),
                             _mm512_castsi512_si128(pixel));
          }
          pairs[o] = _mm512_load_si512(row);
        }
        transpose_16x16(pairs);
        for (int i = 0; i < kHalfWidth; ++i) _mm512_storeu_si512(to + i * kPanelWidth, pairs[i]);
      }
    }
  }
}

// Packs B of the gradient with respect to the input (dgrad), whose taps are reversed and whose input and
// output channels are swapped: K is w.rows x w.columns x the output channels of `w`.
template <class T>
void pack_transposed_blocks(const Bf16WeightView& w, Range panels, bfloat16* to) {
  const auto* weight = static_cast<const T*>(w.data);
  const int64_t taps = w.kernel_h * w.kernel_w;
  const int64_t blocks = padded_k(w.out_channels, w.rows.count, w.columns.count, kTiles) / kBlockK;
  const PairInterleaver order;
  // The next row of K: an output channel of a tap.
  int64_t i = 0, j = 0, o = 0;
  const auto next_row = [&]() -> const T* {
    if (i == w.rows.count) return nullptr;
    const int64_t tap = (w.rows.first + (w.rows.count - 1 - i) * w.rows.step) * w.kernel_w + w.columns.first +
                        (w.columns.count - 1 - j) * w.columns.step;
    const T* row = weight + (o * taps + tap) * w.channels;
    if (++o == w.out_channels) o = 0, ++j;
    if (j == w.columns.count) j = 0, ++i;
    return row;
  };
  for (int64_t block = 0; block < blocks; ++block) {
    const T* rows[kBlockK];
    for (int64_t r = 0; r < kBlockK; ++r) rows[r] = next_row();
    // All panels of a row, because rows are pages apart.
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const __mmask32 columns = first_columns(w.channels - panel * kPanelWidth);
      const auto load_row = [&](int64_t r) {
        return rows[r] ? load_bf16(rows[r] + panel * kPanelWidth, columns) : _mm512_setzero_si512();
      };
      bfloat16* pairs = to + (panel * blocks + block) * kBlockElements;
      for (int64_t r = 0; r < kBlockK; r += 2, pairs += kPanelWidth) {
        const __m512i even = load_row(r), odd = load_row(r + 1);
        _mm512_storeu_si512(pairs, order.low_columns(even, odd));
        _mm512_storeu_si512(pairs + kHalfElements, order.high_columns(even, odd));
      }
    }
  }
}

void direct_bf16_pack(const Bf16WeightView& w, Range panels, void* packed) {
  auto* const to = static_cast<bfloat16*>(packed);
  if (w.dtype == Dtype::kFloat32) {
    w.transposed ? pack_transposed_blocks<float>(w, panels, to) : pack_blocks<float>(w, panels, to);
  } else {
    w.transposed ? pack_transposed_blocks<bfloat16>(w, panels, to) : pack_blocks<bfloat16>(w, panels, to);
  }
}

}  // namespace
}  // namespace fused_res::cpu
