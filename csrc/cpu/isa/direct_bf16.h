// Convolution with bfloat16 operands and fp32 accumulators (the algorithm `direct_bf16`), NHWC: a GEMM with M
// = output pixels, N = output channels and K = filter taps x input channels. A is read in one of three ways:
//   in place  1x1 filters with stride 1: the rows of A are the pixels in channels_last memory.
//   band      other filters with stride 1: a band of input rows is copied with its padding, and every filter
//             tap is another start of the rows of A within it (implicit GEMM).
//   im2col    everything else: the receptive fields are copied into rows.
// operand.h selects the way.
#pragma once

#include "cpu/isa/dot_micro_kernel.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/operand.h"

namespace fused_res::cpu {
namespace {

// Copies n elements in vectors of a cache line.
inline void copy_elements(bfloat16* to, const bfloat16* from, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  if (i < n) {
    const auto mask = static_cast<__mmask32>((1ull << (n - i)) - 1);
    _mm512_mask_storeu_epi16(to + i, mask, _mm512_maskz_loadu_epi16(mask, from + i));
  }
}
inline void clear_elements(bfloat16* to, int64_t n) {
  if (n > 0) memset(to, 0, n * sizeof *to);
}

// Packs B: packed[panel][block of K][...], dot_micro_kernel.h has the layout of a block. K is padded with
// zeros to whole blocks. `weight`: B^T, [out_channels][k].
void direct_bf16_pack(const void* weight, int64_t out_channels, int64_t k, Range panels, void* packed) {
  // A half of a block is the transpose of 16 output channels x 16 pairs of rows of K.
  constexpr int kPairs = kBlockK / 2;
  uint32_t pairs[kHalfWidth][kPairs];
  auto* to =
      static_cast<uint32_t*>(packed) + panels.begin * ((k + kBlockK - 1) / kBlockK) * kBlockElements / 2;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t row = 0; row < k; row += kBlockK) {
      const int64_t rows = min(kBlockK, k - row);
      for (int64_t half = 0; half < kPanelWidth; half += kHalfWidth) {
        const int64_t first = panel * kPanelWidth + half, width = min(kHalfWidth, out_channels - first);
        if (rows < kBlockK || width < kHalfWidth) memset(pairs, 0, sizeof pairs);
        for (int64_t o = 0; o < width; ++o) {
          copy_elements(reinterpret_cast<bfloat16*>(pairs[o]),
                        static_cast<const bfloat16*>(weight) + (first + o) * k + row, rows);
        }
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

// Copies the band of input rows for the output rows [begin, end) of one image, with padding.
inline void copy_band(const ConvolutionArgs& args, int64_t image, Range out_rows, bfloat16* to) {
  const int64_t c = args.channels, pitch = band_width(args);
  const int64_t left = min(args.pad_w, pitch), width = min(args.width, pitch - left);
  const bfloat16* x = static_cast<const bfloat16*>(args.x) + image * args.height * args.width * c;
  const int64_t first = out_rows.begin - args.pad_h, rows = band_height(args, out_rows.end - out_rows.begin);
  for (int64_t row = first; row < first + rows; ++row, to += pitch * c) {
    if (row < 0 || row >= args.height) {
      clear_elements(to, pitch * c);
      continue;
    }
    clear_elements(to, left * c);
    copy_elements(to + left * c, x + row * args.width * c, width * c);
    clear_elements(to + (left + width) * c, (pitch - left - width) * c);
  }
}

// im2col: copies the receptive field of each output pixel of `rows` into a row of `to`.
inline void im2col_bf16(const ConvolutionArgs& args, Range rows, bfloat16* to) {
  const int64_t c = args.channels, k = gemm_k(args), stride = im2col_stride(args);
  const auto* x = static_cast<const bfloat16*>(args.x);
  const bfloat16* const end = x + args.images * args.height * args.width * c;
  for (int64_t row = rows.begin; row < rows.end; ++row, to += stride) {
    const int64_t ox = row % args.out_width, oy = row / args.out_width % args.out_height,
                  image = row / (args.out_width * args.out_height);
    const int64_t top = oy * args.stride_h - args.pad_h, left = ox * args.stride_w - args.pad_w;
    const Range columns = valid_taps(left, args.kernel_w, args.dilation_w, args.width);
    bfloat16* line = to;
    const bfloat16* corner = x + ((image * args.height + top) * args.width + left) * c;
    const int64_t pitch = args.dilation_h * args.width * c, line_elements = args.kernel_w * c;
    if (top >= 0 && top + (args.kernel_h - 1) * args.dilation_h < args.height && args.dilation_w == 1 &&
        columns.end - columns.begin == args.kernel_w &&
        corner + (args.kernel_h - 1) * pitch + line_elements + 32 <= end) {
      // Copied in full vectors: the surplus elements are overwritten by the next line or lie in the padding
      // after the row. Masked stores take several times as long.
      for (int64_t i = 0; i < args.kernel_h; ++i, line += line_elements, corner += pitch) {
        for (int64_t j = 0; j < line_elements; j += 32)
          _mm512_storeu_si512(line + j, _mm512_loadu_si512(corner + j));
      }
      clear_elements(to + k, padded_k(args) - k);
      continue;
    }
    for (int64_t i = 0; i < args.kernel_h; ++i, line += args.kernel_w * c) {
      const int64_t y = top + i * args.dilation_h;
      if (y < 0 || y >= args.height || columns.begin == columns.end) {
        clear_elements(line, args.kernel_w * c);
        continue;
      }
      const bfloat16* from = x + ((image * args.height + y) * args.width + left) * c;
      clear_elements(line, columns.begin * c);
      if (args.dilation_w == 1) {
        copy_elements(line + columns.begin * c, from + columns.begin * c, (columns.end - columns.begin) * c);
      } else {
        for (int64_t j = columns.begin; j < columns.end; ++j)
          copy_elements(line + j * c, from + j * args.dilation_w * c, c);
      }
      clear_elements(line + columns.end * c, (args.kernel_w - columns.end) * c);
    }
    clear_elements(to + k, padded_k(args) - k);
  }
}

// The output pixels of consecutive rows of a segment. The rows that only tiles compute are no output pixels:
// those before a last tile that begins earlier (`skip`), and the padding at the end of a line of a band.
class RowCursor {
 public:
  RowCursor() = default;
  RowCursor(const Segment& s, int64_t row, int64_t skip)
      : pixel_(s.pixel + row), column_(row), pitch_(s.pitch), valid_(s.valid), skip_(skip) {
    if (kTiles && row >= s.valid) {
      column_ = row % pitch_;
      pixel_ = s.pixel + row / pitch_ * valid_ + (column_ < valid_ ? column_ : valid_);
    }
  }

  // Returns the output pixel of the current row, or -1, and moves on to the next row.
  int64_t next() {
    if (!kTiles) return pixel_++;
    const bool is_output = column_ < valid_;
    const int64_t pixel = pixel_;
    if (++column_ == pitch_) column_ = 0;
    pixel_ += is_output;
    return is_output && --skip_ < 0 ? pixel : -1;
  }

 private:
  int64_t pixel_, column_, pitch_, valid_, skip_;
};

// The epilogue of one block of rows for one panel: bias, residual and ReLU in fp32, rounded once.
class DotEpilogue {
 public:
  DotEpilogue() = default;
  DotEpilogue(const ConvolutionArgs& args, int64_t panel, const RowCursor& rows)
      : rows_(rows),
        pitch_(args.out_channels),
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

  // Prefetches the operands of `rows` rows, so that their loads overlap the GEMM.
  void prefetch_rows(int64_t rows) const {
    RowCursor cursor = rows_;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t pixel = cursor.next();
      if (pixel < 0) continue;
      if (residual_) prefetch(residual_ + pixel * pitch_);
      if (!stream_) prefetch_to_write(y_ + pixel * pitch_);
    }
  }

  // Stores the next row from its columns [0, 16) and [16, 32).
  void store(Vec<float> low, Vec<float> high) {
    const int64_t pixel = rows_.next(), at = pixel * pitch_;
    if (kTiles && pixel < 0) return;
    low = low + bias_[0], high = high + bias_[1];
    if (residual_) {
      const bfloat16* from = residual_ + at;
      const __m512i added = full_ ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(columns_, from);
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
    if (stream_) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
    } else if (full_) {
      _mm512_storeu_si512(to, both);
    } else {
      _mm512_mask_storeu_epi16(to, columns_, both);
    }
  }

 private:
  RowCursor rows_;
  int64_t pitch_;
  bfloat16* y_;
  const bfloat16* residual_;
  bool relu_, stream_, full_;
  __mmask32 columns_;
  Vec<float> bias_[2];
};

using Gemm = DotMicroKernel<DotEpilogue>;

// One block of at most Gemm::kRows rows of a segment, for one panel.
inline void compute_block(const ConvolutionArgs& args, const TapLoop& taps, const Segment& s, Range rows,
                          int64_t panel, PrefetchStreams& streams, Gemm& gemm) {
  const auto* b = static_cast<const bfloat16*>(args.packed) + panel * padded_k(args) * kPanelWidth;
  // The rows of a last tile that do not exist: the tile begins earlier instead.
  int64_t skip = rows.begin + gemm.rows_read(rows.end - rows.begin) - s.rows - s.unread;
  if (skip < 0) skip = 0;
  const int64_t first = rows.begin - skip, n = rows.end - first;
  const DotEpilogue epilogue(args, panel, RowCursor(s, first, skip));
  if (streams.output.next == nullptr) epilogue.prefetch_rows(n);
  gemm.run(n, s.a + first * s.lda, s.lda, b, taps, streams, epilogue);
}

// Computes the output pixels `rows`, counted through all images, for the output channels of `panels`. With
// the operand kBand, `rows` are whole rows of the output.
void direct_bf16_run(const ConvolutionArgs& args, Range rows, Range panels, void* scratch) {
  constexpr int64_t kRows = Gemm::kRows;
  const Operand operand = select_operand(args, kTiles);
  auto* a = static_cast<bfloat16*>(scratch);
  const int64_t blocks = padded_k(args) / kBlockK, count = rows.end - rows.begin;
  TapLoop taps = {1, 1, blocks, 0, 0};
  Gemm gemm;

  // Calls f(segment) for every segment of these rows.
  const auto for_each_segment = [&](auto f) {
    if (operand == Operand::kInPlace) {
      const int64_t total = args.images * args.out_height * args.out_width;
      const auto* x = static_cast<const bfloat16*>(args.x) + rows.begin * args.channels;
      return f(Segment{x, args.channels, count, rows.begin, count, count, total - rows.end});
    }
    if (operand == Operand::kIm2col)
      return f(Segment{a, im2col_stride(args), count, rows.begin, count, count, kRows});
    const int64_t pitch = band_width(args), c = args.channels;
    const bfloat16* band = a;
    for_each_image(args, rows, [&](int64_t image, Range out_rows) {
      const int64_t pixel = (image * args.out_height + out_rows.begin) * args.out_width,
                    lines = out_rows.end - out_rows.begin;
      if (kTiles) {
        f(Segment{band, c, (lines - 1) * pitch + args.out_width, pixel, pitch, args.out_width, kRows});
      } else {
        for (int64_t line = 0; line < lines; ++line) {
          f(Segment{band + line * pitch * c, c, args.out_width, pixel + line * args.out_width, args.out_width,
                    args.out_width, kRows});
        }
      }
      band += band_height(args, lines) * pitch * c;
    });
  };

  if (operand == Operand::kBand) {
    taps = {args.kernel_h, args.kernel_w, args.channels / kBlockK,
            args.dilation_h * band_width(args) * args.channels, args.dilation_w * args.channels};
    bfloat16* to = a;
    for_each_image(args, rows, [&](int64_t image, Range out_rows) {
      copy_band(args, image, out_rows, to);
      to += band_height(args, out_rows.end - out_rows.begin) * band_width(args) * args.channels;
    });
  } else if (operand == Operand::kIm2col) {
    im2col_bf16(args, rows, a);
  }

  const auto for_each_block = [&](const Segment& s, auto f) {
    const int64_t parts = (s.rows + kRows - 1) / kRows;
    for (int64_t i = 0; i < parts; ++i) {
      // Registers: blocks of nearly equal height. Tiles: full blocks.
      f(kTiles ? Range{i * kRows, min((i + 1) * kRows, s.rows)}
               : Range{s.rows * i / parts, s.rows * (i + 1) / parts});
    }
  };
  // While a block of rows is computed for all panels, the next block's memory is prefetched.
  const int64_t steps = (panels.end - panels.begin) * blocks;
  const auto next_block = [&](const Segment& s, Range block) {
    PrefetchStreams streams;
    if (s.pitch != s.valid) return streams;
    const auto stream = [&](const void* base, int64_t row, int64_t elements) {
      return PrefetchStream{static_cast<const char*>(base) + row * elements * 2,
                            (kRows * elements * 2 / 64 + steps - 1) / steps};
    };
    if (operand == Operand::kInPlace) streams.input = stream(s.a, block.end, s.lda);
    if (args.residual) streams.residual = stream(args.residual, s.pixel + block.end, args.out_channels);
    streams.output = stream(args.y, s.pixel + block.end, args.out_channels);
    streams.output.write = true;
    if (args.stream) streams.output.lines = 0;
    return streams;
  };
  if (args.pixels_outer) {
    for_each_segment([&](const Segment& s) {
      for_each_block(s, [&](Range block) {
        PrefetchStreams streams = next_block(s, block);
        for (int64_t panel = panels.begin; panel < panels.end; ++panel)
          compute_block(args, taps, s, block, panel, streams, gemm);
      });
    });
  } else {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for_each_segment([&](const Segment& s) {
        for_each_block(s, [&](Range block) {
          PrefetchStreams none;
          compute_block(args, taps, s, block, panel, none, gemm);
        });
      });
    }
  }
  gemm.finish();
  if (args.stream) stream_fence();
}

}  // namespace
}  // namespace fused_res::cpu
