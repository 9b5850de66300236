// Convolution with bfloat16 operands and fp32 accumulators (the algorithm `direct_bf16`), NHWC: a GEMM with M
// = output pixels, N = output channels and K = filter taps x input channels. A is read in one of three ways:
//   in place  1x1 filters with stride 1: the rows of A are the pixels in channels_last memory.
//   band      larger filters: a band of input rows is copied with its padding, and every filter tap is
//   another
//             start of the rows of A within it (implicit GEMM).
//   im2col    everything else: the receptive fields are copied into rows.
// operand.h selects the way and has the layout of a band.
#pragma once

#include "cpu/isa/dot_micro_kernel.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/operand_copy.h"

namespace fused_res::cpu {
namespace {

// Packs B: packed[panel][block of K][...], dot_micro_kernel.h has the layout of a block. K is padded with
// zeros to whole blocks; where packs_filter_rows(), a block is one row of the filter. `weight`:
// [out_channels][kernel_h][kernel_w][channels].
void direct_bf16_pack(const void* weight, int64_t out_channels, int64_t channels, int64_t kernel_h,
                      int64_t kernel_w, Range panels, void* packed) {
  // A half of a block is the transpose of 16 output channels x 16 pairs of rows of K.
  constexpr int kPairs = kBlockK / 2;
  uint32_t pairs[kHalfWidth][kPairs];
  const bool filter_rows = packs_filter_rows(channels, kernel_w, kTiles);
  const int64_t k = kernel_h * kernel_w * channels, padded = padded_k(channels, kernel_h, kernel_w, kTiles);
  // Copies block `block` of K of an output channel.
  const auto copy_block = [&](const bfloat16* from, int64_t block, bfloat16* to) {
    if (!filter_rows) return copy_elements(to, from + block * kBlockK, min(kBlockK, k - block * kBlockK));
    for (int64_t j = 0; j < kernel_w; ++j)
      copy_elements(to + j * kPixelChannels, from + (block * kernel_w + j) * channels, channels);
  };
  auto* to = static_cast<uint32_t*>(packed) + panels.begin * padded * kPanelWidth / 2;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t block = 0; block < padded / kBlockK; ++block) {
      for (int64_t half = 0; half < kPanelWidth; half += kHalfWidth) {
        const int64_t first = panel * kPanelWidth + half, width = min(kHalfWidth, out_channels - first);
        if (filter_rows || width < kHalfWidth || (block + 1) * kBlockK > k) memset(pairs, 0, sizeof pairs);
        for (int64_t o = 0; o < width; ++o)
          copy_block(static_cast<const bfloat16*>(weight) + (first + o) * k, block,
                     reinterpret_cast<bfloat16*>(pairs[o]));
        for (int pair = 0; pair < kPairs; ++pair) {
          for (int o = 0; o < kHalfWidth; ++o) *to++ = pairs[o][pair];
        }
      }
    }
  }
}

// Consecutive rows of A. The first `valid` of every `pitch` rows are output pixels, in order, from `pixel`
// on.
struct Segment {
  const bfloat16* a;
  int64_t lda, rows;
  int64_t pixel, pitch, valid;
  int64_t unread;  // rows after these that may be read
};

// The start of the rows of A for each tap, relative to that of tap 0, in the order of the packed weight.
inline TapLoop band_taps(const ConvolutionArgs& args, const BandLayout& band, int64_t plane,
                         int64_t* offsets) {
  const bool filter_rows = packs_filter_rows(args.channels, args.kernel_w, kTiles);
  const int64_t columns = filter_rows ? 1 : args.kernel_w;
  for (int64_t i = 0; i < args.kernel_h; ++i) {
    const int64_t y = i * args.dilation_h, row_phase = y % args.stride_h;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t x = j * args.dilation_w, column_phase = x % args.stride_w;
      offsets[i * columns + j] = (row_phase * band.column_phases + column_phase) * plane +
                                 (y / args.stride_h * band.pitch + x / args.stride_w) * band.step;
    }
  }
  if (filter_rows) return {args.kernel_h, 1, offsets, static_cast<int>(args.kernel_w * kPixelChannels)};
  return {args.kernel_h * columns, args.channels / kBlockK, offsets};
}

