// What the kernels of one instruction set offer, as a table of plain functions. Included by the host side,
// compiled for the baseline, and by isa/kernels.cpp, compiled once for each instruction set: so no ATen and
// no STL, whose inline functions would reach the linker in an AVX-512 version and then run everywhere.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/layout.h"

namespace fused_res::cpu {

constexpr int kDtypes = 4;
constexpr int kLayouts = 2;

// The part of a tensor that one call handles. NHWC: the channels [c0, c1) of the rows [n0, n1), a row being
// one pixel. NCHW: the positions [s0, s1) in the planes of the channels [c0, c1) of the images [n0, n1).
struct Block {
  int64_t channels;  // of the whole tensor: the length of an NHWC row
  int64_t spatial;   // of the whole tensor: the length of an NCHW plane
  int64_t n0, n1;
  int64_t c0, c1;
  int64_t s0, s1;
};

// "stats" in the comments: float, or double for float64 tensors. "mask": one bit an element, least
// significant first, rows (NHWC) or planes (NCHW) padded to whole bytes.

struct NormArgs {    // fma(x - mean, scale, shift)
  const void* mean;  // stats[C] each
  const void* scale;
  const void* shift;
};

struct ForwardArgs {
  const void* x;
  const void* residual;  // or null
  NormArgs norm;
  NormArgs residual_norm;  // of nulls: the residual is added as it is
  void* y;                 // may be x
  uint8_t* mask;           // or null
  bool relu;
  bool stream;  // write y past the caches; y is aligned for that
};

struct NormBackwardArgs {  // of one norm
  const void* x;
  NormArgs norm;
  const void* slope;   // stats[C], or null: dx = scale * dy
  const void* offset;  // stats[C]
  void* dx;            // or null
};

struct BackwardArgs {
  const void* dy;
  const uint8_t* mask;        // or null; goes before `relu`
  NormBackwardArgs norms[2];  // x's, and in a pair the residual's
  void* dresidual;            // or null; of a residual without a norm
  bool relu;                  // without a mask: recompute it; never in a pair
  bool stream;
};

struct ParamArgs {     // of one normalisation, converted to the stats dtype
  const void* weight;  // stats[C], or null
  const void* bias;    // stats[C], or null
  double eps;
};

struct GradientArgs {
  const void* stats;  // stats[5][C]
  void* slope;        // stats[C] each
  void* offset;
  void* dweight;
  void* dbias;
};

// The rows of a stats tensor.
enum StatsRow { kMean, kInvstd, kScale, kShift, kVar, kStatsRows };

// Partial results are doubles, (mean, M2)[C] of the forward statistics, of the backward ones sum dy[C] and
// sum dy * (x - mean)[C] for every norm. The latter's kernels are for one norm and for a pair.
struct BatchNormActKernels {
  void (*moments)(const Block&, const void* x, double* partial);
  void (*forward)(const Block&, const ForwardArgs&);
  void (*reduce[2])(const Block&, const BackwardArgs&, double* partial);
  void (*backward[2])(const Block&, const BackwardArgs&);
};

struct PoolArgs {
  int64_t images, channels, height, width;  // of the input
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const void* x;      // forward: input; backward: gradient of the output
  const void* mean;   // stats[C]
  const void* scale;  // stats[C], or null: x is pooled as it is
  const void* shift;  // stats[C]
  bool relu;
  void* y;  // forward: output; backward: gradient of the input
  uint8_t*
      indices;  // of the output's shape: position in the window; null (forward NHWC without a norm): unwanted
};

struct MaxPoolKernels {
  // The rows [begin, end) of what is written: (image, y) in NHWC, (plane, y) in NCHW.
  void (*forward)(const PoolArgs&, int64_t begin, int64_t end);
  void (*backward)(const PoolArgs&, int64_t begin, int64_t end);
};

// --- convolutions of float32 images in channels_last memory; weights are packed first ---

constexpr int kPanelOutputs = 32;  // outputs whose weights lie together

struct Weight {  // any strides: flipped taps and swapped channels make it that of the gradient
  const float* data;
  int64_t outputs, channels, taps_h, taps_w;
  int64_t output_stride, channel_stride, row_stride, column_stride;
  int64_t stride;  // of a Winograd convolution
};

struct ConvolutionArgs {
  int64_t images, channels, height, width;  // of the input
  int64_t outputs, out_height, out_width;
  int64_t taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  const float* x;
  const float* packed;
  const float* bias;      // [outputs], or null
  const float* residual;  // like y, or null
  float* y;
  bool relu;
  bool stream;   // write past the caches: only where pixels are whole, aligned lines of memory
  int64_t tile;  // Winograd's, 2 to 4 outputs a side; 0: direct
  bool gather;   // direct: copy the pixels' windows into rows first, which 1x1 kernels may not need
};

struct Range {
  int64_t begin, end;
};

// Of the weight: what the convolution read, and the gradient of what it made. `tile`, `gather` and the sizes
// are those of the convolution; its other pointers are not read.
struct WeightGradientArgs {
  ConvolutionArgs convolution;
  const float* dz;
  bool pack_dz;  // direct: copy dz into panels, which whole ones in memory may not need
  float* dweight;
  int64_t output_stride, channel_stride, row_stride, column_stride;  // of dweight
};

// Every function computes a part of the whole by itself. Panels are kPanelOutputs outputs each. `moments`: of
// the outputs written, double (mean, M2)[outputs], or null.
struct DirectKernels {
  // packed[panel][tap row][tap column][channel][kPanelOutputs]
  void (*pack)(const Weight&, Range panels, float* packed);
  // The output pixels `rows`, counted through all images. Scratch: direct_scratch() floats.
  void (*run)(const ConvolutionArgs&, Range rows, Range panels, float* scratch, double* moments);
};
struct WinogradKernels {
  // packed[panel][pair of points][channel][kPanelOutputs]
  void (*pack)(const Weight&, Range panels, float* packed);
  // Tiles are counted through all images; `block` is what v has room for (tiles.h), `tiles` a part of it.
  void (*input)(const ConvolutionArgs&, Range block, Range tiles, float* v);
  void (*output)(const ConvolutionArgs&, Range block, Range panels, const float* v, float* products,
                 double* moments);
};
// The weight's gradient is a sum over rows: output pixels, or tiles for each pair of points. A block of rows
// becomes two factors, of `v` as many numbers a row as a window or a tile's input has channels, of `dz`
// panels of outputs.
struct WeightGradientKernels {
  // Rows of a block, by output pixels or tiles: `part` of what the factors have room for.
  void (*input)(const WeightGradientArgs&, Range block, Range part, float* v);
  void (*output)(const WeightGradientArgs&, Range block, Range part, float* dz);
  // sums[panel][pair of points][channel][kPanelOutputs] = or, unless `first`, += products of the factors
  void (*multiply)(const WeightGradientArgs&, Range block, Range panels, Range channels, const float* v,
                   const float* dz, bool first, float* sums);
  // dweight, from `parts` of sums that lie `stride` apart.
  void (*finish)(const WeightGradientArgs&, Range panels, Range channels, const float* sums, int64_t parts,
                 int64_t stride);
};

struct ConvolutionKernels {
  DirectKernels direct;
  WinogradKernels winograd;
  WeightGradientKernels direct_gradient, winograd_gradient;
};

constexpr int kFmaValues = 14;  // 12 chains and their two operands

struct Kernels {
  const char* name;
  const ConvolutionKernels* convolution;  // null: not worth it on this instruction set
  BatchNormActKernels batch_norm_act[kDtypes][kLayouts];
  MaxPoolKernels max_pool[kDtypes][kLayouts];
  // self += mask ? grad : 0, in rows of `cols` elements; mask or null
  void (*add_masked[kDtypes])(void* self, const void* grad, const uint8_t* mask, int64_t begin, int64_t end,
                              int64_t cols);
  // partial_a[2][C] = merge(partial_a, partial_b) for the channels [c0, c1)
  void (*merge)(double* a, const double* b, double count_a, double count_b, int64_t channels, int64_t c0,
                int64_t c1);
  // partial_a[rows][C] += partial_b
  void (*add)(double* a, const double* b, int64_t rows, int64_t channels, int64_t c0, int64_t c1);
  // stats[5][C] from merged moments. [0]: float, [1]: double
  void (*finish[2])(void* stats, const double* moments, double count, const ParamArgs&, int64_t channels,
                    int64_t c0, int64_t c1);
  // From sum dy[C], sum dy * (x - mean)[C] and stats[5][C]: slope[C] and offset[C] of NormBackwardArgs,
  // dweight[C], dbias[C]; each may be null.
  void (*finish_gradient[2])(const GradientArgs&, const double* sums, const double* products, double count,
                             int64_t channels, int64_t c0, int64_t c1);
  // Keeps the multiply-add units busy and returns the FLOP. `values`: kFmaValues floats, read and written.
  int64_t (*multiply_add)(int64_t rounds, float* values);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fused_res::cpu
