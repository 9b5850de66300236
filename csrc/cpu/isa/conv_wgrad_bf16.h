// Gradient of a convolution's weight with products of bfloat16 and fp32 accumulators, NHWC: a GEMM whose K is
// the output pixels, chunk by chunk:
//
//   dw[tap][c][o] = sum over pixels of A[pixel + shift of the tap][c] * dz[pixel][o]
//
// A is that of the forward convolution (operand_copy.h), transposed once, so that a tap is a shift of the
// rows of A^T. dz is packed into the blocks of B of dot_micro_kernel.h, in pairs of pixels.
#pragma once

#include "cpu/isa/bf16_blocks.h"
#include "cpu/isa/dot_micro_kernel.h"
#include "cpu/isa/operand_copy.h"
#include "cpu/isa/split_k.h"

namespace fused_res::cpu {
namespace {

// Transposes `rows` <= 32 rows of 32 columns, `stride` elements apart; the other rows are zero. `columns`:
// those that are read, the others are zero. `to`: 32 rows of 32 elements, `pitch` elements apart.
inline void transpose_block(const bfloat16* from, int64_t stride, int64_t rows, __mmask32 columns,
                            const PairInterleaver& order, bfloat16* to, int64_t pitch) {
  const auto load_row = [&](int64_t row) {
    prefetch(from + (row + kBlockK) * stride);  // the next block's
    return _mm512_maskz_loadu_epi16(row < rows ? columns : 0, from + (row < rows ? row : 0) * stride);
  };
  __m512i low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    const __m512i even = load_row(2 * i), odd = load_row(2 * i + 1);
    low[i] = order.low_columns(even, odd);
    high[i] = order.high_columns(even, odd);
  }
  transpose_16x16(low);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * pitch, low[i]);
  transpose_16x16(high);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (16 + i) * pitch, high[i]);
}

// A^T: transposed[plane][wgrad_tap_rows()][wgrad_pitch(positions)].
void wgrad_bf16_pack_input(const WeightGradientArgs& args, Range block, void* copied, void* transposed) {
  const RowsOfA a(args.convolution, block, static_cast<bfloat16*>(copied));
  a.copy();
  const TapLoop& taps = a.taps();
  const PairInterleaver order;
  const auto columns = static_cast<__mmask32>((1ull << taps.channels) - 1);
  // Positions whose columns are within the plane.
  const int64_t readable = (a.plane() - taps.channels) / a.lda() + 1;
  const int64_t pitch = wgrad_pitch(a.positions()), tap_rows = wgrad_tap_rows(args.convolution, kTiles);
  auto* to = static_cast<bfloat16*>(transposed);
  for (int64_t plane = 0; plane < a.planes(); ++plane, to += tap_rows * pitch) {
    const bfloat16* from = a.data() + plane * a.plane();
    for (int64_t position = 0; position < pitch; position += kBlockK) {
      const int64_t rows = readable - position < kBlockK ? readable - position : kBlockK;
      for (int64_t c = 0; c < tap_rows; c += kBlockK) {
        transpose_block(from + position * a.lda() + c, a.lda(), rows, columns, order,
                        to + c * pitch + position, pitch);
      }
    }
  }
}

// Packs dz into packed[panel][block of 32 positions][kBlockElements], where a position that is no output
// pixel is zero. The blocks are those of the segments of A; their first positions follow, int64_t[block].
void wgrad_bf16_pack_dz(const WeightGradientArgs& args, Range block, void* packed) {
  const auto& shape = args.convolution;
  const RowsOfA a(shape, block, nullptr);
  const int64_t panels = (shape.out_channels + kPanelWidth - 1) / kPanelWidth;
  const int64_t blocks = wgrad_blocks(shape, kTiles, block), panel_elements = blocks * kBlockElements;
  const PairInterleaver order;
  const auto* dz = static_cast<const bfloat16*>(args.dz);
  auto* to = static_cast<bfloat16*>(packed);
  auto* position = reinterpret_cast<int64_t*>(to + panels * panel_elements);
  a.for_each_segment(true, [&](const Segment& s) {
    int64_t column = 0, pixel = s.pixel;
    for (int64_t first = 0; first < s.rows; first += kBlockK, to += kBlockElements) {
      *position++ = s.first + first;
      const bfloat16* rows[kBlockK];
      bool valid[kBlockK];
      for (int64_t r = 0; r < kBlockK; ++r) {
        valid[r] = first + r < s.rows && column < s.valid;
        rows[r] = dz + (valid[r] ? pixel++ : 0) * shape.out_channels;
        if (++column == s.pitch) column = 0;
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t width = min(kPanelWidth, shape.out_channels - panel * kPanelWidth);
        const auto columns = static_cast<__mmask32>((1ull << width) - 1);
        bfloat16* pairs = to + panel * panel_elements;
        const auto load_row = [&](int64_t r) {
          prefetch(rows[r] + kBlockK * shape.out_channels + panel * kPanelWidth);  // the next block's
          return _mm512_maskz_loadu_epi16(valid[r] ? columns : 0, rows[r] + panel * kPanelWidth);
        };
        for (int64_t r = 0; r < kBlockK; r += 2, pairs += kPanelWidth) {
          const __m512i even = load_row(r), odd = load_row(r + 1);
          _mm512_storeu_si512(pairs, order.low_columns(even, odd));
          _mm512_storeu_si512(pairs + kHalfElements, order.high_columns(even, odd));
        }
      }
    }
  });
}

