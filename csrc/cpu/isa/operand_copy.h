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

}  // namespace
}  // namespace fused_res::cpu