// The rows of a block that are output pixels, in order. Tiles also compute rows that are none: those before a
// last tile that begins earlier (`skip`), and the padding at the end of a line of a band.
struct OutputRows {
  int64_t count = 0;
  int32_t row[kDotRows];     // of the block
  int64_t offset[kDotRows];  // elements, of the first output channel

  // The rows [first, first + rows) of a segment.
  void set(const Segment& s, int64_t first, int64_t rows, int64_t skip, int64_t out_channels) {
    count = 0;
    int64_t column = first % s.pitch, pixel = s.pixel + first / s.pitch * s.valid + min(column, s.valid);
    for (int64_t r = 0; r < rows; ++r) {
      if (column < s.valid) {
        if (r >= skip) row[count] = static_cast<int32_t>(r), offset[count++] = pixel * out_channels;
        ++pixel;
      }
      if (++column == s.pitch) column = 0;
    }
  }
};

// The epilogue of one block of rows for one panel: bias, residual and ReLU in fp32, rounded once.
class DotEpilogue {
 public:
  DotEpilogue() = default;
  DotEpilogue(const ConvolutionArgs& args, int64_t panel, const OutputRows& rows)
      : rows_(&rows),
        y_(static_cast<bfloat16*>(args.y) + panel * kPanelWidth),
        residual_(args.residual ? static_cast<const bfloat16*>(args.residual) + panel * kPanelWidth
                                : nullptr),
        relu_(args.relu),
        stream_(args.stream) {
    const int64_t columns = args.out_channels - panel * kPanelWidth;
    full_ = columns >= kPanelWidth;
    columns_ = full_ ? ~__mmask32{0} : static_cast<__mmask32>((1u << columns) - 1);
    bias_[0] = bias_[1] = Vec<float>::zero();
    if (args.bias) {
      const float* bias = args.bias + panel * kPanelWidth;
      bias_[0].v = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns_), bias);
      bias_[1].v = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns_ >> 16), bias + kHalfWidth);
    }
  }

  int64_t count() const { return rows_->count; }
  int64_t row(int64_t i) const { return rows_->row[i]; }

  // Prefetches the operands, so that their loads overlap the GEMM.
  void prefetch_rows() const {
    for (int64_t i = 0; i < count(); ++i) {
      if (residual_) prefetch(residual_ + rows_->offset[i]);
      if (!stream_) prefetch_to_write(y_ + rows_->offset[i]);
    }
  }

  // Stores the rows [begin, end) of the accumulators.
  void store(const float (*acc)[kPanelWidth], int64_t begin, int64_t end) const {
    const bool whole_lines = full_ && !stream_;
    if (residual_)
      return whole_lines ? store_rows<true, true>(acc, begin, end) : store_rows<true, false>(acc, begin, end);
    return whole_lines ? store_rows<false, true>(acc, begin, end) : store_rows<false, false>(acc, begin, end);
  }
  void store(int64_t i, Vec<float> low, Vec<float> high) const {
    residual_ ? store_row<true, false>(i, low, high) : store_row<false, false>(i, low, high);
  }

 private:
  // kWholeLines: without masks and streaming stores.
  template <bool kResidual, bool kWholeLines>
  void store_rows(const float (*acc)[kPanelWidth], int64_t begin, int64_t end) const {
    const DotEpilogue e = *this;  // in registers
    for (int64_t i = begin; i < end; ++i) {
      const float* row = acc[e.rows_->row[i]];
      e.store_row<kResidual, kWholeLines>(i, load(row), load(row + kHalfWidth));
    }
  }
  template <bool kResidual, bool kWholeLines>
  void store_row(int64_t i, Vec<float> low, Vec<float> high) const {
    const int64_t at = rows_->offset[i];
    low = low + bias_[0], high = high + bias_[1];
    if constexpr (kResidual) {
      const bfloat16* from = residual_ + at;
      const __m512i added =
          kWholeLines || full_ ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(columns_, from);
      low = low + widen(_mm512_castsi512_si256(added), bfloat16{});
      high = high + widen(_mm512_extracti64x4_epi64(added, 1), bfloat16{});
    }
    if (relu_) low = maskz(not_less_equal_zero(low), low), high = maskz(not_less_equal_zero(high), high);
#if defined(__AVX512BF16__)
    const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
#else
    const __m512i both =
        _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low, bfloat16{})), narrow(high, bfloat16{}), 1);
