// Convolution with bfloat16 operands and fp32 accumulators (the algorithm `direct_bf16`), NHWC: a GEMM with M
// = output pixels, N = output channels and K = filter taps x input channels. A is read in one of three ways:
//   in place  1x1 filters with stride 1: the rows of A are the pixels in channels_last memory.
//   band      larger filters: a band of input rows is copied with its padding, and every filter tap is
//   another
//             start of the rows of A within it (implicit GEMM).
//   im2col    everything else: the receptive fields are copied into rows.
// operand.h selects the way and has the layout of a band.
#pragma once

#include "cpu/isa/bf16_blocks.h"
#include "cpu/isa/dot_micro_kernel.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/operand_copy.h"

namespace fused_res::cpu {
namespace {

// The rows of a block that are output pixels, in order. Tiles also compute rows that are none: those before a
// last tile that begins earlier (`skip`), and the padding at the end of a line of a band.
struct OutputRows {
  int64_t count = 0;
  int32_t row[kDotRows];     // of the block
  int64_t offset[kDotRows];  // elements, of the first output channel in y

  // The rows [first, first + rows) of a segment.
  void set(const ConvolutionArgs& args, const Segment& s, int64_t first, int64_t rows, int64_t skip) {
    count = 0;
    if (args.y_stride_h != 0) return set_strided(args, s, first, rows, skip);
    int64_t column = first % s.pitch, pixel = s.pixel + first / s.pitch * s.valid + min(column, s.valid);
    for (int64_t r = 0; r < rows; ++r) {
      if (column < s.valid) {
        if (r >= skip) row[count] = static_cast<int32_t>(r), offset[count++] = pixel * args.out_channels;
        ++pixel;
      }
      if (++column == s.pitch) column = 0;
    }
  }

 private:
  void set_strided(const ConvolutionArgs& args, const Segment& s, int64_t first, int64_t rows, int64_t skip) {
    int64_t column = first % s.pitch, pixel = s.pixel + first / s.pitch * s.valid + min(column, s.valid);
    int64_t x = args.out_width, y_row = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (column < s.valid) {
        if (x >= args.out_width) {
          const int64_t line = pixel / args.out_width;
          x = pixel % args.out_width;
          y_row = (line / args.out_height * args.y_height + line % args.out_height * args.y_stride_h) *
                  args.y_width;
        }
        if (r >= skip) {
          row[count] = static_cast<int32_t>(r);
          offset[count++] = (y_row + x * args.y_stride_w) * args.out_channels;
        }
        ++pixel, ++x;
      }
      if (++column == s.pitch) column = 0;
    }
  }
};

// The sums of the statistics of one panel's outputs: of x - pivot and of its square, where the pivot is the
// first value. Sums of x and x^2 would lose M2 to cancellation where the deviation is small against the mean.
struct PanelMoments {
  float pivot[kPanelWidth], sum[kPanelWidth], squares[kPanelWidth];
  int64_t count = 0;
};
static_assert(sizeof(PanelMoments) <= kPanelMomentsBytes);

// The epilogue of one block of rows for one panel: bias, residual and ReLU in fp32, rounded once, and the
// moments of the rounded values.
class DotEpilogue {
 public:
  DotEpilogue() = default;
  DotEpilogue(const ConvolutionArgs& args, int64_t panel, const OutputRows& rows, PanelMoments* moments)
      : rows_(&rows),
        moments_(moments),
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
    if (moments_)
      return whole_lines ? store_moments<true>(acc, begin, end) : store_moments<false>(acc, begin, end);
    if (residual_)
      return whole_lines ? store_rows<true, true>(acc, begin, end) : store_rows<true, false>(acc, begin, end);
    return whole_lines ? store_rows<false, true>(acc, begin, end) : store_rows<false, false>(acc, begin, end);
  }
  void store(int64_t i, Vec<float> low, Vec<float> high) const {
    if (moments_) {
      alignas(64) float acc[kPanelWidth];
      cpu::store(acc, low), cpu::store(acc + kHalfWidth, high);
      return add_moments<false>([&](int64_t) { return acc; }, i, i + 1);
    }
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
  // Stores rows and adds their values to the moments.
  template <bool kWholeLines>
  void store_moments(const float (*acc)[kPanelWidth], int64_t begin, int64_t end) const {
    const DotEpilogue e = *this;
    add_moments<kWholeLines>([&](int64_t i) { return acc[e.rows_->row[i]]; }, begin, end);
  }
  template <bool kWholeLines, class Row>
  void add_moments(Row row, int64_t begin, int64_t end) const {
    PanelMoments& m = *moments_;
    // Row by row, because the ranges of rows depend on the tasks, and so on the number of threads.
    Vec<float> sums[2], squares[2], pivots[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t at = half * kHalfWidth;
      sums[half] = m.count == 0 ? Vec<float>::zero() : load(m.sum + at);
      squares[half] = m.count == 0 ? Vec<float>::zero() : load(m.squares + at);
      pivots[half] = load(m.pivot + at);
    }
    for (int64_t i = begin; i < end; ++i) {
      const float* from = row(i);
      const Vec<float> low = load(from), high = load(from + kHalfWidth);
      const __m512i rounded = residual_ ? store_row<true, kWholeLines>(i, low, high)
                                        : store_row<false, kWholeLines>(i, low, high);
      const Vec<float> values[2] = {widen(_mm512_castsi512_si256(rounded), bfloat16{}),
                                    widen(_mm512_extracti64x4_epi64(rounded, 1), bfloat16{})};
      for (int half = 0; half < 2; ++half) {
        if (m.count == 0 && i == begin) {
          // x - infinity would turn infinity into NaN everywhere.
          const Vec<float> zero = values[half] - values[half];
          pivots[half] = maskz(_mm512_cmp_ps_mask(zero.v, zero.v, _CMP_ORD_Q), values[half]);
          cpu::store(m.pivot + half * kHalfWidth, pivots[half]);
        }
        const Vec<float> difference = values[half] - pivots[half];
        sums[half] = sums[half] + difference;
        squares[half] = fma(difference, difference, squares[half]);
      }
    }
    for (int half = 0; half < 2; ++half) {
      cpu::store(m.sum + half * kHalfWidth, sums[half]);
      cpu::store(m.squares + half * kHalfWidth, squares[half]);
    }
    m.count += end - begin;
  }

  // Returns the rounded values.
  template <bool kResidual, bool kWholeLines>
  __m512i store_row(int64_t i, Vec<float> low, Vec<float> high) const {
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
    const __m512i both = narrow_pair(low, high);
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
    return both;
  }

  const OutputRows* rows_;
  PanelMoments* moments_;
  bfloat16* y_;
  const bfloat16* residual_;
  bool relu_, stream_, full_;
  __mmask32 columns_;
  Vec<float> bias_[2];
};

// Stores (mean, M2) of a panel's channels, the first of which is `begin`.
inline void store_moments(const PanelMoments& m, int64_t out_channels, int64_t begin, double* moments) {
  const int64_t width = min(kPanelWidth, out_channels - begin);
  const auto count = static_cast<double>(m.count);
  double *mean = moments + begin, *m2 = mean + out_channels;
  for (int64_t i = 0; i < width; ++i) {
    const double offset = m.sum[i] / count, squares = m.squares[i] - m.sum[i] * offset;
    mean[i] = m.pivot[i] + offset;
    m2[i] = squares < 0 ? 0 : squares;
  }
}

using Gemm = DotMicroKernel<DotEpilogue>;

// A block of at most kDotRows rows of a segment.
struct Block {
  const bfloat16* a;
  int64_t lda, rows;
  OutputRows outputs;

