// Copies of the input of the convolution with bfloat16 products (direct_bf16.h): bands of input rows and
// im2col matrices. operand.h has their layouts.
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

// Copies pixels of 1 to kPixelChannels channels into pixels of kPixelChannels, the others zero.
inline void copy_and_pad_pixels(bfloat16* to, const bfloat16* from, int64_t channels, int64_t pixels) {
  constexpr int64_t kPixels = 32 / kPixelChannels;
  alignas(64) int16_t indices[32] = {};
  __mmask32 valid = 0;
  for (int i = 0; i < 32; ++i) {
    if (i % kPixelChannels >= channels) continue;
    indices[i] = static_cast<int16_t>(i / kPixelChannels * channels + i % kPixelChannels);
    valid |= __mmask32{1} << i;
  }
  const __m512i order = _mm512_load_si512(indices);
  for (int64_t i = 0; i < pixels; i += kPixels) {
    const int64_t n = min(kPixels, pixels - i);
    const auto read = static_cast<__mmask32>((1ull << (n * channels)) - 1),
               written = static_cast<__mmask32>((1ull << (n * kPixelChannels)) - 1);
    const __m512i loaded = _mm512_maskz_loadu_epi16(read, from + i * channels);
    _mm512_mask_storeu_epi16(to + i * kPixelChannels, written,
                             _mm512_maskz_permutexvar_epi16(valid, order, loaded));
  }
}

// Copies one padded input row of a band to the line `to` of each of its column phases, `plane` elements
// apart. `row`: null for a row of the padding.
inline void copy_band_line(const ConvolutionArgs& args, const BandLayout& band, const bfloat16* row,
                           bfloat16* to, int64_t plane) {
  const int64_t line = band.pitch * band.step, c = args.channels, s = args.stride_w;
  for (int64_t phase = 0; phase < band.column_phases; ++phase, to += plane) {
    // Position i of the line is column i * stride + phase - padding.
    const Range valid = valid_taps(phase - args.pad_w, band.pitch, s, args.width);
    if (row == nullptr) {
      clear_elements(to, line);
    } else if (packs_filter_rows(c, args.kernel_w, kTiles)) {
      const int64_t left = args.pad_w * kPixelChannels, n = min(args.width * kPixelChannels, line - left);
      clear_elements(to, min(left, line));
      if (n > 0) copy_and_pad_pixels(to + left, row, c, n / kPixelChannels);
      clear_elements(to + left + n, line - left - n);
    } else {
      clear_elements(to, valid.begin * c);
      const bfloat16* from = row + (valid.begin * s + phase - args.pad_w) * c;
      if (s == 1) {
        copy_elements(to + valid.begin * c, from, (valid.end - valid.begin) * c);
      } else {
        for (int64_t i = valid.begin; i < valid.end; ++i, from += s * c) copy_elements(to + i * c, from, c);
      }
      clear_elements(to + valid.end * c, (band.pitch - valid.end) * c);
    }
  }
}

// Copies the input rows, with their padding, of the output rows `rows` of one image. `to`: their first line
// in the first of the planes, which are `plane` elements apart.
inline void copy_band(const ConvolutionArgs& args, const BandLayout& band, int64_t image, Range rows,
                      bfloat16* to, int64_t plane) {
  const bfloat16* x = static_cast<const bfloat16*>(args.x) + image * args.height * args.width * args.channels;
  const int64_t lines = rows.end - rows.begin + band.halo;
  for (int64_t phase = 0; phase < band.row_phases; ++phase, to += band.column_phases * plane) {
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t y = (rows.begin + line) * args.stride_h + phase - args.pad_h;
      copy_band_line(args, band, y >= 0 && y < args.height ? x + y * args.width * args.channels : nullptr,
                     to + line * band.pitch * band.step, plane);
    }
  }
}

// Copies the bands of all images of these output rows.
inline void copy_bands(const ConvolutionArgs& args, const BandLayout& band, Range rows, bfloat16* to,
                       int64_t plane) {
  for_each_image(args, rows, [&](int64_t image, Range part) {
    copy_band(args, band, image, part, to, plane);
    to += (part.end - part.begin + band.halo) * band.pitch * band.step;
  });
  for (int64_t i = 0; i < band.row_phases * band.column_phases; ++i)
    clear_elements(to + i * plane, band.tail * band.step);
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
      clear_elements(to + k, padded_k(args, kTiles) - k);
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
    clear_elements(to + k, padded_k(args, kTiles) - k);
  }
}