// acc[panel][tap][row][kPanelWidth] (+)= A^T dz for these panels and blocks of rows of A^T.
void wgrad_bf16_gemm(const WeightGradientArgs& args, Range block, Range panels, Range row_blocks,
                     const void* transposed, const void* packed, bool overwrite, float* acc,
                     const MemoryRange* next) {
  constexpr int64_t kRows = DotAccumulator::kRows;
  const RowsOfA a(args.convolution, block, nullptr);
  const TapLoop& taps = a.taps();
  const int64_t pitch = wgrad_pitch(a.positions()), tap_rows = wgrad_tap_rows(args.convolution, kTiles);
  const int64_t count = wgrad_blocks(args.convolution, kTiles, block);
  const int64_t all_panels = (args.convolution.out_channels + kPanelWidth - 1) / kPanelWidth;
  const auto* positions = reinterpret_cast<const int64_t*>(static_cast<const bfloat16*>(packed) +
                                                           all_panels * count * kBlockElements);
  // The operands of the next chunk are read from memory while this one is multiplied.
  const int64_t steps =
      (panels.end - panels.begin) * (row_blocks.end - row_blocks.begin) * kBlockK / kRows * taps.taps * count;
  ChunkPrefetch prefetch(next, steps);
  DotAccumulator gemm;
  const int64_t first = row_blocks.begin * kBlockK, last = row_blocks.end * kBlockK;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const bfloat16* b = static_cast<const bfloat16*>(packed) + panel * count * kBlockElements;
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t rows = min(kRows, last - row);
      for (int64_t tap = 0; tap < taps.taps; ++tap) {
        const int64_t plane = taps.offsets[tap] / a.plane(), shift = taps.offsets[tap] % a.plane() / a.lda();
        const bfloat16* from =
            static_cast<const bfloat16*>(transposed) + (plane * tap_rows + row) * pitch + shift;
        float* to =
            acc + (((panel - panels.begin) * taps.taps + tap) * (last - first) + row - first) * kPanelWidth;
        if (prefetch.done()) {
          gemm.run(rows, from, pitch, b, count, positions, overwrite, to, [] {});
        } else {
          gemm.run(rows, from, pitch, b, count, positions, overwrite, to, [&] { prefetch.advance(); });
        }
      }
    }
  }
}

// The weights of a row of dw: a filter tap, counted through the filter, and an input channel; tap -1 for the
// padding of K.
struct TapAndChannel {
  int64_t tap, channel;
};
inline TapAndChannel weights_of_row(const ConvolutionArgs& args, int64_t tap, int64_t row) {
  if (packs_filter_rows(args.channels, args.kernel_w, kTiles)) {
    const int64_t column = row / kPixelChannels, channel = row % kPixelChannels;
    return {column < args.kernel_w && channel < args.channels ? tap * args.kernel_w + column : -1, channel};
  }
  if (select_operand(args, kTiles) == Operand::kBand) return {tap, row};
  return {row < gemm_k(args) ? row / args.channels : -1, row % args.channels};
}

// Adds the accumulators of all parts, of these panels and blocks of rows, and stores dweight.
void wgrad_bf16_reduce(const WeightGradientArgs& args, Range panels, Range row_blocks, const float* acc,
                       int64_t parts, int64_t stride) {
  const auto& shape = args.convolution;
  const int64_t taps = padded_k(shape, kTiles) / wgrad_tap_rows(shape, kTiles);
  const auto address = [&](int64_t panel, TapAndChannel weights) {
    return args.dweight + panel * kPanelWidth * args.output_stride + weights.channel * args.channel_stride +
           weights.tap / shape.kernel_w * args.row_stride + weights.tap % shape.kernel_w * args.column_stride;
  };
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t width = min(kPanelWidth, shape.out_channels - panel * kPanelWidth);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t row = row_blocks.begin * kBlockK; row < row_blocks.end * kBlockK; row += kHalfWidth) {
        const float* from = acc;
        acc += kHalfWidth * kPanelWidth;
        const TapAndChannel first = weights_of_row(shape, tap, row),
                            last = weights_of_row(shape, tap, row + kHalfWidth - 1);
        if (first.tap == last.tap && first.tap >= 0 && last.channel == first.channel + kHalfWidth - 1 &&
            args.channel_stride == 1 && width == kPanelWidth) {
          for (int64_t half = 0; half < kPanelWidth; half += kHalfWidth) {
            __m512i tile[kHalfWidth];
            for (int64_t i = 0; i < kHalfWidth; ++i)
              tile[i] = _mm512_castps_si512(reduce_split_k(from + i * kPanelWidth + half, parts, stride).v);
            transpose_16x16(tile);
            float* to = address(panel, first) + half * args.output_stride;
            for (int64_t o = 0; o < kHalfWidth; ++o, to += args.output_stride) {
              args.stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), tile[o])
                          : _mm512_storeu_si512(to, tile[o]);
            }
          }
          continue;
        }
        for (int64_t i = 0; i < kHalfWidth; ++i, from += kPanelWidth) {
          const TapAndChannel weights = weights_of_row(shape, tap, row + i);
          if (weights.tap < 0) continue;
          float values[kPanelWidth];
          for (int64_t o = 0; o < kPanelWidth; o += Vec<float>::lanes)
            store(values + o, reduce_split_k(from + o, parts, stride));
          float* to = address(panel, weights);
          for (int64_t o = 0; o < width; ++o) to[o * args.output_stride] = values[o];
        }
      }
    }
  }
  if (args.stream) stream_fence();
}

inline constexpr Bf16WeightGradientKernels wgrad_bf16 = {wgrad_bf16_pack_input, wgrad_bf16_pack_dz,
                                                         wgrad_bf16_gemm, wgrad_bf16_reduce};

}  // namespace
}  // namespace fused_res::cpu