  void set(const ConvolutionArgs& args, const Segment& s, Range range) {
    // The rows of a last tile that do not exist: the tile begins earlier instead.
    int64_t skip = range.begin + Gemm::rows_read(range.end - range.begin) - s.rows - s.unread;
    if (skip < 0) skip = 0;
    const int64_t first = range.begin - skip;
    a = s.a + first * s.lda, lda = s.lda, rows = range.end - first;
    outputs.set(args, s, first, rows, skip);
  }
};

// Computes the output pixels `rows`, counted through all images, for the output channels of `panels`. With
// the operand kBand, `rows` are whole rows of the output.
void direct_bf16_run(const ConvolutionArgs& args, Range rows, Range panels, void* scratch,
                     void* panel_moments, double* moments) {
  constexpr int64_t kRows = Gemm::kRows;
  const RowsOfA a(args, rows, static_cast<bfloat16*>(scratch));
  if (!args.operand_cached) a.copy();
  const TapLoop& taps = a.taps();
  const int64_t k_blocks = taps.taps * taps.blocks;
  Gemm gemm(taps.channels);

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
    if (a.in_place() && !args.operand_cached) streams.input = stream(s.a, block.end, s.lda, 0, s.lda / 32);
    if (args.y_stride_h != 0) return streams;  // DotEpilogue::prefetch_rows()
    if (args.residual) streams.residual = stream(args.residual, pixel, args.out_channels, column, lines);
    streams.output = stream(args.y, pixel, args.out_channels, column, lines);
    streams.output.write = true;
    if (args.stream) streams.output.lines = 0;
    return streams;
  };
  // Two, because the epilogue of a block of tiles runs while the next block is multiplied.
  Block blocks[2];
  int current = 0;
  // The sums of a panel.
  const auto sums = [&](int64_t panel) {
    return reinterpret_cast<PanelMoments*>(static_cast<char*>(panel_moments) +
                                           (panel - panels.begin) * kPanelMomentsBytes);
  };
  for (int64_t panel = panels.begin; moments && panel < panels.end; ++panel) sums(panel)->count = 0;
  const auto compute = [&](const Block& block, int64_t panel, PrefetchStreams& streams) {
    const auto* b = static_cast<const bfloat16*>(args.packed) + panel * k_blocks * kBlockElements;
    const DotEpilogue epilogue(args, panel, block.outputs, moments ? sums(panel) : nullptr);
    if (streams.output.next == nullptr) epilogue.prefetch_rows();
    gemm.run(block.rows, block.a, block.lda, b, taps, streams, epilogue);
  };
  const auto for_each_block_of = [&](auto f) {
    a.for_each_segment(kTiles, [&](const Segment& s) {
      for_each_block(s, [&](Range range) {
        current ^= 1;
        blocks[current].set(args, s, range);
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
  if (moments) {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      store_moments(*sums(panel), args.out_channels, panel * kPanelWidth, moments);
  }
}

}  // namespace
}  // namespace fused_res::cpu
