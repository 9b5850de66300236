// The kernels of one instruction set, as a table of plain functions, and their argument structures. Included
// by the host side, which is compiled for the baseline, and by isa/kernels.cpp, which is compiled once per
// instruction set. It therefore includes no ATen and no STL: the linker might choose the AVX-512 version of
// their inline functions for the baseline code as well.
#pragma once

#include <stdint.h>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/layout.h"

namespace fused_res::cpu {

constexpr int kDtypes = 4;
constexpr int kLayouts = 2;

// The part of a tensor that one call processes. NHWC: channels [c0, c1) of rows [n0, n1), where a row is one
// pixel. NCHW: positions [s0, s1) in the planes of channels [c0, c1) of images [n0, n1).
struct Block {
  int64_t channels;  // channels of the tensor: the length of an NHWC row
  int64_t spatial;   // pixels per image of the tensor: the length of an NCHW plane
  int64_t n0, n1;
  int64_t c0, c1;
  int64_t s0, s1;
};

// In the comments, stats_t is the dtype of statistics: float, or double for float64 tensors. A "mask" has one
// bit per element, least significant bit first, with rows (NHWC) or planes (NCHW) padded to whole bytes.

struct NormArgs {    // normalized = fma(x - mean, scale, shift)
  const void* mean;  // stats_t[C] each
  const void* scale;
  const void* shift;
};

struct ForwardArgs {
  const void* x;
  const void* residual;  // or null
  NormArgs norm;
  NormArgs residual_norm;  // null pointers: the residual is added without normalization
  void* y;                 // may be x
  uint8_t* mask;           // or null
  Activation activation;   // with a residual or a mask kRelu or kIdentity
  double negative_slope;   // of a leaky ReLU
  bool stream;             // use streaming stores for y; the caller guarantees aligned rows
};

struct NormBackwardArgs {  // one norm; training: dx = scale * dy + slope * (x - mean) + offset
  const void* x;
  NormArgs norm;
  const void* slope;   // stats_t[C], or null: dx = scale * dy
  const void* offset;  // stats_t[C]
  void* dx;            // or null
};

struct BackwardArgs {
  const void* dy;
  const uint8_t* mask;        // of the ReLU, or null; takes precedence over `activation`
  NormBackwardArgs norms[2];  // the norm of x and, in a pair, the norm of the residual
  void* dresidual;            // or null; gradient of a residual without a norm
  Activation activation;      // recompute act'(z), if `mask` is null; kIdentity in a pair
  double negative_slope;      // of a leaky ReLU
  bool stream;
};

struct AffineArgs {    // the affine parameters of one norm, converted to stats_t
  const void* weight;  // stats_t[C], or null
  const void* bias;    // stats_t[C], or null
  double eps;
};

struct FinalizeBackwardArgs {
  const void* stats;  // stats_t[5][C]
  void* slope;        // the outputs: stats_t[C] each, or null
  void* offset;
  void* dweight;
  void* dbias;
};

// The rows of a stats tensor.
enum StatsRow {
  kMean,
  kInvstd,
  kScale,  // weight * invstd
  kShift,  // bias, compensated for the rounding of the mean
  kVar,    // unbiased variance, for the running statistics; without batch statistics the running variance
  kStatsRows
};

// Batch norm + residual add + activation. Partial statistics are doubles: forward (mean, M2)[C]; backward sum
// dy[C], and sum dy * (x - mean)[C] for every norm. Backward kernels: [0] for one norm, [1] for a pair, that
// is two norms joined by the residual add.
struct BatchNormActKernels {
  void (*moments)(const Block&, const void* x, double* partial);
  void (*forward)(const Block&, const ForwardArgs&);
  void (*reduce[2])(const Block&, const BackwardArgs&, double* partial);
  void (*backward[2])(const Block&, const BackwardArgs&);
};

struct PoolArgs {
  int64_t images, channels, height, width;  // input shape
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const void* x;      // forward: input; backward: gradient of the output
  const void* mean;   // stats_t[C]
  const void* scale;  // stats_t[C], or null: x is pooled without normalization
  const void* shift;  // stats_t[C]
  bool relu;
  void* y;  // forward: output; backward: gradient of the input
  // Index within the window, in the shape of the output. Null: no indices are computed; NHWC forward without
  // a norm only.
  uint8_t* indices;
};

struct MaxPoolKernels {
  // Compute rows [begin, end) of the tensor that is written; a row is (image, y) in NHWC, (plane, y) in NCHW.
  void (*forward)(const PoolArgs&, int64_t begin, int64_t end);
  void (*backward)(const PoolArgs&, int64_t begin, int64_t end);
};

constexpr int64_t kPooledChannels = 512;  // channels of a task of global average pooling

// --- convolutions of float32 images in channels_last memory, with packed weights ---

constexpr int kPanelWidth = 32;  // output channels of a packed panel of the weight
constexpr int kBlockK = 32;      // rows of a block of a weight that is packed for bfloat16 products

// An unpacked weight with arbitrary strides. With reversed taps and swapped channels it is the weight of the
// gradient with respect to the input (dgrad).
struct WeightView {
  const float* data;
  int64_t out_channels, channels, kernel_h, kernel_w;
  int64_t output_stride, channel_stride, row_stride, column_stride;
  int64_t stride;  // stride of the Winograd convolution to pack for
  bool stream;     // Winograd: write U with streaming stores
};

// Some taps of one dimension of a filter: first, first + step, ...
struct TapSubset {
  int64_t first, step, count;
};

// A weight to pack for products of bfloat16: [out_channels][kernel_h][kernel_w][channels].
struct Bf16WeightView {
  const void* data;
  Dtype dtype;  // float32, which is rounded, or bfloat16
  int64_t out_channels, channels, kernel_h, kernel_w;
  // Pack the weight of the gradient with respect to the input (dgrad), of which a phase of a strided
  // convolution reads these taps.
  bool transposed;
  TapSubset rows, columns;
};

struct ConvolutionArgs {
  int64_t images, channels, height, width;  // input shape
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Dtype dtype;  // of x, residual and y: float32, bfloat16 or float16
  const void* x;
  const void* packed;        // float, or bfloat16 with bf16_products
  const WeightView* weight;  // Winograd, staged: if not null, each task transforms the panels that it reads,
                             // and `packed` is not read
  const float* bias;         // [out_channels], or null
  const void* residual;      // like y, or null
  void* y;
  // Direct: output pixel (i, j) is written to (i * y_stride_h, j * y_stride_w) of images of y_height x
  // y_width pixels, from y on. 0: the output has out_height x out_width pixels.
  int64_t y_stride_h, y_stride_w, y_height, y_width;
  bool relu;
  bool stream;        // streaming stores: only where the channels of an output pixel fill aligned cache lines
                      // exactly
  int64_t tile;       // Winograd output tile size m, 2 to 4; 0: direct
  bool needs_im2col;  // direct: copy receptive fields into rows first, which 1x1 kernels may not need
  // Products of bfloat16 pairs, accumulated in fp32 (direct_bf16.h), instead of fp32 arithmetic.
  bool bf16_products;
  bool pixels_outer;    // bf16_products: compute each block of pixels for all panels, not each panel for all
                        // pixels
  bool operand_cached;  // bf16_products: the thread has read these rows of A already, for other panels; if
                        // they are copied, the scratch memory has them
};

struct Range {
  int64_t begin, end;
};

constexpr int64_t kPanelMomentsBytes = 64 * 7;  // three vectors of a panel, and a count

// Weight gradient: from the convolution's input `convolution.x` and the gradient `dz` of its output. Of
// `convolution`, also `tile`, `needs_im2col` and the geometry are used; its other pointers are not read.
struct WeightGradientArgs {
  ConvolutionArgs convolution;
  const void* dz;  // like convolution.x: float32, or bfloat16 with bf16_products
  bool pack_dz;    // direct: copy dz into panels; not needed if the output channels are a multiple of
                   // kPanelWidth
  float* dweight;
  int64_t output_stride, channel_stride, row_stride, column_stride;  // strides of dweight
  bool stream;  // bf16: write dweight with streaming stores; it and its strides are multiples of 64 bytes
};

// Every function computes an independent part of the result. A panel is kPanelWidth output channels.
// `moments`: partial statistics of the outputs written, double (mean, M2)[out_channels], or null.
struct DirectKernels {
  // packed[panel][kernel row][kernel column][channel][kPanelWidth]
  void (*pack)(const WeightView&, Range panels, void* packed);
  // Convolution for the output pixels `rows`, counted through all images. `scratch`: an im2col matrix of
  // these rows, if args.needs_im2col.
  void (*run)(const ConvolutionArgs&, Range rows, Range panels, void* scratch, double* moments);
};
struct WinogradKernels {
  // Filter transform: U = packed[panel][transform point][channel][kPanelWidth].
  void (*pack)(const WeightView&, Range panels, void* packed);
  // Input transform V, and the GEMMs M = V U with the output transform. Tiles are counted through all images.
  // `block`: the tiles that V and M are laid out for (tiles.h); `tiles`: the part of them to transform.
  void (*input_transform)(const ConvolutionArgs&, Range block, Range tiles, float* v);
  void (*gemm_output_transform)(const ConvolutionArgs&, Range block, Range panels, const float* v, float* m,
                                double* moments);
};
// Memory that is read next.
struct MemoryRange {
  const void* data;
  int64_t bytes;
};
constexpr int kMaxNextRanges = 3;

// Weight gradient: GEMMs whose K is a block of rows, which are output pixels (direct) or the rows of tiles at
// a transform point (Winograd). Both operands are packed first: `v`, the im2col matrix in blocks or the input
// transform, and `dz`, panels of the output gradient or of its transform.
struct WeightGradientKernels {
  // Pack the rows of `part`, a part of the output pixels or tiles `block` that v and dz are laid out for.
  // `copied`: scratch memory for kCopiedRows im2col rows.
  void (*pack_input)(const WeightGradientArgs&, Range block, Range part, float* copied, float* v);
  void (*pack_grad_output)(const WeightGradientArgs&, Range block, Range part, float* dz);
  // acc[panel][transform point][channel][kPanelWidth]. `overwrite`: acc = v^T dz, else acc += v^T dz. Direct:
  // one point, and `channel` is an element of the receptive field. `range`: Winograd: transform points;
  // direct: blocks of these elements (wgrad_row_block). `next`: kMaxNextRanges ranges to prefetch meanwhile.
  void (*gemm)(const WeightGradientArgs&, Range block, Range panels, Range range, const float* v,
               const float* dz, bool overwrite, float* acc, const MemoryRange* next);
  // Split-K reduction: adds the accumulators of `parts` parts, which are `stride` floats apart, transforms
  // them (Winograd) and stores dweight.
  void (*reduce_and_store)(const WeightGradientArgs&, Range panels, Range channels, const float* acc,
                           int64_t parts, int64_t stride);
};

// Weight gradient with products of bfloat16 (conv_wgrad_bf16.h), for chunks of output pixels `block`.
struct Bf16WeightGradientKernels {
  // `copied`: scratch memory for the copies of RowsOfA.
  void (*pack_input)(const WeightGradientArgs&, Range block, void* copied, void* transposed);
  void (*pack_grad_output)(const WeightGradientArgs&, Range block, void* packed);
  // acc[panel][tap][row][kPanelWidth] of these panels and blocks of kBlockK rows of a tap. `next`:
  // kMaxNextRanges ranges to prefetch meanwhile.
  void (*gemm)(const WeightGradientArgs&, Range block, Range panels, Range row_blocks, const void* transposed,
               const void* packed, bool overwrite, float* acc, const MemoryRange* next);
  // Split-K reduction of such accumulators of `parts` parts, which are `stride` floats apart; stores dweight.
  void (*reduce_and_store)(const WeightGradientArgs&, Range panels, Range row_blocks, const float* acc,
                           int64_t parts, int64_t stride);
};

// Convolutions in fp32 arithmetic.
struct ConvolutionKernels {
  // By the dtype of x, residual and y; empty for float64.
  DirectKernels direct[kDtypes];
  WinogradKernels winograd[kDtypes];
  WeightGradientKernels direct_wgrad, winograd_wgrad;
};

// Convolutions with bfloat16 operands, products of pairs of channels and fp32 accumulators.
struct Bf16ConvolutionKernels {
  // `packed`: packed_bf16_size() elements.
  void (*pack)(const Bf16WeightView&, Range panels, void* packed);
  // As DirectKernels::run; `scratch` is sized by DirectBf16Tasks. `panel_moments`: scratch memory of
  // kPanelMomentsBytes for each of the panels, if `moments` are requested.
  void (*run)(const ConvolutionArgs&, Range rows, Range panels, void* scratch, void* panel_moments,
              double* moments);
  Bf16WeightGradientKernels weight_gradient;
  bool tiles;  // whether the micro-kernels multiply matrix tiles
  // Of bfloat16, where the instruction set converts to it.
  BatchNormActKernels batch_norm_act[kLayouts];
  MaxPoolKernels max_pool[kLayouts];
  // Saturates the units that multiply and returns the number of floating-point operations. `values`:
  // kFmaValues floats, read and written.
  int64_t (*dot_loop)(int64_t rounds, float* values);
};

constexpr int kFmaValues = 14;  // 12 independent accumulators and their two shared operands

struct Kernels {
  const char* name;
  const ConvolutionKernels* convolution;           // null for the baseline: the kernels require AVX2
  const Bf16ConvolutionKernels* bf16_convolution;  // null without avx512_bf16 or amx
  BatchNormActKernels batch_norm_act[kDtypes][kLayouts];
  MaxPoolKernels max_pool[kDtypes][kLayouts];
  // Global average pooling of NHWC images: y[N][C]. A task is an image and kPooledChannels channels. Null for
  // float64.
  void (*global_average_pool[kDtypes])(const PoolArgs&, int64_t begin, int64_t end);
  // self += mask ? grad : 0, in rows of `cols` elements. A null mask adds all of grad.
  void (*add_masked[kDtypes])(void* self, const void* grad, const uint8_t* mask, int64_t begin, int64_t end,
                              int64_t cols);
  // Chan merge of partial statistics (mean, M2): a[2][C] = merge(a, b) for channels [c0, c1).
  void (*merge_partials)(double* a, const double* b, double count_a, double count_b, int64_t channels,
                         int64_t c0, int64_t c1);
  // a[rows][C] += b for channels [c0, c1)
  void (*add_partials)(double* a, const double* b, int64_t rows, int64_t channels, int64_t c0, int64_t c1);
  // stats_t[5][C] from the merged moments (mean, M2)[C]. [0]: float, [1]: double
  void (*finalize_stats[2])(void* stats, const double* moments, double count, const AffineArgs&,
                            int64_t channels, int64_t c0, int64_t c1);
  // From sum dy[C], sum dy * (x - mean)[C] and stats_t[5][C]: the backward coefficients slope[C] and
  // offset[C] of NormBackwardArgs, dweight[C] and dbias[C]. Outputs that are null are skipped.
  void (*finalize_backward[2])(const FinalizeBackwardArgs&, const double* sum_dy, const double* sum_dy_xmu,
                               double count, int64_t channels, int64_t c0, int64_t c1);
  // Saturates the FMA units and returns the number of floating-point operations. `values`: kFmaValues floats,
  // read and written.
  int64_t (*fma_loop)(int64_t rounds, float* values);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Bf16ConvolutionKernels bf16_kernels_avx512_bf16;
extern const Bf16ConvolutionKernels bf16_kernels_amx;
extern const Bf16ConvolutionKernels bf16_kernels_amx_emulated;
#endif

}  // namespace fused_res::cpu