#endif
    bfloat16* to = y_ + at;
    if (kWholeLines) {
      _mm512_storeu_si512(to, both);
    } else if (stream_) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
    } else if (full_) {
      _mm512_storeu_si512(to, both);
    } else {
      _mm512_mask_storeu_epi16(to, columns_, both);
    }
  }

  const OutputRows* rows_;
  bfloat16* y_;
  const bfloat16* residual_;
  bool relu_, stream_, full_;
  __mmask32 columns_;
  Vec<float> bias_[2];
};

using Gemm = DotMicroKernel<DotEpilogue>;

// A block of at most kDotRows rows of a segment.
struct Block {
  const bfloat16* a;
  int64_t lda, rows;
  OutputRows outputs;

  void set(const Segment& s, Range range, int64_t out_channels) {
    // The rows of a last tile that do not exist: the tile begins earlier instead.
    int64_t skip = range.begin + Gemm::rows_read(range.end - range.begin) - s.rows - s.unread;
    if (skip < 0) skip = 0;
    const int64_t first = range.begin - skip;
    a = s.a + first * s.lda, lda = s.lda, rows = range.end - first;
    outputs.set(s, first, rows, skip, out_channels);
  }
};

// Computes the output pixels `rows`, counted through all images, for the output channels of `panels`. With
// the operand kBand, `rows` are whole rows of the output.
void direct_bf16_run(const ConvolutionArgs& args, Range rows, Range panels, void* scratch) {
  constexpr int64_t kRows = Gemm::kRows;
  const Operand operand = select_operand(args, kTiles);
  auto* a = static_cast<bfloat16*>(scratch);
  const int64_t k_blocks = padded_k(args, kTiles) / kBlockK, count = rows.end - rows.begin;
  int64_t offsets[kMaxTaps] = {0};
  TapLoop taps = {1, k_blocks, offsets};
  const BandLayout band(args, kTiles);
  if (operand == Operand::kBand) {
    int64_t lines = 0;
    for_each_image(args, rows, [&](int64_t, Range part) { lines += part.end - part.begin + band.halo; });
    const int64_t plane = band.plane(lines);
    taps = band_taps(args, band, plane, offsets);
    if (!args.operand_cached) copy_bands(args, band, rows, a, plane);
  } else if (operand == Operand::kIm2col && !args.operand_cached) {
    im2col_bf16(args, rows, a);
  }
  Gemm gemm(taps.channels);

  // Calls f(segment) for every segment of these rows.
  const auto for_each_segment = [&](auto f) {
    if (operand == Operand::kInPlace) {
      const int64_t total = args.images * args.out_height * args.out_width;
      const auto* x = static_cast<const bfloat16*>(args.x) + rows.begin * args.channels;
      return f(Segment{x, args.channels, count, rows.begin, count, count, total - rows.end});
    }
    if (operand == Operand::kIm2col)
      return f(Segment{a, im2col_stride(args), count, rows.begin, count, count, kRows});
    const bfloat16* from = a;
    for_each_image(args, rows, [&](int64_t image, Range part) {
      const int64_t pixel = (image * args.out_height + part.begin) * args.out_width,
                    lines = part.end - part.begin, width = args.out_width;
      if (kTiles) {
        f(Segment{from, band.step, (lines - 1) * band.pitch + width, pixel, band.pitch, width, kRows});
      } else {
        for (int64_t line = 0; line < lines; ++line) {
          f(Segment{from + line * band.pitch * band.step, band.step, width, pixel + line * width, width,
                    width, kRows});
        }
      }
      from += (lines + band.halo) * band.pitch * band.step;
    });
  };

  const auto for_each_block = [&](const Segment& s, auto f) {
    const int64_t parts = (s.rows + kRows - 1) / kRows;
    for (int64_t i = 0; i < parts; ++i) {
      // Registers: blocks of nearly equal height. Tiles: full blocks.
      f(kTiles ? Range{i * kRows, min((i + 1) * kRows, s.rows)}
               : Range{s.rows * i / parts, s.rows * (i + 1) / parts});
    }
  };
  // While a block of rows is computed for all panels, the next block's memory is prefetched.
  const int64_t steps = (panels.end - panels.begin) * k_blocks;
  const auto next_block = [&](const Segment& s, Range block) {
    const int64_t pixel = s.pixel + block.end / s.pitch * s.valid + min(block.end % s.pitch, s.valid);
    // `lines` cache lines of each of the next kRows rows of `elements` elements, from column `column`.
    const auto stream = [&](const void* base, int64_t row, int64_t elements, int64_t column, int64_t lines) {
      return PrefetchStream(static_cast<const bfloat16*>(base) + row * elements + column,
                            (kRows * lines + steps - 1) / steps, lines, elements * 2);
    };
    const int64_t column = panels.begin * kPanelWidth, lines = panels.end - panels.begin;
    PrefetchStreams streams;
    if (operand == Operand::kInPlace && !args.operand_cached)
      streams.input = stream(s.a, block.end, s.lda, 0, s.lda / 32);
    if (args.residual) streams.residual = stream(args.residual, pixel, args.out_channels, column, lines);
    streams.output = stream(args.y, pixel, args.out_channels, column, lines);
    streams.output.write = true;
    if (args.stream) streams.output.lines = 0;
    return streams;
  };
  // Two, because the epilogue of a block of tiles runs while the next block is multiplied.
  Block blocks[2];
  int current = 0;
  const auto compute = [&](const Block& block, int64_t panel, PrefetchStreams& streams) {
    const auto* b = static_cast<const bfloat16*>(args.packed) + panel * k_blocks * kBlockElements;
    const DotEpilogue epilogue(args, panel, block.outputs);
    if (streams.output.next == nullptr) epilogue.prefetch_rows();
    gemm.run(block.rows, block.a, block.lda, b, taps, streams, epilogue);
  };
  const auto for_each_block_of = [&](auto f) {
    for_each_segment([&](const Segment& s) {
      for_each_block(s, [&](Range range) {
        current ^= 1;
        blocks[current].set(s, range, args.out_channels);
        f(s, range, blocks[current]);
      });
    });
  };
  // With tiles, the first block reads panels that are not cached as fast as memory provides them: ResNet-50's
  // 3x3 kernels of 512 channels take 0.82 of the time with one image. vdpbf16ps prefetches by itself.
  constexpr int64_t kBlockLines = kBlockElements * 2 / 64, kDistance = 8 * kBlockElements;
  const auto weight_stream = [&](int64_t panel) {
    if (!kTiles) return PrefetchStream();
    const auto* b = static_cast<const bfloat16*>(args.packed) + panel * k_blocks * kBlockElements;
    return PrefetchStream(b + kDistance, kBlockLines, kBlockLines, kBlockElements * 2);
  };
  bool first = true;
  if (args.pixels_outer) {
    for_each_block_of([&](const Segment& s, Range range, const Block& block) {
      PrefetchStreams streams = next_block(s, range);
      if (first) streams.weight = weight_stream(panels.begin);
      first = false;
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) compute(block, panel, streams);
    });
  } else {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      first = true;
      for_each_block_of([&](const Segment&, Range, const Block& block) {
        PrefetchStreams streams;
        if (first) streams.weight = weight_stream(panel);
        first = false;
        compute(block, panel, streams);
      });
    }
  }
  gemm.finish();
  if (args.stream) stream_fence();
}

}  // namespace
}  // namespace fused_res::cpu
