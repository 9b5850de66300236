// How the convolution with bfloat16 products (direct_bf16.h) reads its input as the matrix A. Included by the
// host side, for the size of the scratch memory, and by the kernels.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/tiles.h"

namespace fused_res::cpu {
namespace {

enum class Operand { kInPlace, kBand, kIm2col };

// K, padded to whole blocks, of the im2col matrix; the pitch of its rows has one cache line more, so that
// rows do not alias in one set of the L1.
inline int64_t padded_k(const ConvolutionArgs& args) {
  return (gemm_k(args) + kBlockK - 1) / kBlockK * kBlockK;
}
inline int64_t im2col_stride(const ConvolutionArgs& args) { return padded_k(args) + kBlockK; }

// The size in pixels of the band of input rows for `lines` output rows.
inline int64_t band_width(const ConvolutionArgs& args) {
  return args.out_width + (args.kernel_w - 1) * args.dilation_w;
}
inline int64_t band_height(const ConvolutionArgs& args, int64_t lines) {
  return lines + (args.kernel_h - 1) * args.dilation_h;
}

// `tiles`: whether the micro-kernel multiplies tiles, whose rows must be equally spaced.
inline Operand select_operand(const ConvolutionArgs& args, bool tiles) {
  // Rows that are a multiple of 4 KB apart would alias in one set of the L1.
  if (args.channels % 32 != 0 || args.stride_h != 1 || args.stride_w != 1) return Operand::kIm2col;
  if (args.kernel_h * args.kernel_w == 1 && args.pad_h + args.pad_w == 0) {
    const bool aliases = args.channels % 2048 == 0, few = args.images * args.out_height * args.out_width < 32;
    return aliases || few ? Operand::kIm2col : Operand::kInPlace;
  }
  // With tiles, a band computes band_width - out_width pixels more of every output row. im2col copies
  // kernel_h * kernel_w elements for each element of the input, which takes as long as about 16 output
  // channels.
  const bool wasteful =
      tiles && (band_width(args) - args.out_width) * args.out_channels > 16 * args.out_width;
  const bool narrow = !tiles && args.out_width < 12;
  return wasteful || narrow ? Operand::kIm2col : Operand::kBand;
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

}  // namespace
}  // namespace fused_res::cpu
