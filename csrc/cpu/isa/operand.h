// How the convolution with bfloat16 products (direct_bf16.h) reads its input as the matrix A. Included by the
// host side, for the size of the scratch memory, and by the kernels.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/tiles.h"

namespace fused_res::cpu {
namespace {

enum class Operand { kInPlace, kBand, kIm2col };

constexpr int64_t kMaxTaps = 64;  // filter taps of the operand kBand

// With tiles, images of up to kPixelChannels channels are copied to a band with kPixelChannels channels, so
// that the taps of a filter row are consecutive elements: one block of K, of which `kernel_w` pixels are
// multiplied.
constexpr int64_t kPixelChannels = 4;
inline bool packs_filter_rows(int64_t channels, int64_t kernel_w, bool tiles) {
  return tiles && channels <= kPixelChannels && kernel_w * kPixelChannels <= kBlockK;
}

// K, padded to whole blocks.
inline int64_t padded_k(int64_t channels, int64_t kernel_h, int64_t kernel_w, bool tiles) {
  if (packs_filter_rows(channels, kernel_w, tiles)) return kernel_h * kBlockK;
  return (channels * kernel_h * kernel_w + kBlockK - 1) / kBlockK * kBlockK;
}
inline int64_t padded_k(const ConvolutionArgs& args, bool tiles) {
  return padded_k(args.channels, args.kernel_h, args.kernel_w, tiles);
}
// The pitch of the rows of the im2col matrix has one cache line more, so that rows do not alias in one set of
// the L1.
inline int64_t im2col_stride(const ConvolutionArgs& args) { return padded_k(args, false) + kBlockK; }

// The layout of a band: the padded input rows of consecutive output rows. A strided filter reads the rows and
// columns of each residue modulo the stride (a phase) from a plane of their own. So every tap reads
// consecutive positions of one plane, one for each output pixel.
struct BandLayout {
  int64_t step;                       // elements of a position
  int64_t row_phases, column_phases;  // planes: row_phases * column_phases
  int64_t pitch;                      // positions of a line
  int64_t tail;                       // positions after the last line of a plane
  int64_t halo;                       // lines of a plane beyond the number of output rows

  BandLayout(const ConvolutionArgs& args, bool tiles) {
    const int64_t extent_h = (args.kernel_h - 1) * args.dilation_h,
                  extent_w = (args.kernel_w - 1) * args.dilation_w, s = args.stride_w;
    row_phases = args.stride_h < extent_h + 1 ? args.stride_h : extent_h + 1;
    halo = extent_h / args.stride_h;
    if (packs_filter_rows(args.channels, args.kernel_w, tiles)) {
      step = s * kPixelChannels, column_phases = 1;
      pitch = args.out_width + (args.kernel_w - 1 + s - 1) / s, tail = 0;
      return;
    }
    step = args.channels, column_phases = s < extent_w + 1 ? s : extent_w + 1;
    const int64_t positions = args.out_width + extent_w / s;
    // The positions after the image on the right may be those at the start of the next line, which are zero:
    // `shared` of them, in the last plane that has so many positions.
    const int64_t shared = (args.pad_w - extent_w % s + s - 1) / s;
    pitch = positions;
    while (pitch > args.out_width && positions - pitch < shared && (pitch - 1) * s >= args.width + args.pad_w)
      --pitch;
    tail = positions - pitch;
  }