// Consecutive rows of A. The first `valid` of every `pitch` rows are output pixels, in order, from `pixel`
// on.
struct Segment {
  const bfloat16* a;
  int64_t first;  // the index of the first of these rows in its plane
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

// A for the output pixels `rows`, counted through all images: the taps of its K loop, and its rows. With the
// operand kBand, `rows` are whole rows of the output.
class RowsOfA {
 public:
  // `memory`: for the copies of kBand and kIm2col, sized by the tasks.
  RowsOfA(const ConvolutionArgs& args, Range rows, bfloat16* memory)
      : args_(args), rows_(rows), operand_(select_operand(args, kTiles)), band_(args, kTiles) {
    a_ = operand_ == Operand::kInPlace ? static_cast<const bfloat16*>(args.x) + rows.begin * args.channels
                                       : memory;
    memory_ = memory;
    lda_ = operand_ == Operand::kInPlace ? args.channels
           : operand_ == Operand::kBand  ? band_.step
                                         : im2col_stride(args);
    positions_ = rows.end - rows.begin;
    if (operand_ == Operand::kBand) {
      int64_t lines = 0;
      for_each_image(args, rows, [&](int64_t, Range part) { lines += part.end - part.begin + band_.halo; });
      positions_ = lines * band_.pitch + band_.tail;
      taps_ = band_taps(args, band_, plane(), offsets_);
    } else {
      offsets_[0] = 0;
      taps_ = {1, padded_k(args, kTiles) / kBlockK, offsets_};
    }
  }
  RowsOfA(const RowsOfA&) = delete;

  bool in_place() const { return operand_ == Operand::kInPlace; }
  const TapLoop& taps() const { return taps_; }
  const bfloat16* data() const { return a_; }
  int64_t lda() const { return lda_; }
  // The positions, rows of A, of each plane; the elements of a plane; and the number of planes.
  int64_t positions() const { return positions_; }
  int64_t plane() const { return positions_ * lda_; }
  int64_t planes() const { return operand_ == Operand::kBand ? band_.row_phases * band_.column_phases : 1; }

  void copy() const {
    if (operand_ == Operand::kBand) copy_bands(args_, band_, rows_, memory_, plane());
    if (operand_ == Operand::kIm2col) im2col_bf16(args_, rows_, memory_);
  }

  // Calls f(segment) for every segment of these rows. whole_bands: a segment is all lines of an image's band,
  // with the padding between them; otherwise it is one line.
  template <class F>
  void for_each_segment(bool whole_bands, F f) const {
    const int64_t count = rows_.end - rows_.begin;
    if (operand_ == Operand::kInPlace) {
      const int64_t total = args_.images * args_.out_height * args_.out_width;
      return f(Segment{a_, 0, lda_, count, rows_.begin, count, count, total - rows_.end});
    }
    if (operand_ == Operand::kIm2col)
      return f(Segment{a_, 0, lda_, count, rows_.begin, count, count, kDotRows});
    int64_t first = 0;
    for_each_image(args_, rows_, [&](int64_t image, Range part) {
      const int64_t pixel = (image * args_.out_height + part.begin) * args_.out_width,
                    lines = part.end - part.begin, width = args_.out_width, pitch = band_.pitch;
      if (whole_bands) {
        f(Segment{a_ + first * lda_, first, lda_, (lines - 1) * pitch + width, pixel, pitch, width,
                  kDotRows});
      } else {
        for (int64_t line = 0; line < lines; ++line) {
          const int64_t row = first + line * pitch;
          f(Segment{a_ + row * lda_, row, lda_, width, pixel + line * width, width, width, kDotRows});
        }
      }
      first += (lines + band_.halo) * pitch;
    });
  }

 private:
  const ConvolutionArgs& args_;
  Range rows_;
  Operand operand_;
  BandLayout band_;
  const bfloat16* a_;
  bfloat16* memory_;
  int64_t lda_, positions_;
  int64_t offsets_[kMaxTaps];
  TapLoop taps_;
};

}  // namespace
}  // namespace fused_res::cpu