  // Elements of a plane with this number of lines, and of all planes.
  int64_t plane(int64_t lines) const { return (lines * pitch + tail) * step; }
  int64_t size(int64_t lines) const { return row_phases * column_phases * plane(lines); }
};

// True if every output pixel reads one input pixel, in order.
inline bool is_pointwise(const ConvolutionArgs& args) {
  return args.kernel_h * args.kernel_w * args.stride_h * args.stride_w == 1 && args.pad_h + args.pad_w == 0;
}

// `tiles`: whether the micro-kernel multiplies tiles, whose rows must be equally spaced.
inline Operand select_operand(const ConvolutionArgs& args, bool tiles) {
  if (packs_filter_rows(args.channels, args.kernel_w, tiles)) return Operand::kBand;
  if (args.channels % 32 != 0) return Operand::kIm2col;
  if (args.kernel_h * args.kernel_w == 1) {
    if (!is_pointwise(args)) return Operand::kIm2col;
    // Rows that are a multiple of 4 KB apart would alias in one set of the L1.
    const bool aliases = args.channels % 2048 == 0, few = args.images * args.out_height * args.out_width < 32;
    return aliases || few ? Operand::kIm2col : Operand::kInPlace;
  }
  const bool narrow = !tiles && args.out_width < 12;
  return narrow || args.kernel_h * args.kernel_w > kMaxTaps ? Operand::kIm2col : Operand::kBand;
}

// The taps [begin, end) of one dimension that read within the image when tap 0 reads at `position`.
inline Range valid_taps(int64_t position, int64_t taps, int64_t dilation, int64_t size) {
  const int64_t begin = position < 0 ? (-position + dilation - 1) / dilation : 0;
  const int64_t end = position < size ? (size - 1 - position) / dilation + 1 : 0;
  const int64_t first = begin < taps ? begin : taps, last = end < taps ? end : taps;
  return {first, last < first ? first : last};
}

// Calls f(image, output rows) for the parts of the output pixels `rows`, which are whole rows, by image.
template <class F>
inline void for_each_image(const ConvolutionArgs& args, Range rows, F f) {
  int64_t line = rows.begin / args.out_width;
  const int64_t end = rows.end / args.out_width;
  while (line < end) {
    const int64_t image = line / args.out_height, last = (image + 1) * args.out_height;
    const int64_t stop = last < end ? last : end;
    f(image, Range{line - image * args.out_height, stop - image * args.out_height});
    line = stop;
  }
}

// The input pixels that the output pixels `rows` read, counted through all images, and those that the copy of
// a band reads with them: the last lines of all row phases.
inline Range input_pixels(const ConvolutionArgs& args, Range rows) {
  if (is_pointwise(args)) return rows;
  const int64_t extent = (args.kernel_h - 1) * args.dilation_h, s = args.stride_h;
  const int64_t last_row = extent / s * s + (s < extent + 1 ? s : extent + 1) - 1;
  const auto input_row = [&](int64_t line, int64_t offset) {
    const int64_t y = line % args.out_height * s - args.pad_h + offset;
    return line / args.out_height * args.height + (y < 0 ? 0 : y < args.height ? y : args.height - 1);
  };
  const int64_t first = input_row(rows.begin / args.out_width, 0),
                last = input_row((rows.end - 1) / args.out_width, last_row);
  return {first * args.width, (last + 1) * args.width};
}

// Elements of the copies (RowsOfA) of the operand of a chunk of `rows` output pixels.
inline int64_t copied_elements(const ConvolutionArgs& args, bool tiles, int64_t rows) {
  constexpr int64_t kSurplusRows = 32;  // of a last tile
  const Operand operand = select_operand(args, tiles);
  if (operand == Operand::kInPlace) return 0;
  if (operand == Operand::kIm2col) return (rows + kSurplusRows) * im2col_stride(args);
  const BandLayout band(args, tiles);
  const int64_t lines = rows / args.out_width, spanned = (lines - 1) / args.out_height + 2,
                images = spanned < args.images ? spanned : args.images;
  return band.size(lines + images * band.halo) + kSurplusRows * band.step + kBlockK;
}

// --- weight gradient (conv_wgrad_bf16.h) ---

// The pitch of the rows of A^T, for this number of positions: the last block of K may read past them. An odd
// number of cache lines, so that rows do not alias in one set of the L1.
inline int64_t wgrad_pitch(int64_t positions) {
  const int64_t lines = (positions + 2 * kBlockK - 2) / kBlockK;
  return (lines | 1) * kBlockK;
}
// The rows of A^T that a tap multiplies, in whole blocks.
inline int64_t wgrad_tap_rows(const ConvolutionArgs& args, bool tiles) {
  if (packs_filter_rows(args.channels, args.kernel_w, tiles)) return kBlockK;
  return select_operand(args, tiles) == Operand::kBand ? args.channels : padded_k(args, tiles);
}
// The blocks of K of the output pixels `rows`, with those of a band in each image.
inline int64_t wgrad_blocks(const ConvolutionArgs& args, bool tiles, Range rows) {
  const auto blocks = [](int64_t n) { return (n + kBlockK - 1) / kBlockK; };
  if (select_operand(args, tiles) != Operand::kBand) return blocks(rows.end - rows.begin);
  const int64_t pitch = BandLayout(args, tiles).pitch;
  int64_t count = 0;
  for_each_image(args, rows, [&](int64_t, Range part) {
    count += blocks((part.end - part.begin - 1) * pitch + args.out_width);
  });
  return count;
}

}  // namespace
}  // namespace fused_res::cpu
